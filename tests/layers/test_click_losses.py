"""Losses of click models against loops over examples and pairs, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import click_losses
from lmn_jax.layers.losses import click_loss
from tests.runs import mesh_of

N = 24


def examples(seed=0, groups=6, n=N):
  """Logits [n, 2], labels, weights with some zeros, and groups that are not sorted."""
  rng = np.random.default_rng(seed)
  weight = rng.choice([0, 0.5, 1, 3], n).astype(np.float32)
  z = rng.normal(0, 2, (n, 2)).astype(np.float32)
  label = rng.integers(0, 2, n).astype(np.float32)
  return z, label, weight, rng.integers(0, groups, n).astype(np.int32)


def slow_pairs(s, y, w, g):
  """The loss of pairs as a double loop."""
  nats = mass = jnp.zeros(())
  for i in range(len(y)):
    for j in range(len(y)):
      if g[i] == g[j] and y[i] > y[j]:
        nats = nats + w[i] * w[j] * jnp.log1p(jnp.exp(s[j] - s[i]))
        mass = mass + w[i] * w[j]
  return nats / jnp.maximum(mass, 1e-30)


def members(g, w, i):
  """Indices of the used examples in the group of an example."""
  return np.flatnonzero((g == g[i]) & (w > 0))


def slow_list(s, y, w, g):
  terms, mass = [], 0.0
  for i in np.flatnonzero((y > 0) & (w > 0)):
    group = members(g, w, i)
    if (y[group] == 0).any():
      terms.append(w[i] * (jax.nn.logsumexp(s[group]) - s[i]))
      mass += w[i]
  return sum(terms, jnp.zeros(())) / max(mass, 1e-30)


def slow_jrc(z, y, w, g):
  terms = [
    w[i] * (jax.nn.logsumexp(z[members(g, w, i), int(y[i])]) - z[i, int(y[i])])
    for i in np.flatnonzero(w > 0)
  ]
  return sum(terms, jnp.zeros(())) / w.sum()


LOSSES = {
  'pairwise': (click_losses.pairwise_loss, slow_pairs, 0),
  'listwise': (click_losses.listwise_loss, slow_list, 0),
  'jrc': (click_losses.jrc_loss, slow_jrc, slice(None)),
}


@pytest.mark.parametrize('seed, groups', [(0, 6), (1, 1), (2, 20), (3, 3)])
@pytest.mark.parametrize('name', LOSSES)
def test_losses_within_groups_and_their_gradients_equal_loops(name, seed, groups):
  fast, slow, column = LOSSES[name]
  z, *others = examples(seed, groups)
  z = jnp.asarray(z[:, column])
  arrays = [jnp.asarray(x) for x in others]
  value, gradient = jax.value_and_grad(lambda z: 3 * fast(z, *arrays))(z)
  expected, slope = jax.value_and_grad(lambda z: 3 * slow(z, *others))(z)
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
  assert np.any(gradient) and not np.any(np.asarray(gradient)[others[1] == 0])


@pytest.mark.parametrize('name', LOSSES)
def test_losses_within_groups_on_a_mesh(name):
  fast, _, column = LOSSES[name]
  z, *others = examples(4)

  def run(mesh):
    def loss(z, *arrays):
      with meshes.use_mesh(mesh):
        return fast(z, *arrays)

    return jax.jit(jax.value_and_grad(loss))(*meshes.place(mesh, (z[:, column], *others)))

  alone, sharded = run(mesh_of(1)), run(mesh_of(4, 2))
  np.testing.assert_allclose(sharded[0], alone[0], rtol=1e-6)
  np.testing.assert_allclose(sharded[1], alone[1], rtol=1e-5, atol=1e-7)


@settings(max_examples=15)
@given(st.integers(0, 2**20), st.integers(1, 12))
def test_the_order_of_examples_and_the_scale_of_weights_do_not_matter(seed, groups):
  z, label, weight, group = examples(seed, groups)
  order = np.random.default_rng(seed).permutation(N)
  for fast, _, column in LOSSES.values():
    first = fast(*(jnp.asarray(x) for x in (z[:, column], label, weight, group)))
    moved = z[order][:, column], label[order], np.float32(1e-20) * weight[order], group[order] * 7
    assert float(fast(*map(jnp.asarray, moved))) == pytest.approx(float(first), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_groups_of_one_example_have_nothing_to_order(name):
  fast, _, column = LOSSES[name]
  z, label, weight, _ = examples()
  arrays = [jnp.asarray(x) for x in (label, weight, np.arange(N, dtype=np.int32))]
  value, gradient = jax.value_and_grad(lambda z: fast(z, *arrays))(jnp.asarray(z[:, column]))
  assert float(value) == 0 and not np.any(gradient)
  assert float(click_losses.grouped_share(*arrays)) == 0


def test_large_scores_and_unused_groups_are_finite():
  z, label, weight, group = examples()
  weight = np.where(group == 2, 0, weight).astype(np.float32)
  for fast, _, column in LOSSES.values():
    value, gradient = jax.value_and_grad(fast)(
      jnp.asarray(1e4 * z[:, column]), *(jnp.asarray(x) for x in (label, weight, group))
    )
    assert np.isfinite(float(value)) and np.isfinite(gradient).all()
    zero = [jnp.asarray(x) for x in (label, 0 * weight, group)]
    value, gradient = jax.value_and_grad(fast)(jnp.asarray(z[:, column]), *zero)
    assert float(value) == 0 and not np.any(gradient)


def test_the_share_of_groups_with_both_labels():
  label, weight = jnp.array([1.0, 0, 1, 1, 0]), jnp.array([1.0, 2, 3, 4, 0])
  group = jnp.array([5, 5, 7, 9, 9], jnp.int32)  # the negative of group 9 does not count
  assert float(click_losses.grouped_share(label, weight, group)) == pytest.approx(3 / 10)


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.5])
def test_focal_loss_equals_its_definition(gamma):
  z, label, weight, _ = examples()
  p = 1 / (1 + np.exp(-z[:, 0].astype(np.float64)))
  p = np.where(label > 0, p, 1 - p)
  expected = -(weight * (1 - p) ** gamma * np.log(p)).sum() / weight.sum()
  arrays = [jnp.asarray(x) for x in (z[:, 0], label, weight)]
  assert float(click_losses.focal_loss(*arrays, gamma)) == pytest.approx(expected, rel=1e-5)
  gradient = jax.grad(click_losses.focal_loss)(100 * arrays[0], *arrays[1:], gamma)
  assert np.isfinite(gradient).all()


def test_focal_loss_without_focus_is_cross_entropy():
  arrays = [jnp.asarray(x) for x in examples()[:3]]
  arrays[0] = arrays[0][:, 0]
  assert float(click_losses.focal_loss(*arrays, 0.0)) == float(click_loss(*arrays))


def test_the_calibrating_part_of_jrc_is_a_softmax_over_both_logits():
  z, label, weight, _ = (jnp.asarray(x) for x in examples())
  nats = optax.softmax_cross_entropy_with_integer_labels(z, label.astype(jnp.int32))
  expected = float(jnp.sum(weight * nats) / jnp.sum(weight))
  assert float(click_loss(z[:, 1] - z[:, 0], label, weight)) == pytest.approx(expected, rel=1e-6)


def test_losses_of_numbers_equal_their_definitions():
  value, label, weight = np.float32([0, 1.5, -4]), np.float32([1, 1, 0]), np.float32([2, 1, 1])
  arrays = [jnp.asarray(x) for x in (value, label, weight)]
  error = np.abs(value - label)
  squared = (weight * error**2).sum() / 4
  assert float(click_losses.squared_loss(*arrays)) == pytest.approx(squared, rel=1e-6)
  for delta in (0.75, 10.0):
    nats = np.where(error <= delta, error**2 / 2, delta * (error - delta / 2))
    expected = (weight * nats).sum() / 4
    assert float(click_losses.huber_loss(*arrays, delta)) == pytest.approx(expected, rel=1e-6)
