"""Whether a checkpoint belongs to an experiment: its config, its data, the shapes of its state."""

from pathlib import Path
from typing import Any

import jax

from lmn_jax.errors import UserError
from lmn_jax.training.program import State

# What may differ between a run and its continuation: nothing that changes an update.
FREE = (
  'steps', 'log_every', 'eval_every', 'save_every', 'patience', 'skip_not_finite',
  'eval_batch_size', 'buckets', 'sampled_negatives', 'metrics', 'mesh.model', 'data.memory_limit',
)  # fmt: skip
# What a run of an earlier version computed, whose config did not have the field yet.
LATER = {
  f'optimizer.{group}.{field}': value
  for group in ('dense', 'embedding', 'memory')
  for field, value in (('initial_accumulator', 0.0), ('arguments', {}))
} | {'metrics': [], 'criterion': '', 'model.loss': 'bce'}
# Fields of earlier versions that are gone: the value with which each had no effect, or None where
# it had none by itself. They were of training alone, so a run is read whatever they were.
REMOVED = {'model.revive': 0.0, 'model.revive_noise': None}


def check_same(workdir: Path, old: dict, new: dict, trains: bool = True) -> None:
  """Refuses to continue a run with a config, or on data, that would change what is computed.

  Args:
    workdir: for the message. old: config of the checkpoint, with `store`, the fingerprint of its
      data. new: the same of this run. trains: whether the run is continued, or only read.

  Raises:
    UserError: naming the first field that differs, both values, and how many differ.
  """
  before, after = LATER | _leaves(old), _leaves(new)
  for name, idle in REMOVED.items():
    if name not in after and (not trains or idle in (None, before.get(name))):
      before.pop(name, None)
  # Where a schedule ends depends on the steps.
  bound = ('steps',) if new['optimizer']['schedule'] != 'constant' else ()
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
  """Dotted name -> value; tuples as lists, as JSON gives them back. Arguments are one value."""
  if isinstance(tree, dict) and tree and not prefix.endswith('.arguments'):
    return {
      name: value
      for key, child in tree.items()
      for name, value in _leaves(child, f'{prefix}.{key}' if prefix else str(key)).items()
    }
  return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def same_shapes(where: str, saved: dict[str, tuple[int, ...]], abstract: State) -> bool:
  """Whether all arrays of a checkpoint have the shapes of `abstract`.

  Where not, it is the padding of tables, whose rows are a multiple of the devices: what lies
  behind the last id is cut off, or zeros are put there.

  Args:
    where: the checkpoint, for the message. saved: shapes by dotted name. abstract: what is wanted.

  Raises:
    UserError: any other shape differs, or a weight was not saved.
  """
  same = True
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name.startswith('params.') and name not in saved:
      raise UserError(
        f'{where} has no {name}: another version of this program wrote it; use that one, or train '
        'anew with another --workdir'
      )
    before = saved.get(name, leaf.shape)
    if before != leaf.shape:
      same = False
      if not name.startswith('tables.') or before[1:] != leaf.shape[1:]:
        raise UserError(
          f'{where}: {name} has the shape {before} and this program makes {leaf.shape}: another '
          'version of it wrote that; use that one, or another --workdir'
        )
  return same
