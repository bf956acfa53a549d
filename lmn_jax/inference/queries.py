"""The rows to score, in the ids of a store, and their scores."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from lmn_jax.data.input_rows import Histories

Ints = Int[np.ndarray, '_']


class Queries(NamedTuple):
  """N rows to score.

  user: raw user ids, null where missing. record: users' places in the store, -1 for none. end: how
  many of the oldest events of the user's history a row may read. time: of each row, as in the
  store; None where all known events count. now: the time of all requests where rows have none (the
  newest that is known, see `state_table.newest_time`). item: indices (data/item_index.py), None
  where the best items are requested. context: 'context.f' -> codes or numbers, for click models.
  history: the rows' own histories, read instead of the store's; `end` is then the number of events
  of each.
  """

  user: pa.ChunkedArray
  record: Ints
  end: Ints
  time: Ints | None
  now: int
  item: Ints | None
  context: dict[str, np.ndarray]
  history: Histories | None = None

  def requests(self) -> Ints:
    """Returns the time of each row's request, at which gaps of time end; int64 [N]."""
    return np.full(len(self.record), self.now, np.int64) if self.time is None else self.time


class Scores(NamedTuple):
  """Scores of N rows.

  score: float32 [N] of pairs, or [N, K] of items, best first; -inf behind the last candidate.
  item: int32 [N, K], indices. events: int64 [N], lengths of the histories that were read.
  among: number of rows with a time among events that a state holds and the store does not.
  """

  score: Float[np.ndarray, 'N ...']
  events: Ints
  item: Int[np.ndarray, 'N K'] | None = None
  among: int = 0


def filled(N: int, size: int) -> Iterator[Ints]:
  """Yields the indices 0 to N - 1 in blocks of one size; the last block repeats the last index."""
  for begin in range(0, N, size):
    yield np.minimum(np.arange(begin, begin + size), N - 1)
