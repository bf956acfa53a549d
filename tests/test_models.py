"""Every model with every option trains a step and scores; out of bounds is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax import models
from lmn_jax.errors import UserError
from lmn_jax.layers import Schema
from tests.examples import SCHEMA, make_batch, make_config, make_trainer
from tests.runs import mesh_of

# Few runs in which every option is on and off once, beside the defaults in test_update.py.
KINDS = [
  ('pooling', dict(dropout=0.5, hidden=())),
  ('din', dict(softmax=True, hidden=(8, 8))),
  ('lmn', dict(query='user_item', query_norm='batch', base='din', heads=1)),
  ('lmn', dict(query='item', query_norm='layer', base='none', heads=2, freeze_values=True)),
  ('lmn', dict(query='product', query_norm='none', base='pooling', query_context=True)),
  ('lmn', dict(query='axes', heads=3, shuffle_user=True, query_context=True)),
  ('lmn', dict(query='product', heads=2, positions=0, top_k=1, slots_per_axis=1)),
  ('lmn', dict(query='axes', query_norm='none', top_k=8, bf16=True, dropout=0.2)),
  ('sam', dict(variant='2P', feedback='stk', attention=3)),
  ('sam', dict(variant='3P', bf16=True, dropout=0.2)),
  ('sam', dict(variant='3P+')),
]


@pytest.mark.parametrize('name, fields', KINDS, ids=[f'{n} {f}' for n, f in KINDS])
def test_trains_a_step_and_scores(name, fields):
  _, trainer = make_trainer(make_config(name, **fields), mesh_of(1))
  state, batch = trainer.init(0), make_batch()
  before = jax.device_get(state)
  state, metrics = trainer.update(state, batch)
  assert all(np.isfinite(float(x)) for x in metrics.values()), metrics
  assert ('loss/memory' in metrics) == (name == 'lmn' and fields.get('positions') != 0)
  # Everything that is trained has moved somewhere.
  moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before.params)
  still = [jax.tree_util.keystr(k) for k, x in jax.tree.leaves_with_path(moved) if not x]
  # With one slot the softmax is 1 whatever the query, which then has no gradient.
  assert not still or fields.get('slots_per_axis') == 1, still
  for table, rows in state.tables.items():
    same = np.array_equal(rows.rows_RD, before.tables[table].rows_RD)
    assert same == (table == 'memory' and fields.get('freeze_values', False)), table
  logit = trainer.predict(state, batch)
  assert logit.shape == (16,) and logit.dtype == jnp.float32 and np.isfinite(logit).all()
  assert np.unique(logit).size > 8
  # Padding, whatever stands behind it, is not seen.
  blank = np.arange(6)[None] >= batch['length'][:, None]
  assert blank.any()
  noisy = batch | {'history': np.where(blank, np.int32(3), batch['history'])}
  np.testing.assert_allclose(
    trainer.predict(state, noisy), logit, atol=2e-2 if 'bf16' in fields else 1e-6
  )


def test_bf16_is_near_float32_and_keeps_float32_weights():
  losses = {}
  for bf16 in (False, True):
    _, trainer = make_trainer(make_config('lmn', bf16=bf16), mesh_of(1))
    state, losses[bf16] = trainer.init(0), []
    for step in range(5):
      state, metrics = trainer.update(state, make_batch(step))
      losses[bf16].append(float(metrics['loss']))
    weights = (
      state.params,
      state.opt,
      state.stats,
      {k: t.rows_RD for k, t in state.tables.items()},
    )
    assert {x.dtype for x in jax.tree.leaves(weights)} <= {np.dtype('float32'), np.dtype('int32')}
  np.testing.assert_allclose(losses[True], losses[False], rtol=2e-2)
  assert losses[True] != losses[False]


@pytest.mark.parametrize(
  'name, fields, message',
  [
    ('pooling', dict(width=0), 'config.model.width=0 must be at least 1'),
    ('pooling', dict(dropout=1.0), r'config.model.dropout=1.0 must be in \[0, 1\)'),
    ('din', dict(attention=0), 'config.model.attention=0 must be at least 1'),
    ('lmn', dict(heads=0), 'config.model.heads=0 must be at least 1'),
    ('lmn', dict(top_k=9), 'config.model.top_k=9 is larger than slots_per_axis=8; each axis must'),
    ('lmn', dict(query_width=7), 'config.model.query_width=7 must be even'),
    ('lmn', dict(positions=-1), r'config.model.positions=-1 must be 0 \(no injection\) or more'),
    ('lmn', dict(slots_per_axis=46_341), 'config.model.slots_per_axis=46341: slot ids are int32'),
    (
      'lmn',
      dict(revive=1.0),
      r'config.model.revive=1.0 must be in \[0, 1\): 0 revives no key, 0.1',
    ),
    ('lmn', dict(revive=float('nan')), r'config.model.revive=nan must be in \[0, 1\)'),
    ('lmn', dict(revive=-0.1), r'config.model.revive=-0.1 must be in \[0, 1\)'),
    ('lmn', dict(revive_noise=-1.0), 'config.model.revive_noise=-1.0 must be 0 or more and finite'),
    ('lmn', dict(revive_noise=float('inf')), 'config.model.revive_noise=inf must be 0 or more'),
    ('lmn', dict(query='axis'), "config.model.query='axis' is unknown; did you mean 'axes'?"),
    ('lmn', dict(query_norm='bath'), "config.model.query_norm='bath' .* did you mean 'batch'?"),
    ('sam', dict(attention=0), 'config.model.attention=0 must be at least 1'),
    ('sam', dict(variant='4P'), "config.model.variant='4P' is unknown; available: 2P, 3P, 3P"),
    ('sam', dict(feedback='stack'), "config.model.feedback='stack' is unknown; .*iter, stk"),
    ('lmn', dict(base='dim'), "config.model.base='dim' is unknown; did you mean 'din'?"),
  ],
)
def test_out_of_bounds(name, fields, message):
  with pytest.raises(UserError, match=message):
    models.build(make_config(name, **fields).model.to_dict(), SCHEMA)


def test_a_model_by_a_wrong_name_or_with_a_strange_field():
  with pytest.raises(UserError, match="config.model.name='dinn' is unknown; did you mean 'din'?"):
    models.defaults('dinn')
  message = "config.model.heads, config.model.top_k: no field of model 'din', which has attention"
  with pytest.raises(UserError, match=message):
    models.build({'name': 'din', 'top_k': 3, 'heads': 1}, Schema(()))
