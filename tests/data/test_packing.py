"""Windows are packed whole, each once, and tightly."""

import numpy as np

from lmn_jax.data.packing import pack


def test_every_window_is_packed_once_and_few_lanes_are_needed():
  rng = np.random.default_rng(0)
  for N, room in ((1, 5), (40, 1), (3000, 50), (500, 200), (30, 7)):
    size = np.minimum(rng.geometric(min(1, 2.5 / room), N), room)
    packed, bounds = pack(size, room)
    assert sorted(packed.tolist()) == list(range(N)) and bounds[0] == 0 and bounds[-1] == N
    used = np.add.reduceat(size[packed], bounds[:-1])
    assert (np.diff(bounds) > 0).all() and used.max() <= room
    # Of any two lanes at least one is more than half full; with short windows nearly all are full.
    assert np.sum(2 * used <= room) <= 1
    if N > 100:
      assert len(used) <= np.ceil(size.sum() / room) * 1.01 + 1


def test_the_longest_window_that_fits_is_packed_next():
  packed, bounds = pack(np.array([4, 3, 3, 2, 2, 2]), 8)  # 4 + 3, then 3 + 2 + 2, then 2
  np.testing.assert_array_equal(packed, [0, 1, 2, 3, 4, 5])
  np.testing.assert_array_equal(bounds, [0, 2, 5, 6])
