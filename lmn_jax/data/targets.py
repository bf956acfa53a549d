"""The next items to predict: the clicked examples of a store, each at its place in a history."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lmn_jax.data.store import Part, Store

Ints = Int[np.ndarray, '_']


class Targets(NamedTuple):
  """The targets of validation and test, their clicked examples; each [E].

  user: records of the store. place: of the event in the user's history, which is read up to there.
  item: embedding rows. split: numbers of SPLITS.
  """

  user: Ints
  place: Ints
  item: Ints
  split: Shaped[np.ndarray, '_']


def targets_of(store: Store) -> Targets:
  """The targets of a store, by user and place.

  A history is ordered by (time, original row), and the next item is the next one in this order. So
  earlier events of the same second are read, which a click model does not read.
  """
  parts = [_targets_of_part(part) for part in store.parts]
  return Targets(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def times_of_targets(store: Store) -> Ints:
  """The times of `targets_of`, as in the store."""
  times = [part.examples['time'][_rows_and_places(part)[0]] for part in store.parts]
  return np.concatenate(times)


def _targets_of_part(part: Part) -> Targets:
  row, place = _rows_and_places(part)
  user, item, split = (part.examples[name][row] for name in ('user', 'item', 'split'))
  return Targets(user.astype(np.int64) + part.first, place, item.astype(np.int64), split)


def _rows_and_places(part: Part) -> tuple[Ints, Ints]:
  """The examples that are targets, by user and place, and their places."""
  begin = part.bounds['train'][1]  # validation and test follow training
  row = begin + np.flatnonzero(part.examples['label'][begin:] > 0)
  place = places_of(part)[row]
  order = np.lexsort((place, part.examples['user'][row]))
  return row[order], place[order]


def places_of(part: Part) -> Ints:
  """The place of each example in its user's history, which is read up to there: [E].

  The place of an event is its own; the place of any other example is after all events of earlier
  times.
  """
  end = part.examples['end'].astype(np.int64)
  if 'place' not in part.examples:
    return _matched_places(part, end)
  place = part.examples['place']
  return np.where(place < 0, end, place)


def _matched_places(part: Part, end: Ints) -> Ints:
  """`places_of` a store without the column `place`: matches clicks by user, time and item.

  The events of a click's time begin at `end`. Equal ones are matched in the order of the splits.
  """
  clicks = np.flatnonzero(part.examples['label'] > 0)
  user, item, time, split = (
    part.examples[name][clicks] for name in ('user', 'item', 'time', 'split')
  )
  offset, count = part.users['offset'][user], part.users['count'][user]
  # How many equal clicks come before each.
  order = np.lexsort((split, item, time, user))
  new = np.ones(len(order), bool)
  new[1:] = (np.diff(user[order]) != 0) | (np.diff(time[order]) != 0) | (np.diff(item[order]) != 0)
  index = np.arange(len(order))
  skip = np.empty(len(order), np.int64)
  skip[order] = index - np.maximum.accumulate(np.where(new, index, 0))
  place, at, pending = end.copy(), end[clicks], np.arange(len(user))
  while len(pending):
    event = np.minimum(offset[pending] + at[pending], len(part.history['item']) - 1)
    same_time = part.history['time'][event] == time[pending]
    within = (at[pending] < count[pending]) & same_time
    equal = within & (part.history['item'][event] == item[pending])
    match = equal & (skip[pending] == 0)
    place[clicks[pending[match]]] = at[pending[match]]
    skip[pending[equal]] -= 1
    at[pending] += 1
    pending = pending[within & ~match]
  return place


def training_events(store: Store) -> Ints:
  """The number of training events of each user: those before the first held-out one, int64 [U]."""
  counts = []
  for part in store.parts:
    held_out = slice(part.bounds['train'][1], None)
    is_event = part.examples['label'][held_out] > 0
    if 'place' in part.examples:
      is_event |= part.examples['place'][held_out] >= 0  # an event that is no click
    user, place = part.examples['user'][held_out], places_of(part)[held_out]
    events = part.users['count'].astype(np.int64)
    np.minimum.at(events, user[is_event], place[is_event])
    counts.append(events)
  return np.concatenate(counts)


def training_items(store: Store) -> Iterator[np.ndarray]:
  """Yields the item rows of each user's training events, oldest first, of any length."""
  events = training_events(store)
  for part in store.parts:
    counts = events[part.first : part.first + len(part.users['count'])]
    for offset, count in zip(part.users['offset'], counts, strict=True):
      yield part.history['item'][offset : offset + count]
