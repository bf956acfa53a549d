"""Product keys against brute force over all slots; sampled positions against the exact mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import product_keys
from lmn_jax.layers.product_keys import product_top_k, sample_positions, usage, winning_ranks
from lmn_jax.planning import hlo
from tests.runs import mesh_of

search = jax.jit(product_top_k, static_argnums=2)
top_k = jax.jit(product_keys.top_k, static_argnums=1)


def brute_force(query_QHD, keys_H2NE):
  """Scores of every slot, [Q, H, N * N]."""
  Q, H, D = query_QHD.shape
  half = query_QHD.reshape(Q, H, 2, D // 2)
  a = np.einsum('qhe,hne->qhn', half[:, :, 0], keys_H2NE[:, 0])
  b = np.einsum('qhe,hne->qhn', half[:, :, 1], keys_H2NE[:, 1])
  return (a[..., :, None] + b[..., None, :]).reshape(Q, H, -1)


@given(st.integers(1, 40))
def test_winning_ranks_are_all_pairs_that_can_win(K):
  p, r = winning_ranks(K)
  want = {(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= K}
  assert set(zip(p.tolist(), r.tolist(), strict=True)) == want


def test_32_sums_need_119_pairs():
  assert len(winning_ranks(32)[0]) == 119


@given(
  seed=st.integers(0, 2**31 - 1),
  shape=st.sampled_from([(1, 1), (2, 1), (3, 3), (5, 2), (9, 2), (9, 4), (9, 9), (70, 3), (64, 8)]),
  levels=st.sampled_from([2, 5, 1000]),
)
def test_top_k_equals_brute_force(seed, shape, levels):
  """Few levels make ties: the scores must be equal, and every slot must have its score.

  Sums of such whole numbers are exact in float32.
  """
  (N, K), Q, H = shape, 4, 2
  rng = np.random.default_rng(seed)
  query = rng.integers(-levels, levels, (Q, H, 4)).astype(np.float32)
  keys = rng.integers(-levels, levels, (H, 2, N, 2)).astype(np.float32)
  slots, scores = jax.device_get(search(query, keys, K))
  everything = brute_force(query.astype(np.float64), keys.astype(np.float64))
  want = -np.sort(-everything, axis=-1)[..., :K]
  np.testing.assert_array_equal(scores, want)
  np.testing.assert_array_equal(np.take_along_axis(everything, slots, axis=-1), want)
  for row in slots.reshape(-1, K):
    assert len(set(row.tolist())) == K, 'a slot is listed twice'


@given(
  seed=st.integers(0, 2**31 - 1),
  shape=st.sampled_from([(7, 7), (9, 2), (31, 4), (32, 8), (100, 6), (1024, 32)]),
  levels=st.sampled_from([2, 9, 2**20]),
)
def test_top_k_equals_lax_top_k(seed, shape, levels):
  """Sorted, with ties; every place is listed once."""
  N, K = shape
  x = np.random.default_rng(seed).integers(-levels, levels, (3, N)).astype(np.float32)
  values, places = (array[0] for array in jax.device_get(top_k(x[None], K)))
  np.testing.assert_array_equal(values, jax.lax.top_k(x, K)[0])
  np.testing.assert_array_equal(np.take_along_axis(x, places, axis=1), values)
  assert all(len(set(row)) == K for row in places.tolist())


def test_top_k_of_nan_returns_valid_places():
  """So that a training that diverges does not write outside its tables."""
  places = jax.device_get(top_k(np.full((1, 2, 64), np.nan, np.float32), 4))[1]
  assert ((places >= 0) & (places < 64)).all()


def gradients(search):
  """Gradients of a function of the scores of `search(query, keys)`, by queries and keys."""
  return jax.jit(jax.grad(lambda query, keys: jnp.sum(jnp.sin(search(query, keys))), (0, 1)))


@pytest.mark.parametrize('K', [4, 11], ids=['less than a block', 'more than a block'])
def test_gradients_reach_queries_and_keys(K):
  """Against the gradient through the scores of all slots."""
  key = jax.random.key(0)
  query = jax.random.normal(key, (3, 2, 6))
  keys = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 12, 3))

  def plain(query, keys):
    half = query.reshape(3, 2, 2, 3)
    a = jnp.einsum('qhe,hne->qhn', half[:, :, 0], keys[:, 0])
    b = jnp.einsum('qhe,hne->qhn', half[:, :, 1], keys[:, 1])
    everything = (a[..., :, None] + b[..., None, :]).reshape(3, 2, 144)
    return jax.lax.top_k(everything, K)[0]

  ours = gradients(lambda query, keys: product_top_k(query, keys, K).scores_QHK)
  chex.assert_trees_all_close(
    ours(query, keys), gradients(plain)(query, keys), rtol=1e-4, atol=1e-5
  )


@pytest.mark.usefixtures('uncached')
@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_each_device_searches_only_its_own_queries(shape):
  """Equal results on a mesh; the only communication is one sum of the gradients of the keys."""
  mesh = mesh_of(*shape)
  rng = np.random.default_rng(0)
  query = rng.standard_normal((16, 2, 8), np.float32)
  keys = rng.standard_normal((2, 2, 64, 4), np.float32)

  def search(query, keys):
    with meshes.use_mesh(mesh):
      return product_top_k(query, keys, 11).scores_QHK

  by_query, whole = NamedSharding(mesh, meshes.BATCH), NamedSharding(mesh, meshes.REPLICATED)
  arguments = jax.device_put(query, by_query), jax.device_put(keys, whole)
  sharded = jax.jit(gradients(search), out_shardings=(by_query, whole))
  alone = gradients(lambda query, keys: product_top_k(query, keys, 11).scores_QHK)
  chex.assert_trees_all_close(sharded(*arguments), alone(query, keys), rtol=1e-4, atol=1e-5)
  moves = [move for move in hlo.compile_for(sharded, *arguments).moves if move.kind != 'copy']
  assert {move.kind for move in moves} == {'all-reduce'}
  assert sum(move.bytes for move in moves) == keys.nbytes


def test_sampled_positions_are_real_and_unbiased():
  length = jnp.array([0, 1, 3, 7])
  loss = np.arange(28, dtype=np.float64).reshape(4, 7) ** 2
  want = sum(loss[b, :n].sum() for b, n in enumerate([0, 1, 3, 7])) / 11
  totals = []
  draw = jax.jit(lambda key: sample_positions(key, length, 5))
  for i in range(400):
    position, weight = jax.device_get(draw(jax.random.key(i)))
    assert (position >= 0).all() and (position < np.maximum(length, 1)[:, None]).all()
    assert (weight[0] == 0).all(), 'an empty history has a weight'
    totals.append(np.sum(weight * np.take_along_axis(loss, position, axis=1)) / 11)
  error = np.std(totals) / np.sqrt(len(totals))
  assert abs(np.mean(totals) - want) < 4 * error


def test_usage_equals_its_definition():
  reads = np.array([4, 0, 1, 3, 9], np.int32)
  ever = np.array([1, 1, 1, 1, 0], bool)
  metrics = jax.device_get(usage(jnp.asarray(reads), jnp.asarray(ever), 4))
  p = np.array([4, 1, 3]) / 8
  assert metrics['dead'] == pytest.approx(1 / 4)
  assert metrics['ever'] == 1
  assert metrics['kl'] == pytest.approx(np.sum(p * np.log(p * 4)), rel=1e-6)
  assert metrics['entropy'] == pytest.approx(-np.sum(p * np.log(p)) / np.log(4), rel=1e-6)


@pytest.mark.parametrize(
  'reads, entropy',
  [([3, 3, 3], 1), ([0, 7, 0], 0), ([5, 5, 0], np.log(2) / np.log(3)), ([2], 1), ([0, 0], 1)],
)
def test_entropy_of_uniform_single_and_no_reads(reads, entropy):
  metrics = usage(jnp.array(reads), jnp.ones(len(reads), bool), len(reads))
  assert float(metrics['entropy']) == pytest.approx(entropy, abs=1e-6)
