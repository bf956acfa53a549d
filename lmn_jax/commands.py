"""The commands: what each value of --mode checks, and what it does.

`COMMANDS` is the table. A command imports what it needs when it runs: a mistake on the command line
is answered before JAX is loaded.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_collections
from absl import flags

from lmn_jax import cli_errors
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.serving import settings

if TYPE_CHECKING:
  from lmn_jax.data.store import Store
  from lmn_jax.inference.predict import Request


class Job(NamedTuple):
  """What a command works on.

  config: the whole experiment, None without --config. workdir: folder of the run. stores: folder of
  the history stores. flags: of the command line.
  """

  config: ml_collections.ConfigDict | None
  workdir: Path
  stores: Path
  flags: flags.FlagValues


class Command(NamedTuple):
  """What one value of --mode does.

  check: joins the hosts and refuses what is wrong whatever the data are (UserError). run: does the
  work and returns the text to print. flags: refused with a mode that does not name them.
  """

  check: Callable[[Job], None]
  run: Callable[[Job], str]
  flags: tuple[str, ...] = ()


def _train(job: Job) -> str:
  from lmn_jax.training import loop, run_store

  store = _store(job, run_store.store_to_train)
  return _report(job, store, loop.train(job.config, job.workdir, store), loop.REPORT)


def _check_evaluate(job: Job) -> None:
  _check_run(job)

  from lmn_jax.evaluation import part_files

  if output := _output(job):
    part_files.check_output(output)


def _evaluate(job: Job) -> str:
  from lmn_jax.training import run_store, trained_run

  store = _store(job, run_store.store_to_read)
  found = trained_run.evaluate_best(job.config, job.workdir, store, _output(job))
  return _report(job, store, found, trained_run.EVALUATION)


def _output(job: Job) -> Path | None:
  """Of --mode=evaluate: where the scores of the test rows are written, None for nowhere."""
  return Path(job.flags.output) if job.flags['output'].present else None


def _report(job: Job, store: 'Store', found: dict, file: str) -> str:
  from lmn_jax.evaluation import report

  places = report.places_of(job.workdir, job.workdir / file, store)
  return f'{report.table_of(found)}\n{places}'


def _prepare(job: Job) -> str:
  from lmn_jax.data import counts, prepare

  store = _store(job, lambda config, _, stores: prepare.prepare(config.data, stores, repair=True))
  return f'{counts.table_of(store)}\nstore: {store.path}'


def _check_prune(job: Job) -> None:
  """Without a config the stores of every log are looked at; nothing can be wrong."""


def _prune(job: Job) -> str:
  from lmn_jax.training import prune

  # The folders that may hold runs: beside the stores, and beside the run that --workdir names.
  places = [job.stores.parent, *([job.workdir.parent] if job.flags.workdir else [])]
  name = job.config.data.name if job.config else ''
  return prune.prune(job.stores, [*dict.fromkeys(places)], name, job.flags.yes)


def _check_plan(job: Job) -> None:
  _place(job)  # for mistakes in its flags: no host is joined, no device of this machine is used

  from lmn_jax import config as configs
  from lmn_jax.planning import slices
  from lmn_jax.training import setup as setups

  configs.check_names(job.config)
  setups.check(job.config, slices.slice_of(job.flags.topology))


def _plan(job: Job) -> str:
  from lmn_jax.planning import plan
  from lmn_jax.training import run_store

  store = run_store.store_to_plan(job.config, job.workdir, job.stores)
  return plan.plan(job.config, store, job.flags.topology)


def _check_states(job: Job) -> None:
  _check_run(job)

  from lmn_jax.inference import state_table

  state_table.check(job.config)


def _states(job: Job) -> str:
  from lmn_jax.inference import state_table
  from lmn_jax.training import run_store

  store = _store(job, run_store.store_to_read)
  found = state_table.update_states(job.config, job.workdir, store, job.flags.events)
  return state_table.line_of(found)


def _check_predict(job: Job) -> None:
  _check_run(job)

  from lmn_jax.inference import predict

  predict.check(_request(job))


def _predict(job: Job) -> str:
  from lmn_jax.inference import predict
  from lmn_jax.training import run_store

  store = _store(job, run_store.store_to_read)
  return predict.line_of(predict.predict(job.config, job.workdir, store, _request(job)))


def _request(job: Job) -> 'Request':
  from lmn_jax.inference import predict

  return predict.Request(job.flags.input, Path(job.flags.output), job.flags.top_k)


def _export(job: Job) -> str:
  from lmn_jax.export import export
  from lmn_jax.training import run_store

  store = _store(job, run_store.store_to_read)
  to = Path(job.flags.export or job.workdir / 'export')
  found = export.export(job.config, job.workdir, store, to, job.flags.precision)
  return export.lines_of(found)


def _check_serve(job: Job) -> None:
  if job.flags['config'].present:
    raise UserError('--config is of a run, and --mode=serve takes --export=DIR')
  if not job.flags.export:
    raise UserError('--export is missing; for example --export=runs/lmn_douyin/export')


def _serve(job: Job) -> str:
  from lmn_jax.serving import server

  server.serve(job.flags.serve if 'serve' in job.flags else settings.settings(), job.flags.export)
  return ''


def _check_run(job: Job) -> None:
  """Joins the hosts, and refuses a config that cannot be trained."""
  _join(job)

  import jax

  from lmn_jax.training import setup as setups

  processes.check_alone(jax.process_count())
  setups.check(job.config)
  processes.check_shared(job.workdir)


def _join(job: Job) -> None:
  """Joins the hosts, and refuses those that were started with other flags."""
  place = _place(job)

  from lmn_jax import config as configs
  from lmn_jax.data import prepare

  configs.check_names(job.config)
  processes.start(place)
  if processes.index() > 0:
    logging.getLogger('lmn_jax').setLevel(logging.WARNING)  # host 0 logs for all
  processes.agree(
    'config', {'mode': job.flags.mode, 'config': job.config.to_dict()}, prepare.differences,
    'start all hosts with the same flags and config file',
  )  # fmt: skip


def _place(job: Job) -> processes.Place | None:
  """Which of the hosts this is, None for the only one; refuses a missing --config."""
  if job.config is None:
    raise UserError(f'--config is missing; for example {cli_errors.EXAMPLE}')
  return processes.find(job.flags.coordinator, job.flags.processes, job.flags.process, os.environ)


def _store(job: Job, find: Callable[[ml_collections.ConfigDict, Path, Path], 'Store']) -> 'Store':
  """The store of a command; refuses hosts that have different ones.

  Args:
    job: of the command. find: (config, workdir, stores) -> the store; called on host 0 first.
  """
  from lmn_jax.data import prepare

  store = processes.first_then_others(lambda: find(job.config, job.workdir, job.stores))
  processes.agree(
    'store', {'fingerprint': store.fingerprint}, prepare.differences,
    'give every host the same log, or --stores on a disk they share',
  )  # fmt: skip
  return store


COMMANDS = {
  'train': Command(_check_run, _train),
  'evaluate': Command(_check_evaluate, _evaluate, ('output',)),
  'prepare': Command(_join, _prepare),
  'prune': Command(_check_prune, _prune, ('yes',)),
  'plan': Command(_check_plan, _plan, ('topology',)),
  'states': Command(_check_states, _states, ('events',)),
  'predict': Command(_check_predict, _predict, ('input', 'output', 'top_k')),
  'export': Command(_check_run, _export, ('export', 'precision')),
  'serve': Command(_check_serve, _serve, ('export',)),
}
