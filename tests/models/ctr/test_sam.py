"""SAM against its formulas with [B, L, 4D]; memory of its programs; scores of candidates."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.planning import hlo
from tests.blocks import set_sizes
from tests.examples import SCHEMA, embedded, make_batch, make_config, make_trainer
from tests.runs import but_slow, mesh_of

VARIANTS = [('2P', 'iter'), ('3P', 'iter'), ('3P+', 'iter'), ('2P', 'stk'), ('3P+', 'stk')]


def affine(p, x):
  return x @ p['kernel'] + p['bias']


def gru(p, x, h):
  """Cho et al. 2014, with the reset gate after the product as in cuDNN."""
  sigmoid = jax.nn.sigmoid
  r = sigmoid(affine(p['ir'], x) + h @ p['hr']['kernel'])
  z = sigmoid(affine(p['iz'], x) + h @ p['hz']['kernel'])
  n = jnp.tanh(affine(p['in'], x) + r * affine(p['hn'], h))
  return (1 - z) * n + z * h


def reference(params, x, variant, feedback):
  """The logits of a training batch with one target each, by the equations of SAM's docstring."""
  q, v = x.i_BQI[:, 0], x.s_BLI
  m, features = q, []
  for t in range(1, int(variant[0]) + 1):
    p = params[f'pass_{t}']
    second = m if feedback == 'iter' else q
    wide = [jnp.broadcast_to(y[:, None], v.shape) for y in (q, second)]
    x_4D = jnp.concatenate([z for y in wide for z in (y - v, y * v)], axis=-1)
    hidden = jax.nn.sigmoid(x_4D @ p['w1'] + p['b1'])
    w = jax.nn.sigmoid(affine(p['Dense_0'], hidden))[..., 0] * x.mask_BL.astype(jnp.float32)
    m = gru(params['gru'], jnp.sum(w[..., None] * v, axis=1), m)
    if variant != '3P+':
      features += [jax.nn.relu(affine(params[f'map_{t}'], w / w.shape[-1] ** 0.5)), m]
  if variant == '3P+':
    e = m
    for k in (1, 2, 3):
      hop = jnp.concatenate([affine(params[f'hop_{k}'], e), q], axis=-1)
      e = gru(params['enhance'], hop, e)
    o = jnp.concatenate([jax.nn.relu(affine(params['map_3'], w / w.shape[-1] ** 0.5)), e], axis=-1)
  else:
    o = jnp.concatenate(features, axis=-1)
    o = (o - o.mean(0)) / jnp.sqrt(o.var(0) + 1e-5)
    o = o * params['norm']['scale'] + params['norm']['bias']
  y = jnp.concatenate([x.u_BU, q, x.c_BQC[:, 0], o], axis=-1)
  y = jax.nn.relu(affine(params['head']['Dense_0'], y))
  return affine(params['head']['Dense_1'], y)[:, 0]


BATCH = jax.tree.map(jnp.asarray, make_batch())


def make(name='sam', **fields):
  """(model, variables, tables), all random, so that no bias is zero."""
  model = registry.build(make_config(name, **fields).model.to_dict(), SCHEMA)
  rng = np.random.default_rng(0)
  tables = {
    name: jnp.asarray(rng.normal(size=(spec.rows, spec.width)), jnp.float32)
    for name, spec in model.tables().items()
  }
  key = jax.random.key(0)
  variables = model.init({'params': key, 'positions': key}, BATCH, reader(tables), train=True)
  variables['params'] = jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), variables['params']
  )
  return model, variables, tables


def reader(tables):
  def read(name, ids, weights=None):
    rows = jnp.where((ids < len(tables[name]))[..., None], tables[name][ids], 0)
    return rows if weights is None else jnp.einsum('...k,...kd->...d', weights, rows)

  return read


def train_logits(model, variables, tables, batch):
  outputs, _ = model.apply(variables, batch, reader(tables), train=True, mutable=['batch_stats'])
  return outputs.value


