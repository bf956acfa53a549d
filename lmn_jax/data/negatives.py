"""Sampled negatives: items for examples of label 0, which only the item distinguishes."""

from typing import NamedTuple

import numpy as np

from lmn_jax.data.shuffle import mix

ATTEMPTS = 32  # draws of a negative before all items that fit are listed


class Rows(NamedTuple):
  """The rows of a part, sorted by user, then time; each [R].

  user: int, within the part. item: int, index (item_index.py), 0 unknown. time: int64.
  training: bool, the row is an example of training. identity: int64, original row numbers.
  """

  user: np.ndarray
  item: np.ndarray
  time: np.ndarray
  training: np.ndarray
  identity: np.ndarray


def with_negatives(
  examples: np.ndarray, positive: np.ndarray, rows: Rows, plan: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Samples the negatives of positive examples, and drops examples that would show their label.

  An example without another item of its kind (see `sample_negatives`) is dropped whatever its label
  is: as a positive without negatives, or as the only label 0 of its kind, it would show its label.

  Args:
    examples: int [E], indices into the rows.
    positive: bool [E].
    rows: the rows of the part.
    plan: has `negatives` (the number for each positive), `items`, `cold_items` and `seed`.

  Returns:
    Which examples are kept, bool [E]; the number of negatives of each kept one, int [S]; the items
    of these negatives, int32, grouped by example.
  """
  # One draw for an example of label 0, only to learn whether there is another item of its kind.
  copies = np.where(positive, plan['negatives'], 1)
  sizes = plan['items'], plan['cold_items']
  negative = sample_negatives(examples, copies, rows, *sizes, plan['seed'])
  possible = negative[np.cumsum(copies) - copies] >= 0
  used = np.repeat(possible & positive, copies)
  return possible, np.where(positive, plan['negatives'], 0)[possible], negative[used]


# How a user has met an item, at a row: not at all; before it; at the very same time, which the
# history does not show. TRAINED is the same time, in a training example, seen from a held-out row.
NEVER, BEFORE, TRAINED, TIED = range(4)


class _Meetings:
  """How the user of a row has met items, by their other rows."""

  def __init__(self, rows: Rows, V: int, C: int):
    items = V + 1 + C if C else V  # above every index
    self._rows, self._items, self._V, self._C = rows, items, V, C
    user = rows.user.astype(np.int64)
    # The first occurrence of a (user, item) pair is its earliest, as rows are in order of time.
    self._pairs, first = np.unique(user * items + rows.item, return_index=True)
    self._earliest = rows.time[first]
    new = np.r_[True, (user[1:] != user[:-1]) | (rows.time[1:] != rows.time[:-1])]
    self._moment = np.cumsum(new) - 1  # number of the group of one user and one time
    tie = self._moment * items + rows.item
    self._ties, tie_of_row = np.unique(tie, return_inverse=True)
    self._trained = np.bincount(tie_of_row, rows.training) > 0
    # Pools to draw from: each user's items in the order of first meeting, then those of each
    # moment.
    user_of_pair = self._pairs // items
    order = np.lexsort((self._earliest, user_of_pair))
    self._pool = np.concatenate([self._pairs[order] % items, self._ties % items])
    stamps, rank = np.unique(rows.time, return_inverse=True)
    key = user_of_pair * len(stamps) + np.searchsorted(stamps, self._earliest)
    self._first = np.searchsorted(user_of_pair, user)
    self._before = np.searchsorted(key[order], user * len(stamps) + rank) - self._first

  def kind(self, row: np.ndarray, item: np.ndarray, positive: bool = False) -> np.ndarray:
    """NEVER | BEFORE | TRAINED | TIED for items at rows, int [N].

    Args:
      row: int [N].
      item: int [N].
      positive: whether the items are those of the rows themselves. Such an item of a held-out row
        may be TRAINED; none is TIED with itself.
    """
    pair, tie = (x[row] * np.int64(self._items) + item for x in (self._rows.user, self._moment))
    at = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
    before = (self._pairs[at] == pair) & (self._earliest[at] < self._rows.time[row])
    at = np.minimum(np.searchsorted(self._ties, tie), len(self._ties) - 1)
    tied, training = self._ties[at] == tie, self._rows.training[row]
    trained = tied & self._trained[at]
    # What training draws must not depend on held-out rows, or it would reveal them.
    tied = np.where(training, trained, tied) & (not positive)
    trained &= ~training
    return np.where(trained, TRAINED, np.where(tied, TIED, np.where(before, BEFORE, NEVER)))

  def pool(self, row: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and size of a pool that has all items of a kind, and others; each int64 [N]."""
    low, high = (
      np.searchsorted(self._ties, (self._moment[row] + k) * self._items) for k in range(2)
    )
    cold = self._rows.item[row] > self._V
    begin = [np.where(cold, self._V, 0), self._first[row], len(self._pairs) + low]
    size = [np.where(cold, self._C, self._V - 1), self._before[row], high - low]
    return np.choose(kind, begin), np.choose(kind, size)

  def item(self, kind: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The item at a place of a pool; the pool of NEVER is the indices 1..V-1, then V+1..V+C."""
    return np.where(kind == NEVER, at + 1, self._pool[np.minimum(at, len(self._pool) - 1)])


def sample_negatives(
  examples: np.ndarray, copies: np.ndarray, rows: Rows, V: int, C: int, seed: int
) -> np.ndarray:
  """Samples items for label-0 examples, uniformly over the other items of the positive's kind.

  The way a negative is drawn must not distinguish it from its positive. So the user has met both in
  the same way: never, before, or in a training example of the very same time; and the negative of
  an unknown item (row 0) is row 0, too, and that of a cold item another cold item. Where no user
  meets an item twice, this is uniform over the vocabulary, or over the cold items, without those
  that the user has met by then.

  Draw t of copy c of the example of original row r is a hash of (seed, r, c, t), so it does not
  depend on how users are divided into parts, nor on the order in which parts are written.

  Args:
    examples: int [E], indices of the positives into the rows.
    copies: int [E], the number of negatives of each.
    rows: the rows of the part.
    V: indices 1..V-1 are the items of the vocabulary. C: V+1..V+C are cold items.
    seed: of the config.

  Returns:
    int32 [sum(copies)], grouped by example; -1 where there is no other item of the kind.
  """
  row = np.repeat(examples, copies)
  copy = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
  positive = rows.item[row]
  negative = np.where(positive == 0, 0, -1).astype(np.int32)
  meetings = _Meetings(rows, V, C)
  kind = meetings.kind(row, positive, positive=True)
  begin, size = meetings.pool(row, kind)

  def fits(i, drawn):
    other = (drawn > 0) & (drawn != positive[i]) & ((drawn > V) == (positive[i] > V))
    return other & (meetings.kind(row[i], drawn) == kind[i])

  seeded = mix(np.array([seed % 2**64], np.uint64))
  key = mix(mix(rows.identity[row].astype(np.uint64) ^ seeded) + np.uint64(1))
  key = mix(key ^ copy.astype(np.uint64))
  pending = np.flatnonzero((positive > 0) & (size > 1))
  for attempt in range(ATTEMPTS):
    draw = mix(key[pending] + np.uint64(attempt)) % size[pending].astype(np.uint64)
    drawn = meetings.item(kind[pending], begin[pending] + draw.astype(np.int64))
    fit = fits(pending, drawn)
    negative[pending[fit]] = drawn[fit]
    pending = pending[~fit]
  # Where few items of a pool fit, they are listed and one of them is taken.
  for i in pending:
    every = np.full(size[i], i)
    fitting = meetings.item(kind[every], begin[i] + np.arange(size[i]))
    fitting = np.sort(fitting[fits(every, fitting)])
    if len(fitting):
      choice = mix(key[i : i + 1] + np.uint64(ATTEMPTS))[0] % np.uint64(len(fitting))
      negative[i] = fitting[int(choice)]
  return negative
