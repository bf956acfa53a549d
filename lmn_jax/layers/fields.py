"""The fields of a batch as vectors: users, items, contexts and the events of histories."""

import urllib.parse

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.data.named_histories import MAIN, of_history
from lmn_jax.layers.basic import Inputs, Read, Schema, repeat
from lmn_jax.layers.numeric import NumberField
from lmn_jax.layers.time_gaps import BUCKETS, bucket

CONSTANTS = 'constants'  # the variables of a module that are values of the store


def read_field(read: Read, table: str, ids: Int[Array, '...'], V: int, multi: bool) -> Array:
  """Reads the rows of one field; for a multi-valued field, the mean of its rows.

  Args:
    read: the reader passed to the model.
    table: name of the table.
    ids: [...], or [..., M] for a multi-valued field; padding is V.
    V: the number of ids, which is also the padding id.
    multi: whether the last axis of `ids` lists several values.

  Returns:
    [..., D].
  """
  rows = read(table, ids)
  if not multi:
    return rows
  count = jnp.sum(ids < V, axis=-1, keepdims=True).astype(rows.dtype)
  return jnp.sum(rows, axis=-2) / jnp.maximum(count, 1)


class _Features(nn.Module):
  """Fields and methods of modules that read features, each as a row of width D.

  Attributes:
    schema: the features. width: D. scale: standard deviation of initial rows. dtype: compute type.
    buckets: whether the bucket of the gap to the request is a field of an event.
  """

  schema: Schema
  width: int = 16
  scale: float = 0.05
  buckets: bool = False
  dtype: DTypeLike = jnp.float32

  def _modules(self, *kinds: str) -> dict[str, nn.Module]:
    """Returns the modules of the numbers and the vectors of some kinds, by key.

    A vector of any width becomes a row of width D by a matrix without a bias, so that one of zeros,
    which stands for a missing one, has no effect. [ours]

    It is called once, in a compact method.
    """

    def name(key):  # a slash in the name of a column would divide the path of a parameter
      return urllib.parse.quote(key, safe='')

    modules: dict[str, nn.Module] = {
      x.key: NumberField(x, self.width, self.scale, self.dtype, name=name(x.key))
      for x in self.schema.numbers
      if x.key.partition('.')[0] in kinds
    }
    return modules | {
      key: nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name(key))
      for key, _ in self.schema.vectors
      if key.partition('.')[0] in kinds
    }

  def _row(self, batch, read, modules, name, key, axes):
    """The rows of the feature or table `key` from the array `name`, which has `axes` axes."""
    if key in dict(self.schema.vectors):
      return modules[key](read(key, self._vector_ids(batch, name.partition('.')[0])))
    if key in modules:
      return modules[key](batch[name])
    V = dict(self.schema.vocabulary)[key]
    return read_field(read, key, batch[name], V, batch[name].ndim > axes)

  def _vector_ids(self, batch, entity):
    """The rows of the vectors of 'user', 'item' or 'history', in the tables of vectors."""
    if entity == 'user' or f'{entity}_index' not in batch:  # `user_index` is the record of the user
      return batch[entity]
    index, padding = batch[f'{entity}_index'], dict(self.schema.vocabulary)['item']
    return jnp.where(index == padding, self.schema.vector_rows('item'), index)


class EventFields(_Features):
  """What belongs to an event and not to its item, as a vector that is added to the item's.

      r = W [f_1 ; ... ; f_n ; t]        W without a bias; zeros on padding

  f are the rows of the event features, t a learned row for the bucket of the gap to the request
  (time_gaps.bucket), if `buckets`. A sum keeps events and targets, which have neither, in one
  space, so that no encoder depends on the number of event features. [ours]

  Attributes:
    output: width of r.
  """

  output: int = 16

  @property
  def exist(self) -> bool:
    """Whether there is any such field."""
    return self.buckets or bool(self.schema.fields('event'))

  @nn.compact
  def __call__(
    self, batch: dict[str, Array], read: Read, mask_BL: Bool[Array, 'B L']
  ) -> Float[Array, 'B L output']:
    """Returns r, in the compute type.

    Args:
      batch: with `event.f` and, if `buckets`, `time_gap` [B, L]. read: the reader passed to the
        model. mask_BL: True on real events.
    """
    modules, fields = self._modules('event'), self.schema.fields('event')
    rows = [self._row(batch, read, modules, key, key, mask_BL.ndim) for key in fields]
    if self.buckets:
      init = nn.initializers.normal(self.scale)
      rows_ND = self.param('time', init, (BUCKETS, self.width))
      rows.append(rows_ND[bucket(batch['time_gap'])])
    project = nn.Dense(self.output, use_bias=False, dtype=self.dtype, name='project')
    r_BLI = project(jnp.concatenate(rows, axis=-1))
    # On padding, numbers and gaps have rows, too.
    return jnp.where(mask_BL[:, :, None], r_BLI, 0)


