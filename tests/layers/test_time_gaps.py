"""Buckets of gaps against the formula, and gaps of pairs against loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.layers.time_gaps import BUCKETS, bucket, pair_buckets, times_of_history

DAY = 86_400


def formula(gap):
  return min(127, int(np.floor(np.log(max(1.0, gap)) / 0.301)))


@pytest.mark.parametrize(
  'gap, expected', [(0, 0), (-3, 0), (1, 0), (1.35, 0), (1.36, 1), (DAY, 37), (365 * DAY, 57)]
)
def test_buckets_of_some_gaps(gap, expected):
  assert int(bucket(jnp.float32(gap))) == expected == formula(gap)


def test_buckets_equal_the_formula():
  gaps = np.unique(np.geomspace(1, 2**31, 20_000).astype(np.int64)).astype(np.float32)
  # Within rounding of a bound either side is right.
  log = np.log(gaps.astype(np.float64)) / 0.301
  inside = np.abs(log - np.round(log)) > 1e-5
  assert inside.mean() > 0.99
  want = [formula(float(gap)) for gap in gaps[inside]]
  np.testing.assert_array_equal(bucket(jnp.asarray(gaps[inside])), want)


@given(st.floats(0, 2.0**120, width=32), st.floats(0, 2.0**120, width=32))
def test_a_longer_gap_has_no_lower_bucket(a, b):
  low, high = (int(bucket(jnp.float32(x))) for x in sorted((a, b)))
  assert 0 <= low <= high < BUCKETS


def test_gaps_of_pairs_equal_loops_and_are_exact_in_seconds():
  """Differences of a second after 60 years, which float32 times could not represent."""
  time = np.array([[0, 1_900_000_000, 1_900_000_001, 1_900_000_003]], np.int32)
  gap = np.array([[1_900_000_000, 1, 2, 100]], np.float32)
  buckets = pair_buckets(jnp.asarray(time), jnp.asarray(gap), jnp.asarray(time))
  for t in range(4):
    for s in range(4):
      seconds = abs(int(time[0, t]) - int(time[0, s]) + gap[0, t])
      assert int(buckets[0, t, s]) == formula(seconds), (t, s)


def test_the_request_of_an_event_of_a_history_is_the_next_event():
  gap = np.array([[50, 20, 5, 7], [9, 8, 2, 1], [7, 7, 7, 7]], np.float32)  # 3, 4 and no events
  real = np.arange(4)[None] < np.array([3, 4, 0])[:, None]
  time_BL, gap_BL = times_of_history(jnp.asarray(gap), jnp.asarray(real))
  np.testing.assert_array_equal(time_BL, np.where(real, -gap, 0))
  np.testing.assert_array_equal(gap_BL[0, :3], [30, 15, 5])
  np.testing.assert_array_equal(gap_BL[1], [1, 6, 1, 1])
