"""The block form of target attention against the plain [q ; v ; q - v ; q * v] form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.attention import TargetAttention


def plain(params, q, v, mask, softmax):
  """Zhou et al. 2018, written as it is read."""
  q_BLD = jnp.broadcast_to(q[:, None], v.shape)
  x = jnp.concatenate([q_BLD, v, q_BLD - v, q_BLD * v], axis=-1)
  hidden = jax.nn.sigmoid(x @ params['w1'] + params['b1'][None, None])
  w = hidden @ params['Dense_0']['kernel'] + params['Dense_0']['bias'][None, None]
  w = w[..., 0]
  if softmax:
    w = jnp.exp(w) * mask
    w = w / jnp.maximum(w.sum(1, keepdims=True), 1e-9)
  return jnp.sum((w * mask)[..., None] * v, axis=1)


@pytest.mark.parametrize('softmax', [False, True])
def test_blocks_equal_the_plain_form(softmax):
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
  # A full history, one in part, and none at all.
  mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
  unit = TargetAttention(4, softmax=softmax)
  params = unit.init(jax.random.key(0), q, v, mask)['params']

  def ours(params, q, v):
    return unit.apply({'params': params}, q, v, mask)

  def theirs(params, q, v):
    return plain(params, q, v, mask.astype(jnp.float32), softmax)

  chex.assert_trees_all_close(ours(params, q, v), theirs(params, q, v), atol=1e-5)
  grads = [
    jax.grad(lambda *a, f=f: jnp.sum(jnp.cos(f(*a))), (0, 1, 2))(params, q, v)
    for f in (ours, theirs)
  ]
  chex.assert_trees_all_close(*grads, atol=1e-5)
  assert not np.asarray(ours(params, q, v))[2].any(), 'no history gives zeros'


def test_padding_has_no_influence():
  rng = np.random.default_rng(1)
  q = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float32)
  mask = jnp.array([[True, True, False]])
  unit = TargetAttention(4)
  variables = unit.init(jax.random.key(0), q, v, mask)
  a = unit.apply(variables, q, v, mask)
  b = unit.apply(variables, q, v.at[0, 2].set(100.0), mask)
  chex.assert_trees_all_equal(a, b)
