"""Packs windows of different lengths into lanes of one length."""

import numpy as np
from jaxtyping import Int

Ints = Int[np.ndarray, '_']


def pack(size: Ints, room: int) -> tuple[Ints, Ints]:
  """Packs windows into lanes: first the longest that remains, then the longest that still fits.

  Lanes with windows of the same sizes are filled in one step, so that millions of windows take
  about as long as thousands.

  Args:
    size: [N], of each window, from 1 to `room`.
    room: positions of a lane.

  Returns:
    The windows lane by lane, [N], and where those of each lane begin among them, [lanes + 1].
  """
  order = np.argsort(size, kind='stable')
  begin = np.searchsorted(size[order], np.arange(room + 2))
  unpacked, taken = np.diff(begin), begin[:-1].copy()  # by size
  packed, counts, longest = [], [], room
  while longest:
    if not unpacked[longest]:
      longest -= 1
      continue
    sizes, used = [], np.zeros_like(unpacked)  # of one lane
    free, s = room, longest
    while s:
      times = min(free // s, int(unpacked[s] - used[s]))
      sizes += [s] * times
      used[s] += times
      free -= times * s
      s = min(s - 1, free)
    repeats = int(np.min(unpacked[used > 0] // used[used > 0]))
    rows = np.empty((repeats, len(sizes)), np.int64)
    for s in np.flatnonzero(used):
      n = repeats * int(used[s])
      rows[:, np.array(sizes) == s] = order[taken[s] : taken[s] + n].reshape(repeats, -1)
      taken[s] += n
      unpacked[s] -= n
    packed.append(rows.ravel())
    counts += [len(sizes)] * repeats
  return np.concatenate(packed), np.cumsum([0, *counts])


def place_of(count: Ints) -> Ints:
  """The place 0, 1, ... of each member within its group, for groups that follow each other.

  Args:
    count: members of each group.
  """
  return np.arange(np.sum(count)) - np.repeat(np.cumsum(count) - count, count)
