"""Cuts batches on the devices, from the columns of a store and the plan of a step.

A cut is called under jit, within `meshes.use_mesh`. It returns the global batch that the source
cuts on the host, bit for bit, sharded over `data`. Where columns are divided among devices, each
reads for the whole batch what its slice has, and 0 for the rest; the sum over the devices is exact,
as all values are integers, or the bits of float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Shaped

from lmn_jax.data import item_index
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.named_histories import MAIN, array_of
from lmn_jax.data.sampling import Draws
from lmn_jax.data.store_columns import Field, Fields, event_fields, fields_of, width_of
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
      column: the device's slice. record: numbers over all slices. width: W, values of a record.
    """
    if self.count > 1:
      own = column.shape[0] // width
      record = record - jax.lax.axis_index('data') * own
      inside = (record >= 0) & (record < own)
    values = _elements(column, record[..., None] * width + _range(width, record.ndim + 1))
    return jnp.where(inside[..., None], values, 0) if self.count > 1 else values

  def events(
    self, column: Int[Array, '_'], event: Int[Array, 'B ...'], width: int
  ) -> Int[Array, 'W b ...']:
    """The values of events one after the other, for the rows of the batch that this device has.

    Those of events that the store does not have are any. The values come first, because a TPU
    pads the last axis to 128.

    Args:
      column: the device's slice. event: numbers over all slices. width: W, values of an event.
    """
    values = self.read(column, event, width)
    if width == 1:  # a sum of two axes, as without the axis of values
      return self.own_total(values[..., 0])[None]
    return self.own_total(jnp.moveaxis(values, -1, 0), 1)

  def total(self, values: Array) -> Array:
    """The sum over the devices, on each of them."""
    return values if self.count == 1 else jax.lax.psum(values, 'data')

  def own_total(self, values: Shaped[Array, '...'], axis: int = 0) -> Shaped[Array, '...']:
    """The sum over the devices, of the rows b = B / n of the batch that this device has.

    Args:
      values: with the rows B along an axis.
    """
    if self.count == 1:
      return values
    return jax.lax.psum_scatter(values, 'data', scatter_dimension=axis, tiled=True)

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
  for field in fields:
    x = values[..., begin : begin + field.width] if field.width else values[..., begin]
    columns[field.key] = jax.lax.bitcast_convert_type(x, jnp.float32) if field.number else x
    begin += max(1, field.width)
  return columns


def _of_events(values: Int[Array, 'W b T'], fields: Fields, within: Bool[Array, 'b T']) -> Batch:
  """The features of events, from their values one after the other, padded outside of `within`."""
  features = _split(jnp.moveaxis(values, 0, -1), fields)
  return {field.key: _padded(features[field.key], field, within) for field in fields}


def _padded(x: Array, field: Field, within: Bool[Array, 'b T']) -> Array:
  """A feature of events with its padding outside of `within`: [b, T] or [b, T, M]."""
  inside = within[..., None] if field.width else within
  return jnp.where(inside, x, jnp.nan if field.number else field.padding)


def _gaps(end: Int[Array, '...'], begin: Int[Array, '...'], within: Bool[Array, '...']) -> Array:
  """Seconds from `begin` to `end`, float32; 0 outside of `within`."""
  return jnp.where(within, end - begin, 0).astype(jnp.float32)


def _per_device(cut: Any, columns: Batch, plan: Batch) -> Batch:
  """Runs a cut on every device. Columns named in `cut.everywhere` are on all devices."""
  sharded = {name: P() if name in cut.everywhere else meshes.BATCH for name in columns}
  return meshes.each_device(cut.share, (sharded, meshes.REPLICATED), meshes.BATCH)(columns, plan)


