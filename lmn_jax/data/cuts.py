"""Cuts batches on the devices, from the columns of a store and the plan of a step.

A cut is called under jit, within `meshes.use_mesh`. It returns the global batch that the source
cuts on the host, bit for bit, sharded over `data`. Where columns are divided among devices, each
reads for the whole batch what its slice has, and 0 for the rest; the sum over the devices is exact,
as all values are integers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.sampling import Draws
from lmn_jax.data.store_columns import Fields, fields_of, width_of
from lmn_jax.distributed import mesh as meshes

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Slices:
  """How columns are divided among the devices of the axis `data`: the work of one device.

  Attributes:
    count: n, slices of a column and of the batch; with 1 nothing is communicated.
  """

  count: int

  def read(
    self, column: Int[Array, '_'], record: Int[Array, '...'], width: int = 1
  ) -> Int[Array, '... W']:
    """The values of records; 0 where another device has the record, or none has.

    Args:
      column: the device's slice.
      record: numbers over all slices.
      width: W, values of a record.
    """
    if self.count > 1:
      own = column.shape[0] // width
      record = record - jax.lax.axis_index('data') * own
      inside = (record >= 0) & (record < own)
    values = _elements(column, record[..., None] * width + _range(width, record.ndim + 1))
    return jnp.where(inside[..., None], values, 0) if self.count > 1 else values

  def items(self, column: Int[Array, '_'], event: Int[Array, 'B ...']) -> Int[Array, 'b ...']:
    """The items of events, for the rows of the batch that this device has.

    Those of events that the store does not have are any.
    """
    return self.own_total(self.read(column, event)[..., 0])

  def total(self, values: Array) -> Array:
    """The sum over the devices, on each of them."""
    return values if self.count == 1 else jax.lax.psum(values, 'data')

  def own_total(self, values: Shaped[Array, 'B ...']) -> Shaped[Array, 'b ...']:
    """The sum over the devices, of the rows b = B / n of the batch that this device has."""
    if self.count == 1:
      return values
    return jax.lax.psum_scatter(values, 'data', scatter_dimension=0, tiled=True)

  def own(self, values: Shaped[Array, 'B ...']) -> Shaped[Array, 'b ...']:
    """The rows of the batch that this device has."""
    if self.count == 1:
      return values
    rows = values.shape[0] // self.count
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index('data') * rows, rows)


def _range(size: int, ndim: int) -> Int[Array, '...']:
  """0, 1, ... along the last of `ndim` axes."""
  return jnp.arange(size, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (size,))


def _elements(column: Int[Array, '_'], index: Int[Array, '...']) -> Int[Array, '...']:
  """Elements of a column; the first or the last one for places outside.

  Single elements, as a TPU reads them in one operation: slices become a loop over the batch, and
  rows of a matrix a copy of it with rows of 128 elements. On a GPU there is no difference.
  """
  numbers = jax.lax.GatherDimensionNumbers(
    offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
  )
  return jax.lax.gather(column, index[..., None], numbers, (1,), mode='clip')


def _split(values: Int[Array, '... W'], fields: Fields) -> Batch:
  """The features of records, from their values side by side: [...] or [..., M] each."""
  columns, begin = {}, 0
  for name, width in fields:
    columns[name] = values[..., begin : begin + width] if width else values[..., begin]
    begin += max(1, width)
  return columns


def _per_device(cut: Any, columns: Batch, plan: Batch) -> Batch:
  """Runs a cut on every device. Columns named in `cut.everywhere` are on all devices."""
  sharded = {name: P() if name in cut.everywhere else meshes.BATCH for name in columns}
  return meshes.each_device(cut.share, (sharded, meshes.REPLICATED), meshes.BATCH)(columns, plan)


@dataclasses.dataclass(frozen=True)
class ClickCut:
  """Cuts the batches of a BatchSource.

  Attributes:
    length: L, history positions of a plan without `place`. padding: V. slices: of the columns.
    targets: Q, the most of a request. vocabulary: (feature, V_f) of the context.
    user, item, context: features of each kind.
  """

  length: int
  padding: int
  slices: Slices
  targets: int
  vocabulary: tuple[tuple[str, int], ...]
  user: Fields
  item: Fields
  context: Fields
  everywhere = ('items',)

  @classmethod
  def of(cls, source: BatchSource, slices: Slices) -> 'ClickCut':
    """The cut of a source."""
    store = source.store
    user, item, context = (fields_of(store, kind) for kind in ('user', 'item', 'context'))
    return cls(
      source.length,
      store.vocabulary['item'],
      slices,
      1 if source.requests is None else source.requests.targets,
      tuple((key, store.vocabulary[key]) for key, _ in context),
      user,
      item,
      context,
    )

  def __call__(self, columns: Batch, plan: Batch) -> Batch:
    """The global batch of a plan, see batches.py.

    Args:
      columns: of `Resident.put`. plan: of `BatchSource.plan`, replicated.
    """
    return _per_device(self, columns, plan)

  def share(self, columns: Batch, plan: Batch) -> Batch:
    """The rows b of the batch that one device has."""
    slices = self.slices
    place_1L = plan['place'][None, :] if 'place' in plan else _range(self.length, 2)
    length = place_1L.shape[1]
    example_BQW = self._records(columns['examples'], self._examples(plan), 4, self.context)
    example_BW = example_BQW[:, 0]
    user_BW = self._records(columns['users'], example_BW[:, 0], 2, self.user)
    end_B = example_BW[:, 2]
    first_B = user_BW[:, 0] + end_B - jnp.minimum(end_B, length)
    history_bL = slices.items(columns['events'], first_B[:, None] + place_1L)
    example_bQW, user_bW = slices.own(example_BQW), slices.own(user_BW)
    record, end = example_bQW[:, 0, 0], example_bQW[:, 0, 2]
    length_b = jnp.minimum(end, length)
    within_bL = place_1L < length_b[:, None]
    batch = dict(
      user=user_bW[:, 1],
      # Events after the end of an example's history are of later times or other users.
      history=jnp.where(within_bL, history_bL, self.padding),
      length=length_b,
      total=end,
      user_index=record,
    )
    batch |= _split(user_bW[:, 2:], self.user) | self._of_targets(example_bQW, plan)
    return batch | self._item_features(columns, batch)

  def _examples(self, plan: Batch) -> Int[Array, 'B Q']:
    """The positions of the targets; the last one of a request where it has no more."""
    index_B1 = plan['index'][:, None]
    if self.targets == 1:
      return index_B1
    return index_B1 + jnp.minimum(_range(self.targets, 2), plan['targets'][:, None] - 1)

  def _of_targets(self, example_bQW: Int[Array, 'b Q W'], plan: Batch) -> Batch:
    """The fields of the targets, [b] each, or [b, Q] padded of requests."""
    batch = dict(
      item=example_bQW[..., 1],
      label=jax.lax.bitcast_convert_type(example_bQW[..., 3], jnp.float32),
      weight=self.slices.own(plan['weight'])[:, None],
    )
    batch |= _split(example_bQW[..., 4:], self.context)
    if self.targets == 1:
      return {name: x[:, 0] for name, x in batch.items()}
    exists_bQ = _range(self.targets, 2) < self.slices.own(plan['targets'])[:, None]
    padding = dict(item=self.padding, label=0.0, weight=0.0) | dict(self.vocabulary)
    return {
      name: jnp.where(exists_bQ.reshape(*exists_bQ.shape, *[1] * (x.ndim - 2)), x, padding[name])
      for name, x in batch.items()
    }

  def _records(
    self, column: Int[Array, '_'], index: Int[Array, 'B ...'], columns: int, features: Fields
  ) -> Int[Array, 'B ... W']:
    """Whole records of `columns` values and their features, for the whole batch on each device."""
    return self.slices.total(self.slices.read(column, index, columns + width_of(features)))

  def _item_features(self, columns: Batch, batch: Batch) -> Batch:
    """The features of the items and of the histories; every device has all of them."""
    if not self.item:
      return {}
    width = width_of(self.item)
    of_item, of_history = (
      _split(Slices(1).read(columns['items'], batch[name], width), self.item)
      for name in ('item', 'history')
    )
    renamed = {f'history.{key.removeprefix("item.")}': x for key, x in of_history.items()}
    return of_item | renamed


# The tables of a Sampler with their types; columns are int32.
TABLES = dict(log_q=jnp.float32, threshold=jnp.uint32, alias=jnp.int32)


@dataclasses.dataclass(frozen=True)
class LaneCut:
  """Cuts the batches of a LaneSource.

  Attributes:
    length: T, positions of a segment. padding: V. slices: of the columns.
    training, packed: whether batches have the fields `target` and `begin`.
    draws: of negatives, or None.
  """

  length: int
  padding: int
  slices: Slices
  training: bool
  packed: bool
  draws: Draws | None
  everywhere = tuple(TABLES)

  @classmethod
  def of(cls, source: LaneSource, slices: Slices) -> 'LaneCut':
    """The cut of a source."""
    draws = source.sampler.draws if source.sampler else None
    shape = source.length, int(source.padding)
    return cls(*shape, slices, source.training, source.packed, draws)

  def __call__(self, columns: Batch, plan: Batch) -> Batch:
    """The global batch of a plan, see lanes.py.

    Args:
      columns: of `Resident.put`. plan: of `LaneSource.plan`, replicated.
    """
    return _per_device(self, columns, plan)

  def share(self, columns: Batch, plan: Batch) -> Batch:
    """The rows b of the batch that one device has."""
    own = self.slices.own
    batch = {name: own(plan[name]) for name in ('first', 'user', 'asked', 'number') if name in plan}
    within_bT = _range(self.length, 2) < own(plan['count'].sum(1))[:, None]
    item_bT, target_bT = self._items(columns['events'], plan)
    batch['item'] = jnp.where(within_bT, item_bT, self.padding)
    if self.packed:
      start_bP = _starts(own(plan['count']))
      batch['begin'] = jnp.where(within_bT, self._spread(start_bP, start_bP), 0)
    if self.training:
      batch['target'] = jnp.where(within_bT, target_bT, self.padding)
    if self.draws:
      lanes = jnp.arange(len(plan['first']), dtype=jnp.uint32)
      tables = {
        name: jax.lax.bitcast_convert_type(columns[name], kind)
        for name, kind in TABLES.items()
        if name in columns
      }
      batch |= self.draws.fields(plan['keys'], batch['target'], own(lanes), tables)
    return batch

  def _items(
    self, events: Int[Array, '_'], plan: Batch
  ) -> tuple[Int[Array, 'b T'], Int[Array, 'b T']]:
    """The items at each position and after it; any after the last event of a lane."""
    slices, length = self.slices, self.length
    if not self.packed:
      event_BS = plan['event'] + _range(length + 1, 2)
      item_bS = slices.items(events, event_BS)
      return item_bS[:, :-1], item_bS[:, 1:]
    start_BP = _starts(plan['count'])
    event_BT = self._spread(start_BP, plan['event'] - start_BP) + _range(length, 2)
    # As one array, for one sum over the devices.
    item_b2T = slices.items(events, jnp.stack([event_BT, event_BT + 1], axis=1))
    return item_b2T[:, 0], item_b2T[:, 1]

  def _spread(self, start_BP: Int[Array, 'B P'], value_BP: Int[Array, 'B P']) -> Int[Array, 'B T']:
    """The value, at each position, of the last piece that has begun."""
    step_BP = jnp.diff(value_BP, axis=1, prepend=jnp.zeros_like(value_BP[:, :1]))
    begun_BPT = _range(self.length, 3) >= start_BP[:, :, None]
    return jnp.sum(jnp.where(begun_BPT, step_BP[:, :, None], 0), axis=1)


def _starts(count_BP: Int[Array, 'B P']) -> Int[Array, 'B P']:
  """The position at which each piece of a lane begins."""
  return jnp.cumsum(count_BP, axis=1) - count_BP
