"""Cuts one history of the examples of a store on the host: the main one, or a named one."""

from collections.abc import Sequence

import numpy as np

from lmn_jax.data.named_histories import array_of, column_of
from lmn_jax.data.reads import Reads, filled, padding_of
from lmn_jax.data.store import Part, Store
from lmn_jax.data.times import Clock


class HistoryReader:
  """The newest events of a history before each example, in the layout of batches.py.

  Attributes:
    name: of the history, '' for the main one. ladder: the lengths that steps may have.
  """

  def __init__(
    self,
    store: Store,
    parts: Sequence[Part],
    reads: Reads,
    clock: Clock | None,
    ladder: Sequence[int],
    name: str,
  ):
    """See the attributes.

    Args:
      store: of the parts. parts: those that are read, by number. reads: what is read of events
      besides the items. clock: of the times, None if they are not read.
    """
    self.name, self.ladder, self._parts, self._clock = name, tuple(ladder), parts, clock
    self._padding = {'item': np.int32(store.vocabulary['item'])}
    self._padding |= {key: padding_of(store, key) for key in reads.events}
    if clock:
      self._padding['time'] = np.int64(0)
    self._windows = [
      {column: self._windows_of(part.events(name)[column]) for column in self._padding}
      for part in parts
    ]

  def array(self, name: str) -> str:
    """The name of an array of this history in a batch."""
    return array_of(self.name, name)

  def _windows_of(self, column: np.ndarray) -> dict[int, np.ndarray]:
    """All pieces of L adjacent values, by L; without an L where there is none, or for lists."""
    return {
      length: np.lib.stride_tricks.sliding_window_view(column, length)
      for length in self.ladder
      if len(column) >= length and column.ndim == 1
    }

  def read(
    self, number: int, example: np.ndarray, user: np.ndarray, rung: int
  ) -> dict[str, np.ndarray]:
    """The history of some examples, by its arrays of a batch.

    Args:
      number: of the part. example: rows of it, int64 [B]. user: their user records in the part,
        int32 [B]. rung: of the ladder, the length L of the step.
    """
    part, most = self._parts[number], self.ladder[rung]
    end = part.examples[column_of(self.name, 'end')].take(example)
    length = np.minimum(end, most)
    first = part.users[column_of(self.name, 'offset')].take(user) + end - length
    arrays = {column: self._column(number, column, first, length, most) for column in self._padding}
    arrays['history'] = arrays.pop('item')
    if self._clock:
      gaps = self._gaps(part.examples['time'].take(example), arrays.pop('time'), length)
      arrays['time_gap'] = gaps
    arrays |= dict(length=length.astype(np.int32), total=end.astype(np.int32))
    return {self.array(name): x for name, x in arrays.items()}

  def _gaps(self, time_B: np.ndarray, time_BL: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Seconds from the events to the examples, float32 [B, L]; 0 on padding."""
    gap_BL = self._clock.seconds(time_B)[:, None] - self._clock.seconds(time_BL)
    place = np.arange(time_BL.shape[1], dtype=np.int32)[None, :]
    return np.where(place < length[:, None], gap_BL, 0).astype(np.float32)

  def _column(
    self, number: int, name: str, first: np.ndarray, length: np.ndarray, most: int
  ) -> np.ndarray:
    """A column of the events first .. first + length - 1 of a part, padded to [B, L, ...].

    Args:
      most: L of the step.
    """
    padding = self._padding[name]
    events = self._parts[number].events(self.name)[name]
    windows = self._windows[number][name].get(most)
    place = np.arange(most, dtype=np.int32)[None, :]
    if windows is None:
      history = filled((len(first), most), events, padding)
      if len(events):
        events.take(first[:, None] + place, axis=0, mode='clip', out=history)
    else:
      # A window is L adjacent events, copied as one piece. Windows that would go beyond the end of
      # the part are gathered event by event.
      last = len(windows) - 1
      history = windows[np.minimum(first, last)]
      late = np.flatnonzero(first > last)
      if len(late):
        history[late] = events.take(first[late, None] + place, mode='clip')
    # Events after the end of an example's history are of later times or other users.
    beyond = place >= length.astype(np.int32)[:, None]
    np.copyto(history, padding, where=beyond.reshape(*beyond.shape, *[1] * (history.ndim - 2)))
    return history
