"""History search and the attention over its results, against the formulas in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import history_search
from lmn_jax.planning import hlo
from tests.runs import but_slow, mesh_of


def newest_of_best(score, mask, K):
  """Positions of the K best of one history, best first; of equal scores, the newest first."""
  places = [place for place in range(len(score)) if mask[place]]
  return sorted(places, key=lambda place: (-score[place], -place))[:K]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_search_returns_the_best_of_the_mask(seed, L, K, ties):
  rng = np.random.default_rng(seed)
  score = rng.integers(-1, 2, (3, L)).astype(np.float32) if ties else rng.normal(size=(3, L))
  mask = rng.random((3, L)) < 0.6
  mask[0] = False
  # Two targets for each history; the second has the negated scores.
  scores = np.stack([score, -score], axis=1)
  hits = history_search.search(jnp.asarray(scores, jnp.float32), jnp.asarray(mask)[:, None], K)
  assert hits.place_BQK.shape == hits.mask_BQK.shape == (3, 2, min(K, L))
  for b, q in np.ndindex(3, 2):
    places = np.asarray(hits.place_BQK)[b, q][np.asarray(hits.mask_BQK)[b, q]]
    assert places.tolist() == newest_of_best(scores[b, q], mask[b], K)
  taken = history_search.take(jnp.arange(3 * L).reshape(3, L, 1), hits)[..., 0]
  want = np.arange(3)[:, None, None] * L + np.asarray(hits.place_BQK)
  np.testing.assert_array_equal(taken, want)


def test_scores_of_a_search_get_no_gradient():
  mask = jnp.ones((1, 1, 4), bool)
  x = jnp.arange(4.0)[None, None]

  def f(score):
    return jnp.sum(history_search.take(x[0, :, :, None], history_search.search(score, mask, 2)))

  assert f(x) == 5 and not np.asarray(jax.grad(f)(x)).any()


@pytest.mark.usefixtures('uncached')
def test_every_device_searches_only_its_own_histories():
  mesh = mesh_of(4, 2)
  split = NamedSharding(mesh, meshes.BATCH)
  score = np.random.default_rng(0).normal(size=(16, 1, 30)).astype(np.float32)
  arguments = (score, np.ones((16, 1, 30), bool), score[:, 0, :, None])
  arguments = jax.device_put(arguments, split)

  def find(score, mask, x):
    with meshes.use_mesh(mesh):
      hits = history_search.search(score, mask, 4)
      return hits, history_search.take(x, hits)

  compiled = jax.jit(find).lower(*arguments).compile()
  assert not re.search(hlo.COLLECTIVES, compiled.as_text())
  hits, taken = compiled(*arguments)
  assert hits.place_BQK.sharding.is_equivalent_to(split, 3)
  np.testing.assert_array_equal(hits.place_BQK, np.argsort(-score, axis=2)[..., :4])
  np.testing.assert_array_equal(taken[..., 0], -np.sort(-score, axis=2)[..., :4])


def test_matches_of_single_and_several_values():
  single = history_search.matches(jnp.array([[2, 1], [5, 2]]), jnp.array([[2, 1, 5], [5, 2, 5]]), 5)
  want = [[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 1, 0]]]
  np.testing.assert_array_equal(single, want)  # 5 is the padding
  target = jnp.array([[1, 5, 5], [5, 5, 5]])[:, None]
  history = jnp.array([[[5, 5, 5], [0, 5, 1], [0, 2, 5]]] * 2)
  several = history_search.matches(target, history, 5)
  np.testing.assert_array_equal(several[:, 0], [[0, 1, 0], [0, 0, 0]])


def test_fingerprints_are_signs_of_random_projections():
  x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  words = np.asarray(history_search.fingerprint(jnp.asarray(x), words=3, bits=32, seed=4))
  assert words.shape == (2, 3, 3) and words.dtype == np.uint32
  r = np.asarray(jax.random.normal(jax.random.key(4), (5, 96)))
  bit = (x @ r >= 0).reshape(2, 3, 3, 32)
  np.testing.assert_array_equal(
    words, (bit.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
  )
  other = history_search.fingerprint(jnp.asarray(x), words=3, bits=32, seed=5)
  assert (np.asarray(other) != words).all()


def test_bits_agree_with_the_probability_of_the_angle():
  angle = np.pi / 3
  x = jnp.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
  a, b = np.asarray(history_search.fingerprint(x, words=20_000, bits=1, seed=0))
  # 4 standard deviations of the share of 20,000 bits.
  assert abs(np.mean(a == b) - (1 - 1 / 3)) < 4 * np.sqrt(2 / 9 / 20_000)


def arrays(B=4, K=5, I=6, seed=0):  # noqa: E741
  rng = np.random.default_rng(seed)
  q, v = rng.normal(size=(B, I)), rng.normal(size=(B, K, I))
  # Histories of all, three, one and no behaviours.
  mask = np.arange(K)[None] < np.array([K, 3, 1, 0])[:, None]
  return jnp.asarray(q, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(mask)


def heads(wq, wk, q, v, mask, bias=None):
  """[sum_j softmax_j((Wk_h v_j) . (Wq_h q) / sqrt(d) + t_j) v_j for each h], by example.

  bias: t, [B, K], or None for zeros.
  """
  bias = np.zeros(mask.shape) if bias is None else bias
  out = np.zeros((len(q), wq.shape[1], q.shape[1]))
  for b in range(len(q)):
    for h in range(wq.shape[1]):
      s = np.array([(v[b, j] @ wk[:, h]) @ (q[b] @ wq[:, h]) for j in range(len(v[b]))])
      w = np.exp(s / np.sqrt(wq.shape[2]) + bias[b]) * mask[b]
      if mask[b].any():
        out[b, h] = (w / w.sum()) @ v[b]
  return out


@pytest.mark.parametrize('H, biased', but_slow([(1, False), (3, False), (3, True)], {1, 2}))
def test_attention_equals_the_formula(H, biased):
  exact = arrays()
  bias = np.random.default_rng(5).normal(size=(4, 5)).astype(np.float32) if biased else None
  bias_BQK = None if bias is None else jnp.asarray(bias.reshape(2, 2, 5))
  # Two targets for each of two examples.
  q, v, mask = (x.reshape(2, 2, *x.shape[1:]) for x in exact)
  queries, attention = history_search.HeadQueries(H, 4), history_search.TargetHeads(2)
  first = queries.init(jax.random.key(0), q)
  # Larger weights than the initial ones, so that the softmax is far from uniform.
  first = jax.tree.map(lambda x: 2 * x, first)
  g = queries.apply(first, q)
  second = attention.init(jax.random.key(1), g, v, mask)
  want = heads(first['params']['query'], first['params']['key'], *map(np.asarray, exact), bias)
  attended = history_search.attend(g, v, mask, bias_BQK).reshape(want.shape)
  np.testing.assert_allclose(attended, want, atol=2e-5)
  wv, wo = second['params']['value'], second['params']['out']['kernel']
  projected = np.concatenate([want[:, h] @ wv[h] for h in range(H)], axis=-1) @ wo
  output = attention.apply(second, g, v, mask, bias_BQK).reshape(projected.shape)
  np.testing.assert_allclose(output, projected, atol=2e-5)
  assert not want[3].any() and not np.asarray(output)[3].any()

  def loss(v, first):
    return jnp.sum(jnp.cos(attention.apply(second, queries.apply(first, q), v, mask)))

  grads = jax.grad(loss, (0, 1))(v, first)
  assert all(np.isfinite(x).all() and np.asarray(x).any() for x in jax.tree.leaves(grads))
  assert not np.asarray(grads[0])[~np.asarray(mask)].any(), 'a masked behaviour has a gradient'
