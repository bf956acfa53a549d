"""Ranks against a plain count, on one device and on eight, and the metrics of ranks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking
from tests.runs import mesh_of

V, R, D, Q, S = 90, 128, 6, 16, 12


def slow_ranks(score_QV, target_Q, seen):
  """Ranks by a loop over the candidates."""
  ranks = []
  for score, target, seen_items in zip(score_QV, target_Q, seen, strict=True):
    rank = 1
    for item in range(1, len(score)):
      if item != target and item not in seen_items and not score[item] < score[target]:
        rank += 1
    ranks.append(rank)
  return ranks


@pytest.fixture(scope='module')
def arrays():
  rng = np.random.default_rng(0)
  rows = rng.integers(-2, 3, (R, D)).astype(np.float32)  # integers: ties, and no rounding
  rows[V:] = 9  # padding rows, with the highest scores
  query = rng.integers(-2, 3, (Q, D)).astype(np.float32)
  target = rng.integers(1, V, Q).astype(np.int32)
  seen = rng.integers(0, V + 1, (Q, S)).astype(np.int32)
  seen[0, 0] = target[0]  # a seen target is still ranked
  return rows, query, target, seen


@pytest.mark.parametrize('mesh_shape', [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize('block', [2**22, Q * 7])
def test_ranks_equal_a_plain_count(arrays, mesh_shape, block):
  rows, query, target, seen = arrays
  mesh = mesh_of(*mesh_shape)
  placed = jax.device_put(rows, NamedSharding(mesh, meshes.ROWS))
  ranks = ranking.ranks(placed, query, target, seen, mesh, V, block)
  reference = slow_ranks(query @ rows[:V].T, target, [set(x.tolist()) for x in seen])
  assert ranks.tolist() == reference and len(set(reference)) > 8


def test_ranks_on_the_host_equal_a_plain_count(arrays):
  rows, query, target, seen = arrays
  score = query @ rows[:V].T
  lists = [x[x < V] for x in seen]
  assert ranking.ranks_of(score, target, lists).tolist() == slow_ranks(
    score, target, [set(x.tolist()) for x in lists]
  )


def test_ties_and_nan_count_against_the_model(arrays):
  rows, query, target, seen = arrays
  none = np.full((Q, 1), V, np.int32)
  for blind in (np.zeros_like(query), np.full_like(query, np.nan)):
    assert (
      ranking.ranks(jnp.asarray(rows), blind, target, none, mesh_of(1), V).tolist() == [V - 1] * Q
    )
  unknown = ranking.ranks(jnp.asarray(rows), query, np.zeros(Q, np.int32), none, mesh_of(1), V)
  assert unknown.tolist() == [V] * Q, 'after all candidates'


def test_metrics_of_ranks_equal_values_by_hand():
  metrics = ranking.measure(np.array([1, 2, 3, 11]), (2, 10))
  assert metrics['rows'] == 4 and metrics['hr@2'] == 0.5 and metrics['hr@10'] == 0.75
  assert metrics['ndcg@2'] == pytest.approx((1 + 1 / np.log2(3)) / 4)
  assert metrics['ndcg@10'] == pytest.approx((1 + 1 / np.log2(3) + 0.5) / 4)
  assert metrics['mrr'] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 11) / 4)
  assert ranking.measure(np.array([], int), (2,))['hr@2'] is None


def test_sampled_metrics_are_the_mean_over_samples():
  """Against all sets of negatives of a small catalogue, and many samples of a larger one."""
  rank, rivals, ks = np.array([1, 3, 6, 40]), np.array([5, 5, 5, 60]), (1, 3)
  rng = np.random.default_rng(0)
  drawn = []
  for r, c in zip(rank, rivals, strict=True):
    before = np.arange(c) < r - 1
    sets = (
      itertools.combinations(range(c), 4)
      if c < 9
      else (rng.choice(c, 4, replace=False) for _ in range(4000))
    )
    drawn.append([ranking.measure(np.array([1 + before[list(x)].sum()]), ks) for x in sets])
  metrics = ranking.measure_sampled(rank, rivals, 4, ks)
  assert metrics['rows'] == 4 and metrics['negatives'] == 4
  for name in ('hr@1', 'hr@3', 'ndcg@3', 'mrr'):
    expected = np.mean([np.mean([x[name] for x in samples]) for samples in drawn])
    assert metrics[name] == pytest.approx(expected, abs=4e-3)
  few = ranking.measure_sampled(np.array([3]), np.array([5]), 100, ks)
  assert few['hr@3'] == pytest.approx(1) and few['mrr'] == pytest.approx(1 / 3)
  assert ranking.measure_sampled(rank[:0], rivals[:0], 4, ks)['mrr'] is None


def test_seen_items_are_padded_to_few_shapes():
  ids = ranking.padded([np.arange(3), np.arange(17)], V)
  assert ids.shape == (2, 32) and ids[0].tolist() == [0, 1, 2] + [V] * 29
