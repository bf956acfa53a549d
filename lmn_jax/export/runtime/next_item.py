"""States of users, and scores, of an exported next-item model."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lmn_jax.export.runtime.padding import least, padded
from lmn_jax.export.runtime.programs import Programs
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.export.runtime.requests import Request, Sizes
from lmn_jax.inference.segment_states import (
  UNTIMED,
  Events,
  UserStates,
  clear,
  no_events,
  segment_of,
  take_in,
)


class NextItemScorer:
  """Computes products of a user's vector and item rows.

  Attributes:
    whole: whether the model reads whole histories, or only the newest window.
  """

  def __init__(
    self, manifest: dict[str, Any], programs: Programs, sizes: Sizes, padding: dict[str, np.ndarray]
  ):
    """padding: by name the value of a missing event, see `Histories`."""
    self._padding = padding
    self._programs, self._sizes = programs, sizes
    self._V: int = manifest['vocabulary']['item']
    self._T: int = manifest['length']  # events of a segment
    self._D: int = manifest['tables']['item']['width']
    self._block: int = manifest['block']
    self._carry: list = manifest['carry']  # (shape for a user, dtype) of each array
    self.whole: bool = manifest['whole']

  def empty(self, row: int) -> UserStates:
    """Returns the state of a user without events. row: embedding row."""
    zero = np.zeros(1, np.int64)
    carry = [np.zeros((1, *shape), dtype) for shape, dtype in self._carry]
    recent = no_events(self._padding, 1, self._T)
    return UserStates(np.array([row], np.int32), zero, zero.copy(), recent, carry)

  def updating(self, state: UserStates, events: Events) -> Generator[None, None, UserStates]:
    """Returns the state after new events, in steps of a segment."""
    return take_in(state, [events], self._fold if self.whole else None)

  def newest(self, state: UserStates) -> int:
    """Returns the newest time of the events that a state holds, in seconds; UNTIMED for none."""
    if 'time' not in self._padding:
      return UNTIMED
    return int(state.recent['time'][0, : state.held[0]].max(initial=UNTIMED))

  def events(self, state: UserStates) -> int:
    """Returns how many events a user's state holds."""
    return int(state.segments[0]) * self._T + int(state.held[0])

  def folded(self, state: UserStates) -> tuple[UserStates, int]:
    """Returns a state without the events after its last full segment, and their number."""
    recent = no_events(self._padding, 1, self._T)
    closed = state._replace(held=np.zeros_like(state.held), recent=recent)
    return closed, int(state.held[0])

  def pack(self, state: UserStates) -> bytes:
    """Returns a user's state as bytes."""
    return b''.join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(state))

  def unpack(self, packed: bytes) -> UserStates:
    """Returns the state that `pack` wrote.

    Raises:
      RequestError: a wrong number of bytes.
    """
    empty = self.empty(0)
    like, structure = jax.tree.flatten(empty)
    if len(packed) != (size := sum(x.nbytes for x in like)):
      raise RequestError(f'a state has {len(packed)} bytes, and states of this export {size}')
    leaves, begin = [], 0
    for x in like:
      leaves.append(np.frombuffer(packed, x.dtype, x.size, begin).reshape(x.shape))
      begin += x.nbytes
    return jax.tree.unflatten(structure, leaves)

  def _fold(self, states, users, request):
    """Reads the full segments of these users into their carry, in place."""
    batch, carry = self._segment(states, users, request)
    new_carry = self._programs.run(
      'fold', self._programs.dense, self._programs.tables, batch, carry
    )
    for old, new in zip(states.carry, new_carry, strict=True):
      old[users] = new[: len(users)]
    clear(states, users, self._padding)

  def _segment(self, states, users, request):
    B = least(self._sizes.batch, len(users))
    batch = {
      name: padded(x, (B, *x.shape[1:]), self._padding.get(name, 0))
      for name, x in segment_of(states, users, request).items()
    }
    return batch, [padded(x[users], (B, *x.shape[1:]), 0) for x in states.carry]

  def prepare(self, requests: Sequence[Request]) -> jax.Array:
    """Returns the vectors [B, D] of the users, each after their newest event, on the device."""
    states = jax.tree.map(lambda *x: np.concatenate(x), *(x.state for x in requests))
    times = None if requests[0].time is None else np.array([x.time for x in requests], np.int64)
    batch, carry = self._segment(states, np.arange(len(requests)), times)
    last = np.maximum(states.held - 1, 0).astype(np.int32)
    batch['asked'] = padded(last[:, None], (len(batch['user']), 1), 0)
    return self._programs.call('vector', self._programs.dense, self._programs.tables, batch, carry)

  def score(
    self, requests: Sequence[Request], candidates: Sequence[np.ndarray], prepared: jax.Array
  ) -> tuple[np.ndarray, bool]:
    """Scores some candidates of each request.

    Args:
      requests: at most the largest batch size. candidates: int32 rows for each request, at most the
        largest number of candidates. prepared: result of `prepare`.

    Returns:
      float32 [B, C], of sizes of a compiled program, and False: this process has all rows.
    """
    B = least(self._sizes.batch, len(requests))
    C = least(self._sizes.candidates, max(map(len, candidates)))
    item_BC = padded(candidates, (B, C), self._V)
    return self._programs.run('rate', self._programs.tables, prepared, item_BC), False

  def finished(self, request: Request, values: np.ndarray) -> np.ndarray:
    """Returns the scores [C] of the answer: 0 without events, NaN for an unknown candidate."""
    values = values if request.events else np.zeros_like(values)
    return np.where(request.item < self._V, values, np.float32('nan'))

  def blocks(self, request: Request) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yields (rows, scores, False) of all items, in blocks; this process has all rows."""
    vector_BD, size = self.prepare([request]), self._block
    for begin in range(0, self._V, size):
      at = min(begin, self._V - size)  # the last block overlaps the one before
      values = self._programs.run('block', self._programs.tables, vector_BD, np.int32(at))[0]
      rows = np.arange(at, at + size)
      new = rows >= begin
      yield rows[new], values[new] if request.events else np.zeros(new.sum(), np.float32), False

  def programs(self, empty: Request) -> Iterator[Callable[[], Any]]:
    """Yields functions that compile all programs. empty: a request of an unknown user."""
    for B in self._sizes.batch:
      requests = [empty] * B
      yield lambda requests=requests: self.prepare(requests)
      if self.whole:
        states = [x.state._replace(held=x.state.held + self._T) for x in requests]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *states)
        request = None if empty.time is None else np.full(B, empty.time, np.int64)
        yield lambda x=joined, request=request: self._fold(x, np.arange(len(x.held)), request)
      vector_BD = self._programs.place(np.zeros((B, self._D), np.float32))
      for C in self._sizes.candidates:
        items = [np.full(C, self._V, np.int32)] * B
        yield lambda requests=requests, items=items, v=vector_BD: self.score(requests, items, v)
      if B == self._sizes.batch[0]:
        yield lambda v=vector_BD: self._programs.run('block', self._programs.tables, v, np.int32(0))
