"""SIM, UBR4CTR, ETA, SDIM and TWIN against their formulas in numpy, example by example."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.models import registry
from lmn_jax.models.ctr.ubr4ctr import policy_loss
from tests.encoders import make_params
from tests.examples import SCHEMA, SIZES, embedded, make_batch, make_config
from tests.layers.test_history_search import heads, newest_of_best

WIDTH, L = 4, 12
KINDS = [
  ('sim', dict(search='hard', top_k=2, heads=3)),
  ('sim', dict(search='hard', category='tags', top_k=4)),
  ('sim', dict(search='soft', top_k=3, heads=2)),
  ('sim', dict(search='soft', top_k=20)),
  ('ubr4ctr', dict(top_k=2)),
  ('ubr4ctr', dict(top_k=20, heads=3)),
  ('eta', dict(top_k=3, bits=32, heads=2)),
  ('eta', dict(top_k=4, bits=64, hash_seed=3)),
  ('sdim', dict(bits=12, tau=2)),
  ('sdim', dict(bits=9, tau=3, hash_seed=1)),
  ('twin', dict(top_k=3, heads=3)),
  ('twin', dict(top_k=20, heads=1)),
]


def make_bare(name, fields):
  """(model without its head, variables, tables, batch); a call returns features and losses."""
  odd = {} if name == 'sdim' else {'attention': 5}
  model = registry.build(make_config(name, **odd | fields).model.to_dict(), SCHEMA)

  class Bare(type(model)):
    @nn.compact
    def __call__(self, batch, read, train=False):
      encoded = self.encode(embedded(batch, read), batch, read, train)
      # Logits of good predictions, so that the policy gets rewards.
      losses = encoded.losses(4 * batch['label'] - 2) if train else {}
      return encoded.x_BQE[:, 0], losses

    @nn.compact
    def draw(self, batch, read):
      return self._query(embedded(batch, read), 3, train=True)

  names = set(registry.defaults(name)) - {'name'}
  bare = Bare(SCHEMA, **{field: getattr(model, field) for field in names})
  rng = np.random.default_rng(7)
  # Rows of about unit size, so that no softmax is uniform; the padding id reads zeros.
  tables = {
    k: jnp.asarray(np.r_[rng.normal(size=(V, WIDTH)), np.zeros((1, WIDTH))], jnp.float32)
    for k, V in SIZES.items()
  }
  batch = jax.tree.map(jnp.asarray, make_batch(L=L))
  keys = {'params': jax.random.key(0), 'positions': jax.random.key(1)}
  variables = make_params(lambda: bare.init(keys, batch, reader(tables), train=True))
  return bare, variables, tables, batch


def reader(tables):
  return lambda name, ids: tables[name][ids]


@jax.jit
def inputs_of(batch, tables):
  return embedded(batch, reader(tables))


def host_inputs(batch, tables):
  """The inputs of an encoder, on the host."""
  return jax.tree.map(np.asarray, inputs_of(batch, tables))


def shares_value(a, b, V):
  """Whether two values of a feature, or two lists of values, have a value in common."""
  return bool((set(np.atleast_1d(a)) & set(np.atleast_1d(b))) - {V})


def sign_bits(x, count, seed):
  return x @ np.asarray(jax.random.normal(jax.random.key(seed), (x.shape[-1], count))) >= 0


def dense(p, x):
  return x @ p['kernel'] + p['bias']


def mlp(p, x):
  names = sorted(p)
  for name in names[:-1]:
    x = np.maximum(dense(p[name], x), 0)
  return dense(p[names[-1]], x)


def one_head_score(p, a, e):
  """(Wk e_j) . (Wq a) / sqrt(d) for each head: [H, L]."""
  return np.einsum('lhd,hd->hl', np.einsum('li,ihd->lhd', e, p['key']),
                   np.einsum('i,ihd->hd', a, p['query'])) / np.sqrt(p['key'].shape[2])  # fmt: skip


def query_of(p, model, x, b):
  """UBR4CTR's log-odds of each field of the target, for one example."""
  e = np.concatenate([x.i_BQI[b, 0], x.u_BU[b], x.c_BQC[b, 0]]).reshape(-1, WIDTH)
  z = (e - e.mean(1, keepdims=True)) / np.sqrt(e.var(1, keepdims=True) + 1e-6)
  z = z * p['select_norm']['scale'] + p['select_norm']['bias']
  s = p['select']

  def part(name, x):
    return np.einsum('fi,ihd->fhd', x, s[name]['kernel']) + s[name]['bias']

  score = np.einsum('fhd,ghd->hfg', part('query', z), part('key', e)) / np.sqrt(model.attention)
  w = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
  mixed = np.einsum('hfg,ghd->fhd', w, part('value', e))
  out = e + np.einsum('fhd,hdi->fi', mixed, s['out']['kernel']) + s['out']['bias']
  return mlp(p['select_head'], out[:3])[:, 0]


