"""Checkpoints: state, data position, the loop's own numbers and the config, in one step folder.

The newest and the best step are kept; while training goes on also the one before the newest, to
fall back on. Orbax writes a step beside its place and renames it, so a half-written one is never
taken for a checkpoint; before that it is sealed: seal.json has size and CRC-32 of each file. A step
is saved first and validated then, so that nothing is lost with a validation that is cut; what the
validations found stands in validations.json beside the steps.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lmn_jax.distributed import processes
from lmn_jax.errors import Preempted, UserError
from lmn_jax.files import flaw, seal, write_json
from lmn_jax.training.update import State, parts_of

log = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes an update.
FREE = (
  'steps', 'log_every', 'eval_every', 'save_every', 'patience', 'skip_not_finite',
  'eval_batch_size', 'buckets', 'sampled_negatives', 'mesh.model', 'data.memory_limit',
)  # fmt: skip
# What a run of an earlier version computed, whose config did not have the field yet.
LATER = {
  f'optimizer.{group}.initial_accumulator': 0.0 for group in ('dense', 'embedding', 'memory')
}
PREFIX = 'step_'
VALIDATIONS = 'validations.json'
HALF = f'{PREFIX}*.orbax-checkpoint-tmp*'
METADATA = '_CHECKPOINT_METADATA'  # Orbax adds to it when it renames the step
# What a disk may refuse with while it is written to, and how TensorStore, in C++, says so.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
SAYS = tuple(map(os.strerror, DISK))
ASIDE = 'spoilt'  # beside the checkpoints: what does not fit its seal any more


@jax.jit
def finite(state: State) -> dict[str, Any]:
  """Which parts of a state are finite, by name; a state that is not all so is not worth keeping."""
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state))


class Restored(NamedTuple):
  """A checkpoint read back. loop: the numbers of the training loop, as they were saved."""

  step: int
  state: State
  loop: dict[str, Any]


class Standing(NamedTuple):
  """What validations have come to.

  best, best_step: the highest score and its step, of equals the earliest; None without validation.
  waited: validations since then.
  """

  best: float | None = None
  best_step: int | None = None
  waited: int = 0


def standing(scores: Iterable[tuple[int, float]]) -> Standing:
  """Where a run stands after validations, (step, score) in the order of the steps."""
  found = Standing()
  for step, score in scores:
    if found.best is None or score > found.best:
      found = Standing(score, step)
    else:
      found = found._replace(waited=found.waited + 1)
  return found


def steps_of(folder: Path) -> list[int]:
  """The steps that have a folder, ascending."""
  names = (path.name.removeprefix(PREFIX) for path in folder.glob(f'{PREFIX}*'))
  return sorted(int(name) for name in names if name.isdecimal())


def last_kept(folder: Path) -> str:
  """In words, for a run that ends: which checkpoint it has."""
  steps = steps_of(folder)
  return f'the last good checkpoint is step {steps[-1]}' if steps else 'no checkpoint was kept'


def set_aside(folder: Path) -> None:
  """Puts the newest steps that are spoilt out of the way, until one is sound; says so.

  Args:
    folder: of the checkpoints, `workdir/checkpoints`; the spoilt go to `workdir/spoilt`.

  Raises:
    UserError: there are steps, and all are spoilt: to begin anew is not for us to decide.
  """
  if processes.index() == 0:
    spoilt = []
    for step in reversed(steps_of(folder)):
      own = folder / f'{PREFIX}{step}'
      found = flaw(own)
      if not found:
        break
      spoilt.append((own, found))
    else:
      if spoilt:
        own, found = spoilt[0]
        raise UserError(
          f'{own} is spoilt: {found}; no other checkpoint is sound, so the run cannot go on: bring '
          f'{folder} back from a copy, or delete it to begin anew'
        )
    for own, found in spoilt:
      place = folder.parent / ASIDE / own.name
      place.parent.mkdir(exist_ok=True)
      shutil.rmtree(place, ignore_errors=True)
      own.rename(place)
      log.warning('checkpoint %s is spoilt: %s; it is now %s', own, found, place)
  processes.wait('sound')


@contextlib.contextmanager
def told_of_disk(folder: Path) -> Iterator[None]:
  """Within, a disk that takes no more is the user's to mend: what Orbax raises is made one line.

  Raises:
    UserError: of a full, a read-only or a broken disk.
  """
  try:
    yield
  except Exception as error:
    said = ' '.join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    found = os.strerror(code) if code in DISK else next((x for x in SAYS if x in said), '')
    if not found:
      raise
    raise UserError(
      f'{folder}: {found}; {last_kept(folder)}. Make room, or see to the disk; the same command '
      'goes on'
    ) from error


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
    self.scores = _read_scores(self.folder / VALIDATIONS)
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
    best = standing((step, score) for step, score in self.scores if step in kept).best_step
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
    write_json(self.folder / VALIDATIONS, self.scores)

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
      UserError: it is spoilt, or worker processes read the data and the hosts are not as many as
        before.
    """
    self._check(step)
    wanted, strict = abstract._asdict(), self._is_alike(step, abstract)
    how = ocp.checkpoint_utils.construct_restore_args(wanted, strict=strict)
    items = dict(
      state=ocp.args.PyTreeRestore(wanted, restore_args=how), loop=ocp.args.JsonRestore()
    )
    if data is not None:
      # Each host has its own file.
      before = len(list((self.folder / f'{PREFIX}{step}' / 'data').glob('process_*.json')))
      if before == jax.process_count():
        items['data'] = grain.checkpoint.CheckpointRestore(data)
      elif 'next_index' in data.get_state():
        data.set_state({'next_index': step})  # without workers the step is the position
      else:
        raise UserError(
          f'{self.folder} step {step} was written by {before} hosts whose workers read the data, '
          f'now there are {jax.process_count()}; go on with {before}, or use another --workdir and '
          '--config.loader_workers=0'
        )
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return Restored(step, State(**restored['state']), restored['loop'])

  def _is_alike(self, step: int, abstract: State) -> bool:
    """Whether all arrays of a step have the shapes of `abstract`.

    Where not, it is the padding of tables, whose rows are a multiple of the devices: what lies
    behind the last id is cut off, or zeros are put there.

    Raises:
      UserError: any other shape differs, or a weight was not saved.
    """
    told = self._manager.item_metadata(step)['state']
    saved = {leaf.name: leaf.shape for leaf in jax.tree.leaves(told.tree) if hasattr(leaf, 'shape')}
    alike = True
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      if name.startswith('params.') and name not in saved:
        raise UserError(
          f'{self.folder} step {step} has no {name}: another version of this program wrote it; use '
          'that one, or train anew with another --workdir'
        )
      before = saved.get(name, leaf.shape)
      if before != leaf.shape:
        alike = False
        if not name.startswith('tables.') or before[1:] != leaf.shape[1:]:
          raise UserError(
            f'{self.folder} step {step}: {name} has the shape {before} and this program makes '
            f'{leaf.shape}: another version of it wrote that; use that one, or another --workdir'
          )
    return alike

  def _check(self, step: int):
    """Refuses a step that is spoilt; host 0 looks, for all."""
    if processes.index() == 0:
      own = self.folder / f'{PREFIX}{step}'
      found = flaw(own)
      if found:
        raise UserError(
          f'{own} is spoilt: {found}; bring it back from a copy, or delete that folder: the best '
          'of the checkpoints that are left is then used'
        )
    processes.wait('checked')

  def drop(self, step: int) -> None:
    """Removes a step, and what its validation found."""
    self.wait()
    self.scores = [x for x in self.scores if x[0] != step]
    write_json(self.folder / VALIDATIONS, self.scores)
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


