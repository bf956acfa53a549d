"""What lanes read at some steps: pieces of histories, and the places of their events."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lmn_jax.data.packing import place_of
from lmn_jax.data.reads import Reads, clock_of, filled, padding_of
from lmn_jax.data.store import Store

Ints = Int[np.ndarray, '_']
MOST = np.iinfo(np.int32).max


class Pieces(NamedTuple):
  """What some lanes read at some steps, lane by lane: P pieces of entries.

  rows: number of lanes times steps. lane: a row. entry, record (of the user), begin (events of the
  entry before it), events, column (at which it begins in its lane). Each [P].
  """

  rows: int
  lane: Ints
  entry: Ints
  record: Ints
  begin: Ints
  events: Ints
  column: Ints

  def grid(self, values: np.ndarray, width: int) -> Int[np.ndarray, 'rows width']:
    """Values [P] at the places of the pieces in their lanes, int32, padded with 0."""
    grid = np.zeros((self.rows, width), np.int32)
    grid[self.lane, place_of(np.bincount(self.lane, minlength=self.rows))] = values
    return grid


class Places(NamedTuple):
  """The events of pieces, each [E], and where they are in a batch.

  shape: [B, T] of the batch. at: lane and column of each. piece: its piece. part: of the store.
  event: its number within the part.
  """

  shape: tuple[int, int]
  at: tuple[Ints, Ints]
  piece: Ints
  part: Ints
  event: Ints

  @classmethod
  def of(cls, pieces: Pieces, length: int, part: Ints, first: Ints) -> 'Places':
    """The places of pieces. length: T. part, first: part and first event of each piece, [P]."""
    piece, place = np.repeat(np.arange(len(pieces.lane)), pieces.events), place_of(pieces.events)
    at = pieces.lane[piece], pieces.column[piece] + place
    return cls((pieces.rows, length), at, piece, part[piece], first[piece] + place)


class EventColumns:
  """The columns that are read of the events of a store."""

  def __init__(self, store: Store, reads: Reads):
    self._histories = [part.history for part in store.parts]
    self._clock = clock_of(store) if reads.time else None
    self._padding = {key: padding_of(store, key) for key in ('item', *reads.events)}
    self._keys = reads.events

  def items(self, places: Places, shift: int = 0) -> Int[np.ndarray, 'B T']:
    """The item rows of events, or of those `shift` later, padded with V."""
    return self._read('item', places, shift)

  def features(self, places: Places) -> dict[str, np.ndarray]:
    """The event features that are read, by key: [B, T] or [B, T, M]."""
    return {key: self._read(key, places) for key in self._keys}

  def times(self, places: Places, asked: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The fields `time` and `time_gap` of a batch.

    Args:
      places: of the events.
      asked: in validation and test, 'asked', 'number' and 'asked_time' of the targets, [B, P] each.
    """
    time, request = (self._seconds(places, shift) for shift in (0, 1))
    if asked is not None:
      lane, k = np.nonzero(asked['number'] >= 0)
      at = lane, asked['asked'][lane, k]
      request[at] = MOST
      np.minimum.at(request, at, asked['asked_time'][lane, k])
    gap = np.zeros(places.shape, np.float32)
    gap[places.at] = (request - time)[places.at]
    return dict(time=time, time_gap=gap)

  def seconds(self, time: Int[np.ndarray, '...']) -> Int[np.ndarray, '...']:
    """Times as in the store, int64, as int32 seconds."""
    return self._clock.seconds(time).astype(np.int32)

  def _seconds(self, places, shift):
    """The seconds of events, or of those `shift` later, int32 [B, T]; 0 on padding."""
    seconds = np.zeros(places.shape, np.int32)
    seconds[places.at] = self.seconds(self._values('time', places, shift))
    return seconds

  def _read(self, name, places, shift=0):
    padded = filled(places.shape, self._histories[0][name], self._padding[name])
    padded[places.at] = self._values(name, places, shift)
    return padded

  def _values(self, name, places, shift):
    """The values of events, or of those `shift` later; any value after the last of a part."""
    column = self._histories[0][name]
    values = np.empty((len(places.event), *column.shape[1:]), column.dtype)
    for number in np.unique(places.part):
      inside = places.part == number
      values[inside] = self._histories[number][name].take(
        places.event[inside] + shift, axis=0, mode='clip'
      )
    return values
