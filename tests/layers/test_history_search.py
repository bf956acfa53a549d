"""The search in a history and the attention after it, against numpy written from the formulas."""

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
  """Places of the K best of one history, best first, of equal ones the newest."""
  places = [place for place in range(len(score)) if mask[place]]
  return sorted(places, key=lambda place: (-score[place], -place))[:K]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_search_finds_the_best_of_the_mask(seed, L, K, ties):
  rng = np.random.default_rng(seed)
  score = rng.integers(-1, 2, (3, L)).astype(np.float32) if ties else rng.normal(size=(3, L))
  mask = rng.random((3, L)) < 0.6
  mask[0] = False
  # Two targets of each: the second has the scores turned about.
  scores = np.stack([score, -score], axis=1)
  found = history_search.search(jnp.asarray(scores, jnp.float32), jnp.asarray(mask)[:, None], K)
  assert found.place_BQK.shape == found.mask_BQK.shape == (3, 2, min(K, L))
  for b, q in np.ndindex(3, 2):
    got = np.asarray(found.place_BQK)[b, q][np.asarray(found.mask_BQK)[b, q]]
    assert got.tolist() == newest_of_best(scores[b, q], mask[b], K)
  taken = history_search.take(jnp.arange(3 * L).reshape(3, L, 1), found)[..., 0]
  want = np.arange(3)[:, None, None] * L + np.asarray(found.place_BQK)
  np.testing.assert_array_equal(taken, want)


def test_a_score_has_no_gradient():
  mask = jnp.ones((1, 1, 4), bool)
  x = jnp.arange(4.0)[None, None]

  def f(score):
    return jnp.sum(history_search.take(x[0, :, :, None], history_search.search(score, mask, 2)))

  assert f(x) == 5 and not np.asarray(jax.grad(f)(x)).any()


@pytest.mark.usefixtures('uncached')
def test_every_device_searches_the_histories_it_has():
  mesh = mesh_of(4, 2)
  split = NamedSharding(mesh, meshes.BATCH)
  score = np.random.default_rng(0).normal(size=(16, 1, 30)).astype(np.float32)
  arguments = (score, np.ones((16, 1, 30), bool), score[:, 0, :, None])
  arguments = jax.device_put(arguments, split)

  def find(score, mask, x):
    with meshes.use_mesh(mesh):
      found = history_search.search(score, mask, 4)
      return found, history_search.take(x, found)

  compiled = jax.jit(find).lower(*arguments).compile()
  assert not re.search(hlo.COLLECTIVES, compiled.as_text())
  found, taken = compiled(*arguments)
  assert found.place_BQK.sharding.is_equivalent_to(split, 3)
  np.testing.assert_array_equal(found.place_BQK, np.argsort(-score, axis=2)[..., :4])
  np.testing.assert_array_equal(taken[..., 0], -np.sort(-score, axis=2)[..., :4])


def test_matches_in_one_value_and_in_any_of_several():
  one = history_search.matches(jnp.array([[2, 1], [5, 2]]), jnp.array([[2, 1, 5], [5, 2, 5]]), 5)
  want = [[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 1, 0]]]
  np.testing.assert_array_equal(one, want)  # 5 is the padding
  target = jnp.array([[1, 5, 5], [5, 5, 5]])[:, None]
  history = jnp.array([[[5, 5, 5], [0, 5, 1], [0, 2, 5]]] * 2)
  several = history_search.matches(target, history, 5)
  np.testing.assert_array_equal(several[:, 0], [[0, 1, 0], [0, 0, 0]])


def test_fingerprints_are_the_signs_of_the_same_random_projections():
  x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  got = np.asarray(history_search.fingerprint(jnp.asarray(x), words=3, bits=32, seed=4))
  assert got.shape == (2, 3, 3) and got.dtype == np.uint32
  r = np.asarray(jax.random.normal(jax.random.key(4), (5, 96)))
  bit = (x @ r >= 0).reshape(2, 3, 3, 32)
  np.testing.assert_array_equal(
    got, (bit.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
  )
  other = history_search.fingerprint(jnp.asarray(x), words=3, bits=32, seed=5)
  assert (np.asarray(other) != got).all()


def test_bits_agree_as_often_as_the_angle_says():
  angle = np.pi / 3
  x = jnp.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
  a, b = np.asarray(history_search.fingerprint(x, words=20_000, bits=1, seed=0))
  # 4 standard deviations of a share of 20,000.
  assert abs(np.mean(a == b) - (1 - 1 / 3)) < 4 * np.sqrt(2 / 9 / 20_000)


def arrays(B=4, K=5, I=6, seed=0):  # noqa: E741
  rng = np.random.default_rng(seed)
  q, v = rng.normal(size=(B, I)), rng.normal(size=(B, K, I))
  # A full history, one in part, one behaviour, none.
  mask = np.arange(K)[None] < np.array([K, 3, 1, 0])[:, None]
  return jnp.asarray(q, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(mask)


def heads(wq, wk, q, v, mask):
  """[sum_j softmax_j((Wk_h v_j) . (Wq_h q) / sqrt(d)) v_j for each h], an example at a time."""
  out = np.zeros((len(q), wq.shape[1], q.shape[1]))
  for b in range(len(q)):
    for h in range(wq.shape[1]):
      s = np.array([(v[b, j] @ wk[:, h]) @ (q[b] @ wq[:, h]) for j in range(len(v[b]))])
      w = np.exp(s / np.sqrt(wq.shape[2])) * mask[b]
      if mask[b].any():
        out[b, h] = (w / w.sum()) @ v[b]
  return out


@pytest.mark.parametrize('H', but_slow([1, 3], {1}))
def test_target_attention_is_that_of_the_formula(H):
  exact = arrays()
  # As two targets of each of two examples.
  q, v, mask = (x.reshape(2, 2, *x.shape[1:]) for x in exact)
  queries, attention = history_search.HeadQueries(H, 4), history_search.TargetHeads(2)
  first = queries.init(jax.random.key(0), q)
  # Larger weights than those of the start, so that the softmax is far from even.
  first = jax.tree.map(lambda x: 2 * x, first)
  g = queries.apply(first, q)
  second = attention.init(jax.random.key(1), g, v, mask)
  want = heads(first['params']['query'], first['params']['key'], *map(np.asarray, exact))
  found = history_search.attend(g, v, mask).reshape(want.shape)
  np.testing.assert_allclose(found, want, atol=2e-5)
  wv, wo = second['params']['value'], second['params']['out']['kernel']
  projected = np.concatenate([want[:, h] @ wv[h] for h in range(H)], axis=-1) @ wo
  found = attention.apply(second, g, v, mask).reshape(projected.shape)
  np.testing.assert_allclose(found, projected, atol=2e-5)
  assert not want[3].any() and not np.asarray(found)[3].any()

  def loss(v, first):
    return jnp.sum(jnp.cos(attention.apply(second, queries.apply(first, q), v, mask)))

  grads = jax.grad(loss, (0, 1))(v, first)
  assert all(np.isfinite(x).all() and np.asarray(x).any() for x in jax.tree.leaves(grads))
  assert not np.asarray(grads[0])[~np.asarray(mask)].any(), 'what is masked has no gradient'