class ItemFields(_Features):
  """Features of items, by id, as vectors that are added to the rows of the ids.

      c_i = W [f_1 ; ... ; f_n]        W without a bias; zeros for the padding

  f are the rows of the coded features (of a list their mean), the numbers and the vectors of item
  i. The codes and numbers are in the collection CONSTANTS: `words`, int32 [V + 1, words of an
  item], in the order of store_columns.item_features, numbers as the bits of float32.

  Attributes:
    output: width of c.
  """

  output: int = 16

  @nn.compact
  def __call__(self, ids: Int[Array, '...'], read: Read) -> Float[Array, '... output']:
    """Returns c, float32. ids: of items; V is the padding. read: the reader of the model."""
    V, modules = dict(self.schema.vocabulary)['item'], self._modules('item')
    batch = {'item': ids} | self._values(jnp.minimum(ids, V), V)
    fields = self.schema.fields('item')
    rows = [
      self._row(batch, read, modules, key, key, ids.ndim).astype(self.dtype) for key in fields
    ]
    project = nn.Dense(self.output, use_bias=False, dtype=self.dtype, name='project')
    c = project(jnp.concatenate(rows, axis=-1)).astype(jnp.float32)
    return jnp.where((ids < V)[..., None], c, 0)

  def _values(self, ids, V):
    """The codes and numbers of items by key: int32 [...] or [..., M], float32 [...]."""
    numbers = [x.key for x in self.schema.numbers if x.key.startswith('item.')]
    lists, values, begin = dict(self.schema.widths), {}, 0
    keys = (*self.schema.item, *numbers)
    if not keys:
      return {}
    shape = V + 1, sum(lists.get(key, 1) for key in keys)
    words = self.variable(CONSTANTS, 'words', jnp.zeros, shape, jnp.int32).value[ids]
    for key in keys:
      end = begin + lists.get(key, 1)
      values[key] = words[..., begin:end] if key in lists else words[..., begin]
      begin = end
    of_numbers = {key: jax.lax.bitcast_convert_type(values[key], jnp.float32) for key in numbers}
    return values | of_numbers


class Fields(_Features):
  """Embeds a batch of clicks; for coded features alone it has no parameters.

      e_i = E [i ; its coded features ; its numbers ; its vectors]            target items
      s_l = E [i_l ; its coded features ; its numbers ; its vectors] + r_l    events, r: EventFields

  E is the identity, or a matrix without a bias to the width `event_width`. [ours]

  Attributes:
    event_width: width of targets and events; 0 for D for each field of an item.
    histories: the named histories that are embedded in place of the main one; () embeds the main
      one.
  """

  event_width: int = 0
  histories: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, batch: dict[str, Array], read: Read) -> Inputs:
    """Reads every field of a batch and concatenates the rows of each entity.

    Args:
      batch: the arrays of `batches.py`: ids [B], histories [B, L], features `user.f`, `item.f`,
        `history.f`, `context.f`, `event.f`, and if they differ from the ids `item_index` and
        `history_index`, by which vectors are read. `item` and its features may be [B, Q],
        candidates of each user, which share his context; or labelled targets of a request, with
        labels [B, Q] or [B, Q, K], each with a context of its own. Numbers are float32, NaN where
        they are missing.
      read: the reader passed to the model.

    Returns:
      Inputs in the compute type.
    """
    schema, B = self.schema, batch['user'].shape[0]
    modules = self._modules('user', 'item', 'context')

    def entity(arrays, *fields, lead):
      """Concatenated rows of (array of the batch, feature) pairs: [*lead, D * len(fields)]."""
      rows = [self._row(arrays, read, modules, name, key, len(lead)) for name, key in fields]
      if not rows:
        return jnp.zeros((*lead, 0), self.dtype)
      return jnp.concatenate(rows, axis=-1).astype(self.dtype)

    target = [('item', 'item'), *((f, f) for f in schema.fields('item'))]
    event = [(name.replace('item', 'history', 1), key) for name, key in target]
    i_BQI = entity(batch, *target, lead=batch['item'].shape)
    i_BQI = i_BQI.reshape(B, -1, i_BQI.shape[-1])
    labelled = batch['item'].ndim == 2 and 'label' in batch and batch['label'].ndim > 1
    lead = batch['item'].shape if labelled else (B,)
    context = entity(batch, *[(f, f) for f in schema.fields('context')], lead=lead)
    user = ('user', 'user'), *((f, f) for f in schema.fields('user'))
    u_BU = entity(batch, *user, lead=(B,))
    views = {name: of_history(batch, name) for name in self.histories} or {MAIN: batch}
    histories = {}
    for name, view in views.items():
      s_BLI = entity(view, *event, lead=view['history'].shape)
      mask_BL = jnp.arange(s_BLI.shape[1])[None, :] < view['length'][:, None]
      histories[name] = s_BLI, mask_BL
    i_BQI, histories = self._with_events(i_BQI, histories, views, read)
    none = jnp.zeros((B, 0, i_BQI.shape[-1]), self.dtype), jnp.zeros((B, 0), bool)
    return Inputs(
      u_BU,
      i_BQI,
      context if labelled else repeat(context, i_BQI.shape[1]),
      *histories.pop(MAIN, none),
      batch['item'] < dict(schema.vocabulary)['item'] if labelled else None,
      histories,
    )

  def _with_events(self, i_BQI, histories, views, read):
    """Projects targets and events to `event_width`, and adds the fields of the events."""
    if any(number.key.startswith('item.') for number in self.schema.numbers):
      # A missing number has a row.
      histories = {
        name: (jnp.where(mask_BL[:, :, None], s_BLI, 0), mask_BL)
        for name, (s_BLI, mask_BL) in histories.items()
      }
    if self.event_width:
      project = nn.Dense(self.event_width, use_bias=False, dtype=self.dtype, name='item')
      i_BQI = project(i_BQI)
      histories = {name: (project(s_BLI), mask_BL) for name, (s_BLI, mask_BL) in histories.items()}
    events = EventFields(
      self.schema, self.width, self.scale, self.buckets, self.dtype, i_BQI.shape[-1], name='events'
    )
    if events.exist:
      histories = {
        name: (s_BLI + events(views[name], read, mask_BL), mask_BL)
        for name, (s_BLI, mask_BL) in histories.items()
      }
    return i_BQI, histories
