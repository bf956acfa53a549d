"""Windows of different lengths side by side in lanes of one length."""

import numpy as np
from jaxtyping import Int

Ints = Int[np.ndarray, '_']


def pack(size: Ints, room: int) -> tuple[Ints, Ints]:
  """Windows side by side, as many as there is room for.

  A lane takes the longest that is left, and then, again and again, the longest that still fits.
  Lanes filled alike are made together, so that millions take no longer than thousands.

  Args:
    size: [N], from 1 to `room`. room: positions of a lane.

  Returns:
    Windows lane by lane [N], and where each lane's begin among them [lanes + 1].
  """
  order = np.argsort(size, kind='stable')
  begin = np.searchsorted(size[order], np.arange(room + 2))
  left, taken = np.diff(begin), begin[:-1].copy()
  packed, counts, longest = [], [], room
  while longest:
    if not left[longest]:
      longest -= 1
      continue
    own, used = [], np.zeros_like(left)
    free, s = room, longest
    while s:
      times = min(free // s, int(left[s] - used[s]))
      own += [s] * times
      used[s] += times
      free -= times * s
      s = min(s - 1, free)
    repeats = int(np.min(left[used > 0] // used[used > 0]))
    rows = np.empty((repeats, len(own)), np.int64)
    for s in np.flatnonzero(used):
      n = repeats * int(used[s])
      rows[:, np.array(own) == s] = order[taken[s] : taken[s] + n].reshape(repeats, -1)
      taken[s] += n
      left[s] -= n
    packed.append(rows.ravel())
    counts += [len(own)] * repeats
  return np.concatenate(packed), np.cumsum([0, *counts])


def place_of(count: Ints) -> Ints:
  """For groups that lie one behind the other, the place of each member in its own: 0, 1, ...

  Args:
    count: members of each group.
  """
  return np.arange(np.sum(count)) - np.repeat(np.cumsum(count) - count, count)