def search_places(name, model, p, x, batch, b):
  """Positions in the history that the search of example b returns, best first."""
  mask, a, e = x.mask_BL[b], x.i_BQI[b, 0], x.s_BLI[b]
  if name == 'sim' and model.search == 'hard':
    f = model.category
    V = SIZES[f'item.{f}']
    same = [shares_value(batch[f'item.{f}'][b], c, V) for c in batch[f'history.{f}'][b]]
    return newest_of_best(np.zeros(L), mask & same, model.top_k)
  if name == 'sim':
    return newest_of_best(one_head_score(p['general'], a, e)[0], mask, model.top_k)
  if name == 'eta':
    bits = sign_bits(np.r_[a[None], e], model.bits, model.hash_seed)
    return newest_of_best(-(bits[1:] != bits[0]).sum(1), mask, model.top_k)
  if name == 'twin':
    return newest_of_best(one_head_score(p['queries'], a, e).sum(0), mask, model.top_k)
  score, odds = np.zeros(L), query_of(p, model, x, b)
  chosen = (odds > 0) | (odds == odds.max())
  for k, f in enumerate(['item', 'item.category', 'item.tags']):
    past = batch['history' if f == 'item' else f.replace('item', 'history')][b]
    same = np.array([shares_value(batch[f][b], v, SIZES[f]) for v in past]) & mask
    N, n = mask.sum(), same.sum()
    score += chosen[k] * same * np.log(1 + (N - n + 0.5) / (n + 0.5))
  return newest_of_best(score.astype(np.float32), mask & (score > 0), model.top_k)


def encode(name, model, p, x, batch):
  """The expected features of the encoder, example by example."""
  out = []
  for b in range(len(x.i_BQI)):
    a, e = x.i_BQI[b, 0], x.s_BLI[b]
    if name == 'sdim':
      groups = sign_bits(np.r_[a[None], e], model.bits, model.hash_seed).reshape(
        L + 1, -1, model.tau
      )
      total = np.zeros(len(a))
      for g in range(groups.shape[1]):
        s = sum((e[j] for j in range(L) if x.mask_BL[b, j] and
                 (groups[j + 1, g] == groups[0, g]).all()), np.zeros(len(a)))  # fmt: skip
        total += s / max(np.linalg.norm(s), 1e-6)
      out.append(total / groups.shape[1])
      continue
    places = search_places(name, model, p, x, batch, b)
    q = p['exact' if name == 'sim' else 'queries']
    v = e[places][None] if places else np.zeros((1, 1, len(a)))
    mask = np.full((1, v.shape[1]), bool(places))
    features = heads(q['query'], q['key'], a[None], v, mask)[0]
    if name in ('eta', 'twin'):
      value = p['attention']['value']
      features = np.concatenate([features[h] @ value[h] for h in range(len(features))])
      features = features @ p['attention']['out']['kernel']
    out.append(features.reshape(-1))
  return np.array(out)


@pytest.mark.parametrize('name, fields', KINDS, ids=[f'{n} {f}' for n, f in KINDS])
def test_encoder_equals_the_formulas(name, fields):
  model, variables, tables, batch = make_bare(name, fields)
  apply = jax.jit(lambda batch: model.apply(variables, batch, reader(tables))[0])
  features = np.asarray(apply(batch))
  x = host_inputs(batch, tables)
  batch = jax.device_get(batch)
  p = jax.tree.map(np.asarray, variables.get('params', {}))
  want = encode(name, model, p, x, batch)
  np.testing.assert_allclose(features, want, atol=3e-5)
  # The batch has histories that are empty, short, and longer than the search result.
  assert batch['length'].min() == 0 and batch['length'].max() > fields.get('top_k', 1) % 20
  assert not want[0].any() and np.count_nonzero(want.any(axis=1)) >= 5
  if name != 'sdim' and model.top_k < L:
    # In several examples, the search result differs from the newest behaviours.
    sets = [search_places(name, model, p, x, batch, b) for b in range(len(features))]
    newest = [newest_of_best(np.zeros(L), m, model.top_k) for m in x.mask_BL]
    assert sum(set(s) != set(n) for s, n in zip(sets, newest, strict=True)) >= 4
  # The ids on padding have no effect.
  blank = ~x.mask_BL
  noisy = batch | {
    'history': np.where(blank, batch['item'][:, None], batch['history']),
    'history.category': np.where(blank, batch['item.category'][:, None], batch['history.category']),
    'history.tags': np.where(blank[..., None], batch['item.tags'][:, None], batch['history.tags']),
  }
  np.testing.assert_allclose(apply(noisy), features, atol=1e-5)


