"""Routing and squash against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.errors import UserError
from lmn_jax.layers.capsules import MAPS, Routing, route, squash, votes

B, M, T, D = 2, 3, 4, 5


def slow_squash(s):
  norm = np.linalg.norm(s)
  return norm**2 / (1 + norm**2) * s / norm


def norm(unit, x):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)
  return x * np.asarray(unit['scale']) + np.asarray(unit['bias'])


def slow_route(x, maps, start, mask, iterations):
  """The routing of one user: x [I, D], maps(i, j) -> [D, D] for x W, start [J, D], mask [I]."""
  capsules = start
  for _ in range(iterations):
    total = np.zeros_like(start)
    for i in np.flatnonzero(mask):
      vote = [x[i] @ maps(i, j) for j in range(len(start))]
      b = np.array([capsules[j] @ vote[j] for j in range(len(start))])
      alpha = np.exp(b - b.max()) / np.exp(b - b.max()).sum()
      for j in range(len(start)):
        total[j] += alpha[j] * vote[j]
    capsules = np.stack([slow_squash(s) for s in total])
  return capsules


@pytest.fixture
def example():
  rng = np.random.default_rng(0)
  mask = np.array([[True, False, True, True], [True, True, True, False]])
  return rng.normal(size=(B, M, D)), rng.normal(size=(B, T, D)), mask


@pytest.mark.parametrize('map_name', MAPS)
@pytest.mark.parametrize('iterations', [1, 3])
def test_routing_equals_the_formulas(example, map_name, iterations):
  memory, past, mask = example
  routing = Routing(map_name, iterations)
  arguments = [jnp.asarray(x, jnp.float32) for x in (memory, past)] + [jnp.asarray(mask)]
  first = routing.init(jax.random.key(0), *arguments)['params']
  shape = {'shared': (D, D), 'per_capsule': (M, D, D), 'per_pair': (M + T, M, D, D)}[map_name]
  np.testing.assert_array_equal(first['map'], np.broadcast_to(np.eye(D), shape))
  rng = np.random.default_rng(1)
  p = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), first)
  updated = routing.apply({'params': p}, *arguments)
  w = np.asarray(p['map'], np.float64)
  maps = {
    'shared': lambda i, j: w,
    'per_capsule': lambda i, j: w[j],
    'per_pair': lambda i, j: w[i, j],
  }
  for b in range(B):
    x = np.concatenate([norm(p['norm_memory'], memory[b]), norm(p['norm_past'], past[b])])
    real = np.r_[np.ones(M, bool), mask[b]]
    reference = slow_route(x, maps[map_name], memory[b], real, iterations)
    np.testing.assert_allclose(updated[b], reference, rtol=2e-5, atol=1e-6)


def test_masked_events_have_no_effect(example):
  memory, past, mask = example
  w = jnp.eye(D)

  def routed(past):
    x = jnp.asarray(np.concatenate([memory, past], axis=1), jnp.float32)
    real = jnp.asarray(np.concatenate([np.ones((B, M), bool), mask], axis=1))
    return route(votes(x, w), jnp.asarray(memory, jnp.float32), real)

  noise = np.where(mask[:, :, None], 0, 100)
  np.testing.assert_array_equal(routed(past), routed(past + noise))
  assert np.any(routed(past) != routed(past + 0.1 * mask[:, :, None]))


def test_squash_keeps_the_direction_and_is_shorter_than_one():
  s = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32) * [[0.01], [1], [10], [1000]]
  squashed = np.asarray(squash(jnp.asarray(s, jnp.float32)))
  np.testing.assert_allclose(squashed, [slow_squash(x) for x in s], rtol=1e-5)
  assert (np.linalg.norm(squashed, axis=1) < 1 + 1e-6).all()
  zero = jnp.zeros((1, D))
  assert not np.asarray(squash(zero)).any()
  assert np.isfinite(jax.grad(lambda s: jnp.sum(squash(s)))(zero)).all()


def test_capsules_with_equal_starts_stay_equal_with_a_shared_map():
  """This is why the routing starts from the old memory: from zeros, all slots would be equal."""
  rng = np.random.default_rng(0)
  u = votes(jnp.asarray(rng.normal(size=(1, T, D)), jnp.float32), jnp.eye(D))
  capsules = route(u, jnp.zeros((1, M, D)), jnp.ones((1, T), bool))
  np.testing.assert_allclose(capsules[0], np.broadcast_to(capsules[0, :1], (M, D)), rtol=1e-6)


def test_an_unknown_map_is_rejected(example):
  arguments = [jnp.asarray(x) for x in example]
  with pytest.raises(UserError, match="config.model.routing_map='pair' is unknown"):
    Routing('pair').init(jax.random.key(0), *arguments)
