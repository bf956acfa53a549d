"""The commands of the command line: a check and a function for each value of --mode.

`COMMANDS` is the table. Commands import modules when they run, so that mistakes on the command line
are reported before JAX is imported.
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
  """The arguments of a command.

  config: the config of the experiment, None without --config. workdir: folder of the run. stores:
  folder of the history stores. flags: all flags of the command line.
  """

  config: ml_collections.ConfigDict | None
  workdir: Path
  stores: Path
  flags: flags.FlagValues

  def experiment(self) -> 'Experiment':
    """Returns the Experiment whose methods do the work."""
    from lmn_jax.experiment import Experiment

    return Experiment(
      self.config, workdir=self.workdir, stores=self.stores,
      compilation_cache=self.flags.compilation_cache,
    )  # fmt: skip


class Command(NamedTuple):
  """A value of --mode.

  check: joins the hosts and checks the flags and the config without data (UserError). run: does the
  work and returns the text to print. flags: flags of this mode, refused with modes without them.
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
  """Accepts all flags; without a config, the stores of all logs are searched."""


def _prune(job: Job) -> str:
  from lmn_jax.training import prune

  # Folders that may contain runs: the parents of the stores and of --workdir.
  places = [job.stores.parent, *([job.workdir.parent] if job.flags.workdir else [])]
  name = job.config.data.name if job.config else ''
  return prune.prune(job.stores, [*dict.fromkeys(places)], name, job.flags.yes)


def _check_plan(job: Job) -> None:
  _place(job)  # only checks the flags: planning joins no hosts and uses no devices

  from lmn_jax import config as configs
  from lmn_jax.planning import slices
  from lmn_jax.training import setup as setups

  configs.check_names(job.config)
  setups.check(job.config, slices.slice_of(job.flags.topology))


def _plan(job: Job) -> str:
  import jax

  from lmn_jax.planning import plan, search
  from lmn_jax.training import run_store, writer

  # JAX stores programs of a slice in its compilation cache, and cannot load them.
  jax.config.update('jax_enable_compilation_cache', False)
  store = run_store.store_to_plan(job.config, job.workdir, job.stores)
  planned = plan.plan(job.config, store, job.flags.topology)
  writer.print_result(plan.text_of(planned))
  for line in search.search(planned) if job.flags.search else ():
    writer.print_result(line)
  return ''


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
  from lmn_jax import arguments
  from lmn_jax.serving import server

  flags = job.flags
  serve = flags.serve if 'serve' in flags else settings.settings()
  cache = arguments.cache_of(flags.compilation_cache, Path(flags.export).parent)
  server.serve(serve, flags.export, cache)
  return ''


def _check_run(job: Job) -> None:
  """Joins the hosts, and checks the config and that all hosts share the workdir."""
  _join(job)

  import jax

  from lmn_jax.distributed import mesh as meshes

  meshes.own_devices()  # the first use of devices
  processes.check_alone(jax.process_count())
  job.experiment().check()
  processes.check_shared(job.workdir)


def _join(job: Job) -> None:
  """Joins the hosts, and checks that all were started with the same flags."""
  place = _place(job)

  from lmn_jax import config as configs
  from lmn_jax.data import prepare

  configs.check_names(job.config)
  joining.start(place)
  if processes.index() > 0:
    logging.getLogger('lmn_jax').setLevel(logging.WARNING)  # only host 0 logs
  processes.agree(
    'config', {'mode': job.flags.mode, 'config': job.config.to_dict()}, prepare.differences,
    'start all hosts with the same flags and config file',
  )  # fmt: skip


def _place(job: Job) -> discovery.Place | None:
  """Returns the place of this process among the hosts, None for a single one; checks --config."""
  if job.config is None:
    raise UserError(f'--config is missing; for example {cli_errors.EXAMPLE}')
  return discovery.find(job.flags.coordinator, job.flags.processes, job.flags.process, os.environ)


COMMANDS = {
  'train': Command(_check_run, _train),
  'evaluate': Command(_check_run, _evaluate, ('output',)),
  'prepare': Command(_join, _prepare),
  'prune': Command(_check_prune, _prune, ('yes',)),
  'plan': Command(_check_plan, _plan, ('topology', 'search')),
  'states': Command(_check_run, _states, ('events',)),
  'predict': Command(_check_run, _predict, ('input', 'output', 'top_k')),
  'embeddings': Command(_check_embeddings, _embeddings, ('table', 'output')),
  'export': Command(_check_run, _export, ('export', 'precision')),
  'serve': Command(_check_serve, _serve, ('export',)),
}
