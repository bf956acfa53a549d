"""Rows of numbers against numpy; missing values; gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.basic import Number
from lmn_jax.layers.numeric import NumberField, standardised
from tests.encoders import make_params

D, H = 5, 3
STANDARD = Number('item.price', 'standard', 3.0, 2.5)
LOG = Number('event.dwell', 'log', 1.5, 0.5)
AUTODIS = Number('context.hour', 'autodis', 12.0, 6.0, H)
KINDS = pytest.mark.parametrize('number', [STANDARD, LOG, AUTODIS], ids=lambda x: x.kind)
VALUES = np.array([[0, 1, -1, 3, 1e4], [-1e6, 0.25, np.nan, 17.5, -3e-4]], np.float32)


def value_of(x, number):
  """The standardised value, float64."""
  x = np.asarray(x, np.float64)
  if number.kind == 'log':
    x = np.sign(x) * np.log(1 + np.abs(x))
  return (x - number.shift) / number.scale


def autodis(p, v):
  """One value at a time."""
  h = np.where(p['weight'] * v > 0, p['weight'] * v, 0.01 * p['weight'] * v)
  z = h @ p['mix'] + 0.1 * h
  e = np.exp(z - z.max())
  return e / e.sum() @ p['meta']


def row_of(p, x, number):
  if np.isnan(x):
    return p['missing']
  v = value_of(x, number)
  return autodis(p['autodis'], v) if number.kind == 'autodis' else v * p['weight'] + p['bias']


def make(number):
  field = NumberField(number, D, 0.05)
  return field, make_params(field.init, jax.random.key(0), jnp.asarray(VALUES))


@KINDS
def test_standardised_values_equal_numpy(number):
  x = VALUES[np.isfinite(VALUES)]
  value = standardised(jnp.asarray(x), number)
  np.testing.assert_allclose(value, value_of(x, number), rtol=1e-6, atol=1e-6)


@KINDS
def test_rows_equal_numpy(number):
  field, variables = make(number)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
  want = np.array([[row_of(p, x, number) for x in row] for row in VALUES])
  rows = field.apply(variables, jnp.asarray(VALUES))
  assert rows.shape == (2, 5, D) and rows.dtype == jnp.float32
  np.testing.assert_allclose(rows, want, rtol=1e-6, atol=1e-6)


@KINDS
def test_a_missing_value_gives_gradients_to_its_row_alone(number):
  field, variables = make(number)

  def grads(x):
    def loss(params):
      return jnp.sum(jnp.cos(field.apply({'params': params}, jnp.asarray(x, jnp.float32))))

    return jax.grad(loss)(variables['params'])

  missing, present = grads([np.nan]), grads([2.0])
  assert np.all(np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(missing)])))
  for grad, moved in ((missing, {'missing'}), (present, set(present) - {'missing'})):
    nonzero = {name for name, tree in grad.items() if any(map(np.any, jax.tree.leaves(tree)))}
    assert nonzero == moved


def test_autodis_is_between_its_meta_embeddings():
  field, variables = make(AUTODIS)
  meta_HD = np.asarray(variables['params']['autodis']['meta'])
  rows = np.asarray(field.apply(variables, jnp.linspace(-50, 50, 101)))
  assert np.all(rows <= meta_HD.max(0) + 1e-6) and np.all(rows >= meta_HD.min(0) - 1e-6)


@KINDS
def test_bfloat16_is_near_float32(number):
  field, variables = make(number)
  x = jnp.linspace(-5, 20, 26)
  rounded = NumberField(number, D, 0.05, jnp.bfloat16).apply(variables, x)
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, field.apply(variables, x), rtol=0.05, atol=0.02)
