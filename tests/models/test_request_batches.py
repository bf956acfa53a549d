"""A request of Q targets has the loss and the gradients of its targets one by one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.losses import total_loss
from lmn_jax.models import registry
from lmn_jax.models.ctr import dien, lmn
from tests.examples import SCHEMA, SIZES, make_batch, make_config
from tests.runs import but_slow

B, Q = 6, 3
OF_TARGET = ('item', 'item.category', 'item.tags', 'context.query', 'label', 'weight')
CASES = [*registry.CLICK, ('sam', dict(variant='3P+')), ('lmn', dict(query_context=True, heads=2))]
CASES = [case if isinstance(case, tuple) else (case, {}) for case in CASES]
FAST = {number for number, (name, _) in enumerate(CASES) if name in ('din', 'sam', 'lmn')}


def request_batch():
  """B requests of 1 to Q targets, with weights, and the same targets as examples."""
  rng, histories, targets = np.random.default_rng(0), make_batch(1, B), make_batch(2, B * Q)
  targets['weight'] = rng.uniform(0.5, 2, B * Q).astype(np.float32)
  exists = np.arange(Q)[None] < np.array([1, 3, 2, 3, 1, 2])[:, None]
  requests, examples = dict(histories), {}
  for name, x in targets.items():
    if name in OF_TARGET:
      padding = SIZES.get(name, 0)
      has = exists.reshape(B, Q, *[1] * (x.ndim - 1))
      requests[name] = np.where(has, x.reshape(B, Q, *x.shape[1:]), x.dtype.type(padding))
      examples[name] = requests[name][exists]
    else:
      examples[name] = np.repeat(histories[name], Q, axis=0)[exists.ravel()]
  return requests, examples


def deterministic(monkeypatch):
  """Replaces draws, which differ for requests and examples, by functions of the history."""
  monkeypatch.setattr(dien, 'sample_negatives', lambda key, s, history, length: (
    jnp.cos(s), history % 2 == 0))  # fmt: skip
  monkeypatch.setattr(lmn, 'sample_positions', lambda key, length, P: (
    jnp.maximum(length[:, None] - 1 - jnp.arange(P)[None], 0),
    jnp.broadcast_to(length[:, None] / P, (len(length), P)).astype(jnp.float32)))  # fmt: skip
  monkeypatch.setattr(jax.random, 'bernoulli', lambda key, p: p > 0.5)


def reader(tables):
  def read(name, ids, weights=None):
    rows = jnp.pad(tables[name], ((0, 1), (0, 0)))[ids]  # zeros for the padding
    return rows if weights is None else jnp.einsum('...k,...kd->...d', weights, rows)

  return read


def random_like(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize('name, fields', but_slow(CASES, FAST))
def test_a_request_equals_its_targets_one_by_one(name, fields, monkeypatch):
  """Loss, each auxiliary loss, gradients of parameters and rows, and moving statistics."""
  deterministic(monkeypatch)
  config = make_config(name, **fields)
  model = registry.build(config.model.to_dict(), SCHEMA)
  tables = random_like(
    {k: jax.ShapeDtypeStruct((x.rows, x.width), jnp.float32) for k, x in model.tables().items()}, 0
  )
  keys = {k: jax.random.key(0) for k in ('params', 'dropout', 'positions')}
  requests, examples = (jax.tree.map(jnp.asarray, x) for x in request_batch())

  def init(batch):
    return model.init(keys, batch, reader(tables), train=True)

  shapes = jax.eval_shape(init, requests)
  chex.assert_trees_all_equal_shapes(shapes, jax.eval_shape(init, examples))
  params = random_like(shapes.pop('params'), 1)
  stats = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)

  @jax.jit
  def result(params, tables, batch):
    def loss(params, tables):
      outputs, after = model.apply(
        {'params': params, **stats}, batch, reader(tables), train=True, rngs=keys,
        mutable=list(stats),
      )  # fmt: skip
      losses = dict(outputs.losses)
      if 'balance' in losses:  # MIMN divides by the number of histories
        losses['balance'] *= len(batch['history'])
      assert outputs.value.shape == batch['item'].shape
      return total_loss(losses, model.objective, config.loss), (losses, after)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, tables)

  together, apart = (result(params, tables, batch) for batch in (requests, examples))
  assert together[0][0] > 0.1
  # Gradients are sums over targets, some of which cancel: before a batch norm a bias has none.
  np.testing.assert_allclose(together[0][0], apart[0][0], rtol=1e-5)
  chex.assert_trees_all_close(together[0][1], apart[0][1], rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(together[1], apart[1], rtol=1e-4, atol=2e-5)
