"""A trained run: its lock, its best checkpoint, and the report on it."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from lmn_jax import files
from lmn_jax.data.store import Store
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.evaluation import report, scored_rows
from lmn_jax.files import write_json
from lmn_jax.training import checkpoint, feed
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.compatibility import check_same
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup, identity_of

EVALUATION, CHECKPOINTS = 'evaluation.json', 'checkpoints'
LOCK = '.lock'  # in a workdir; one command at a time uses a run


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


def check_trained(workdir: Path) -> None:
  """Checks that a folder holds a trained run.

  Raises:
    UserError: it has no folder of checkpoints.
  """
  if not (workdir / CHECKPOINTS).is_dir():
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')


def best_of(
  config: ml_collections.ConfigDict, workdir: Path, store: Store
) -> tuple[Setup, checkpoint.Restored]:
  """Returns the setup of a run, and its best checkpoint.

  Raises:
    UserError: there is no checkpoint, or it is of another experiment.
  """
  check_trained(workdir)
  setup = setups.set_up(config, store)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    step = checkpoints.best()
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
    check_same(workdir, checkpoints.config(step), identity_of(config, store), trains=False)
    return setup, checkpoints.restore(step, setup.trainer.abstract)


def score_split(setup: Setup, state: State, split: str) -> np.ndarray:
  """Returns the scores of a held-out split, on every host."""
  setup, state = fold_item_fields(setup, state)
  source, mesh = setup.sources[split], setup.mesh
  batches = feed.held_out(source, setup.residents.get(split), mesh)
  return setup.task.score(setup.trainer, state, setup.model, batches, source, mesh)


def score_held_out(setup: Setup, state: State) -> dict[str, np.ndarray]:
  """Returns the scores of the held-out splits, by split, on every host."""
  return {split: score_split(setup, state, split) for split in setup.sources if split != 'train'}


def make_report(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: Setup,
  best: checkpoint.Restored,
  scores: dict[str, np.ndarray],
) -> dict:
  """Returns the report on a checkpoint from the scores of the held-out splits."""
  notes = setup.task.notes(setup.sources)
  return {
    'step': best.step,
    **report.origin(config, store),
    'protocol': '; '.join(filter(None, (store.protocol, setup.task.protocol(config)))),
    **({'batches': notes} if notes else {}),
    **{
      split: setup.task.report(config, store, setup.sources, split, of_split)
      for split, of_split in scores.items()
    },
    'baselines': {
      split: setup.task.baselines(config, store, setup.sources, split) for split in scores
    },
    'columns': setup.task.columns(config),
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(setup.trainer.abstract.params)),
    'tables': {name: [spec.rows, spec.width] for name, spec in setup.model.tables().items()},
  }


def evaluate_split(
  config: ml_collections.ConfigDict, store: Store, setup: Setup, state: State, split: str
) -> dict:
  """Returns the metrics of a split, overall and by length of history, for a state."""
  scores = score_split(setup, state, split)
  return setup.task.report(config, store, setup.sources, split, scores)


def evaluate_best(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, output: Path | None = None
) -> dict:
  """Evaluates the best checkpoint of a run again, without training.

  Args:
    config: of a trained run. workdir: of the run. store: its data.
    output: file for the score of each test row, see scored_rows.py; None writes no file.

  Returns:
    The report, also written to `workdir/evaluation.json`.

  Raises:
    UserError: there is no checkpoint, it is of another experiment, or the run is in use; there is
      no test split for `output`, or it cannot be written.
  """
  check_trained(workdir)
  with only_command(workdir):
    setup, best = best_of(config, workdir, store)
    if output and 'test' not in setup.sources:
      raise UserError(
        f'--output={output} needs test rows, and no test split is held out; leave --output out, or '
        'hold out config.data.split.test'
      )
    scores = score_held_out(setup, best.state)
    metrics = make_report(config, store, setup, best, scores)
    if output and jax.process_index() == 0:
      rows = setup.task.rows(store, setup.sources, 'test', scores['test'])
      scored_rows.write(config.data, store, 'test', rows, output)
    write_json(workdir / EVALUATION, metrics)
    return metrics
