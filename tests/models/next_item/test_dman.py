"""DMAN against its formulas in numpy, user by user; which loss trains what; causality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lmn_jax.layers.basic import Schema
from lmn_jax.models.next_item.dman import DMAN, VARIANTS, Past
from tests.encoders import dense, make_params, softmax
from tests.layers.test_capsules import slow_route
from tests.runs import but_slow

V, B, T, D, L, M = 12, 3, 4, 6, 2, 3
SCHEMA = Schema((('user', 5), ('item', V)))


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def gelu(x):
  return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32)), np.float64)


def attend(p, queries, memory, heads, seen, bias):
  """Attention by query and head. seen, bias: (t, s) -> bool, (head, t, s) -> float."""
  E = D // heads
  q, k, v = (
    x @ p[name]['kernel'] for x, name in ((queries, 'query'), (memory, 'key'), (memory, 'value'))
  )
  out = np.zeros_like(queries)
  for h in range(heads):
    head = slice(h * E, (h + 1) * E)
    for t in range(len(queries)):
      keys = [s for s in range(len(memory)) if seen(t, s)]
      if keys:
        score = [k[s, head] @ q[t, head] / np.sqrt(E) + bias(h, t, s) for s in keys]
        out[t, head] = softmax(np.array(score)) @ v[keys, head]
  return out


def block(p, name, x, memory, heads, seen, bias):
  x = x + attend(
    p[name], norm(p[f'{name}_norm'], x), norm(p[f'{name}_norm'], memory), heads, seen, bias
  )
  hidden = norm(p[f'{name}_norm_2'], x)
  feed = p[f'{name}_feed']
  return x + dense(feed['Dense_1'], gelu(dense(feed['Dense_0'], hidden)))


def reference(p, model, x, past):
  """One user's segment: x [n, D] events, past (inputs of layers [L][T', D], memory [L, M, D])."""
  before, memory = past
  heads, n = model.heads, len(x)
  x = x + p['positions'][:n]
  short, levels = x, []
  for k in range(L):
    levels.append(short)
    old = before[k] if model.variant != 'nran' else before[k][:0]
    m = len(old)
    # A segment with a successor is full: its event j is T - j before the first event of the next.
    short = block(
      p, f'short_{k}', short, np.concatenate([old, short]), heads,
      lambda t, s, m=m: s < m + t + 1, lambda h, t, s, m=m: p['distance'][h, m + t - s],
    )  # fmt: skip
  v = short
  if model.variant != 'xl':
    long = x
    for k in range(L):
      long = block(p, f'long_{k}', long, memory[k], heads, lambda t, s: True, lambda h, t, s: 0.0)
    gate = scipy.special.expit(short @ p['gate_short']['kernel'] + long @ p['gate_long']['kernel'])
    v = gate * short + (1 - gate) * long
  loss = 0.0
  new = memory.copy()
  for k in range(L):
    if model.variant == 'xl' or not len(before[k]):
      continue
    if model.variant == 'fifo':
      new[k] = np.concatenate([memory[k], before[k]])[-M:]
      continue
    unit = p[f'abstract_{k}']
    w, primary = unit['map'], np.concatenate([memory[k], before[k]])
    routed = [norm(unit['norm_memory'], memory[k]), norm(unit['norm_past'], before[k])]
    new[k] = slow_route(
      np.concatenate(routed), lambda i, j, w=w: w, memory[k], np.ones(len(primary), bool), 3
    )
    scale, unit = p[f'short_{k}_norm'], p[f'short_{k}']
    reads = [
      attend(
        unit, norm(scale, levels[k]), norm(scale, y), heads, lambda t, s: True, lambda h, t, s: 0.0
      )
      for y in (primary, new[k])
    ]
    loss = loss + np.mean(np.square(reads[0] - reads[1]), axis=-1)
  return norm(p['norm'], v), (np.stack(levels), new), loss


def make(variant='full', heads=2, **fields):
  model = DMAN(
    SCHEMA, width=D, blocks=L, heads=heads, slots=M, variant=variant, loss='softmax', **fields
  )
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)

  def read(name, ids, weights=None):
    assert name == 'item' and weights is None
    return jnp.where((ids < V)[..., None], rows[jnp.minimum(ids, V - 1)], 0)

  return model, read, np.asarray(rows, np.float64)


def segments():
  """Three steps of three lanes: a long history; two users in turn; a short history."""
  rng = np.random.default_rng(1)
  item = rng.integers(1, V, (3, B, T)).astype(np.int32)
  target = rng.integers(1, V, (3, B, T)).astype(np.int32)
  first = np.zeros((3, B), bool)
  first[0] = True
  item[0, 1, 2:] = target[0, 1, 1:] = V  # two events, then another user
  first[1, 1] = True
  item[2, 2, 1:] = target[2, 2, 1:] = V
  return [
    dict(
      item=jnp.asarray(i), target=jnp.asarray(t), first=jnp.asarray(f), user=jnp.zeros(B, jnp.int32)
    )
    for i, t, f in zip(item, target, first, strict=True)
  ]


def params_of(model, read):
  batch = segments()[0]
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
  return make_params(lambda: model.init(keys, batch, read, model.carry(batch), train=True))[
    'params'
  ]


@pytest.mark.parametrize('variant', VARIANTS)
def test_segments_of_a_user_equal_the_formulas(variant):
  model, read, rows = make(variant)
  params = params_of(model, read)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  carry, past = model.carry(segments()[0]), [None] * B

  @jax.jit
  def run(batch, carry):
    return model.apply({'params': params}, batch, read, carry, train=True)

  for batch in segments():
    out = run(batch, carry)
    carry, user_losses, events = out.carry, [], 0
    for b in range(B):
      if batch['first'][b]:
        past[b] = np.zeros((L, 0, D)), p['memory'].copy() if 'memory' in p else np.zeros((L, M, D))
      items = [int(i) for i in batch['item'][b] if i < V]
      had_past = past[b][0].shape[1] > 0
      v, past[b], loss = reference(p, model, rows[items], past[b])
      np.testing.assert_allclose(out.value[b, : len(items)], v, rtol=2e-4, atol=2e-5)
      np.testing.assert_allclose(carry.memory_BLMD[b], past[b][1], rtol=2e-4, atol=2e-5)
      np.testing.assert_allclose(
        carry.hidden_BLTD[b, :, : len(items)], past[b][0], rtol=2e-4, atol=2e-5
      )
      if had_past:
        user_losses.append(np.sum(loss))
        events += len(items)
    if variant in ('full', 'nran'):
      want = sum(user_losses) / max(events, 1)
      np.testing.assert_allclose(out.losses['reconstruction'], want, rtol=2e-4, atol=1e-6)
    else:
      assert 'reconstruction' not in out.losses


def third_step(model, read, params):
  """The third batch and its carried state, with which every parameter has a gradient."""
  carry = model.carry(segments()[0])
  for batch in segments()[:2]:
    carry = model.apply({'params': params}, batch, read, carry).carry
  return segments()[2], carry


@pytest.mark.parametrize('routing_map', but_slow(['shared', 'per_capsule', 'per_pair'], {0}))
def test_each_loss_trains_its_own_parameters(routing_map):
  model, read, _ = make(routing_map=routing_map)
  params = params_of(model, read)
  batch, carry = third_step(model, read, params)

  @jax.jit
  def grads(params, batch):
    def loss(params, name):
      return model.apply({'params': params}, batch, read, carry, train=True).losses[name]

    return {name: jax.grad(loss)(params, name) for name in ('next_item', 'reconstruction')}

  def trained(tree):
    return {name for name, x in tree.items() if any(np.any(y) for y in jax.tree.leaves(x))}

  by_loss = grads(params, batch)
  assert trained(by_loss['reconstruction']) == {'abstract_0', 'abstract_1'}
  assert trained(by_loss['next_item']) == set(params) - {'abstract_0', 'abstract_1', 'memory'}

  # The initial memory is read only in the first segment of a user.
  batch = batch | {'first': jnp.array([True, False, False])}
  assert 'memory' in trained(grads(params, batch)['next_item'])


@pytest.mark.parametrize('variant', VARIANTS)
def test_vectors_do_not_depend_on_later_events(variant):
  model, read, _ = make(variant)
  params = params_of(model, read)
  batch, carry = third_step(model, read, params)

  @jax.jit
  def vectors(item):
    return model.apply({'params': params}, batch | {'item': item}, read, carry).value

  original = vectors(batch['item'])
  for t in range(T):
    changed = vectors(batch['item'].at[:, t].set((batch['item'][:, t] + 1) % V))
    np.testing.assert_array_equal(changed[:, :t], original[:, :t])
    assert np.any(changed[0, t:] != original[0, t:])


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_depend_on_their_parts_of_the_carried_state(variant):
  model, read, _ = make(variant)
  params = params_of(model, read)
  batch, carry = third_step(model, read, params)

  @jax.jit
  def vectors(carry, batch):
    return model.apply({'params': params}, batch, read, carry).value

  def differs(**changed):
    return bool(np.any(vectors(carry._replace(**changed), batch)[0] != vectors(carry, batch)[0]))

  assert differs(hidden_BLTD=carry.hidden_BLTD + 1) == (variant != 'nran')
  assert differs(memory_BLMD=carry.memory_BLMD[:, :, ::-1] ** 2) == (variant != 'xl')
  # The first segment of a user does not depend on the carried state of the lane.
  new = batch | {'first': jnp.ones(B, bool)}
  other = Past(carry.hidden_BLTD + 1, ~carry.there_BT, carry.memory_BLMD + 1)
  np.testing.assert_array_equal(vectors(carry, new), vectors(other, new))


def test_dropout_is_applied_in_training():
  model, read, _ = make(dropout=0.5)
  params = params_of(model, read)
  batch, carry = third_step(model, read, params)

  @jax.jit
  def vectors(key):
    rngs = {'dropout': key}
    return model.apply({'params': params}, batch, read, carry, train=True, rngs=rngs).value

  assert np.any(vectors(jax.random.key(0)) != vectors(jax.random.key(1)))
  assert dataclasses.replace(model, dropout=0.0).dropout == 0
