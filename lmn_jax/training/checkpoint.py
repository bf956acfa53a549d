"""Checkpoints: state, data position, the loop's own numbers and the config, in one step folder.

The newest and the best step are kept; while training goes on also the one before the newest, to
fall back on. Orbax writes a step beside its place and renames it, so a half-written one is never
taken for a checkpoint; before that it is sealed: seal.json has size and CRC-32 of each file. A step
is saved first and validated then, so that nothing is lost with a validation that is cut; what the
validations found stands in validations.json beside the steps.
"""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lmn_jax.distributed import processes
from lmn_jax.errors import Preempted, UserError
from lmn_jax.files import seal
from lmn_jax.training import validations
from lmn_jax.training.compatibility import same_shapes
from lmn_jax.training.integrity import check_sound
from lmn_jax.training.program import State
from lmn_jax.training.step_folders import HALF, PREFIX, step_folder

METADATA = '_CHECKPOINT_METADATA'  # Orbax adds to it when it renames the step


class Restored(NamedTuple):
  """A checkpoint read back. loop: the numbers of the training loop, as they were saved."""

  step: int
  state: State
  loop: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, under `folder`. Use as a context manager, or call `close`.

  Attributes:
    scores: (step, score) of the validations, in the order of the steps.
  """

  def __init__(self, folder: str | Path):
    """Opens the folder; makes it where it is missing.

    Raises:
      UserError: its validations.json is damaged.
    """
    self.folder = Path(folder)
    self._swept = False
    self._copy: State | None = None
    self.scores = validations.read(self.folder)
    keep = [preservation_policy.LatestN(2), _KeepBest(self)]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
      step_prefix=PREFIX.removesuffix('_'),
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._manager = ocp.CheckpointManager(
      Path(folder).absolute(),
      options=options,
      item_handlers=dict(
        # Compressed, half the bytes take the cores that train twice as long (experiments/LOG.md).
        state=ocp.PyTreeCheckpointHandler(use_compression=False),
        data=grain.checkpoint.CheckpointHandler(),
        loop=ocp.JsonCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
      ),
    )

  def latest(self) -> int | None:
    """The newest step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The kept step with the best validation score; without any the newest; None if none."""
    kept = set(self._manager.all_steps())
    best = validations.standing(x for x in self.scores if x[0] in kept).best_step
    return self.latest() if best is None else best

  def config(self, step: int) -> dict:
    """The config a step was trained with, and under `store` the fingerprint of its data."""
    return self._item(step, 'config')

  def _item(self, step: int, name: str) -> dict:
    items = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
    return dict(self._manager.restore(step, args=items)[name])

  def go_on_from(self, step: int | None) -> None:
    """Forgets the validations of later steps, which will come again; None forgets all."""
    self.scores = [x for x in self.scores if step is not None and x[0] <= step]

  def validated(self, step: int, score: float) -> None:
    """Notes what a validation of a saved step found."""
    self.scores.append((step, score))
    validations.write(self.folder, self.scores)

  def save(self, state: State, data: Any, loop: dict, config: dict) -> None:
    """Begins to save the state's step; training goes on while it is written.

    Args:
      state: what is saved; its arrays are copied before this returns, so they may be donated.
      data: the Grain iterator, for its position. loop: JSON-able numbers of the loop.
      config: of the run and its data.

    Raises:
      OSError, ValueError: the save before, or this one, could not be written.
    """
    self._sweep()
    step = int(jax.device_get(state.step))
    if jax.default_backend() == 'cpu':
      # There is no other memory to copy to, and Orbax writes the very arrays, which for so long
      # could not be donated: the next step would copy all of them, into new pages each time.
      self.wait()
      state = self._copy = _copied(self._copy, state)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state._asdict()),
      data=grain.checkpoint.CheckpointSave(data),
      loop=ocp.args.JsonSave(loop),
      config=ocp.args.JsonSave(config),
    )
    # Orbax copies to the host by ways that a guard against unmeant transfers takes for such.
    with jax.transfer_guard('allow'):
      self._manager.save(step, args=items)

  def _seal(self):
    """Of the step that was just written, before it is renamed to its place; on host 0."""
    for half in self.folder.glob(HALF):
      seal(half, but=(METADATA,))

  def _sweep(self):
    """Removes what a killed process left half-written, once, before the first save.

    Orbax's own sweep runs in a thread from the start, for which a process that saves nothing does
    not wait: its end would print that thread's traceback.
    """
    if not self._swept and jax.process_index() == 0:
      for half in self.folder.glob(HALF):
        shutil.rmtree(half)
    self._swept = True

  def restore(self, step: int, abstract: State, data: Any = None) -> Restored:
    """Reads a step back, onto whatever mesh `abstract` lies on.

    Args:
      step: which. abstract: shapes, dtypes and shardings. data: the iterator to set, if any.

    Raises:
      UserError: it is damaged, or worker processes read the data and the hosts are not as many as
        before.
    """
    check_sound(step_folder(self.folder, step))
    wanted = abstract._asdict()
    strict = same_shapes(f'{self.folder} step {step}', self._saved_shapes(step), abstract)
    how = ocp.checkpoint_utils.construct_restore_args(wanted, strict=strict)
    items = dict(
      state=ocp.args.PyTreeRestore(wanted, restore_args=how), loop=ocp.args.JsonRestore()
    )
    if data is not None:
      items |= self._position(step, data)
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return Restored(step, State(**restored['state']), restored['loop'])

  def _position(self, step: int, data: Any) -> dict[str, Any]:
    """The item that sets the data's position; none where as many batches as steps were read."""
    # Each host has its own file.
    before = len(list((step_folder(self.folder, step) / 'data').glob('process_*.json')))
    if before == jax.process_count():
      return {'data': grain.checkpoint.CheckpointRestore(data)}
    if 'next_index' not in data.get_state():  # workers read ahead, each from a position of its own
      raise UserError(
        f'{self.folder} step {step} was written by {before} hosts whose workers read the data, '
        f'now there are {jax.process_count()}; go on with {before}, or use another --workdir and '
        '--config.loader_workers=0'
      )
    data.set_state({'next_index': step})
    return {}

  def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a step, by dotted name."""
    saved = self._manager.item_metadata(step)['state']
    leaves = (leaf for leaf in jax.tree.leaves(saved.tree) if hasattr(leaf, 'shape'))
    return {leaf.name: leaf.shape for leaf in leaves}

  def drop(self, step: int) -> None:
    """Removes a step, and what its validation found."""
    self.wait()
    self.scores = [x for x in self.scores if x[0] != step]
    validations.write(self.folder, self.scores)
    self._manager.delete(step)

  def prune(self) -> None:
    """Removes what is neither the newest nor the best."""
    self.wait()
    for step in self._manager.all_steps():
      if step not in (self.latest(), self.best()):
        self._manager.delete(step)

  def wait(self) -> None:
    """Returns when everything begun is on disk.

    Raises:
      OSError, ValueError: it could not be written.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and closes."""
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    # Closing waits for all hosts, on the devices: where one has failed the others would wait for
    # it, or take its last message for an answer and abort. They are ended at once
    # (distributed/processes.py).
    if error is None or isinstance(error, Preempted) or processes.count() == 1:
      self.close()


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copied(into: State | None, state: State) -> State:
  """A copy of a state, in the place of an older copy if there is one."""
  del into
  return jax.tree.map(jnp.copy, state)


class _KeepBest(preservation_policy.PreservationPolicy):
  """Keeps the best of the validated steps."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context):
    best = self._checkpoints.best()
    return [one.step == best for one in checkpoints]