@dataclasses.dataclass(frozen=True)
class ClickCut:
  """Cuts the batches of a BatchSource.

  Attributes:
    histories: name and length L of the main history and of the named ones that are read; L is that
      of a plan without `place`. padding: V. slices: of the columns.
    targets: Q, the most of a request.
    labels: K, labels of an example. weighted: whether the records of examples have a sample weight.
    user, item, context: features of each kind. event: features that are read of events.
    time: whether times are read. cold: whether there are cold items; vectors: also with vectors.
  """

  histories: tuple[tuple[str, int], ...]
  padding: int
  slices: Slices
  targets: int
  labels: int
  weighted: bool
  user: Fields
  item: Fields
  context: Fields
  event: Fields
  time: bool
  cold: bool
  vectors: bool
  everywhere = ('items',)

  @classmethod
  def of(cls, source: BatchSource, slices: Slices) -> 'ClickCut':
    """The cut of a source."""
    store = source.store
    fields = (fields_of(store, kind) for kind in ('user', 'item', 'context'))
    targets = 1 if source.requests is None else source.requests.targets
    examples = targets, len(store.labels), source.weighted
    events = event_fields(store, source.reads), source.reads.time
    cold = store.cold_items > 0, store.has_item_vectors
    histories = (MAIN, source.length), *source.reads.histories
    return cls(histories, store.vocabulary['item'], slices, *examples, *fields, *events, *cold)

  def __call__(self, columns: Batch, plan: Batch) -> Batch:
    """The global batch of a plan, see batches.py.

    Args:
      columns: of `Resident.put`. plan: of `BatchSource.plan`, replicated.
    """
    return _per_device(self, columns, plan)

  def share(self, columns: Batch, plan: Batch) -> Batch:
    """The rows b of the batch that one device has."""
    slices, named = self.slices, len(self.histories) - 1
    # Values of an example before its context: record, item, end, labels, weight, ends of the named
    # histories, seconds.
    fixed = 3 + self.labels + self.weighted + named + self.time
    example_BQW = self._records(columns['examples'], self._examples(plan), fixed, self.context)
    example_BW = example_BQW[:, 0]  # has the user and the history
    user_BW = self._records(columns['users'], example_BW[:, 0], 2 + named, self.user)
    example_bQW, user_bW = slices.own(example_BQW), slices.own(user_BW)
    batch = dict(user=user_bW[:, 1], user_index=example_bQW[:, 0, 0])
    for number, (name, _) in enumerate(self.histories):
      # Where the first event of the user is, and how many are before the example.
      at = (1 + number, 3 + self.labels + self.weighted + number - 1) if name else (0, 2)
      first_B, end_B = user_BW[:, at[0]], example_BW[:, at[1]]
      seconds_b = example_bQW[:, 0, fixed - 1]
      arrays = self._history(columns, plan, number, first_B, end_B, seconds_b)
      batch |= {array_of(name, key): x for key, x in arrays.items()}
    batch |= _split(user_bW[:, 2 + named :], self.user)
    batch |= self._of_targets(example_bQW, fixed, plan)
    batch |= self._item_features(columns, batch)
    return item_index.with_rows(batch, self.padding, self.vectors) if self.cold else batch

  def _history(
    self,
    columns: Batch,
    plan: Batch,
    number: int,
    first_B: Int[Array, 'B'],
    end_B: Int[Array, 'B'],
    seconds_b: Int[Array, '_'],
  ) -> Batch:
    """A history for the rows b of this device, by its names without that of the history.

    Args:
      number: of the history. first_B: the first event of the user. end_B: events before the
        example. seconds_b: the time of the example, if times are read.
    """
    (name, length), key = self.histories[number], array_of(self.histories[number][0], 'place')
    place_1L = plan[key][None, :] if key in plan else _range(length, 2)
    length_B = jnp.minimum(end_B, place_1L.shape[1])
    event_B1 = (first_B + end_B - length_B)[:, None]
    width = 1 + self.time + width_of(self.event)
    event_WbL = self.slices.events(columns[array_of(name, 'events')], event_B1 + place_1L, width)
    length_b = self.slices.own(length_B)
    within_bL = place_1L < length_b[:, None]
    arrays = dict(
      # Events after the end of an example's history are of later times or other users.
      history=jnp.where(within_bL, event_WbL[0], self.padding),
      length=length_b,
      total=self.slices.own(end_B),
    )
    if self.time:
      arrays['time_gap'] = _gaps(seconds_b[:, None], event_WbL[1], within_bL)
    return arrays | _of_events(event_WbL[1 + self.time :], self.event, within_bL)

  def _examples(self, plan: Batch) -> Int[Array, 'B Q']:
    """The positions of the targets; the last one of a request where it has no more."""
    index_B1 = plan['index'][:, None]
    if self.targets == 1:
      return index_B1
    return index_B1 + jnp.minimum(_range(self.targets, 2), plan['targets'][:, None] - 1)

  def _of_targets(self, example_bQW: Int[Array, 'b Q W'], fixed: int, plan: Batch) -> Batch:
    """The fields of the targets: [b, ...] each, or [b, Q, ...] of requests, padded."""
    if self.targets == 1:
      example_bQW = example_bQW[:, 0]
    end = 3 + self.labels + self.weighted
    values = jax.lax.bitcast_convert_type(example_bQW[..., 3:end], jnp.float32)
    label = values[..., : self.labels] if self.labels > 1 else values[..., 0]
    weight_b = self.slices.own(plan['weight'])
    batch = dict(item=example_bQW[..., 1], label=label)
    batch |= _split(example_bQW[..., fixed:], self.context)
    if self.targets == 1:
      return batch | dict(weight=weight_b * values[..., -1] if self.weighted else weight_b)
    exists_bQ = _range(self.targets, 2) < self.slices.own(plan['targets'])[:, None]
    weight_bQ = jnp.where(exists_bQ, weight_b[:, None], 0)
    batch['weight'] = weight_bQ * values[..., -1] if self.weighted else weight_bQ
    batch['item'] = jnp.where(exists_bQ, batch['item'], self.padding)
    has = exists_bQ[..., None] if self.labels > 1 else exists_bQ
    batch['label'] = jnp.where(has, label, 0)
    return batch | {x.key: _padded(batch[x.key], x, exists_bQ) for x in self.context}

  def _records(
    self, column: Int[Array, '_'], index: Int[Array, 'B ...'], columns: int, features: Fields
  ) -> Int[Array, 'B ... W']:
    """Whole records of `columns` values and their features, for the whole batch on each device."""
    return self.slices.total(self.slices.read(column, index, columns + width_of(features)))

  def _item_features(self, columns: Batch, batch: Batch) -> Batch:
    """The features of the items and of the histories; every device has all of them."""
    if not self.item:
      return {}

    def features(items):
      values = Slices(1).read(columns['items'], batch[items], width_of(self.item))
      return _split(values, self.item)

    arrays = features('item')
    for name, _ in self.histories:
      for key, x in features(array_of(name, 'history')).items():
        arrays[array_of(name, key.replace('item.', 'history.', 1))] = x
    return arrays