@pytest.mark.parametrize(
  'variant, feedback, pairs',
  but_slow([*((*v, 2048) for v in VARIANTS), ('3P', 'iter', 4)], {5}),
)
def test_logits_and_gradients_equal_the_formulas(monkeypatch, variant, feedback, pairs):
  """For all parameters and rows, without chunks and in chunks of 4 of 6 positions."""
  set_sizes(monkeypatch, unit_pairs=pairs, unit_positions=1)
  model, variables, tables = make(variant=variant, feedback=feedback)
  params, batch = variables['params'], BATCH

  def ours(params, tables):
    return train_logits(model, variables | {'params': params}, tables, batch)

  def theirs(params, tables):
    with jax.numpy_rank_promotion('allow'):
      return reference(params, embedded(batch, reader(tables)), variant, feedback)

  def graded(logits):
    """(gradients, logits)"""

    def loss(params, tables):
      logit_B = logits(params, tables)
      return jnp.sum(jnp.cos(logit_B)), logit_B

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, tables)

  (grads, logit_B), (reference_grads, reference_B) = graded(ours), graded(theirs)
  np.testing.assert_allclose(logit_B, reference_B, rtol=1e-4, atol=1e-5)
  leaves = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(reference_grads), strict=True)
  # The error of a gradient is relative to the largest entry, because terms may cancel.
  for (path, a), b in leaves:
    assert jnp.any(b), path
    np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))), err_msg=str(path)
    )


@pytest.mark.parametrize('variant', ['3P', '3P+'])
def test_ids_on_padding_have_no_effect(variant):
  """Neither on logits nor on gradients."""
  model, variables, tables = make(variant=variant)
  batch = BATCH
  blank = jnp.arange(6)[None] >= batch['length'][:, None]
  noisy = batch | {'history': jnp.where(blank, 3, batch['history'])}
  assert jnp.any(noisy['history'] != batch['history'])

  def loss(params, tables, batch):
    return jnp.sum(jnp.cos(train_logits(model, variables | {'params': params}, tables, batch)))

  run = jax.jit(jax.value_and_grad(loss, (0, 1)))
  chex.assert_trees_all_equal(
    run(variables['params'], tables, batch), run(variables['params'], tables, noisy)
  )


# The history is passed as rows, so that all temporaries of a program are those of the model.
BARE = Schema((('user', 4), ('item', 8)))


def compile_bare(name, B, L, Q=None, grad=False, D=32, **fields):
  """The compiled scores of Q candidates, or the gradient by parameters and history."""
  config = make_config(name, **(dict(width=D) | fields))
  model = registry.build(config.model.to_dict(), BARE)
  batch = {
    'user': jnp.zeros(B, jnp.int32),
    'item': jnp.zeros(B if Q is None else (B, Q), jnp.int32),
    'history': jnp.zeros((B, L), jnp.int32),
    'length': jnp.full(B, L, jnp.int32),
    'label': jnp.zeros(B),
    'weight': jnp.ones(B),
  }

  def read_from(v_BLD):
    def read(name, ids, weights=None):
      rows = jnp.ones((*(ids.shape if weights is None else ids.shape[:-1]), D))
      return v_BLD if name == 'item' and ids.shape == (B, L) else rows

    return read

  def init(v_BLD):
    return model.init(jax.random.key(0), batch, read_from(v_BLD))

  def total(variables, v_BLD):
    outputs, _ = model.apply(
      variables, batch, read_from(v_BLD), train=grad, mutable=['batch_stats']
    )
    return jnp.sum(outputs.value)

  v = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
  program = jax.grad(total, (0, 1)) if grad else total
  return jax.jit(program).lower(jax.eval_shape(init, v), v).compile()


def largest(compiled):
  """Elements of the largest array of a program."""
  shapes = re.findall(r'\bf32\[([\d,]+)\]', compiled.as_text())
  return max(np.prod([int(x) for x in shape.split(',')]) for shape in shapes)


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures('uncached')
def test_no_array_of_four_widths():
  """The largest array of a training step is [L, D], not the [L, 4D] of the plain form."""
  B, L, D = 4, 512, 32
  assert largest(compile_bare('sam', B, L, grad=True)) == B * L * D


@pytest.mark.usefixtures('uncached')
def test_long_histories_are_read_in_chunks(monkeypatch):
  """The temporaries are less than one more array of the size of the history."""
  B, L, D = 2, 8192, 32
  bound = B * L * D * 4
  chunked = temporaries(compile_bare('sam', B, L, grad=True))
  set_sizes(monkeypatch, unit_pairs=L)
  whole = temporaries(compile_bare('sam', B, L, grad=True))
  assert chunked < bound < whole


