"""The law of the lengths: its mean, its shares against draws, and that the step determines it."""

import numpy as np
import pytest

from lmn_jax.data.train_lengths import BLOCK, TrainLengths, shares_of
from lmn_jax.errors import UserError


@pytest.mark.parametrize('law, mean', [('suffix', 0.5), ('beta', 0.5), ('beta', 0.2)])
def test_shares_are_those_of_draws_that_are_rounded_at_random(law, mean):
  lengths = TrainLengths(law, mean, 1600, 0)
  assert lengths.ladder == (100, 200, 400, 800, 1600)
  rng, n = np.random.default_rng(0), 400_000
  x = rng.random(n) if law == 'suffix' else rng.beta(mean, 1 - mean, n)
  rungs = np.array(lengths.ladder) / 1600
  x = np.maximum(x, rungs[0])
  above = np.clip(np.searchsorted(rungs, x), 1, 4)
  low, high = rungs[above - 1], rungs[above]
  rounded = np.where(rng.random(n) < (x - low) / (high - low), high, low)
  share = [np.mean(rounded == rung) for rung in rungs]
  np.testing.assert_allclose(lengths.shares, share, atol=4 / np.sqrt(n))
  assert lengths.shares.sum() == pytest.approx(1)


@pytest.mark.parametrize('a, b', [(1.0, 1.0), (0.5, 0.5), (0.2, 0.8), (0.9, 0.1)])
def test_the_mean_is_that_of_the_law_but_for_the_shortest(a, b):
  rungs = np.array([1e-6, 0.1, 0.5, 1])
  assert np.dot(shares_of(rungs, a, b), rungs) == pytest.approx(a / (a + b), abs=2e-6)


def test_draws_have_the_shares_and_follow_the_seed_and_the_block_alone():
  lengths = TrainLengths('beta', 0.4, 64, 7)
  blocks = 20_000
  drawn = [lengths.at(k * BLOCK) for k in range(1, blocks)]
  share = [drawn.count(length) / len(drawn) for length in lengths.ladder]
  np.testing.assert_allclose(share, lengths.shares, atol=4 / np.sqrt(blocks))
  for step in (BLOCK, 5 * BLOCK, 2**40):
    assert {lengths.at(step + k) for k in range(BLOCK)} == {lengths.at(step)}
  again, other = TrainLengths('beta', 0.4, 64, 7), TrainLengths('beta', 0.4, 64, 8)
  assert [again.at(k * BLOCK) for k in range(1, blocks)] == drawn
  assert [other.at(k * BLOCK) for k in range(1, 50)] != drawn[:49]


def test_the_first_block_has_the_full_length():
  assert {TrainLengths('suffix', 0.5, 64, seed).at(BLOCK - 1) for seed in range(9)} == {64}


@pytest.mark.parametrize('length, ladder', [(1, (1,)), (3, (1, 3)), (10, (1, 2, 5, 10))])
def test_short_histories_have_fewer_lengths(length, ladder):
  lengths = TrainLengths('suffix', 0.5, length, 0)
  assert lengths.ladder == ladder and lengths.shares.sum() == pytest.approx(1)
  assert {lengths.at(step) for step in range(999)} == set(ladder)


def test_full_reads_everything():
  lengths = TrainLengths('full', 0.5, 64, 0)
  assert {lengths.at(step) for step in range(0, 2**20, 997)} == {64}


def test_a_line_says_what_is_read():
  assert TrainLengths('suffix', 0.5, 16, 0).describe() == (
    'training reads histories of 1 (9%), 2 (9%), 4 (19%), 8 (38%), 16 (25%) events, 0.50 of the '
    'full length on average'
  )


@pytest.mark.parametrize('law, mean, message', [
  ('prefix', 0.5, "config.train_length='prefix' is unknown; .*suffix"),
  ('beta', 0.0, 'config.train_length_mean=0.0 must be between 0 and 1, such as 0.5'),
  ('suffix', 0.3, "train_length_mean=0.3 is for train_length='beta'; with 'suffix' leave it 0.5"),
  ('beta', 1.0, 'config.train_length_mean=1.0 must be between 0 and 1'),
])  # fmt: skip
def test_wrong_values_are_an_error_of_one_line(law, mean, message):
  with pytest.raises(UserError, match=message):
    TrainLengths(law, mean, 10, 0)
