"""MIMN against numpy, slot by slot: the equations of the paper and additions of its code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.basic import Schema
from lmn_jax.models.ctr.mimn import MIMN, unevenness
from tests.encoders import (
  LENGTHS,
  alone,
  check_encoder,
  dense,
  gru_step,
  make_inputs,
  make_params,
  sigmoid,
  softmax,
)


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def address(params, key, sharp, M):
  """Equations 1 and 2 with `key_M` of the released code: the mean of two cosines."""
  names = np.tanh(params['names'])
  K = [0.5 * (cosine(key, name) + cosine(key, slot)) for name, slot in zip(names, M, strict=True)]
  return softmax(sharp * np.array(K))


def capacity_loss(w):
  """The loss of the released code for sums of weights [B, S], without its factor .001."""
  B, S = w.shape
  return np.mean((w - w.mean(axis=-1, keepdims=True)) ** 2 / S / B)


def attend(params, x, c, r, M):
  """A step of the controller: state, read, read weights and write heads."""
  gates = dense(params['controller_input'], x) + r @ params['controller_read']
  c = gru_step(gates, c, params['controller_recurrent'])
  key, write_key, erase, add, sharp = np.split(
    c @ params['heads'] + params['heads_bias'], np.arange(1, 5) * len(x)
  )
  sharp = 2 * (np.log1p(np.exp(sharp)) + 1)
  w = address(params, np.tanh(key), sharp[0], M)
  write = np.tanh(write_key), sharp[1], sigmoid(erase), np.tanh(add)
  return c, sum(w[s] * M[s] for s in range(len(M))), w, write


def run(params, s, top_k, balance, induction):
  """(controller, read, memory, sum of write weights, channels) after a history."""
  M = params['memory'].copy()
  S, width = M.shape
  c, r = np.zeros(params['controller_recurrent'].shape[0]), np.zeros(width)
  written, channels = np.zeros(S), np.zeros((S, width))
  for x in s:
    c, r, w, (key, sharp, erase, add) = attend(params, x, c, r, M)
    write = address(params, key, sharp, M)
    if balance:
      write = write * softmax(written @ params['utilise'])
    written = written + write
    for k in range(S):
      for d in range(width):
        M[k, d] = (1 - write[k] * erase[d]) * M[k, d] + write[k] * add[d]
    if induction:
      for k in np.argsort(w)[::-1][:top_k]:
        gates = dense(params['channel_input'], x) + M[k] @ params['channel_memory']
        channels[k] = gru_step(gates, channels[k], params['channel_recurrent'])
  return c, r, M, written, channels


def activation_unit(params, q, v):
  """The unit of DIN over the rows of v, without softmax."""
  out = np.zeros_like(q)
  for row in v:
    hidden = sigmoid(np.concatenate([q, row, q - row, q * row]) @ params['w1'] + params['b1'])
    out += dense(params['Dense_0'], hidden)[0] * row
  return out


def reference(params, i, s, **fields):
  c, r, M, _, channels = run(params, s, **fields)
  c, r, *_ = attend(params, i, c, r, M)
  parts = [c, r]
  if fields['induction']:
    parts.append(activation_unit(params['attention'], i, channels))
  return np.concatenate(parts)


def model_of(**fields):
  return MIMN(Schema(()), slots=3, controller=5, attention=6, **fields)


@pytest.mark.parametrize(
  'fields',
  [
    dict(top_k=2, balance=True, induction=True),
    dict(top_k=1, balance=True, induction=False),
    dict(top_k=1, balance=False, induction=True),
  ],
  ids=['all', 'no induction', 'no balance'],
)
def test_encoder_equals_the_formulas(fields):
  check_encoder(model_of(**fields), lambda *a: reference(*a, **fields))


def test_balance_loss_equals_that_of_the_released_code():
  fields = dict(top_k=1, balance=True, induction=True)
  encoder, x = alone(model_of(**fields)), make_inputs()
  params = make_params(encoder.init, jax.random.key(0), x)['params']
  weight = np.array([1.0, 0.5, 0.0, 1.0], np.float32)
  batch = {'weight': jnp.asarray(weight)}

  def loss(params):
    return encoder.apply({'params': params}, x, batch, train=True)[1]['balance']

  exact, s_BLI = jax.tree.map(lambda p: np.asarray(p, np.float64), (params, x.s_BLI))
  written = np.stack(
    [run(exact, s[:length], **fields)[3] for s, length in zip(s_BLI, LENGTHS, strict=True)]
  )
  # Equation 8 with the divisor of the code, as a weighted mean.
  uneven = [sum((w - row.mean()) ** 2 for w in row) for row in written]
  B, S = written.shape
  want = weight @ uneven / weight.sum() / (S**2 * B)
  assert np.mean(uneven) / (S**2 * B) == pytest.approx(capacity_loss(written))
  value_and_grads = jax.jit(jax.value_and_grad(loss))
  value, grads = value_and_grads(params)
  assert float(value) == pytest.approx(want, rel=1e-4)
  assert np.any(grads['utilise']) and np.any(grads['heads'])
  # The write weights do not depend on the channels.
  assert not np.any(grads['channel_memory']) and not np.any(grads['channel_recurrent'])
  # Gradients are finite for a memory of zeros, which has no direction.
  _, grads = value_and_grads(params | {'memory': jnp.zeros_like(params['memory'])})
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  without = alone(model_of(balance=False))
  assert not jax.eval_shape(lambda p: without.apply({'params': p}, x, batch, train=True), params)[1]


def test_unevenness_is_zero_for_equal_weights():
  values = unevenness(jnp.array([[1.5, 1.5, 1.5], [1.0, 2.0, 3.0]]))
  np.testing.assert_allclose(values, [0, 2])
