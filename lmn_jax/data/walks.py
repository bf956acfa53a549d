"""Which user each lane reads at a step, where lanes read whole histories segment by segment."""

import threading

import numpy as np
from jaxtyping import Int

from lmn_jax.data.packing import place_of
from lmn_jax.data.shuffle import permute

Ints = Int[np.ndarray, '_']


def deal(segments: Ints, lanes: int) -> list[Ints]:
  """Deals users to lanes, so that all lanes have about as many segments.

  The longest are dealt first, to the lanes in turn, forwards and backwards.

  Args:
    segments: [U], of each user.
    lanes: number of lanes.

  Returns:
    The users of each lane, the longest first.
  """
  order = np.argsort(-segments, kind='stable')
  turn, place = np.divmod(np.arange(len(order)), lanes)
  lane = np.where(turn % 2, lanes - 1 - place, place)
  by_lane = np.argsort(lane, kind='stable')
  return np.split(order[by_lane], np.cumsum(np.bincount(lane, minlength=lanes))[:-1])


class Walks:
  """The walks of all lanes: each reads its users one after the other, and then again.

  Attributes:
    dealt: the users of each lane.
    batches: number of steps in which every lane has read its users once.
  """

  def __init__(self, segments: Ints, lanes: int, seed: int, shuffle: bool):
    """Deals the users.

    Args:
      segments: [U], of each user, at least 1.
      lanes: number of lanes.
      seed: of the orders.
      shuffle: True: without end, each lane in a new order each round. False: once.
    """
    self.dealt = deal(segments, lanes)
    self._segments, self._seed, self._shuffle = segments, seed, shuffle
    self._users = np.concatenate(self.dealt)  # of all lanes, each in the order dealt
    sizes = [len(users) for users in self.dealt]
    self._bounds = np.cumsum([0, *sizes])  # of the lanes, among the users
    self._before = np.cumsum([0, *(segments[users].sum() for users in self.dealt)])
    self._total = np.diff(self._before)  # segments of each lane
    self.batches = int(self._total.max())
    # The round of each lane whose order is in `_order`, and the segments of all lanes up to and
    # with each user in this order. They change in place, for threads that cut different steps.
    self._round = np.full(lanes, -1 if shuffle else 0)
    self._order, self._upto = self._users.copy(), np.cumsum(segments[self._users])
    self._lock = threading.Lock()

  def at(self, lane: Ints, step: Ints) -> tuple[Ints, Ints]:
    """The user and the segment that lanes [N] read at steps [N]; (-1, 0) for a finished lane."""
    total = self._total[lane]
    turn, step = np.divmod(step, np.maximum(total, 1))
    user, segment = np.full(len(lane), -1), np.zeros(len(lane), np.int64)
    reads = total > 0 if self._shuffle else (total > 0) & (turn == 0)
    # In consecutive steps a lane rarely reaches more than its next round.
    least = np.full(len(self._total), np.iinfo(np.int64).max)
    np.minimum.at(least, lane, turn)
    later = turn - least[lane]
    for k in range(int(later[reads].max(initial=-1)) + 1):
      at = np.flatnonzero(reads & (later == k))
      with self._lock:
        self._set_rounds(lane[at], turn[at])
        before = self._before[lane[at]]
        index = np.searchsorted(self._upto, before + step[at], side='right')
        user[at] = self._order[index]
        segment[at] = step[at] - (self._upto[index] - before - self._segments[user[at]])
    return user, segment

  def _set_rounds(self, lane: Ints, turn: Ints) -> None:
    """Sets the order of lanes [N] to that of their rounds [N]; equal lanes have equal rounds."""
    changed = self._round[lane] != turn
    if not changed.any():
      return
    self._round[lane] = turn
    lanes = np.unique(lane[changed])
    size = self._bounds[lanes + 1] - self._bounds[lanes]
    for n in np.unique(size).tolist():  # lanes differ by one user at most
      self._set_order(lanes[size == n], n)

  def _set_order(self, lanes: Ints, n: int) -> None:
    """Sets the order of lanes with n users each to that of their rounds."""
    epoch = np.repeat(self._round[lanes] * len(self._round) + lanes, n)
    place = place_of(np.full(len(lanes), n))
    begin = np.repeat(self._bounds[lanes], n)
    users = self._users[begin + permute(place, epoch, n, self._seed)]
    upto = np.cumsum(self._segments[users].reshape(-1, n), axis=1) + self._before[lanes][:, None]
    self._order[begin + place], self._upto[begin + place] = users, upto.ravel()
