"""The users of a store and their histories, read in batches by record."""

import numpy as np
from jaxtyping import Int

from lmn_jax.data.histories import users_of
from lmn_jax.data.store import Store
from lmn_jax.inference.state_table import OLDEST

Ints = Int[np.ndarray, '_']


class StoredUsers:
  """The users of a store. A record is a user's place in it, over all parts; -1 is no user."""

  def __init__(self, store: Store):
    self._store, self._users = store, users_of(store)

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

  def _events(self, record, name):
    """Returns a column of a user's history."""
    if record < 0:
      return np.zeros(0, np.int64)
    users, begin = self._users, self._users.offset[record]
    return self._store.parts[users.part[record]].history[name][begin : begin + users.count[record]]

  def newest(self, record: Ints, end: Ints, L: int) -> tuple[Int[np.ndarray, 'B L'], Ints]:
    """Returns the newest L of the first `end` events, and their number.

    They are left-aligned and padded with V.
    """
    users, V = self._users, self._store.vocabulary['item']
    length = np.minimum(end, L)
    first = users.offset[record] + end - length
    history, place = np.full((len(record), L), V, np.int32), np.arange(L)
    for indices, events in self._by_part(record, 'history', 'item'):
      if len(events):
        history[indices] = events.take(first[indices, None] + place, mode='clip')
    history[place >= length[:, None]] = V
    return history, length

  def features(self, record: Ints) -> dict[str, np.ndarray]:
    """Returns the profile, 'user.f' -> codes [B] or [B, M], or numbers [B].

    They are unknown, or NaN, where there is no record.
    """
    features = {}
    for key in self._store.fields('user'):
      values = self._unknown(key, len(record))
      for indices, column in self._by_part(record, 'users', key):
        first = self._store.parts[self._users.part[record[indices[0]]]].first
        values[indices] = column[record[indices] - first]
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

  def _by_part(self, record, table, name):
    """Yields, for each part, the indices into `record` of its users, and a column of the part."""
    part = np.where(record < 0, -1, self._users.part[record])
    for number in np.unique(part[part >= 0]):
      yield np.flatnonzero(part == number), getattr(self._store.parts[number], table)[name]
