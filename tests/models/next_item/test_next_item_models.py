"""The next-item models besides DMAN against the formulas of their papers, event by event."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.models.next_item.hpmn import covariance
from tests.encoders import biases, dense, dropped_on_entry, make_params, softmax
from tests.layers.test_self_attention import attend, mlp, norm, relu
from tests.runs import but_slow

V, U, B, T, D = 12, 5, 3, 4, 6
SCHEMA = Schema((('user', U), ('item', V)))
sigmoid = scipy.special.expit
# Fields that make each model small.
FIELDS = {
  'gru4rec': {}, 'caser': dict(window=3, horizontal=2, vertical=2), 'sasrec': dict(heads=2),
  'shan': {}, 'hpmn': dict(slots=3), 'sdm': dict(heads=2), 'hstu': dict(heads=2),
}  # fmt: skip


def gru(p, x, h, index=None):
  """One step of a GRU with the gates [u, r, n]."""
  w, b, r = (
    (p['input']['kernel'], p['input']['bias'], p['recurrent'])
    if index is None
    else (p['input'][index], p['bias'][index], p['recurrent'][index])
  )
  x_u, x_r, x_n = np.split(x @ w + b, 3)
  h_u, h_r, h_n = np.split(h @ r, 3)
  u, n = sigmoid(x_u + h_u), np.tanh(x_n + sigmoid(x_r + h_r) * h_n)
  return (1 - u) * h + u * n


def gru4rec(p, x, u):
  h, out = np.zeros(D), []
  for row in x:
    h = gru(p['gru'], row, h)
    out.append(h)
  return np.stack(out)


def caser(p, x, u):
  W, K, out = 3, 2, []
  padded = np.concatenate([np.zeros((W - 1, D)), x])
  for t in range(len(x)):
    e, o = padded[t : t + W], []
    for h in range(1, W + 1):
      f = p[f'horizontal_{h}']
      o.append(
        np.max(
          [relu(e[i : i + h].ravel() @ f['kernel'] + f['bias']) for i in range(W - h + 1)], axis=0
        )
      )
    o += [sum(p['vertical'][w, k] * e[w] for w in range(W)) for k in range(K)]
    z = relu(dense(p['together'], np.concatenate(o)))
    out.append(dense(p['out'], np.concatenate([z, u])))
  return np.stack(out)


def sasrec(p, x, u, times=None):
  x = x * np.sqrt(D) + p['positions'][: len(x)]
  for b in range(2):
    attention = p[f'SelfAttention_{b}']
    bias = None if times is None else pair_biases(attention, *times)
    x = x + attend(attention, norm(p[f'LayerNorm_{2 * b}'], x), 2, True, bias)
    x = x + mlp(p[f'MLP_{b}'], norm(p[f'LayerNorm_{2 * b + 1}'], x), relu)
  return norm(p['LayerNorm_4'], x)


def weighted(u, layer, v):
  a = np.array([u @ layer(row) for row in v])
  return softmax(a) @ v


def shan(p, x, u):
  out = []
  for t in range(len(x)):
    long = weighted(u, lambda v: relu(dense(p['first'], v)), x[: t + 1])
    short = np.concatenate([long[None], x[t // T * T : t + 1]])
    out.append(weighted(u, lambda v: relu(dense(p['second'], v)), short))
  return np.stack(out)


def sdm(p, x, u):
  out = []
  for begin in range(0, len(x), T):
    session, h = [], np.zeros(D)
    for row in x[begin : begin + T]:
      h = gru(p['gru'], row, h)
      session.append(h)
    hat = attend(p['attention'], np.stack(session), 2, causal=True) @ p['out']['kernel']
    long = weighted(u, lambda v: v, x[:begin]) if begin else np.zeros(D)
    long = np.tanh(dense(p['long'], long))
    for t in range(len(session)):
      s = weighted(u, lambda v: v, hat[: t + 1])
      g = sigmoid(dense(p['gate'], np.concatenate([u, s, long])))
      out.append((1 - g) * long + g * s)
  return np.stack(out)


def hpmn(p, x, u):
  m, out = np.zeros((3, D)), []
  for t, row in enumerate(x, 1):
    below = row
    for j in range(3):
      if t % 2**j == 0:
        m[j] = gru(p, below, m[j], j)
      below = m[j]
    energy = [
      dense(p['energy'], relu(dense(p['asked'], np.concatenate([s, row, s * row])))) for s in m
    ]
    r = softmax(np.array(energy)[:, 0]) @ m
    out.append(dense(p['out'], np.concatenate([r, row])))
  return np.stack(out)


def silu(x):
  return x * sigmoid(x)


def pair_biases(p, time, gap):
  """The biases by the time from event s to the request at t: [t, s]."""
  return biases(p, np.abs(time[:, None] + gap[:, None] - time[None]))


def hstu(p, x, u, times=None):
  H, E = 2, D // 2
  x = x * np.sqrt(D) + p['positions'][: len(x)]
  for b in range(2):
    layer = p[f'layer_{b}']
    mixed = silu(norm(layer['LayerNorm_0'], x) @ layer['mix']['kernel'])
    gate, v, q, k = np.split(mixed, 4, axis=-1)
    read = np.zeros_like(x)
    for h in range(H):
      at = slice(h * E, (h + 1) * E)
      for t in range(len(x)):
        for s in range(t + 1):
          score = q[t, at] @ k[s, at] + layer['distance'][h, t - s]
          if times is not None:
            score += pair_biases(layer, *times)[t, s]
          a = silu(score) / T
          read[t, at] += a * v[s, at]
    x = x + dense(layer['out'], norm(layer['LayerNorm_1'], read) * gate)
  return norm(p['norm'], x)


REFERENCES = dict(
  gru4rec=gru4rec, caser=caser, sasrec=sasrec, shan=shan, hpmn=hpmn, sdm=sdm, hstu=hstu
)
HISTORIES = ((7,), (2, 3), (1,))  # lengths of the histories of each lane, one user after another


def batches():
  """Batches of segments, and for each user (items, user row, places of the vectors)."""
  rng = np.random.default_rng(0)
  steps = 3
  item, first = np.full((steps, B, T), V, np.int32), np.zeros((steps, B), bool)
  users, user_row = [], np.zeros((steps, B), np.int32)
  for lane, lengths in enumerate(HISTORIES):
    step = 0
    for length in lengths:
      events, row, places = rng.integers(1, V, length), int(rng.integers(U)), []
      for begin in range(0, length, T):
        piece = events[begin : begin + T]
        item[step, lane, : len(piece)], user_row[step, lane] = piece, row
        first[step, lane] = begin == 0
        places += [(step, lane, t) for t in range(len(piece))]
        step += 1
      users.append((events, row, places))
    first[step:, lane] = True
  target = rng.integers(1, V, item.shape).astype(np.int32)
  segments = [
    dict(item=jnp.asarray(i), first=jnp.asarray(f), user=jnp.asarray(u), target=jnp.asarray(t))
    for i, f, u, t in zip(item, first, user_row, target, strict=True)
  ]
  return segments, users


def make(name, **fields):
  config = (
    registry.defaults(name, 'next_item') | dict(width=D, loss='softmax') | FIELDS[name] | fields
  )
  model = registry.build(config, SCHEMA, 'next_item')
  rng = np.random.default_rng(1)
  tables = {k: jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for k, n in SCHEMA.vocabulary}

  def read(name, ids, weights=None):
    rows = tables[name]
    return jnp.where((ids < len(rows))[..., None], rows[jnp.minimum(ids, len(rows) - 1)], 0)

  batch = batches()[0][0]
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
  params = make_params(lambda: model.init(keys, batch, read, model.carry(batch), train=True))[
    'params'
  ]
  return model, params, read, {k: np.asarray(x, np.float64) for k, x in tables.items()}


@pytest.mark.parametrize('name', REFERENCES)
def test_vectors_equal_the_formulas(name):
  model, params, read, tables = make(name)
  run = jax.jit(lambda batch, carry: model.apply({'params': params}, batch, read, carry))
  segments, users = batches()
  carry, values = model.carry(segments[0]), []
  for batch in segments:
    out = run(batch, carry)
    carry = out.carry
    values.append(np.asarray(out.value))
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for events, row, places in users:
    # Windows are independent; a carried state covers all events.
    pieces = [events] if model.whole else [events[k : k + T] for k in range(0, len(events), T)]
    x = [REFERENCES[name](p, tables['item'][piece], tables['user'][row]) for piece in pieces]
    vectors = np.stack([values[step][lane, t] for step, lane, t in places])
    np.testing.assert_allclose(vectors, np.concatenate(x), rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize('name', [name for name in REFERENCES if registry.NEXT_ITEM[name].packs])
def test_packed_windows_equal_separate_windows(name):
  model, _, read, _ = make(name)
  rng, N = np.random.default_rng(0), 9  # odd, and more positions than pieces of the attention
  sizes = ((4, 3, 2), (5, 1), (9,))
  item, begin = np.full((B, N), V, np.int32), np.zeros((B, N), np.int32)
  for lane, lengths in enumerate(sizes):
    for low, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
      item[lane, low : low + length] = rng.integers(1, V, length)
      begin[lane, low : low + length] = low
  batch = dict(item=jnp.asarray(item), first=jnp.ones(B, bool))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, read, {}))['params']
  draw = iter(jax.random.split(jax.random.key(1), 200))
  params = jax.tree.map(lambda x: jax.random.normal(next(draw), x.shape), shapes)

  def run(item, begin):
    batch = dict(item=jnp.asarray(item), first=jnp.ones(len(item), bool), begin=jnp.asarray(begin))
    return np.asarray(model.apply({'params': params}, batch, read, {}).value)

  together = run(item, begin)
  for lane, lengths in enumerate(sizes):
    for low, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
      alone = np.full((1, N), V, np.int32)
      alone[0, :length] = item[lane, low : low + length]
      separate = run(alone, np.zeros((1, N), np.int32))[0, :length]
      np.testing.assert_allclose(together[lane, low : low + length], separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', but_slow(list(REFERENCES), {0, 2}))
def test_requested_vectors_equal_those_of_all_positions(name):
  model, params, read, _ = make(name)
  batch = batches()[0][0] | {'begin': jnp.asarray([[0, 0, 2, 2], [0, 1, 1, 1], [0, 0, 0, 0]])}
  if not model.packs:
    del batch['begin']
  output_BP = jnp.asarray([[3, 1], [0, 0], [2, 3]])

  @jax.jit
  def run(batch):
    return model.apply({'params': params}, batch, read, model.carry(batch))

  every, requested = run(batch), run(batch | {'asked': output_BP})
  expected = jnp.take_along_axis(every.value, output_BP[:, :, None], axis=1)
  np.testing.assert_allclose(requested.value, expected, rtol=1e-4, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, requested.carry, every.carry)


@pytest.mark.parametrize('name', REFERENCES)
def test_vectors_do_not_depend_on_later_events(name):
  model, params, read, _ = make(name)
  run = jax.jit(lambda batch: model.apply({'params': params}, batch, read, model.carry(batch)))
  batch = batches()[0][0]
  original = run(batch)
  for t in range(T):
    other = (batch['item'][:, t] + 1) % V
    changed = run(
      batch | {'item': batch['item'].at[:, t].set(jnp.where(batch['item'][:, t] < V, other, V))}
    )
    np.testing.assert_array_equal(changed.value[:, :t], original.value[:, :t])
    assert np.any(changed.value[0, t] != original.value[0, t])


@pytest.mark.parametrize('name', but_slow(list(REFERENCES), {0, 2}))
def test_every_parameter_gets_a_gradient(name):
  model, params, read, _ = make(name)
  first, second = batches()[0][:2]
  carry = model.apply({'params': params}, first, read, model.carry(first)).carry
  # Targets of padding are padding.
  batch = second | {'target': jnp.where(second['item'] < V, second['target'], V)}

  @jax.jit
  def grads(params):
    rngs = {'dropout': jax.random.key(0)}
    return jax.grad(
      lambda p: model.apply({'params': p}, batch, read, carry, train=True, rngs=rngs).losses[
        'next_item'
      ]
    )(params)

  still = {
    jax.tree_util.keystr(k) for k, g in jax.tree.leaves_with_path(grads(params)) if not np.any(g)
  }
  assert still <= {"['distance']"}, still


def test_covariance_of_slots_equals_numpy():
  slots = np.random.default_rng(0).normal(size=(2, 3, 8))
  covariances = [np.cov(m, bias=True) for m in slots]
  want = [0.5 * (np.sum(c**2) - np.sum(np.diag(c) ** 2)) for c in covariances]
  np.testing.assert_allclose(covariance(jnp.asarray(slots, jnp.float32)), want, rtol=1e-5)


@pytest.mark.parametrize('name', REFERENCES)
def test_dropout_is_applied_in_training(name):
  model, params, read, _ = make(name, dropout=0.5)
  batch = batches()[0][0]

  @jax.jit
  def vectors(key):
    rngs = {'dropout': key}
    carry = model.carry(batch)
    return model.apply({'params': params}, batch, read, carry, train=True, rngs=rngs).value

  assert np.any(vectors(jax.random.key(0)) != vectors(jax.random.key(1)))


@pytest.mark.parametrize('name', but_slow(list(registry.NEXT_ITEM), {0, 2}))
def test_dropout_is_applied_to_the_events_once(name):
  config = registry.defaults(name, 'next_item') | FIELDS.get(name, {}) | dict(width=D, dropout=0.5)
  model = registry.build(config, SCHEMA, 'next_item')
  _, _, read, _ = make('gru4rec')
  batch, keys = batches()[0][0], {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  carry = model.carry(batch)
  params = make_params(lambda: model.init(keys, batch, read, carry, train=True))['params']

  def run():
    model.apply({'params': params}, batch, read, carry, train=True, rngs=keys)

  (dropped,) = dropped_on_entry(run)
  events = np.asarray(read('item', batch['item']))
  if name == 'sasrec':  # rows with positions, as in its paper
    events = events * np.sqrt(D) + np.asarray(params['positions'])
  np.testing.assert_allclose(dropped, events, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('negatives', [1, 7])
def test_gbce_uses_the_sampled_share_of_the_other_items(negatives):
  """alpha = N / (items - 1): neither the unknown item, row 0, nor the target is a negative."""
  model, params, read, _ = make('gru4rec', negatives=negatives, calibration=0.6)
  model = dataclasses.replace(model, loss='gbce')
  rng = np.random.default_rng(0)
  batch = batches()[0][0]
  negative = rng.integers(1, V, (B, T, negatives)).astype(np.int32)
  out = model.apply(
    {'params': params}, batch | {'negative': jnp.asarray(negative)}, read, model.carry(batch),
    train=True,
  )  # fmt: skip
  v, rows = np.asarray(out.value, np.float64), np.asarray(read('item', jnp.arange(V)), np.float64)
  alpha = negatives / len(range(2, V))  # of items 1, ..., V - 1 one is the target
  beta = alpha * (0.6 * (1 - 1 / alpha) + 1 / alpha)
  target = np.asarray(batch['target'])
  positive_score = np.einsum('btd,btd->bt', v, rows[target])
  negative_score = np.einsum('btd,btnd->btn', v, rows[negative])
  nats = np.where(negative != target[:, :, None], np.logaddexp(0, negative_score), 0)
  want = np.mean(beta * np.logaddexp(0, -positive_score) + nats.sum(-1))
  assert float(out.losses['next_item']) == pytest.approx(want, rel=1e-5)