def _read_scores(path: Path) -> list[tuple[int, float]]:
  try:
    return [(int(step), float(score)) for step, score in json.loads(path.read_text())]
  except FileNotFoundError:
    return []
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{path} is damaged ({error}); delete it: what earlier validations found is then forgotten, '
      'and the newest step is validated again'
    ) from None


def check_same(workdir: Path, old: dict, new: dict) -> None:
  """Refuses to continue a run with a config, or on data, that would change what is computed.

  Args:
    workdir: for the message. old: config of the checkpoint, with `store`, the fingerprint of its
      data. new: the same of this run.

  Raises:
    UserError: naming the first field that differs, both values, and how many differ.
  """
  before, after = LATER | _leaves(old), _leaves(new)
  # Where a schedule ends depends on the steps; keys are revived after each validation.
  bound = {'steps'} if new['optimizer']['schedule'] != 'constant' else set()
  bound |= {'eval_every'} if new['model'].get('revive') else set()
  may = [name for name in FREE if name not in bound]
  free = tuple(f'{name}.' for name in may)
  if before['store'] == after['store']:
    free += ('data.',)  # other words for the same data, such as a log that was moved
  changed = [
    name
    for name in sorted(before.keys() | after.keys())
    if before.get(name) != after.get(name) and not f'{name}.'.startswith(free)
  ]
  if changed == ['store']:
    raise UserError(
      f'{workdir} was trained on another content of the store (fingerprint {before["store"][:12]}, '
      f'now {after["store"][:12]}): the log changed under the same config; use another --workdir, '
      'or delete this one'
    )
  if changed:
    name, *rest = [name for name in changed if name != 'store']
    more = f' (and {len(rest)} more)' if rest else ''
    raise UserError(
      f'{workdir} holds another experiment: config.{name} was {_shown(before, name)} and is '
      f'{_shown(after, name)}{more}; use another --workdir, or delete this one. What may change '
      f'when a run goes on: {", ".join(may)}'
    )


def _shown(leaves, name):
  return repr(leaves[name]) if name in leaves else 'absent'


def _leaves(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Dotted name -> value; tuples as lists, as JSON gives them back."""
  if isinstance(tree, dict) and tree:
    return {
      name: value
      for key, child in tree.items()
      for name, value in _leaves(child, f'{prefix}.{key}' if prefix else str(key)).items()
    }
  return {prefix: list(tree) if isinstance(tree, tuple) else tree}
