"""Permutations are bijections, uniform over epochs, and cheap at single points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.data.shuffle import permute


@given(
  n=st.one_of(st.integers(1, 40), st.integers(41, 5000)),
  seed=st.integers(-5, 2**63),
  epoch=st.integers(0, 2**40),
)
def test_a_permutation_is_a_bijection(n, seed, epoch):
  index = np.arange(n)
  permuted = permute(index, np.full(n, epoch), n, seed)
  assert permuted.dtype == np.int64
  np.testing.assert_array_equal(np.sort(permuted), index)
  # Points of two epochs in one call are permuted as in one call for each epoch.
  both = permute(np.r_[index, index], np.r_[np.full(n, epoch), np.full(n, epoch + 1)], n, seed)
  np.testing.assert_array_equal(both[:n], permuted)
  np.testing.assert_array_equal(np.sort(both[n:]), index)


@pytest.mark.parametrize('n', [5, 16, 37, 100])
def test_permutations_are_uniform_over_epochs(n):
  """Position i goes to place j in 1/n of the epochs, and adjacent ones do not stay adjacent."""
  epochs = 4000
  index = np.tile(np.arange(n), epochs)
  permuted = permute(index, np.repeat(np.arange(epochs), n), n, seed=2).reshape(epochs, n)
  counts = np.zeros((n, n))
  np.add.at(counts, (np.tile(np.arange(n), (epochs, 1)), permuted), 1)
  mean = epochs / n
  chi = ((counts - mean) ** 2 / mean).sum()
  freedom = (n - 1) ** 2
  assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom), (chi, freedom)
  pairs = np.zeros(n)
  np.add.at(pairs, (permuted[:, 1:] - permuted[:, :-1]).reshape(-1) % n, 1)
  share = pairs[1:] / pairs[1:].sum() * (n - 1)
  assert abs(share - 1).max() < 0.1  # about 4000 of each: 6 standard deviations


def test_a_permutation_of_a_trillion_is_evaluated_at_a_thousand_points():
  n = 10**12
  permuted = permute(np.arange(1000), np.zeros(1000, np.int64), n, seed=0)
  assert len(np.unique(permuted)) == 1000 and permuted.min() >= 0 and permuted.max() < n
  assert abs(permuted.mean() / n - 0.5) < 0.05
