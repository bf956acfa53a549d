"""Checks of an encoder alone, against a reference in numpy for one example without padding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmn_jax.layers.basic import Inputs, repeat

LENGTHS = (5, 2, 1, 0)  # a full history, a part of one, one event, no event
TARGETS = 2  # candidates of each example
WIDTH = 4


def make_inputs(seed=0, L=5):
  """Returns inputs of four examples, with noise as padding after each history."""
  rng = np.random.default_rng(seed)
  B = len(LENGTHS)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  mask = jnp.asarray(np.arange(L)[None] < np.array(LENGTHS)[:, None])
  u_BU, i_BQI, c_BC, s_BLI = (
    normal(B, 3),
    normal(B, TARGETS, WIDTH),
    normal(B, 2),
    normal(B, L, WIDTH),
  )
  return Inputs(u_BU, i_BQI, repeat(c_BC, TARGETS), s_BLI, mask)


def make_gaps(L=5):
  """Returns `time_gap` of the four examples, float32 [B, L]: seconds to weeks, and 7 as padding."""
  gaps = np.exp(np.random.default_rng(9).uniform(0, 14, (len(LENGTHS), L))).astype(np.int32)
  gaps = np.sort(gaps, axis=1)[:, ::-1]
  return np.where(np.arange(L)[None] < np.array(LENGTHS)[:, None], gaps, 0).astype(np.float32)


def biases(params, gaps):
  """The biases of a TimeBias for gaps, by the formula of the bucket."""
  bucket = np.floor(np.log(np.maximum(gaps, 1)) / 0.301).astype(int)
  return params['bias_by_time']['bias'][np.minimum(bucket, 127)]


def alone(model):
  """Returns the model without embedding and head: Inputs -> (features, losses)."""

  class Alone(type(model)):
    @nn.compact
    def __call__(self, x, batch=None, train=False):
      encoded = self.encode(x, batch or {}, None, train)
      return encoded.x_BQE, encoded.losses(None) if train else {}

  names = {field.name for field in dataclasses.fields(model)} - {'parent', 'name'}
  return Alone(**{name: getattr(model, name) for name in names})


def dropped_on_entry(run):
  """Returns the inputs of each nn.Dropout that is called before any other submodule.

  Args:
    run: applies a model in training mode.
  """
  inputs, entered = [], []

  def record(call, args, kwargs, context):
    if context.method_name != '__call__' or not context.module.path:
      return call(*args, **kwargs)
    if isinstance(context.module, nn.Dropout) and not entered:
      inputs.append(np.asarray(args[0]))
    elif not isinstance(context.module, nn.Dropout):
      entered.append(context.module)
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    run()
  return inputs


def make_params(init, *arguments, seed=0):
  """Returns random parameters with the shapes of `init`: no bias is zero, no scale is one.

  `init` is traced for its shapes and not compiled.
  """
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(init, *arguments)
  return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)


def check_encoder(model, reference):
  """Checks values and gradients against a reference, and that padding has no effect.

  Args:
    model: the model whose `encode` is checked.
    reference: (params, i [I], s [T, I]) -> features of one target of an example, all float64; for a
      model with time='bias' (params, i, s, gaps [T]).
  """
  encoder, x, gaps = alone(model), make_inputs(), make_gaps()
  batch = {'time_gap': jnp.asarray(gaps)} if model.time == 'bias' else None
  params = make_params(encoder.init, jax.random.key(0), x, batch)['params']

  @jax.jit
  def ours(params, i_BQI, s_BLI):
    return encoder.apply({'params': params}, x._replace(i_BQI=i_BQI, s_BLI=s_BLI), batch)[0]

  def theirs(params, i_BQI, s_BLI):
    def features(i_QI, s_LI, gap_L, length):
      past = (s_LI[:length],) if batch is None else (s_LI[:length], gap_L[:length])
      return [reference(params, i_I, *past) for i_I in i_QI]

    return np.stack(list(map(features, i_BQI, s_BLI, gaps, LENGTHS)))

  arguments = params, x.i_BQI, x.s_BLI
  exact = jax.tree.map(lambda p: np.asarray(p, np.float64), arguments)
  features = ours(*arguments)
  np.testing.assert_allclose(features, theirs(*exact), atol=1e-5)

  # Along a random direction for each array, against central differences of the reference.
  grads = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.cos(ours(*a))), (0, 1, 2)))(*arguments)
  leaves, tree = jax.tree.flatten(exact)
  rng = np.random.default_rng(1)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads)]
  for k, (path, grad) in enumerate(zip(paths, jax.tree.leaves(grads), strict=True)):
    direction = rng.normal(size=leaves[k].shape)

    def moved(step, k=k, direction=direction):
      new = leaves[:k] + [leaves[k] + step * direction] + leaves[k + 1 :]
      return np.cos(theirs(*jax.tree.unflatten(tree, new))).sum()

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-3, atol=1e-4, err_msg=path)
    assert np.abs(grad).max() > 1e-4, f'{path} has no gradient, so nothing was compared'

  noisy = jnp.where(x.mask_BL[:, :, None], x.s_BLI, 100.0)
  np.testing.assert_array_equal(ours(params, x.i_BQI, noisy), features)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def dense(params, x):
  return x @ params['kernel'] + params.get('bias', 0)


def gru_step(x_G, h_E, recurrent_EG, a=1.0):
  """Returns the next state of a GRU, gate by gate; `a` scales the update gate."""
  E = len(h_E)
  U_u, U_r, U_n = (recurrent_EG[:, k * E : (k + 1) * E] for k in range(3))
  u = a * sigmoid(x_G[:E] + h_E @ U_u)
  r = sigmoid(x_G[E : 2 * E] + h_E @ U_r)
  n = np.tanh(x_G[2 * E :] + r * (h_E @ U_n))
  return (1 - u) * h_E + u * n