@pytest.mark.parametrize('name, fields', KINDS[::2], ids=[f'{n} {f}' for n, f in KINDS[::2]])
def test_gradients_are_finite_and_zero_for_padding(name, fields):
  model, variables, tables, batch = make_bare(name, fields)

  def loss(variables, tables, weight):
    weighted, rngs = batch | {'weight': weight}, {'positions': jax.random.key(2)}
    x_BE, losses = model.apply(variables, weighted, reader(tables), train=True, rngs=rngs)
    return jnp.sum(jnp.cos(x_BE)) + sum(losses.values())

  grads = jax.jit(jax.grad(loss, (0, 1)))
  dense_grads, row_grads = grads(variables, tables, jnp.ones(16))
  for x in jax.tree.leaves((dense_grads, row_grads)):
    assert np.isfinite(x).all()
  assert all(np.asarray(x).any() for x in jax.tree.leaves(dense_grads))
  assert np.asarray(row_grads['item']).any() and not np.asarray(row_grads['item'])[-1].any()
  # Parts that only an auxiliary loss trains get no gradient from examples of weight 0.
  weightless = grads(variables, tables, jnp.zeros(16))[0].get('params', {})
  for part in {'general', 'general_head', 'select', 'select_head'} & set(weightless):
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(weightless[part]))


def test_the_loss_of_the_soft_search_equals_its_formula():
  model, variables, tables, batch = make_bare('sim', dict(search='soft', top_k=3))
  batch['history'] = jnp.minimum(batch['history'], 3)  # items also on padding
  weight = np.arange(16, dtype=np.float32) / 8
  batch['weight'] = jnp.asarray(weight)
  losses = jax.jit(lambda: model.apply(variables, batch, reader(tables), train=True)[1])()
  x = host_inputs(batch, tables)
  p = jax.tree.map(np.asarray, variables['params'])
  nats = []
  for b in range(16):
    r = one_head_score(p['general'], x.i_BQI[b, 0], x.s_BLI[b])[0] * x.mask_BL[b]
    logit = mlp(p['general_head'], np.r_[r @ x.s_BLI[b], x.i_BQI[b, 0]])[0]
    nats.append(np.logaddexp(0, -logit if batch['label'][b] else logit))
  np.testing.assert_allclose(losses['search'], weight @ nats / weight.sum(), rtol=1e-4)


def test_queries_are_drawn_with_their_log_probability():
  model, variables, tables, batch = make_bare('ubr4ctr', dict(top_k=3))
  many = {k: jnp.repeat(x[5:6], 4000, axis=0) for k, x in batch.items()}
  chosen, log_prob = jax.jit(  # [B, 1, F], [B, 1]
    lambda key: model.apply(variables, many, reader(tables), rngs={'positions': key}, method='draw')
  )(jax.random.key(3))
  x = host_inputs(batch, tables)
  odds = query_of(jax.tree.map(np.asarray, variables['params']), model, x, 5)
  drawn = 0
  for query in itertools.product([False, True], repeat=3):
    signs = np.where(query, 1, -1)
    query_log_prob = -np.log1p(np.exp(-signs * odds)).sum()
    same = (np.asarray(chosen)[:, 0] == query).all(axis=1)
    np.testing.assert_allclose(np.asarray(log_prob)[same, 0], query_log_prob, rtol=1e-4)
    share = np.exp(query_log_prob)
    assert abs(same.mean() - share) < 5 * np.sqrt(share * (1 - share) / 4000) + 1e-4
    drawn += same.any()
  assert drawn >= 4


def test_a_query_is_never_empty_in_evaluation():
  model, variables, tables, batch = make_bare('ubr4ctr', dict(top_k=3))
  variables['params']['select_head']['Dense_2']['bias'] -= 100
  x = host_inputs(batch, tables)
  p = jax.tree.map(np.asarray, variables['params'])
  assert all((query_of(p, model, x, b) < 0).all() for b in range(16))
  want = encode('ubr4ctr', model, p, x, jax.device_get(batch))
  assert want.any()
  features = jax.jit(lambda: model.apply(variables, batch, reader(tables))[0])()
  np.testing.assert_allclose(features, want, atol=3e-5)


def test_policy_loss_equals_its_formula():
  logit, label = jnp.array([2.0, -1.0, 9.0, 0.0]), jnp.array([1.0, 1.0, 0.0, 1.0])
  weight, log_prob = jnp.array([1.0, 0.5, 0.5, 0.0]), jnp.array([-0.5, -1.0, -2.0, -7.0])
  p = 1 / (1 + np.exp(-np.asarray(logit)))
  bce = -np.log(np.where(np.asarray(label) == 1, p, 1 - p))
  reward = np.maximum(1 - bce / np.log(2), -1)
  assert reward[0] > 0 > reward[1] > -1 == reward[2]
  loss, (log_prob_grad, logit_grad) = jax.value_and_grad(policy_loss, (0, 1))(
    log_prob, logit, label, weight
  )
  np.testing.assert_allclose(loss, -(reward * log_prob) @ weight / 2, rtol=1e-5)
  assert not np.asarray(logit_grad).any(), 'the prediction gets a gradient'
  np.testing.assert_allclose(log_prob_grad, -reward * weight / 2, rtol=1e-5)
