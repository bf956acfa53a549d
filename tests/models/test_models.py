"""Every model trains a step and scores with every option; values out of bounds are rejected."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed.mesh import place
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from tests.examples import SCHEMA, make_batch, make_config, make_trainer
from tests.runs import but_slow, mesh_of

# A few runs with every option on and off, beside the defaults in test_update.py.
KINDS = [
  ('pooling', dict(dropout=0.5, hidden=())),
  ('din', dict(softmax=True, hidden=(8, 8))),
  ('lmn', dict(query='user_item', query_norm='batch', base='din', heads=1)),
  ('lmn', dict(query='item', query_norm='layer', base='none', heads=2, freeze_values=True)),
  ('lmn', dict(query='product', heads=2, positions=0, top_k=1, slots_per_axis=1)),
  ('lmn', dict(query='axes', query_norm='none', top_k=8, bf16=True, dropout=0.2)),
  ('sam', dict(variant='3P', bf16=True, dropout=0.2)),
]
# Other tests compare these options with formulas or dense optax, so their steps are slow tests.
ELSEWHERE = [
  ('lmn', dict(query='product', query_norm='none', base='pooling', query_context=True)),
  ('lmn', dict(query='axes', heads=3, shuffle_user=True, query_context=True)),
  ('sam', dict(variant='2P', feedback='stk', attention=3)),
  ('sam', dict(variant='3P+')),
]

RIVALS = [
  ('dien', dict(evolution=8, dropout=0.2)),
  ('mimn', dict(slots=3, top_k=2)),
  ('sasrec', dict(heads=3, dropout=0.2)),
  ('bst', dict(dropout=0.2)),
  ('sim', dict(search='soft', top_k=3, dropout=0.2)),
  ('ubr4ctr', dict(top_k=3)),
  ('eta', dict(top_k=3, bits=32)),
  ('sdim', dict(bits=8, tau=2)),
  ('twin', dict(top_k=9, heads=2)),
]

# On eight devices against one: a recurrence, a memory, attention with dropout, a search, and a
# random draw with a search. The other models have the same parts.
SHARDED = [kind for kind in RIVALS if kind[0] in ('dien', 'mimn', 'sasrec', 'sim', 'ubr4ctr')]
OTHERS = [kind for kind in RIVALS if kind not in SHARDED]

# These are only traced, to check dtypes and the names of the losses; other tests check the values.
TRACED = [
  *ELSEWHERE,
  ('dien', dict(bf16=True)),
  ('dien', dict(auxiliary=False)),
  ('mimn', dict(bf16=True)),
  ('mimn', dict(balance=False, induction=False, bf16=True)),
  ('bst', dict(output='target', blocks=2)),
  ('sim', dict(bf16=True)),
  ('sim', dict(search='hard', category='tags', bf16=True)),
  ('ubr4ctr', dict(bf16=True)),
  ('eta', dict(bf16=True)),
  ('sdim', dict(bf16=True)),
  ('twin', dict(bf16=True)),
]

# The auxiliary loss of a model, and the fields with which it has none.
AUXILIARY = {
  'lmn': 'memory', 'dien': 'auxiliary', 'mimn': 'balance', 'sim': 'search', 'ubr4ctr': 'search',
}  # fmt: skip
WITHOUT = ('positions', 0), ('auxiliary', False), ('balance', False), ('search', 'hard')


def ids(kinds):
  return [f'{name} {fields}' for name, fields in kinds]


def weighted_batch():
  return make_batch() | {'weight': np.linspace(0, 2, 16, dtype=np.float32)}


def one_step(name, fields, mesh, optimizer=None):
  """(trainer, state before, state after, metrics) on a mesh."""
  config = make_config(name, **fields)
  config.loss.update({weight: 2.0 for weight in config.loss})
  for group in ('dense', 'embedding'):
    config.optimizer[group].update(optimizer or {})
  _, trainer = make_trainer(config, mesh)
  state, batch = trainer.init(0), weighted_batch()
  before = jax.device_get(state)
  state, metrics = trainer.update(state, place(mesh, batch))
  return trainer, before, jax.device_get(state), jax.device_get(metrics)


def auxiliary_losses(metrics):
  return [k for k in metrics if re.fullmatch('loss/(?!click|memory_of_mean).*', k)]


def expected_losses(name, fields):
  """The names of the auxiliary losses of a model."""
  has_none = name not in AUXILIARY or any(x in WITHOUT for x in fields.items())
  return [] if has_none else [f'loss/{AUXILIARY[name]}']


@pytest.mark.parametrize(
  'name, fields',
  but_slow(KINDS + OTHERS + ELSEWHERE, {3, 8}),
  ids=ids(KINDS + OTHERS + ELSEWHERE),
)
def test_a_model_trains_a_step_and_scores(name, fields):
  check_step(name, fields, *one_step(name, fields, mesh_of(1)))


@pytest.mark.slow
@pytest.mark.parametrize('name, fields', SHARDED, ids=ids(SHARDED))
def test_a_step_on_eight_devices_equals_that_on_one(name, fields):
  # SGD, whose steps are proportional to the gradients; Adam would amplify rounding errors.
  sgd = dict(name='sgd', rate=1.0)
  alone, sharded = (one_step(name, fields, mesh_of(*shape), sgd) for shape in ((1, 1), (4, 2)))
  check_step(name, fields, *alone)
  chex.assert_trees_all_close(alone[2:], sharded[2:], rtol=1e-5, atol=1e-6)


def check_step(name, fields, trainer, before, state, metrics):
  """Everything is finite, all trained arrays have changed, and scores do not depend on padding."""
  batch = weighted_batch()
  assert all(np.isfinite(x) for x in metrics.values()), metrics
  auxiliary = auxiliary_losses(metrics)
  assert auxiliary == expected_losses(name, fields)
  total = metrics['loss/click'] + 2 * sum(metrics[k] for k in auxiliary)
  assert metrics['loss'] == pytest.approx(total, rel=1e-5)
  # Every trained array has changed somewhere.
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before.params)
  still = [jax.tree_util.keystr(k) for k, x in jax.tree.leaves_with_path(moved) if not x]
  # With one slot the softmax is always 1, so the query has no gradient.
  assert not still or fields.get('slots_per_axis') == 1, still
  for table, rows in state.tables.items():
    same = np.array_equal(rows.rows_RD, before.tables[table].rows_RD)
    assert same == (table == 'memory' and fields.get('freeze_values', False)), table
  logit = trainer.predict(state, batch)
  assert logit.shape == (16,) and logit.dtype == jnp.float32 and np.isfinite(logit).all()
  assert np.unique(logit).size > 8
  # The ids on padding have no effect.
  blank = np.arange(6)[None] >= batch['length'][:, None]
  assert blank.any()
  noisy = batch | {'history': np.where(blank, np.int32(3), batch['history'])}
  np.testing.assert_allclose(
    trainer.predict(state, noisy), logit, atol=2e-2 if 'bf16' in fields else 1e-6
  )


@pytest.mark.parametrize('name, fields', but_slow(TRACED, range(0, 15, 2)), ids=ids(TRACED))
def test_a_step_keeps_dtypes_and_has_the_expected_losses(name, fields):
  _, trainer = make_trainer(make_config(name, **fields), mesh_of(1))
  state, metrics = jax.eval_shape(trainer.update, trainer.abstract, make_batch())
  assert auxiliary_losses(metrics) == expected_losses(name, fields)
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, trainer.abstract)
  assert {x.dtype for x in metrics.values()} == {np.dtype('float32')}


@pytest.mark.parametrize(
  'name, fields, message',
  [
    ('pooling', dict(width=0), 'config.model.width=0 must be at least 1'),
    ('pooling', dict(dropout=1.0), r'config.model.dropout=1.0 must be in \[0, 1\)'),
    ('din', dict(attention=0), 'config.model.attention=0 must be at least 1'),
    ('dien', dict(evolution=0), 'config.model.evolution=0 must be at least 1'),
    ('mimn', dict(slots=0), 'config.model.slots=0 must be at least 1'),
    ('mimn', dict(top_k=5), 'config.model.top_k=5 is larger than slots=4, .*; use at most 4'),
    ('sasrec', dict(blocks=0), 'config.model.blocks=0 must be at least 1'),
    ('sasrec', dict(heads=5), 'config.model.heads=5 must divide 12, .* use one of 1, 2, 3, 4, 6'),
    ('bst', dict(heads=0), 'config.model.heads=0 must be at least 1'),
    ('bst', dict(heads=8), 'config.model.heads=8 must divide 12, .* use one of 1, 2, 3, 4, 6'),
    ('bst', dict(output='al'), "config.model.output='al' is unknown; did you mean 'all'?"),
    ('lmn', dict(heads=0), 'config.model.heads=0 must be at least 1'),
    ('lmn', dict(top_k=9), 'config.model.top_k=9 is larger than slots_per_axis=8; use a top_k of'),
    ('lmn', dict(query_width=7), 'query_width=7 must be even, half for each axis; use 8'),
    ('lmn', dict(positions=-1), r'config.model.positions=-1 must be 0 \(no injection\) or more'),
    ('lmn', dict(slots_per_axis=46_341), 'slots_per_axis=46341 must be at most 46340: slot ids'),
    ('lmn', dict(query='axis'), "config.model.query='axis' is unknown; did you mean 'axes'?"),
    ('lmn', dict(query_norm='bath'), "config.model.query_norm='bath' .* did you mean 'batch'?"),
    ('sam', dict(attention=0), 'config.model.attention=0 must be at least 1'),
    ('sam', dict(variant='4P'), "config.model.variant='4P' is unknown; available: 2P, 3P, 3P"),
    ('sam', dict(feedback='stack'), "config.model.feedback='stack' is unknown; .*iter, stk"),
    ('lmn', dict(base='dim'), "config.model.base='dim' is unknown; did you mean 'din'?"),
    ('sim', dict(search='sift'), "config.model.search='sift' is unknown; did you mean 'soft'?"),
    (
      'sim',
      dict(search='hard', category='shop'),
      "config.model.category='shop' is not one of the item features with codes, category, tags",
    ),
    ('sim', dict(top_k=0), 'config.model.top_k=0 must be at least 1'),
    ('ubr4ctr', dict(heads=0), 'config.model.heads=0 must be at least 1'),
    ('twin', dict(attention=0), 'config.model.attention=0 must be at least 1'),
    ('eta', dict(bits=40), 'config.model.bits=40 must be a multiple of 32, such as 64'),
    ('eta', dict(hash_seed=-1), r'config.model.hash_seed=-1 must be in \[0, 2147483648\), such as'),
    ('sdim', dict(hash_seed=2**31), 'config.model.hash_seed=2147483648 must be in'),
    ('sdim', dict(bits=47), 'config.model.bits=47 must be a multiple of tau=3, such as 48'),
    ('sdim', dict(bits=66, tau=33), 'config.model.tau=33 must be at most 32, the bits of a word'),
  ],
)
def test_values_out_of_bounds_are_rejected(name, fields, message):
  with pytest.raises(UserError, match=message):
    registry.build(make_config(name, **fields).model.to_dict(), SCHEMA)


def test_an_unknown_model_or_field_is_rejected():
  with pytest.raises(UserError, match="config.model.name='dinn' is unknown; did you mean 'din'?"):
    registry.defaults('dinn')
  message = "config.model.heads, config.model.top_k: unknown fields of model 'din'; its fields are"
  with pytest.raises(UserError, match=message):
    registry.build({'name': 'din', 'top_k': 3, 'heads': 1}, Schema(()))