def items_of(batch):
  """The names of the target and its features."""
  return [name for name in batch if name.startswith('item')]


def candidates_of(batch, others):
  """The batch with its items and those of other batches stacked, [B, Q]."""
  return batch | {
    name: np.stack([x[name] for x in (batch, *others)], axis=1) for name in items_of(batch)
  }


@pytest.mark.parametrize(
  'name, fields',
  [
    ('lmn', {'base': 'din', 'query_context': True}),
    # Other tests compare the encoders of most models with their formulas for two targets.
    *(
      pytest.param(*kind, marks=pytest.mark.slow)
      for kind in [
        ('ubr4ctr', {'top_k': 3}),
        ('sim', {'search': 'hard', 'category': 'tags', 'top_k': 3}),
        ('sam', {'variant': '3P+'}),
        ('dien', {}),
        ('mimn', {}),
      ]
    ),
  ],
)
def test_scores_of_candidates_equal_those_of_separate_examples(name, fields):
  """Items [B, Q] beside histories [B, L] against B * Q examples."""
  model, variables, tables = make(name, **fields)
  B, Q = BATCH['item'].shape[0], 3
  candidates = candidates_of(BATCH, [make_batch(seed) for seed in range(1, Q)])
  assert candidates['item.tags'].shape == (B, Q, 3)

  @jax.jit
  def logits(batch):
    return model.apply(variables, batch, reader(tables)).value

  together = logits(candidates)
  rows = {key: jnp.repeat(x, Q, axis=0) for key, x in BATCH.items()}
  rows |= {
    key: candidates[key].reshape(B * Q, *candidates[key].shape[2:]) for key in items_of(BATCH)
  }
  separate = logits(rows)
  assert together.shape == (B, Q) and np.unique(separate).size > B
  np.testing.assert_allclose(together.reshape(-1), separate, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('uncached')
@pytest.mark.parametrize('name', ['sam', 'din', 'lmn'])
def test_candidates_share_one_history(name):
  """The history is not repeated for each candidate: no array has a tenth of the elements of
  [Q, L, D], and all temporaries together have less than a quarter of its bytes."""
  L, Q, D = 2048, 256, 32
  compiled = compile_bare(name, 1, L, Q, hidden=(8,), attention=8)
  assert largest(compiled) < Q * L * D / 10
  assert temporaries(compiled) < Q * L * D * 4 / 4


@pytest.mark.parametrize('name', but_slow(['sam', 'din', 'lmn', 'pooling'], {0, 2}))
def test_predict_of_candidates_equals_predict_of_each(name):
  """On a mesh, with `trainer.predict`, which a server calls."""
  mesh = mesh_of(4, 2)
  _, trainer = make_trainer(make_config(name, scale=1.0), mesh)
  state, batches = trainer.init(0), [make_batch(seed) for seed in range(3)]

  def predict(batch):
    return np.asarray(trainer.predict(state, meshes.place(mesh, batch)))

  together = predict(candidates_of(batches[0], batches[1:]))
  alone = [predict(batches[0] | {key: x[key] for key in items_of(x)}) for x in batches]
  assert together.shape == (16, 3) and np.unique(together).size > 40
  np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_in_chunks_on_a_mesh_equals_that_on_one_device(monkeypatch):
  """And the devices do not communicate within the loops."""
  set_sizes(monkeypatch, unit_pairs=4, unit_positions=1)
  batch, states = make_batch(), []
  for mesh in (mesh_of(1), mesh_of(4, 2)):
    _, trainer = make_trainer(make_config('sam'), mesh, shared=False)
    placed = meshes.place(mesh, batch)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    moves = hlo.compile_for(trainer.update, trainer.abstract, shapes).moves
    states.append(jax.device_get(trainer.update(trainer.init(0), placed)[0]))
  chex.assert_trees_all_close(states[0].params, states[1].params, atol=1e-5)
  sums = [move.where for move in moves if move.kind == 'all-reduce']
  assert sums and not [where for where in sums if 'while' in where]
