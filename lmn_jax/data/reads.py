"""What batches have of events besides the items: their features, times and gaps of time.

A model chooses it, and nothing else is read: batches of items alone cost what they cost without.
Times are whole seconds since the earliest time of the log, int32, so that a gap is the same
difference of two integers on the host and on the devices. Where the unit of the log's times is
unknown, or they are positions, the log's own numbers are in place of seconds.
"""

from typing import NamedTuple

import numpy as np

from lmn_jax.data.store import Store
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError

MOST = 2**31 - 1  # int32


class Reads(NamedTuple):
  """What is read of events besides the items.

  time: whether the gaps of time are read. events: keys of the event features, in the order of
  `Store.fields`. histories: name and length of each named history that is read beside the main one.
  """

  time: bool = False
  events: tuple[str, ...] = ()
  histories: tuple[tuple[str, int], ...] = ()


def clock_of(store: Store) -> Clock:
  """Returns the clock of a store, for times as int32 seconds.

  Raises:
    UserError: the events of the store have no times, or too distant ones.
  """
  notes, clock = store.manifest['notes'], store.clock
  if 'row_histories' in notes:
    raise UserError(
      f'{store.path}: the events of config.data.row_history have no times of their own; set '
      "config.model.time='none'"
    )
  # Positions of rows are below the number of rows.
  last = clock.last if clock.timed else max(clock.last, notes.get('rows_read', 0))
  seconds = (last - clock.first) // clock.per_second
  if seconds > MOST:
    unit = 'seconds' if clock.unit else 'of the unknown unit of its numbers'
    raise UserError(
      f'{store.path}: the times of the log reach over {seconds:,} {unit}, and gaps of time are '
      f"counted up to {MOST:,}; set config.model.time='none', or write times in seconds since 1970"
    )
  return clock


def padding_of(store: Store, key: str) -> np.number:
  """The value of a feature where there is no event: V, or NaN of a number."""
  numbers = store.numbers.get(key.partition('.')[0], ())
  return np.float32(np.nan) if key in numbers else np.int32(store.vocabulary[key])


def seconds_of(clock: Clock, time: np.ndarray) -> np.ndarray:
  """Returns times of new events, int64 as in the store, as int32 seconds.

  Raises:
    UserError: a time that is too far from the earliest one of the log.
  """
  seconds = clock.seconds(time)
  far = np.abs(seconds) > MOST
  if np.any(far):
    raise UserError(
      f'a time of {time[far][0]} is {seconds[far][0]:,} seconds from the earliest one of the log, '
      f"and gaps of time are counted up to {MOST:,}; set config.model.time='none', or train again "
      'on a log with newer events'
    )
  return seconds.astype(np.int32)


def event_padding(store: Store, reads: Reads) -> dict[str, np.ndarray]:
  """Returns, by name, what is read of a missing event besides its item: [], or [M] of a list."""
  padding = {}
  for key in reads.events:
    width = store.widths.get(key, 0)
    padding[key] = np.full((width,) if width else (), padding_of(store, key))
  return padding | ({'time': np.array(0, np.int32)} if reads.time else {})


def filled(lead: tuple[int, ...], column: np.ndarray, padding: np.number) -> np.ndarray:
  """An array of padding for values of a column [N] or [N, M]: [*lead] or [*lead, M]."""
  return np.full((*lead, *column.shape[1:]), padding, column.dtype)
