"""Checks that a checkpoint belongs to an experiment: its config, its data, its shapes."""

from pathlib import Path
from typing import Any

import jax

from lmn_jax import files
from lmn_jax.errors import UserError
from lmn_jax.training.program import State

# Fields that may differ between a run and its continuation: none changes an update.
FREE = (
  'steps', 'log_every', 'eval_every', 'save_every', 'patience', 'skip_not_finite',
  'eval_batch_size', 'buckets', 'sampled_negatives', 'metrics', 'mesh.model', 'data.memory_limit',
  'loader_workers', 'store_on', 'steps_per_dispatch',
)  # fmt: skip
# Fields that configs of earlier versions do not have -> the value that those versions used.
LATER = {
  f'optimizer.{group}.{field}': value
  for group in ('dense', 'embedding', 'memory')
  for field, value in (('initial_accumulator', 0.0), ('arguments', {}))
} | {
  'metrics': [], 'criterion': '', 'targets_per_request': 1, 'stale_events': 0,
  'train_length': 'full', 'train_length_mean': 0.5, 'history_lengths': {}, 'data.histories': {},
  'data.event_features': [], 'data.weight': '', 'data.labels': [], 'data.label_kind': 'click',
  'model.loss': 'bce', 'model.gamma': 2.0, 'model.ranking': 0.5, 'model.delta': 1.0,
  'model.label_head': 'shared', 'model.tower': [], 'model.experts': 4, 'model.label_experts': 1,
  'model.expert_levels': 1, 'model.label_weights': [], 'model.time': 'none',
  'model.event_width': 0, 'model.tuned': [], 'data.cold_items': False, 'model.id_dropout': 0.0,
  'model.item_fields': False,
}  # fmt: skip
# Removed fields of earlier versions -> the value that had no effect; None: no value had an effect
# by itself. They concern training alone, so a run is read whatever their values are.
REMOVED = {'model.revive': 0.0, 'model.revive_noise': None}


def check_same(workdir: Path, old: dict, new: dict, trains: bool = True) -> None:
  """Checks that a config and its data compute the same as those of a checkpoint.

  Args:
    workdir: for the message.
    old: config of the checkpoint, with the fingerprint of its data as `store`.
    new: the same of this command. trains: whether the run continues, or is only read.

  Raises:
    UserError: a field differs; it names the first, both values, and how many differ.
  """
  before, after = _flatten(old | {'data': current_data(old['data'])}), _flatten(new)
  # A model has only some of the fields.
  before = {name: value for name, value in LATER.items() if name in after} | before
  for name, no_effect in REMOVED.items():
    if name not in after and (not trains or no_effect in (None, before.get(name))):
      before.pop(name, None)
  # The end of a schedule depends on the steps.
  fixed = ('steps',) if new['optimizer']['schedule'] != 'constant' else ()
  may_change = [name for name in FREE if name not in fixed]
  free = tuple(f'{name}.' for name in may_change)
  if before['store'] == after['store']:
    free += ('data.',)  # the same data under another config, such as that of a moved log
  changed = [
    name
    for name in sorted(before.keys() | after.keys())
    if before.get(name) != after.get(name) and not f'{name}.'.startswith(free)
  ]
  if changed == ['store']:
    raise UserError(
      f'{workdir} was trained on other data (fingerprint {before["store"][:12]}, now '
      f'{after["store"][:12]}): the log changed under the same config; use another --workdir, or '
      'delete this one'
    )
  if changed:
    name, *rest = [name for name in changed if name != 'store']
    more = f' (and {len(rest)} more)' if rest else ''
    raise UserError(
      f'{workdir} holds another experiment: config.{name} was {_text(before, name)} and is '
      f'{_text(after, name)}{more}; use another --workdir, or delete this one. Fields that may '
      f'change when a run continues: {", ".join(may_change)}'
    )


def current_data(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns a section `data` of any version without `bins`, which are in `numeric` today."""
  current = {}
  for name, value in fields.items():
    if name == 'bins':
      current['numeric'] = {feature: f'bins:{count}' for feature, count in value.items()}
    else:
      current[name] = value
  return current


def _text(leaves, name):
  return repr(leaves[name]) if name in leaves else 'absent'


def _flatten(config: dict) -> dict[str, Any]:
  """Dotted name -> value; tuples as lists, as in JSON. Arguments of an optimizer are one value."""

  def children(tree, path):
    return tree if isinstance(tree, dict) and not path.endswith('.arguments') else None

  values = files.flatten(config, children)
  return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def same_shapes(where: str, saved: dict[str, tuple[int, ...]], abstract: State) -> bool:
  """Whether all arrays of a checkpoint have the shapes of `abstract`.

  If not, only the padding of tables differs, whose rows are a multiple of the devices: rows after
  the last id are then cut off, or added as zeros.

  Args:
    where: the checkpoint, for the message. saved: shapes by dotted name.
    abstract: the state to restore.

  Raises:
    UserError: any other shape differs, or a weight was not saved.
  """
  same = True
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name.startswith('params.') and name not in saved:
      raise UserError(
        f'{where} has no {name}: another version of lmn_jax wrote it; use that version, or train '
        'again with another --workdir'
      )
    before = saved.get(name, leaf.shape)
    if before != leaf.shape:
      same = False
      if not name.startswith('tables.') or before[1:] != leaf.shape[1:]:
        raise UserError(
          f'{where}: {name} has the shape {before}, and this version expects {leaf.shape}: another '
          'version of lmn_jax wrote it; use that version, or another --workdir'
        )
  return same
