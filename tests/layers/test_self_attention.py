"""SASRec and BST against the formulas of their papers in numpy, position by position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmn_jax.layers.basic import Schema
from lmn_jax.models.ctr.bst import BST
from lmn_jax.models.ctr.sasrec import SASRec
from tests.blocks import set_sizes
from tests.encoders import (
  LENGTHS,
  alone,
  biases,
  check_encoder,
  dense,
  dropped_on_entry,
  make_inputs,
  make_params,
  softmax,
)

L = LENGTHS[0]


def norm(params, x):
  """Layer norm of each row; 1e-6 is the epsilon of Flax."""
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * params['scale'] + params['bias']


def attend(params, x, heads, causal, bias=None):
  """Self-attention, one query and one head at a time. bias: [T, T], of queries and keys."""
  T, D = x.shape
  E = D // heads
  q, k, v = (x @ params['qkv']['kernel'][:, j * D : (j + 1) * D] for j in range(3))
  out = np.zeros((T, D))
  for h in range(heads):
    head = slice(h * E, (h + 1) * E)
    for t in range(T):
      seen = slice(0, t + 1 if causal else T)
      score = k[seen, head] @ q[t, head] / np.sqrt(E)
      out[t, head] = softmax(score if bias is None else score + bias[t, seen]) @ v[seen, head]
  return out


def mlp(params, x, activation):
  return dense(params['Dense_1'], activation(dense(params['Dense_0'], x)))


def relu(x):
  return np.maximum(x, 0)


def leaky_relu(x):
  return np.where(x > 0, x, 0.01 * x)


def sasrec(params, i, s, gaps=None, *, blocks, heads):
  if not len(s):
    return np.zeros(2 * len(i))
  norms = (params[f'LayerNorm_{k}'] for k in range(2 * blocks + 1))
  x = s + params['positions'][L - len(s) :]
  for b in range(blocks):
    p = params[f'SelfAttention_{b}']
    # From event s to the event after t, or to the request.
    bias = None if gaps is None else biases(p, gaps[None] - np.append(gaps[1:], 0)[:, None])
    x = x + attend(p, norm(next(norms), x), heads, True, bias)
    x = x + mlp(params[f'MLP_{b}'], norm(next(norms), x), relu)
  F = norm(next(norms), x[-1])
  return np.concatenate([F, F * i])


def bst(params, i, s, gaps=None, *, blocks, heads, output):
  x = np.concatenate([i[None], s[::-1]]) + params['positions'][: 1 + len(s)]
  for b in range(blocks):
    p, bias = params[f'SelfAttention_{b}'], None
    if gaps is not None:  # between two behaviours, the target at the time of the request
      before = np.concatenate([[0], gaps[::-1]])
      bias = biases(p, np.abs(before[None] - before[:, None]))
    attended = attend(p, x, heads, False, bias)
    x = norm(params[f'LayerNorm_{2 * b}'], x + dense(params[f'Dense_{b}'], attended))
    changed = mlp(params[f'MLP_{b}'], x, leaky_relu)
    x = norm(params[f'LayerNorm_{2 * b + 1}'], x + changed)
  if output == 'target':
    return x[0]
  return np.concatenate([x.reshape(-1), np.zeros((L - len(s)) * x.shape[1])])


@pytest.fixture(params=['whole', 'in blocks'])
def scores(request, monkeypatch, heads):
  """Scores of all examples together, or in blocks, for SASRec of 3 examples and of 1."""
  if request.param != 'whole':
    set_sizes(monkeypatch, attention_whole=0, attention_block=3 * heads * L**2)


TIMES = pytest.mark.parametrize('time', ['none', 'bias'])


@TIMES
@pytest.mark.parametrize('blocks, heads', [(1, 1), (2, 2)])
def test_sasrec_equals_the_formulas(blocks, heads, scores, time):
  model = SASRec(Schema(()), blocks=blocks, heads=heads, time=time)
  check_encoder(model, functools.partial(sasrec, blocks=blocks, heads=heads))


@TIMES
@pytest.mark.parametrize('blocks, heads, output', [(1, 4, 'all'), (2, 2, 'target')])
def test_bst_equals_the_formulas(blocks, heads, output, scores, time):
  model = BST(Schema(()), blocks=blocks, heads=heads, output=output, time=time)
  check_encoder(model, functools.partial(bst, blocks=blocks, heads=heads, output=output))


MODELS = pytest.mark.parametrize(
  'model', [SASRec(Schema(())), BST(Schema(()))], ids=['sasrec', 'bst']
)


@MODELS
def test_bf16_is_near_float32(model):
  x = make_inputs()
  half = x._replace(i_BQI=x.i_BQI.astype(jnp.bfloat16), s_BLI=x.s_BLI.astype(jnp.bfloat16))
  encoder, rounded = alone(model), alone(dataclasses.replace(model, bf16=True))
  params = make_params(encoder.init, jax.random.key(0), x)['params']

  def loss(encoder, x):
    def of(params):
      features = encoder.apply({'params': params}, x)[0]
      assert features.dtype == x.s_BLI.dtype
      return jnp.sum(jnp.cos(features.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(of))

  exact, exact_grads = loss(encoder, x)(params)
  # JAX's attention promotes bfloat16, forward and backward.
  with jax.numpy_dtype_promotion('standard'):
    value, grads = loss(rounded, half)(params)
  assert float(value) == pytest.approx(float(exact), rel=0.05) and float(value) != float(exact)
  assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, exact_grads))
  assert error < 0.1 * optax.tree.norm(exact_grads)


@MODELS
def test_dropout_is_applied_in_training_only(model):
  encoder, x = alone(dataclasses.replace(model, dropout=0.5)), make_inputs()
  params = make_params(encoder.init, jax.random.key(0), x)['params']

  @functools.partial(jax.jit, static_argnums=1)
  def features(key, train=True):
    rngs = {'dropout': jnp.array([0, key], jnp.uint32)}
    return encoder.apply({'params': params}, x, train=train, rngs=rngs)[0]

  assert np.any(features(0) != features(1))
  np.testing.assert_array_equal(features(0, train=False), features(1, train=False))


@MODELS
def test_dropout_is_applied_to_the_inputs_at_most_once(model):
  """Once in SASRec, with the positions; in BST's paper only after the attention."""
  encoder, x = alone(dataclasses.replace(model, dropout=0.5)), make_inputs()
  params = make_params(encoder.init, jax.random.key(0), x)['params']

  def run():
    encoder.apply({'params': params}, x, train=True, rngs={'dropout': jax.random.key(1)})

  assert len(dropped_on_entry(run)) == isinstance(model, SASRec)
