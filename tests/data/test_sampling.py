"""Draws have the probabilities of their sampler, and are independent of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.data import sampling
from lmn_jax.data.sampling import Sampler, alias_tables
from lmn_jax.errors import UserError


def drawn(sampler, steps, lanes=4, T=8):
  """The draws of some steps: [S, B, T, N]."""
  target, rows = np.zeros((lanes, T), np.int32), np.arange(lanes)
  return np.stack([sampler.sample(step, target, rows)['negative'] for step in steps])


def assert_plausible(counts, share):
  """A chi-square test, which draws with these probabilities fail once in a million times."""
  mean = counts.sum() * share
  chi = ((counts - mean) ** 2 / mean).sum()
  assert scipy.stats.chi2.sf(chi, len(share) - 1) > 1e-6, chi


@pytest.mark.parametrize('V', [3, 50, 3000])
@pytest.mark.parametrize('name', ['uniform', 'popularity'])
@pytest.mark.parametrize('seed', [0, -7, 2**63])
def test_draws_have_the_probabilities_of_the_sampler(name, V, seed):
  rng = np.random.default_rng(0)
  count = np.maximum(rng.zipf(1.5, V) % 1000, 1)
  share = count / count.sum() if name == 'popularity' else np.r_[0, np.full(V - 1, 1 / (V - 1))]
  draws = drawn(Sampler(name, V, count, (4, 8, 500), seed), range(40))
  assert draws.dtype == np.int32
  counts = np.bincount(draws.ravel(), minlength=V)
  assert not counts[share == 0].any()
  rare = draws.size * share < 5  # too few of each for the test: they are counted together
  merged = [np.append(x[~rare], x[rare].sum()) for x in (counts, share)]
  possible = merged[1] > 0
  assert_plausible(merged[0][possible], merged[1][possible])


def test_draws_are_independent_of_those_beside_them_and_of_other_steps():
  """Pairs of draws have all pairs of values equally often."""
  V, draws = 21, drawn(Sampler('uniform', 21, None, (4, 8, 500), 1), range(100)) - 1
  other = drawn(Sampler('uniform', 21, None, (4, 8, 500), 2), range(100)) - 1
  pairs = {
    'draws of a target': (draws[..., 1:], draws[..., :-1]),
    'targets': (draws[:, :, 1:], draws[:, :, :-1]),
    'lanes': (draws[:, 1:], draws[:, :-1]),
    'adjacent steps': (draws[1:], draws[:-1]),
    'steps two to the 6 apart': (draws[64:], draws[:-64]),
    'seeds': (draws, other),
  }
  for name, (a, b) in pairs.items():
    counts = np.bincount((a.astype(np.int64) * (V - 1) + b).ravel(), minlength=(V - 1) ** 2)
    assert counts.sum() == a.size, name
    assert_plausible(counts, np.full((V - 1) ** 2, (V - 1) ** -2.0))


def test_draws_of_a_step_are_not_those_of_another_in_another_order():
  """With many items, two steps have few draws in common."""
  draws = drawn(Sampler('uniform', 2**31 - 1, None, (4, 8, 500), 1), range(30)).reshape(30, -1)
  assert len(np.unique(draws)) > draws.size - 100  # 54 equal pairs are expected


@given(
  word=st.integers(0, 2**32 - 1),
  size=st.one_of(st.integers(1, 2**31 - 1), st.sampled_from([2**16 - 1, 2**16, 2**31 - 1])),
  share=st.floats(0, 1, exclude_max=True),
)
def test_words_are_scaled_exactly(word, size, share):
  low = int(share * size)
  scaled = sampling._scaled(np.array([word], np.uint32), size, np.uint32(low))
  assert scaled.dtype == np.uint32 and scaled[0] == (word * size + low) >> 32 < size


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.integers(1, 10**6))
def test_alias_tables_have_the_shares_of_the_counts(counts, factor):
  count = np.array(counts) * factor
  threshold, alias = alias_tables(count)
  own = np.where(alias == np.arange(len(count)), 1, threshold / 2**32)
  share = own.copy()
  np.add.at(share, alias, 1 - own)
  np.testing.assert_allclose(share / len(count), count / count.sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize('name', ['uniform', 'popularity', 'in_batch'])
def test_numpy_and_jax_draw_the_same_items_for_any_rows(name, monkeypatch):
  monkeypatch.setattr(sampling, 'BLOCK', 3 * 7 * 5)  # several blocks
  rng, V = np.random.default_rng(0), 70_000
  sampler = Sampler(name, V, rng.integers(1, 9, V), (16, 7, 5), 3)
  target = rng.integers(0, V + 1, (16, 7)).astype(np.int32)
  whole = sampler.sample(2**35 + 1, target, np.arange(16))
  keys = sampler.keys(np.array([2**35, 2**35 + 1]))[1]
  traced = jax.jit(sampler.draws.fields)(
    keys, jnp.array(target), jnp.arange(16, dtype=jnp.uint32), sampler.tables
  )
  rows = np.array([1, 4, 15])
  some = sampler.sample(2**35 + 1, target[rows], rows)
  assert whole.keys() == traced.keys() == some.keys()
  for name, x in whole.items():
    assert traced[name].dtype == x.dtype == (np.int32 if name == 'negative' else np.float32)
    np.testing.assert_array_equal(traced[name], x)
    np.testing.assert_array_equal(some[name], x[rows])


@pytest.mark.parametrize(
  'count, shape, message',
  [
    (np.ones(3, int), (2**12, 2**10, 2**11), 'negatives=2048 for 4096 lanes of 1024 events'),
    (np.full(3, 2**61), (4, 2, 2), "'popularity', at most 2.63 as a product; use 'uniform'"),
  ],
)
def test_what_the_draws_cannot_count_is_an_error_of_one_line(count, shape, message):
  with pytest.raises(UserError, match=message) as error:
    Sampler('popularity', 3, count, shape, 0)
  assert '\n' not in str(error.value)
