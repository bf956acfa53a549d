"""Heads of several labels against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.label_heads import LabelHeads

K, F, EXPERTS, LABEL_EXPERTS = 3, 5, 2, 2
HIDDEN, TOWER = (6, 4), (3,)


def heads(kind, levels=1, outputs=1, **fields):
  fields = dict(hidden=HIDDEN, tower=TOWER, dropout=0.0, dtype=jnp.float32) | fields
  return LabelHeads(K, outputs, kind, experts=EXPERTS, label_experts=LABEL_EXPERTS, levels=levels,
                    **fields)  # fmt: skip


def initialised(model, x):
  """(params, outputs) of random parameters, biases too."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, False))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)
  return jax.tree.map(np.asarray, params['params']), np.asarray(model.apply(params, x, False))


def mlp(params, x, final):
  """An MLP with relu after all layers, or after all but the last one."""
  for k in range(len(params)):
    x = x @ params[f'Dense_{k}']['kernel'] + params[f'Dense_{k}']['bias']
    if k < len(params) - 1 or not final:
      x = np.maximum(x, 0)
  return x


def gated(params, x, values):
  g = np.exp(x @ params['kernel'])
  g = g / g.sum(-1, keepdims=True)
  return sum(g[..., i, None] * value for i, value in enumerate(values))


def slow(params, x, kind, levels):
  def experts(name, x, count):
    return [mlp(params[f'{name}_{i}'], x, False) for i in range(count)]

  if kind == 'shared':
    mixed = [mlp(params['bottom'], x, False)] * K
  elif kind == 'mmoe':
    values = experts('expert', x, EXPERTS)
    mixed = [gated(params[f'gate_{k}'], x, values) for k in range(K)]
  else:
    mixed, shared = [x] * K, x
    for level in range(levels):
      own = [experts(f'expert_{level}_{k}', mixed[k], LABEL_EXPERTS) for k in range(K)]
      common = experts(f'expert_{level}_shared', shared, EXPERTS)
      mixed = [gated(params[f'gate_{level}_{k}'], mixed[k], own[k] + common) for k in range(K)]
      if level < levels - 1:
        everything = [value for values in own for value in values] + common
        shared = gated(params[f'gate_{level}_shared'], shared, everything)
  return np.stack([mlp(params[f'tower_{k}'], mixed[k], True) for k in range(K)], axis=-2)


@pytest.mark.parametrize('kind, levels', [('shared', 1), ('mmoe', 1), ('ple', 1), ('ple', 3)])
@pytest.mark.parametrize('outputs', [1, 2])
def test_outputs_equal_the_formula(kind, levels, outputs):
  x = np.random.default_rng(1).normal(size=(4, 2, F)).astype(np.float32)
  params, y = initialised(heads(kind, levels, outputs), jnp.asarray(x))
  assert y.shape == (4, 2, K, outputs) and y.dtype == np.float32
  np.testing.assert_allclose(y, slow(params, x, kind, levels), rtol=1e-4, atol=1e-5)


def test_labels_differ_by_their_gates_and_towers():
  x = jnp.ones((2, F))
  _, y = initialised(heads('mmoe'), x)
  assert len(set(y[0, :, 0].tolist())) == K


@pytest.mark.parametrize('kind', ['shared', 'mmoe', 'ple'])
def test_outputs_are_float32_in_bfloat16(kind):
  model = heads(kind, dtype=jnp.bfloat16, dropout=0.5)
  x = jnp.ones((2, 1, F), jnp.bfloat16)
  variables = model.init(jax.random.key(0), x, False)
  y = model.apply(variables, x, True, rngs={'dropout': jax.random.key(1)})
  assert y.dtype == jnp.float32 and y.shape == (2, 1, K, 1)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
