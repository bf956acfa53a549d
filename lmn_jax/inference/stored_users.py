"""The users of a store and their histories, read in batches by record."""

import numpy as np
from jaxtyping import Int

from lmn_jax.data.histories import users_of
from lmn_jax.data.named_histories import MAIN
from lmn_jax.data.reads import Reads, clock_of, filled, padding_of
from lmn_jax.data.store import Store
from lmn_jax.inference.state_table import OLDEST

Ints = Int[np.ndarray, '_']
NOTHING = Reads()


class StoredUsers:
  """The users of a store. A record is a user's place in it, over all parts; -1 is no user."""

  def __init__(self, store: Store, reads: Reads = NOTHING, history: str = MAIN):
    """See the class.

    Args:
      store: of the users. reads: what the model reads of events besides the items. history: whose
        events these are, by default the main one.

    Raises:
      UserError: times are read and cannot be.
    """
    self._store, self._users, self._reads = store, users_of(store, history), reads
    self._events_of = [part.events(history) for part in store.parts]
    self._clock = clock_of(store) if reads.time else None

  def seconds(self, time: Ints) -> Ints:
    """Returns times as in the store in seconds, if times are read."""
    return self._clock.seconds(time)

  def rows(self, record: Ints) -> Ints:
    """Returns embedding rows; 0 where there is no record."""
    return np.where(record < 0, 0, self._users.row[record])

  def counts(self, record: Ints) -> Ints:
    """Returns how many events each user has."""
    return np.where(record < 0, 0, self._users.count[record])

  def before(self, record: Ints, time: Ints) -> Ints:
    """Returns how many events each user has strictly before a time, as an example's `end` does."""
    counts, order = np.zeros(len(record), np.int64), np.argsort(record, kind='stable')
    records, first = np.unique(record[order], return_index=True)
    for n, indices in zip(records, np.split(order, first[1:]), strict=True):
      counts[indices] = np.searchsorted(self._events(n, 'time'), time[indices])
    return counts

  def newest_time(self, record: Ints) -> Ints:
    """Returns the time of each user's newest event; OLDEST where there is none."""
    return np.array([max(self._events(n, 'time')[-1:], default=OLDEST) for n in record], np.int64)

  def histories(self, record: Ints, end: Ints) -> list[np.ndarray]:
    """Returns the item rows of each user's first `end` events, oldest first."""
    return [self._events(n, 'item')[:k] for n, k in zip(record, end, strict=True)]

  def events(self, record: int, begin: int, end: int) -> dict[str, np.ndarray]:
    """Returns a user's events `begin` to `end` - 1, oldest first, as segment_states.py has them."""
    span = slice(begin, end)
    events = {name: self._events(record, name)[span] for name in ('item', *self._reads.events)}
    if self._clock:
      events['time'] = self._clock.seconds(self._events(record, 'time')[span]).astype(np.int32)
    return events

  def _events(self, record, name):
    """Returns a column of a user's history."""
    if record < 0:
      return self._events_of[0][name][:0]
    users, begin = self._users, self._users.offset[record]
    return self._events_of[users.part[record]][name][begin : begin + users.count[record]]

  def newest(
    self, record: Ints, end: Ints, L: int, request: Ints | None = None
  ) -> tuple[dict[str, np.ndarray], Ints]:
    """Returns the newest L of the first `end` events, and their number.

    Args:
      record, end, L: B users. request: the times of the requests, as in the store; None if no times
        are read.

    Returns:
      Arrays of a batch of clicks, [B, L] or [B, L, M], left-aligned and padded: `history`,
      `event.<f>` and `time_gap`.
    """
    length = np.minimum(end, L)
    first = self._users.offset[record] + end - length
    batch = {'history': self._newest(record, 'item', first, length, L)}
    batch |= {key: self._newest(record, key, first, length, L) for key in self._reads.events}
    if self._clock:
      time_BL = self._newest(record, 'time', first, length, L, np.int64(0))
      gap_BL = self._clock.seconds(request)[:, None] - self._clock.seconds(time_BL)
      gap_BL = np.where(np.arange(L) < length[:, None], gap_BL, 0)
      batch['time_gap'] = gap_BL.astype(np.float32)
    return batch, length

  def _newest(self, record, name, first, length, L, padding=None):
    """Returns a column of the events first .. first + length - 1, padded to [B, L, ...]."""
    padding = padding_of(self._store, name) if padding is None else padding
    like, place = self._events_of[0][name], np.arange(L)
    values = filled((len(record), L), like, padding)
    for number, indices in self._by_part(record):
      events = self._events_of[number][name]
      if len(events):
        values[indices] = events.take(first[indices, None] + place, axis=0, mode='clip')
    values[place >= length[:, None]] = padding
    return values

  def features(self, record: Ints) -> dict[str, np.ndarray]:
    """Returns the profile, 'user.f' -> codes [B] or [B, M], or numbers [B].

    They are unknown, or NaN, where there is no record.
    """
    features = {}
    for key in self._store.fields('user'):
      values = self._unknown(key, len(record))
      for number, indices in self._by_part(record):
        part = self._store.parts[number]
        values[indices] = part.users[key][record[indices] - part.first]
      features[key] = values
    return features

  def _unknown(self, key: str, B: int) -> np.ndarray:
    """Returns unknown values of a feature."""
    if key in self._store.numbers.get('user', ()):
      return np.full(B, np.nan, np.float32)
    V, M = self._store.vocabulary[key], self._store.widths[key]
    codes = np.full((B, M), V, np.int32) if M else np.zeros(B, np.int32)
    if M:
      codes[:, 0] = 0
    return codes

  def _by_part(self, record):
    """Yields the number of each part that has users, and the indices into `record` of these."""
    part = np.where(record < 0, -1, self._users.part[record])
    for number in np.unique(part[part >= 0]):
      yield number, np.flatnonzero(part == number)
