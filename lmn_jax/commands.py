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
from lmn_jax.distributed import discovery, joining, processes
from lmn_jax.errors import UserError
from lmn_jax.serving import settings

if TYPE_CHECKING:
  from lmn_jax.experiment import Experiment


class Job(NamedTuple):
  """What a command works on.

  config: the whole experiment, None without --config. workdir: folder of the run. stores: folder of
  the history stores. flags: of the command line.
  """

  config: ml_collections.ConfigDict | None
  workdir: Path
  stores: Path
  flags: flags.FlagValues

  def experiment(self) -> 'Experiment':
    """What a program in Python would call."""
    from lmn_jax.experiment import Experiment

    return Experiment(self.config, workdir=self.workdir, stores=self.stores)


class Command(NamedTuple):
  """What one value of --mode does.

  check: joins the hosts and refuses what is wrong whatever the data are (UserError). run: does the
  work and returns the text to print. flags: refused with a mode that does not name them.
  """

  check: Callable[[Job], None]
  run: Callable[[Job], str]
  flags: tuple[str, ...] = ()


def _train(job: Job) -> str:
  from lmn_jax.training import loop

  experiment = job.experiment()
  return _report(experiment, experiment.train(), loop.REPORT)


def _evaluate(job: Job) -> str:
  from lmn_jax.training import trained_run

  output = job.flags.output if job.flags['output'].present else None
  experiment = job.experiment()
  return _report(experiment, experiment.evaluate(output), trained_run.EVALUATION)


def _report(experiment: 'Experiment', metrics: dict, file: str) -> str:
  from lmn_jax.evaluation import report

  workdir = experiment.workdir
  paths = report.output_paths(workdir, workdir / file, experiment.store)
  return f'{report.table_of(metrics)}\n{paths}'


def _prepare(job: Job) -> str:
  from lmn_jax.data import counts

  store = job.experiment().prepare()
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


def _states(job: Job) -> str:
  from lmn_jax.inference import update_states

  return update_states.line_of(job.experiment().update_states(job.flags.events))


def _predict(job: Job) -> str:
  from lmn_jax.inference import predict

  flags = job.flags
  return predict.line_of(job.experiment().predict_file(flags.input, flags.output, flags.top_k))


def _check_embeddings(job: Job) -> None:
  _check_run(job)

  from lmn_jax.evaluation import part_files

  part_files.check_output(Path(job.flags.output), ('.parquet',))


def _embeddings(job: Job) -> str:
  from lmn_jax.data import frames

  table = job.experiment().embeddings(job.flags.table)
  frames.write(table, Path(job.flags.output))
  width = table.schema.field('vector').type.list_size
  return f'{job.flags.output}: {table.num_rows:,} vectors of {width} of the table {job.flags.table}'


def _export(job: Job) -> str:
  from lmn_jax.export import export

  return export.lines_of(job.experiment().export(job.flags.export or None, job.flags.precision))


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

  processes.check_alone(jax.process_count())
  job.experiment().check()
  processes.check_shared(job.workdir)


def _join(job: Job) -> None:
  """Joins the hosts, and refuses those that were started with other flags."""
  place = _place(job)

  from lmn_jax import config as configs
  from lmn_jax.data import prepare

  configs.check_names(job.config)
  joining.start(place)
  if processes.index() > 0:
    logging.getLogger('lmn_jax').setLevel(logging.WARNING)  # host 0 logs for all
  processes.agree(
    'config', {'mode': job.flags.mode, 'config': job.config.to_dict()}, prepare.differences,
    'start all hosts with the same flags and config file',
  )  # fmt: skip


def _place(job: Job) -> discovery.Place | None:
  """Which of the hosts this is, None for the only one; refuses a missing --config."""
  if job.config is None:
    raise UserError(f'--config is missing; for example {cli_errors.EXAMPLE}')
  return discovery.find(job.flags.coordinator, job.flags.processes, job.flags.process, os.environ)


COMMANDS = {
  'train': Command(_check_run, _train),
  'evaluate': Command(_check_run, _evaluate, ('output',)),
  'prepare': Command(_join, _prepare),
  'prune': Command(_check_prune, _prune, ('yes',)),
  'plan': Command(_check_plan, _plan, ('topology',)),
  'states': Command(_check_run, _states, ('events',)),
  'predict': Command(_check_run, _predict, ('input', 'output', 'top_k')),
  'embeddings': Command(_check_embeddings, _embeddings, ('table', 'output')),
  'export': Command(_check_run, _export, ('export', 'precision')),
  'serve': Command(_check_serve, _serve, ('export',)),
}
