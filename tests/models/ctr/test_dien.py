"""DIEN against the formulas of the paper in numpy: states, auxiliary loss and negatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.basic import Schema
from lmn_jax.models.ctr.dien import DIEN, auxiliary_loss, sample_negatives
from tests.encoders import (
  alone,
  biases,
  check_encoder,
  dense,
  gru_step,
  make_inputs,
  make_params,
  sigmoid,
  softmax,
)


def run_gru(params, x_TD, attention_T=None):
  """All states of a GRU or AUGRU that starts at zeros."""
  h, states = np.zeros(params['recurrent'].shape[0]), []
  for t, x in enumerate(x_TD):
    a = 1.0 if attention_T is None else attention_T[t]
    h = gru_step(dense(params['input'], x), h, params['recurrent'], a)
    states.append(h)
  return np.array(states).reshape(-1, len(h))


def reference(params, i, s, gaps=None):
  h = run_gru(params['extractor'], s)
  if not len(s):
    return np.zeros(params['evolution']['recurrent'].shape[0])
  score = np.array([state @ dense(params['attention'], i) for state in h])
  a = softmax(score if gaps is None else score + biases(params, gaps))
  return run_gru(params['evolution'], h, a)[-1]


@pytest.mark.parametrize('time', ['none', 'bias'])
def test_encoder_equals_the_formulas(time):
  check_encoder(DIEN(Schema(()), evolution=3, time=time), reference)


def test_auxiliary_loss_is_equation_6():
  rng = np.random.default_rng(0)
  h, s, negative = rng.normal(size=(3, 2, 4, 3)).astype(np.float32)
  weight = np.array([[1, 1, 0, 1], [0, 0.5, 0.5, 0]], np.float32)
  want = total = 0
  for b in range(2):
    for t in range(3):
      w = weight[b, t + 1]
      want -= w * np.log(sigmoid(h[b, t] @ s[b, t + 1]))
      want -= w * np.log(1 - sigmoid(h[b, t] @ negative[b, t + 1]))
      total += w
  loss = auxiliary_loss(*map(jnp.asarray, (h, s, negative, weight)))
  assert float(loss) == pytest.approx(want / total, rel=1e-5)
  assert float(auxiliary_loss(*map(jnp.asarray, (h, s, negative, 0 * weight)))) == 0


def test_negatives_are_real_events_of_another_history():
  # Event t of example b has the value 10 b + t; examples 0 and 1 share item 7.
  length = jnp.array([3, 2, 0, 1])
  s = jnp.asarray(10 * np.arange(4)[:, None] + np.arange(3)[None], jnp.float32)[:, :, None]
  history = jnp.array([[7, 1, 2], [7, 3, 99], [99, 99, 99], [4, 99, 99]])
  drawn = [set() for _ in range(4)]
  # Enough draws for every pair to occur.
  keys = jax.random.split(jax.random.key(0), 200)
  draw = jax.jit(jax.vmap(lambda key: sample_negatives(key, s, history, length)))
  draws = jax.device_get(draw(keys))
  for negative, mask in zip(*draws, strict=True):
    for b, t in np.argwhere(mask):
      value = int(negative[b, t, 0])
      drawn[b].add(value)
      other, position = divmod(value, 10)
      assert other != b and position < length[other], 'padding, or of the same history'
      assert history[other, position] != history[b, t], 'the item of the event'
    # An empty history gives no negatives.
    assert not np.any(mask & (negative[:, :, 0] // 10 == 2))
  assert drawn[0] == {10, 11, 30} and drawn[3] == {0, 1, 2, 10, 11}


def test_negatives_of_a_batch_of_one_have_its_shape():
  s, history = jnp.ones((1, 3, 2)), jnp.array([[1, 2, 3]])
  _, mask = sample_negatives(jax.random.key(0), s, history, jnp.array([3]))
  assert mask.shape == (1, 3)


def test_auxiliary_loss_is_weighted_and_trains_only_the_extractor():
  encoder, x = alone(DIEN(Schema(()))), make_inputs()
  batch = dict(history=jnp.arange(20).reshape(4, 5), length=jnp.sum(x.mask_BL, axis=1))
  params = make_params(encoder.init, jax.random.key(0), x)['params']

  def loss(params, weight):
    rngs = {'positions': jax.random.key(1)}
    weighted = batch | {'weight': weight}
    return encoder.apply({'params': params}, x, weighted, train=True, rngs=rngs)[1]['auxiliary']

  value_and_grads = jax.jit(jax.value_and_grad(loss))
  _, grads = value_and_grads(params, jnp.ones(4))
  assert all(np.any(g) for g in jax.tree.leaves(grads['extractor']))
  assert not any(np.any(g) for g in jax.tree.leaves((grads['evolution'], grads['attention'])))
  assert value_and_grads(params, jnp.zeros(4))[0] == 0
