"""States, vectors and scores of an exported next-item model."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lmn_jax.export.runtime.padding import least, padded
from lmn_jax.export.runtime.programs import Programs
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.export.runtime.requests import Asked, Sizes
from lmn_jax.inference.segment_states import UserStates, take_in


class NextItems:
  """Products of a user's vector with the rows of items.

  Attributes:
    whole: whether the model carries the whole past, or reads a window.
  """

  def __init__(self, manifest: dict[str, Any], programs: Programs, sizes: Sizes):
    self._programs, self._sizes = programs, sizes
    self._V: int = manifest['vocabulary']['item']
    self._T: int = manifest['length']  # events of a segment
    self._block: int = manifest['block']
    self._carry: list = manifest['carry']  # shape of each user's, and dtype
    self.whole: bool = manifest['whole']

  def empty(self, row: int) -> UserStates:
    """The state of a user without events. row: of their embedding."""
    zero = np.zeros(1, np.int64)
    carry = [np.zeros((1, *shape), dtype) for shape, dtype in self._carry]
    recent_1T = np.full((1, self._T), self._V, np.int32)
    return UserStates(np.array([row], np.int32), zero, zero.copy(), recent_1T, carry)

  def updating(self, state: UserStates, items: np.ndarray) -> Generator[None, None, UserStates]:
    """The state after new events, in steps of a segment. items: rows, oldest first."""
    return take_in(state, [items], self._fold if self.whole else None)

  def events(self, state: UserStates) -> int:
    """How many events a user's state holds."""
    return int(state.segments[0]) * self._T + int(state.held[0])

  def folded(self, state: UserStates) -> tuple[UserStates, int]:
    """A user's state without the events after its last full segment, and how many these are."""
    recent = np.full_like(state.recent, self._V)
    closed = state._replace(held=np.zeros_like(state.held), recent=recent)
    return closed, int(state.held[0])

  def pack(self, state: UserStates) -> bytes:
    """A user's state as bytes."""
    return b''.join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(state))

  def unpack(self, packed: bytes) -> UserStates:
    """The state of `pack`.

    Raises:
      RequestError: bytes of another size than a state has.
    """
    like = jax.tree.leaves(self.empty(0))
    if len(packed) != sum(x.nbytes for x in like):
      raise RequestError(f'a state of {len(packed)} bytes is none of this export')
    leaves, begin = [], 0
    for x in like:
      leaves.append(np.frombuffer(packed, x.dtype, x.size, begin).reshape(x.shape))
      begin += x.nbytes
    return UserStates(*leaves[:4], leaves[4:])

  def _fold(self, states, users):
    """Reads the full segments of these users into what is carried, in place."""
    batch, carry = self._segment(states, users)
    new_carry = self._programs.run(
      'fold', self._programs.dense, self._programs.tables, batch, carry
    )
    for old, new in zip(states.carry, new_carry, strict=True):
      old[users] = new[: len(users)]
    states.segments[users] += 1
    states.held[users], states.recent[users] = 0, self._V

  def _segment(self, states, users):
    B = least(self._sizes.batch, len(users))
    batch = {
      'item': padded(states.recent[users], (B, self._T), self._V),
      'first': padded(states.segments[users] == 0, (B,), False),
      'user': padded(states.row[users], (B,), 0),
    }
    return batch, [padded(x[users], (B, *x.shape[1:]), 0) for x in states.carry]

  def prepare(self, requests: Sequence[Asked]) -> np.ndarray:
    """Vectors [B, D] of the users, each after their newest event."""
    columns = [jax.tree.leaves(x.state) for x in requests]
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    states = UserStates(*joined[:4], joined[4:])
    batch, carry = self._segment(states, np.arange(len(requests)))
    last = np.maximum(states.held - 1, 0).astype(np.int32)
    batch['asked'] = padded(last[:, None], (len(batch['user']), 1), 0)
    return self._programs.run('vector', self._programs.dense, self._programs.tables, batch, carry)

  def score(
    self, requests: Sequence[Asked], candidates: Sequence[np.ndarray], prepared: np.ndarray
  ) -> tuple[np.ndarray, bool]:
    """Scores of a piece of each request's candidates.

    Args:
      requests: at most the largest batch size. candidates: of each int32, at most the largest
        size. prepared: of `prepare`.

    Returns:
      float32 [B, C], of sizes of compiled programs, and False: all rows are here.
    """
    B = least(self._sizes.batch, len(requests))
    C = least(self._sizes.candidates, max(map(len, candidates)))
    item_BC = padded(candidates, (B, C), self._V)
    return self._programs.run('rate', self._programs.tables, prepared, item_BC), False

  def finished(self, request: Asked, values: np.ndarray) -> np.ndarray:
    """Scores [C] as they are answered: 0 without events, NaN for an unknown candidate."""
    known = values if request.events else np.zeros_like(values)
    return np.where(request.item < self._V, known, np.float32('nan'))

  def blocks(self, request: Asked) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """All items, a block at a time: rows, scores, and False: all rows are here."""
    vector_BD, size = self.prepare([request]), self._block
    for begin in range(0, self._V, size):
      at = min(begin, self._V - size)  # the last block reaches back into the one before
      values = self._programs.run('block', self._programs.tables, vector_BD, np.int32(at))[0]
      rows = np.arange(at, at + size)
      new = rows >= begin
      yield rows[new], values[new] if request.events else np.zeros(new.sum(), np.float32), False

  def programs(self, nobody: Asked) -> Iterator[Callable[[], Any]]:
    """Calls that compile every program. nobody: a request of an unknown user."""
    for B in self._sizes.batch:
      requests = [nobody] * B
      yield lambda requests=requests: self.prepare(requests)
      if self.whole:
        states = [x.state._replace(held=x.state.held + self._T) for x in requests]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *states)
        yield lambda joined=joined: self._fold(joined, np.arange(len(joined.held)))
      vector_BD = self.prepare(requests)
      for C in self._sizes.candidates:
        items = [np.full(C, self._V, np.int32)] * B
        yield lambda requests=requests, items=items, v=vector_BD: self.score(requests, items, v)
      if B == self._sizes.batch[0]:
        yield lambda v=vector_BD: self._programs.run('block', self._programs.tables, v, np.int32(0))
