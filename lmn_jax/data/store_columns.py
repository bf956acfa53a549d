"""Columns of a store as devices hold them: flat arrays of records, cut into equal slices.

A record is a fixed number of values of 4 bytes that are read together, such as all columns of an
example. So a device reads an example with one gather. A slice is read from the maps of the parts
when it is sent, so the host never holds a whole column unless one device does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lmn_jax.data.store import Store

Words = Int[np.ndarray, 'R W']
Fields = tuple[tuple[str, int], ...]  # features with their numbers of values, 0 for plain ones


class Column(NamedTuple):
  """The records of all parts, and how they are divided among devices.

  counts: number of records in each part.
  width: W, values of a record.
  read: (number of a part, range of its records) -> int32 [R, W]; float32 values as their bits.
  everywhere: whether every device holds all records.
  """

  counts: tuple[int, ...]
  width: int
  read: Callable[[int, slice], Words]
  everywhere: bool = False

  @property
  def records(self) -> int:
    """Number of records in all parts."""
    return sum(self.counts)

  def slices(self, devices: int) -> int:
    """Number of slices on some devices."""
    return 1 if self.everywhere else devices

  def own(self, devices: int) -> int:
    """Number of records that belong to each slice; the last slice is padded."""
    return max(1, -(-self.records // self.slices(devices)))

  def words(self, devices: int) -> int:
    """Number of values of a slice."""
    return self.own(devices) * self.width

  def cut(self, number: int, devices: int) -> np.ndarray:
    """The values of a slice, int32 [words], with zeros after the last record."""
    begin = number * self.own(devices)
    end = begin + self.own(devices)
    values = np.zeros((end - begin, self.width), np.int32)
    first = 0  # record of the part
    for part, count in enumerate(self.counts):
      low, high = max(begin, first), min(end, first + count)
      if low < high:
        values[low - begin : high - begin] = self.read(part, slice(low - first, high - first))
      first += count
    return values.reshape(-1)


def joined(columns: Sequence[np.ndarray]) -> Words:
  """Columns [R] or [R, M] of int32, or of float32 as their bits, side by side."""
  words = [np.ascontiguousarray(column).view(np.int32) for column in columns]
  return np.concatenate([column.reshape(len(column), -1) for column in words], axis=1)


def fields_of(store: Store, kind: str) -> Fields:
  """The features of 'user', 'item' or 'context', in the order of their values in a record."""
  return tuple((key, store.widths[key]) for key in store.features[kind])


def width_of(fields: Fields) -> int:
  """Number of values of some features of a record."""
  return sum(max(1, width) for _, width in fields)


def events(store: Store) -> Column:
  """The item row of each event, by (part, user record, place)."""
  items = [part.history['item'] for part in store.parts]
  return Column(tuple(map(len, items)), 1, lambda part, records: items[part][records, None])


def examples(store: Store, split: str, weighted: bool) -> Column:
  """The examples of a split: user record over all parts, item, events before it, labels, context.

  Args:
    store: of the examples. split: its name. weighted: whether the sample weight follows the labels.
  """
  labels = store.label_columns
  names = ('user', 'item', 'end', *labels, *['weight'] * weighted, *store.features['context'])
  bounds = [part.bounds[split] for part in store.parts]

  def read(number, records):
    part, begin = store.parts[number], bounds[number][0]
    records = slice(records.start + begin, records.stop + begin)
    user, item, end, *others = (part.examples[name][records] for name in names)
    return joined([user + np.int32(part.first), item, end.astype(np.int32), *others])

  width = 3 + len(labels) + weighted + width_of(fields_of(store, 'context'))
  return Column(tuple(end - begin for begin, end in bounds), width, read)


def users(store: Store) -> Column:
  """The user records: first event over all parts, embedding row, features."""
  first_event = np.cumsum([0, *(len(part.history['item']) for part in store.parts)])

  def read(number, records):
    offset, row, *features = (
      store.parts[number].users[name][records]
      for name in ('offset', 'row', *store.features['user'])
    )
    return joined([(offset + first_event[number]).astype(np.int32), row, *features])

  width = 2 + width_of(fields_of(store, 'user'))
  return Column(tuple(len(part.users['row']) for part in store.parts), width, read)


def item_features(store: Store) -> Column:
  """The item features by embedding row, with the padding as the last one."""
  codes = [store.items[key] for key in store.features['item']]
  return Column(
    (store.vocabulary['item'] + 1,),
    width_of(fields_of(store, 'item')),
    lambda part, records: joined([column[records] for column in codes]),
    everywhere=True,
  )


def table(values: np.ndarray) -> Column:
  """Values of 4 bytes [R] that every device has."""
  return Column((len(values),), 1, lambda part, records: joined([values[records]]), everywhere=True)
