"""Losses against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from lmn_jax import config as configs
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers import losses
from lmn_jax.layers.losses import (
  Recall,
  click_loss,
  memory_loss,
  smooth_l1,
  total_loss,
  weighted_mean,
)
from tests.blocks import set_sizes
from tests.runs import mesh_of


def test_click_loss_ignores_filler_rows():
  logit = np.array([0.3, -2.0, 40.0, -40.0], np.float32)
  label = np.array([1, 0, 1, 1], np.float32)
  weight = np.array([1, 1, 1, 0], np.float32)
  p = 1 / (1 + np.exp(-logit[:2].astype(np.float64)))
  expected = -(np.log(p[0]) + np.log(1 - p[1])) / 3
  loss = click_loss(jnp.asarray(logit), jnp.asarray(label), jnp.asarray(weight))
  assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_smooth_l1_equals_the_definition_of_girshick():
  x = np.array([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 2.5], np.float32)
  expected = np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)
  np.testing.assert_allclose(smooth_l1(jnp.asarray(x)), expected, rtol=1e-6)


def recall():
  rng = np.random.default_rng(0)
  recalled, target = rng.normal(0, 2, (2, 3, 4, 5)).astype(np.float32)
  weight = np.array([[2, 2, 2, 2], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]], np.float32)
  return recalled, target, weight


def test_memory_loss_and_the_loss_of_the_mean_target():
  recalled, target, weight = recall()
  loss, mean_loss = memory_loss(
    Recall(jnp.asarray(recalled), jnp.asarray(target), jnp.asarray(weight))
  )

  def mean(predicted):
    x = predicted - target
    loss = np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5).mean(-1)
    return (weight * loss).sum() / weight.sum()

  average = np.einsum('bp,bpv->v', weight, target) / weight.sum()
  assert float(loss) == pytest.approx(mean(recalled), rel=1e-5)
  assert float(mean_loss) == pytest.approx(mean(average[None, None]), rel=1e-5)


def test_weighted_mean():
  x, weight = jnp.array([[1.0, 2.0], [4.0, 9.0]]), jnp.array([[0.25, 0.0], [0.5, 0.0]])
  assert float(weighted_mean(x, weight)) == pytest.approx(3)
  assert float(weighted_mean(x, 0 * weight)) == 0
  assert weighted_mean(x.astype(jnp.bfloat16), weight).dtype == jnp.float32


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_the_scale_of_weights_does_not_matter(scale):
  x, weight = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.5, 0.25, 0.25])
  assert float(weighted_mean(x, scale * weight)) == pytest.approx(2, rel=1e-6)


def test_total_is_the_objective_plus_weighted_auxiliary_losses():
  click = {'click': jnp.float32(0.7)}
  auxiliary = {'memory': jnp.float32(3), 'search': jnp.float32(5)}
  weights = ConfigDict(dict(memory_weight=0.5, search_weight=2.0, balance_weight=7.0))
  assert float(total_loss(click, 'click', weights)) == pytest.approx(0.7)
  assert float(total_loss(click | auxiliary, 'click', weights)) == pytest.approx(12.2)


@pytest.fixture
def ranked():
  """v [2, 3, 4], targets with one padding, weights, rows [7, 4], and negatives [2, 3, 5]."""
  rng = np.random.default_rng(0)
  v, rows = rng.normal(size=(2, 3, 4)), rng.normal(size=(7, 4))
  target = np.array([[1, 6, 3], [2, 5, 7]], np.int32)
  weight = (target < 7).astype(np.float32)
  return v, target, weight, rows, rng.integers(0, 8, (2, 3, 5)).astype(np.int32)


def single(x):
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize('positions', [2, 256])
def test_softmax_over_all_items(ranked, monkeypatch, positions):
  set_sizes(monkeypatch, loss_positions=positions)
  v, target, weight, rows, _ = ranked
  weight = weight * np.array([[1, 0, 2], [0, 3, 1]])  # of three blocks of two, two are computed
  mask = np.nonzero(weight)

  def slow(v, rows):
    score = v[mask] @ rows[1:].T  # row 0 is not a candidate
    nats = optax.softmax_cross_entropy_with_integer_labels(score, target[mask] - 1)
    return jnp.sum(nats * weight[mask]) / weight.sum()

  def fast(v, rows):
    return losses.softmax_loss(v, jnp.asarray(target), single(weight), rows)

  at = single(v), single(rows)
  # A factor after the loss: the gradients that are computed with the loss must be scaled by it.
  reference, result = (
    jax.value_and_grad(lambda *x, f=f: 3 * f(*x), (0, 1))(*at) for f in (slow, fast)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), result, reference
  )
  assert not np.any(result[1][0][1, 2]) and not np.any(result[1][1][0])


@pytest.mark.parametrize('mesh_shape', [(2, 1), (4, 2)])
def test_softmax_over_all_items_on_a_mesh(mesh_shape):
  rng = np.random.default_rng(0)
  v, rows = single(rng.normal(size=(8, 3, 4))), single(rng.normal(size=(7, 4)))
  target = jnp.asarray(rng.integers(1, 7, (8, 3)), jnp.int32)
  weight = single(rng.integers(0, 2, (8, 3)))

  def run(mesh):
    def nats(v, rows, target, weight):
      with meshes.use_mesh(mesh):
        return losses.softmax_loss(v, target, weight, rows)

    placed = meshes.place(mesh, (v, target, weight))
    everywhere = jax.device_put(rows, NamedSharding(mesh, meshes.REPLICATED))
    return jax.jit(jax.value_and_grad(nats, (0, 1)))(placed[0], everywhere, *placed[1:])

  sharded, alone = run(mesh_of(*mesh_shape)), run(mesh_of(1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), sharded, alone)


def scores(ranked):
  v, target, weight, rows, negative = ranked
  padded = np.concatenate([rows, np.zeros((1, 4))])
  positive = np.einsum('btd,btd->bt', v, padded[target])
  negatives = np.einsum('btd,btnd->btn', v, padded[negative])
  mask = (negative > 0) & (negative < 7) & (negative != target[:, :, None])
  assert mask.any() and not mask.all()
  return positive, negatives, mask, weight


def test_softmax_over_sampled_items(ranked):
  positive, negatives, mask, weight = scores(ranked)
  nats = [
    np.log(np.exp(positive[b, t]) + np.exp(negatives[b, t][mask[b, t]]).sum()) - positive[b, t]
    for b, t in zip(*np.nonzero(weight), strict=True)
  ]
  loss = losses.sampled_softmax_loss(
    single(positive), single(negatives), jnp.asarray(mask), single(weight)
  )
  assert float(loss) == pytest.approx(np.mean(nats), rel=1e-5)


@pytest.mark.parametrize('t', [0.0, 0.75, 1.0])
def test_generalised_cross_entropy(ranked, t):
  """With t = 0 it is binary cross-entropy."""
  positive, negatives, mask, weight = scores(ranked)
  alpha = 5 / 6
  beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
  assert beta == pytest.approx({0.0: 1, 1.0: alpha}.get(t, beta))

  def p(x):
    return 1 / (1 + np.exp(-x))

  nats = [
    -beta * np.log(p(positive[b, k])) - np.log(1 - p(negatives[b, k][mask[b, k]])).sum()
    for b, k in zip(*np.nonzero(weight), strict=True)
  ]
  arrays = single(positive), single(negatives), jnp.asarray(mask), single(weight)
  assert float(losses.gbce_loss(*arrays, alpha, t)) == pytest.approx(np.mean(nats), rel=1e-5)


def test_the_error_for_a_loss_without_weight_names_the_remedy():
  losses = {'click': jnp.float32(1), 'mine': jnp.float32(2)}
  with pytest.raises(UserError, match='config.loss has no mine_weight; add it to loss_weights of'):
    total_loss(losses, 'click', configs.base('pooling').loss)
