"""Checkpoints: the state, the numbers of the loop and the config, in a folder for each step.

The newest and the best step are kept; during training also the step before the newest, as a
fallback. The step is the position in the data, so no position is saved. Orbax writes a step in a
temporary folder and renames it, so an unfinished step is never read as a checkpoint. Before the
rename it is sealed: seal.json has size and CRC-32 of each file. A step is saved before it is
validated, so an interrupted validation loses nothing; validations.json beside the steps has the
scores.
"""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lmn_jax.distributed import processes
from lmn_jax.errors import Preempted
from lmn_jax.files import seal
from lmn_jax.training import validations
from lmn_jax.training.compatibility import same_shapes
from lmn_jax.training.integrity import check_sound
from lmn_jax.training.program import State
from lmn_jax.training.step_folders import HALF, PREFIX, step_folder

METADATA = '_CHECKPOINT_METADATA'  # Orbax changes it when it renames the step, after the seal


class Restored(NamedTuple):
  """A restored checkpoint. loop: the numbers of the training loop, as saved."""

  step: int
  state: State
  loop: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, under `folder`. Use as a context manager, or call `close`.

  Attributes:
    scores: (step, score) of the validations, in the order of the steps.
  """

  def __init__(self, folder: str | Path):
    """Opens the folder, and creates it if it is missing.

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
        # Compression halves the bytes and doubles the time on the training's cores
        # (experiments/LOG.md).
        state=ocp.PyTreeCheckpointHandler(use_compression=False),
        loop=ocp.JsonCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
      ),
    )

  def latest(self) -> int | None:
    """Returns the newest step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the existing step with the best score; without scores the newest; None if none."""
    steps = set(self._manager.all_steps())
    best = validations.standing(x for x in self.scores if x[0] in steps).best_step
    return self.latest() if best is None else best

  def config(self, step: int) -> dict:
    """Returns the config of a step, with the fingerprint of its data as `store`."""
    return self._item(step, 'config')

  def _item(self, step: int, name: str) -> dict:
    items = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
    return dict(self._manager.restore(step, args=items)[name])

  def forget_after(self, step: int | None) -> None:
    """Forgets the scores of later steps, which will be trained again; None forgets all scores."""
    self.scores = [x for x in self.scores if step is not None and x[0] <= step]

  def validated(self, step: int, score: float) -> None:
    """Stores the validation score of a saved step."""
    self.scores.append((step, score))
    validations.write(self.folder, self.scores)

  def save(self, state: State, loop: dict, config: dict) -> None:
    """Begins to save a state; training continues while it is written.

    Args:
      state: its arrays are copied before this returns, so the caller may donate them.
      loop: JSON-able numbers of the loop. config: of the run and its data.

    Raises:
      OSError, ValueError: this save, or the one before, could not be written.
    """
    self._sweep()
    step = int(jax.device_get(state.step))
    if jax.default_backend() == 'cpu':
      # On CPU Orbax makes no copy and holds the arrays until they are written. They could not be
      # donated meanwhile, and the next step would copy all of them into new memory.
      self.wait()
      state = self._copy = _copied(self._copy, state)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state._asdict()),
      loop=ocp.args.JsonSave(loop),
      config=ocp.args.JsonSave(config),
    )
    # Orbax copies to the host in a way that the transfer guard counts as implicit.
    with jax.transfer_guard('allow'):
      self._manager.save(step, args=items)

  def _seal(self):
    """Seals the step that was just written, before it is renamed; on host 0."""
    for half in self.folder.glob(HALF):
      seal(half, but=(METADATA,))

  def _sweep(self):
    """Removes steps that a killed process left unfinished, once, before the first save.

    Orbax's own cleanup runs in a thread that a process does not wait for if it saves nothing; the
    thread would then print a traceback at the end of the process.
    """
    if not self._swept and jax.process_index() == 0:
      for half in self.folder.glob(HALF):
        shutil.rmtree(half)
    self._swept = True

  def restore(self, step: int, abstract: State) -> Restored:
    """Restores a step onto the mesh of `abstract`, which may differ from that of the save.

    Args:
      step: to restore. abstract: shapes, dtypes and shardings.

    Raises:
      UserError: the step is damaged.
    """
    check_sound(step_folder(self.folder, step))
    target = abstract._asdict()
    strict = same_shapes(f'{self.folder} step {step}', self._saved_shapes(step), abstract)
    how = ocp.checkpoint_utils.construct_restore_args(target, strict=strict)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(target, restore_args=how), loop=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return Restored(step, State(**restored['state']), restored['loop'])

  def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays of a step, by dotted name."""
    saved = self._manager.item_metadata(step)['state']
    leaves = (leaf for leaf in jax.tree.leaves(saved.tree) if hasattr(leaf, 'shape'))
    return {leaf.name: leaf.shape for leaf in leaves}

  def drop(self, step: int) -> None:
    """Removes a step and its score."""
    self.wait()
    self.scores = [x for x in self.scores if x[0] != step]
    validations.write(self.folder, self.scores)
    self._manager.delete(step)

  def prune(self) -> None:
    """Removes all steps but the newest and the best."""
    self.wait()
    for step in self._manager.all_steps():
      if step not in (self.latest(), self.best()):
        self._manager.delete(step)

  def wait(self) -> None:
    """Waits until all saves are on disk.

    Raises:
      OSError, ValueError: it could not be written.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all saves are on disk, and closes the folder."""
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    # Closing waits for all hosts, on the devices. If one has failed, the others would wait for it
    # without end, or abort; so they are ended at once (distributed/failure.py).
    if error is None or isinstance(error, Preempted) or processes.count() == 1:
      self.close()


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copied(old_copy: State | None, state: State) -> State:
  """Returns a copy of a state, in the memory of an older copy if there is one."""
  del old_copy
  return jax.tree.map(jnp.copy, state)


class _KeepBest(preservation_policy.PreservationPolicy):
  """Keeps the step with the best score."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context):
    best = self._checkpoints.best()
    return [checkpoint.step == best for checkpoint in checkpoints]
