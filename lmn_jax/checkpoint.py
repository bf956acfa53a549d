"""Checkpoints: state, data position, the loop's own numbers and the config, in one step folder.

The newest and the best step are kept. Orbax writes a step beside its place and renames it, so a
half-written one is never taken for a checkpoint.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lmn_jax.errors import UserError
from lmn_jax.update import State

# What may differ between a run and its continuation: nothing that changes an update.
FREE = (
  'steps', 'log_every', 'eval_every', 'save_every', 'patience', 'eval_batch_size', 'buckets',
  'sampled_negatives', 'mesh.model', 'data.memory_limit',
)  # fmt: skip


@jax.jit
def finite(state: State) -> jax.Array:
  """Whether all numbers of a state are finite: bool scalar. Others are not worth keeping."""
  leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


class Restored(NamedTuple):
  """A checkpoint read back. loop: the numbers of the training loop, as they were saved."""

  step: int
  state: State
  loop: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, under `folder`. Use as a context manager, or call `close`."""

  def __init__(self, folder: str | Path):
    self.folder = Path(folder)
    self._swept = False

    def by_score(metrics):
      # Of equal scores the earliest step is the best, as in the training loop; without validation
      # the newest.
      return metrics['score'], -metrics['step'] if metrics['score'] >= 0 else metrics['step']

    policies = [
      preservation_policy.LatestN(1),
      preservation_policy.BestN(n=1, get_metric_fn=by_score),
    ]
    options = ocp.CheckpointManagerOptions(
      best_fn=by_score,
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
      step_prefix='step',
    )
    self._manager = ocp.CheckpointManager(
      Path(folder).absolute(),
      options=options,
      item_handlers=dict(
        state=ocp.StandardCheckpointHandler(),
        data=grain.checkpoint.CheckpointHandler(),
        loop=ocp.JsonCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
      ),
    )

  def latest(self) -> int | None:
    """The newest step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step with the best validation score; the newest if none was validated; None if none."""
    return self._manager.best_step()

  def config(self, step: int) -> dict:
    """The config a step was trained with, and under `store` the fingerprint of its data."""
    return self._item(step, 'config')

  def _item(self, step: int, name: str) -> dict:
    items = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
    return dict(self._manager.restore(step, args=items)[name])

  def save(self, state: State, data: Any, loop: dict, config: dict, score: float | None) -> None:
    """Begins to save the state's step; training goes on while it is written.

    Args:
      state: what is saved; its arrays are copied before this returns, so they may be donated.
      data: the Grain iterator, for its position. loop: JSON-able numbers of the loop.
      config: of the run and its data. score: of the validation at this very step, or None.
    """
    self._sweep()
    step = int(state.step)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      data=grain.checkpoint.CheckpointSave(data),
      loop=ocp.args.JsonSave(loop),
      config=ocp.args.JsonSave(config),
    )
    # A step without validation is never the best: any score is above -1.
    metrics = {'score': -1.0 if score is None else score, 'step': step}
    self._manager.save(step, args=items, metrics=metrics)

  def _sweep(self):
    """Removes what a killed process left half-written, once, before the first save.

    Orbax's own sweep runs in a thread from the start, for which a process that saves nothing does
    not wait: its end would print that thread's traceback.
    """
    if not self._swept and jax.process_index() == 0:
      for half in self.folder.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(half)
    self._swept = True

  def restore(self, step: int, abstract: State, data: Any = None) -> Restored:
    """Reads a step back, onto whatever mesh `abstract` lies on.

    Args:
      step: which. abstract: shapes, dtypes and shardings. data: the iterator to set, if any.

    Raises:
      UserError: if worker processes read the data and the hosts are not as many as before.
    """
    items = dict(state=ocp.args.StandardRestore(abstract._asdict()), loop=ocp.args.JsonRestore())
    if data is not None:
      # Each host has its own file.
      before = len(list((self.folder / f'step_{step}' / 'data').glob('process_*.json')))
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

  def wait(self) -> None:
    """Returns when everything begun is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and closes."""
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def check_same(workdir: Path, old: dict, new: dict) -> None:
  """Refuses to continue a run with a config, or on data, that would change what is computed.

  Args:
    workdir: for the message. old: config of the checkpoint, with `store`, the fingerprint of its
      data. new: the same of this run.

  Raises:
    UserError: naming the first field that differs, both values, and how many differ.
  """
  before, after = _leaves(old), _leaves(new)
  # Where a schedule ends depends on the steps; keys are revived after each validation.
  bound = {'steps'} if new['optimizer']['schedule'] != 'constant' else set()
  bound |= {'eval_every'} if new['model'].get('revive') else set()
  free = tuple(f'{name}.' for name in FREE if name not in bound)
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
      f'{_shown(after, name)}{more}; use another --workdir, or delete this one'
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