MOST = np.iinfo(np.int32).max

# The tables of a Sampler with their types; columns are int32.
TABLES = dict(log_q=jnp.float32, threshold=jnp.uint32, alias=jnp.int32)


@dataclasses.dataclass(frozen=True)
class LaneCut:
  """Cuts the batches of a LaneSource.

  Attributes:
    length: T, positions of a segment. padding: V. slices: of the columns.
    training, packed: whether batches have the fields `target` and `begin`.
    draws: of negatives, or None. event: features that are read of events. time: whether times are.
  """

  length: int
  padding: int
  slices: Slices
  training: bool
  packed: bool
  draws: Draws | None
  event: Fields
  time: bool
  everywhere = tuple(TABLES)

  @classmethod
  def of(cls, source: LaneSource, slices: Slices) -> 'LaneCut':
    """The cut of a source."""
    draws = source.sampler.draws if source.sampler else None
    shape = source.length, int(source.padding)
    events = event_fields(source.store, source.reads), source.reads.time
    return cls(*shape, slices, source.training, source.packed, draws, *events)

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
    event_WbT, next_WbT = self._events(columns['events'], plan)
    batch['item'] = jnp.where(within_bT, event_WbT[0], self.padding)
    batch |= _of_events(event_WbT[1 + self.time :], self.event, within_bT)
    if self.time:
      time_bT, request_bT = event_WbT[1], self._requests(next_WbT[1], plan)
      batch['time'] = jnp.where(within_bT, time_bT, 0)
      batch['time_gap'] = _gaps(request_bT, time_bT, within_bT)
    if self.packed:
      start_bP = _starts(own(plan['count']))
      batch['begin'] = jnp.where(within_bT, self._spread(start_bP, start_bP), 0)
    if self.training:
      batch['target'] = jnp.where(within_bT, next_WbT[0], self.padding)
    if self.draws:
      lanes = jnp.arange(len(plan['first']), dtype=jnp.uint32)
      tables = {
        name: jax.lax.bitcast_convert_type(columns[name], kind)
        for name, kind in TABLES.items()
        if name in columns
      }
      batch |= self.draws.fields(plan['keys'], batch['target'], own(lanes), tables)
    return batch

  def _events(
    self, events: Int[Array, '_'], plan: Batch
  ) -> tuple[Int[Array, 'W b T'], Int[Array, 'W b T']]:
    """The values of the events at each position and after it; any after the last one of a lane."""
    slices, length, width = self.slices, self.length, 1 + self.time + width_of(self.event)
    if not self.packed:
      event_BS = plan['event'] + _range(length + 1, 2)
      value_WbS = slices.events(events, event_BS, width)
      return value_WbS[..., :-1], value_WbS[..., 1:]
    start_BP = _starts(plan['count'])
    event_BT = self._spread(start_BP, plan['event'] - start_BP) + _range(length, 2)
    # As one array, for one sum over the devices.
    value_Wb2T = slices.events(events, jnp.stack([event_BT, event_BT + 1], axis=1), width)
    return value_Wb2T[:, :, 0], value_Wb2T[:, :, 1]

  def _requests(self, next_bT: Int[Array, 'b T'], plan: Batch) -> Int[Array, 'b T']:
    """The seconds of the requests: of the targets that are asked for, or of the next events."""
    if self.training:
      return next_bT
    asked_bP, number_bP, time_bP = (
      self.slices.own(plan[name]) for name in ('asked', 'number', 'asked_time')
    )
    lane_b1 = _range(len(next_bT), 1)[:, None]
    at = lane_b1, jnp.where(number_bP < 0, self.length, asked_bP)  # past the end: dropped
    return next_bT.at[at].set(MOST, mode='drop').at[at].min(time_bP, mode='drop')

  def _spread(self, start_BP: Int[Array, 'B P'], value_BP: Int[Array, 'B P']) -> Int[Array, 'B T']:
    """The value, at each position, of the last piece that has begun."""
    step_BP = jnp.diff(value_BP, axis=1, prepend=jnp.zeros_like(value_BP[:, :1]))
    begun_BPT = _range(self.length, 3) >= start_BP[:, :, None]
    return jnp.sum(jnp.where(begun_BPT, step_BP[:, :, None], 0), axis=1)


def _starts(count_BP: Int[Array, 'B P']) -> Int[Array, 'B P']:
  """The position at which each piece of a lane begins."""
  return jnp.cumsum(count_BP, axis=1) - count_BP
