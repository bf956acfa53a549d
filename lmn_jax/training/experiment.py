"""An experiment: what a config and a store make together, and the run in which it was trained."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from lmn_jax import config as configs
from lmn_jax import files
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.evaluation import report, scored_rows
from lmn_jax.evaluation.criterion import criterion_of
from lmn_jax.files import write_json
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.models.base import Model
from lmn_jax.tables import optimizers
from lmn_jax.training import checkpoint, program
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.compatibility import check_same
from lmn_jax.training.program import State
from lmn_jax.training.tasks import TASKS, Task
from lmn_jax.training.trainer import Trainer, compile_program

EVALUATION, CHECKPOINTS = 'evaluation.json', 'checkpoints'
LOCK = '.lock'  # in a workdir: one command at a time uses a run


class Experiment(NamedTuple):
  """What a config and a store make together. sources: batches by split, the training's endless."""

  task: Task
  mesh: Mesh
  model: Model
  sources: dict[str, Any]
  trainer: Trainer


@contextlib.contextmanager
def only_command(workdir: Path) -> Iterator[None]:
  """Holds the lock of a run, so that one command at a time uses it.

  The hosts of one command share the run: the first of them holds the lock.

  Raises:
    UserError: another command uses the run.
  """
  if processes.index() > 0:
    yield
    return
  with files.locked(workdir / LOCK):
    yield


def check(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
  """Refuses what is wrong with a config whatever the data are, before they are prepared.

  Args:
    config: the whole experiment. devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: naming the field, its value and the bound.
  """
  configs.check(config)
  TASKS[config.task].check(config)
  # How many ids there are is in the data; what the items' features are called is not.
  features = tuple(f'item.{name}' for name in config.data.item_features)
  registry.build(config.model.to_dict(), Schema((), item=features), config.task)
  for group in ('dense', 'embedding', 'memory'):
    optimizers.make(config.optimizer, group, config.steps)
    if group != 'dense':
      optimizers.row_type(config.optimizer, group)
  criterion_of(config, TASKS[config.task].columns(config))
  data = meshes.make_mesh(config.mesh.model, devices).shape['data']
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] % data:
      below = config[name] // data * data
      near = [str(size) for size in (below, below + data) if size]
      raise UserError(
        f'config.{name}={config[name]} is not divisible by the {data} devices of the data axis; '
        f'use {" or ".join(near)}'
      )


def set_up(
  config: ml_collections.ConfigDict, store: Store, devices: Sequence[jax.Device] | None = None
) -> Experiment:
  """Builds mesh, model, batches and functions of an experiment; nothing is trained yet.

  Args:
    config: the whole experiment. store: its data.
    devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: for a value out of its bounds, or a validation split that cannot choose.
  """
  check(config, devices)
  task, mesh = TASKS[config.task], meshes.make_mesh(config.mesh.model, devices)
  schema = Schema(tuple(store.vocabulary.items()), **store.features)
  model = registry.build(config.model.to_dict(), schema, config.task)
  sources = task.sources(config, store, mesh)
  shapes = {
    name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
    for name, x in sources['train'][0].items()
  }
  if config.patience and 'valid' not in sources:
    raise UserError(
      f'config.patience={config.patience} waits for a better validation, and nothing validates; '
      'set it to 0, or hold out config.data.split.valid'
    )
  trainer = compile_program(program.make(config, model, shapes, mesh))
  return Experiment(task, mesh, model, sources, trainer)


def identity_of(config: ml_collections.ConfigDict, store: Store) -> dict[str, Any]:
  """What a checkpoint belongs to: the config, and as `store` the content of the data."""
  return config.to_dict() | {'store': store.fingerprint}


def check_trained(workdir: Path) -> None:
  """Refuses a folder in which nothing was trained.

  Raises:
    UserError: it has no folder of checkpoints.
  """
  if not (workdir / CHECKPOINTS).is_dir():
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')


def best_of(
  config: ml_collections.ConfigDict, workdir: Path, store: Store
) -> tuple[Experiment, checkpoint.Restored]:
  """The experiment of a run with its best checkpoint.

  Raises:
    UserError: if there is no checkpoint, or it is of another experiment.
  """
  check_trained(workdir)
  exp = set_up(config, store)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    step = checkpoints.best()
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
    check_same(workdir, checkpoints.config(step), identity_of(config, store), trains=False)
    return exp, checkpoints.restore(step, exp.trainer.abstract)


def score_held_out(exp: Experiment, state: State) -> dict[str, np.ndarray]:
  """The scores of the splits that are held out, by split; on every host."""
  return {
    split: exp.task.score(exp.trainer, state, exp.model, source, exp.mesh)
    for split, source in exp.sources.items()
    if split != 'train'
  }


def make_report(
  config: ml_collections.ConfigDict,
  store: Store,
  exp: Experiment,
  best: checkpoint.Restored,
  scores: dict[str, np.ndarray],
) -> dict:
  """The report on a checkpoint: the splits that are held out, scored with its weights."""
  return {
    'step': best.step,
    **report.origin(config, store),
    'protocol': '; '.join(filter(None, (store.protocol, exp.task.protocol(config)))),
    **{
      split: exp.task.report(config, store, exp.sources, split, found)
      for split, found in scores.items()
    },
    'baselines': {split: exp.task.baselines(config, store, exp.sources, split) for split in scores},
    'columns': exp.task.columns(config),
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(exp.trainer.abstract.params)),
    'tables': {name: [spec.rows, spec.width] for name, spec in exp.model.tables().items()},
  }


def evaluate_split(
  config: ml_collections.ConfigDict, store: Store, exp: Experiment, state: State, split: str
) -> dict:
  """The metrics of a split, overall and by length of history, with these weights."""
  scores = exp.task.score(exp.trainer, state, exp.model, exp.sources[split], exp.mesh)
  return exp.task.report(config, store, exp.sources, split, scores)


def evaluate_best(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, output: Path | None = None
) -> dict:
  """Reports again on the best checkpoint of a run, without training.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data.
    output: a file for the score of each row of the test, see scored_rows.py; None for none.

  Returns:
    The report, also written to `workdir/evaluation.json`.

  Raises:
    UserError: if there is no checkpoint, or it is of another experiment, or in use; no test, or an
      output that cannot be written.
  """
  check_trained(workdir)
  with only_command(workdir):
    exp, best = best_of(config, workdir, store)
    if output and 'test' not in exp.sources:
      raise UserError(f'--output={output}: nothing is held out for the test, so it has no row')
    scores = score_held_out(exp, best.state)
    found = make_report(config, store, exp, best, scores)
    if output and jax.process_index() == 0:
      rows = exp.task.rows(store, exp.sources, 'test', scores['test'])
      scored_rows.write(config.data, store, 'test', rows, output)
    write_json(workdir / EVALUATION, found)
    return found
