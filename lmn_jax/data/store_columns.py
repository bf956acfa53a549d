"""Columns of a store as devices hold them: flat arrays of records, cut into equal slices.

A record is a fixed number of values of 4 bytes that are read together, such as all columns of an
example. So a device reads an example with one gather. A slice is read from the maps of the parts
when it is sent, so the host never holds a whole column unless one device does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lmn_jax.data.named_histories import MAIN, column_of
from lmn_jax.data.reads import Reads, clock_of
from lmn_jax.data.store import Store

Words = Int[np.ndarray, 'R W']


class Field(NamedTuple):
  """A feature in a record.

  width: M values, 0 for a single one. number: whether it is the bits of a float32, not a code.
  padding: V, of codes.
  """

  key: str
  width: int
  number: bool
  padding: int


Fields = tuple[Field, ...]


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
  """The features of a kind, in the order of their values in a record."""
  numbers = store.numbers.get(kind, ())
  return tuple(
    Field(key, store.widths.get(key, 0), key in numbers, store.vocabulary.get(key, 0))
    for key in store.fields(kind)
  )


def event_fields(store: Store, reads: Reads) -> Fields:
  """The features that are read of events."""
  return tuple(field for field in fields_of(store, 'event') if field.key in reads.events)


def width_of(fields: Fields) -> int:
  """Number of values of some features of a record."""
  return sum(max(1, field.width) for field in fields)


def events(store: Store, reads: Reads, name: str = MAIN) -> Column:
  """The events by (part, user record, place): item row, seconds if they are read, features.

  Args:
    store: of the events. reads: what is read of them. name: of the history.
  """
  fields = event_fields(store, reads)
  clock = clock_of(store) if reads.time else None

  def read(number, records):
    history = store.parts[number].events(name)
    columns = [history['item'][records]]
    if clock:
      columns.append(clock.seconds(history['time'][records]).astype(np.int32))
    return joined([*columns, *(history[field.key][records] for field in fields)])

  counts = tuple(len(part.events(name)['item']) for part in store.parts)
  return Column(counts, 1 + reads.time + width_of(fields), read)


def examples(store: Store, split: str, weighted: bool, reads: Reads) -> Column:
  """The examples of a split: user record over all parts, item, events before it, labels, context.

  Args:
    store: of the examples. split: its name. weighted: whether the sample weight follows the labels.
    reads: the events before it in each named history, and with times the seconds, are before the
      context.
  """
  labels, named = store.label_columns, [column_of(name, 'end') for name, _ in reads.histories]
  names = ('user', 'item', 'end', *labels, *['weight'] * weighted)
  bounds = [part.bounds[split] for part in store.parts]
  clock = clock_of(store) if reads.time else None

  def read(number, records):
    part, begin = store.parts[number], bounds[number][0]
    records = slice(records.start + begin, records.stop + begin)
    user, item, end, *others = (part.examples[name][records] for name in names)
    columns = [user + np.int32(part.first), item, end.astype(np.int32), *others]
    columns += [part.examples[name][records].astype(np.int32) for name in named]
    if clock:
      columns.append(clock.seconds(part.examples['time'][records]).astype(np.int32))
    return joined([*columns, *(part.examples[key][records] for key in store.fields('context'))])

  width = len(names) + len(named) + reads.time + width_of(fields_of(store, 'context'))
  return Column(tuple(end - begin for begin, end in bounds), width, read)


def users(store: Store, reads: Reads) -> Column:
  """The user records: first event over all parts, embedding row, features.

  Args:
    store: of the users. reads: before the features is the first event of each named history.
  """
  histories = (MAIN, *(name for name, _ in reads.histories))
  # Number of events before each part.
  before = {
    name: np.cumsum([0, *(len(part.events(name)['item']) for part in store.parts)])
    for name in histories
  }

  def read(number, records):
    columns = store.parts[number].users
    main, *named = (
      (columns[column_of(name, 'offset')][records] + before[name][number]).astype(np.int32)
      for name in histories
    )
    features = (columns[name][records] for name in store.fields('user'))
    return joined([main, columns['row'][records], *named, *features])

  width = 2 + len(reads.histories) + width_of(fields_of(store, 'user'))
  return Column(tuple(len(part.users['row']) for part in store.parts), width, read)


def item_features(store: Store) -> Column:
  """The item features by index, see item_index.py."""
  features = [store.items[key] for key in store.fields('item')]
  return Column(
    (len(features[0]),),
    width_of(fields_of(store, 'item')),
    lambda part, records: joined([column[records] for column in features]),
    everywhere=True,
  )


def table(values: np.ndarray) -> Column:
  """Values of 4 bytes [R] that every device has."""
  return Column((len(values),), 1, lambda part, records: joined([values[records]]), everywhere=True)
