"""Features of items in next-item models: the rows against numpy, in events and in every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Number, Schema
from lmn_jax.layers.fields import CONSTANTS, ItemFields
from lmn_jax.models import registry
from lmn_jax.training import config_warnings, program
from lmn_jax.training import setup as setups
from lmn_jax.training.initial_state import initial_state
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.setup import Setup
from lmn_jax.training.trainer import compile_program
from tests.runs import mesh_of, tiny_next

# Fewer events than items, so their features are read by id; more negatives, so these are not.
V, D, B, T, N = 40, 4, 8, 3, 5
SCHEMA = Schema(
  (('user', 5), ('item', V), ('item.genre', 4), ('item.tags', 6)),
  item=('item.genre', 'item.tags'),
  numbers=(Number('item.price', 'log', 1.0, 2.0), Number('user.age', 'standard', 30.0, 9.0)),
  vectors=(('item.text', 3), ('user.text', 2)),
  widths=(('item.tags', 2),),
)
IDS_ALONE = Schema((('user', 5), ('item', V)))
RNG = np.random.default_rng(0)
TABLES = {
  name: RNG.normal(size=shape).astype(np.float32)
  for name, shape in {
    'item': (V, D), 'item.genre': (4, D), 'item.tags': (6, D), 'item.text': (V, 3)
  }.items()
}  # fmt: skip
GENRE = RNG.integers(0, 4, V)
TAGS = np.where(RNG.random((V, 2)) < 0.4, 6, RNG.integers(0, 6, (V, 2)))
PRICE = np.where(RNG.random(V) < 0.3, np.nan, RNG.exponential(9, V)).astype(np.float32)
WORDS = np.zeros((V + 1, 4), np.int32)
WORDS[:V] = np.column_stack([GENRE, TAGS, PRICE.view(np.int32)])


def reader_of(tables):
  return lambda name, ids: jnp.asarray(tables[name]).at[ids].get(mode='fill', fill_value=0)


def expected_rows(p):
  """e of all items, by the equations."""
  tags_VMD = np.append(TABLES['item.tags'], np.zeros((1, D), np.float32), axis=0)[TAGS]
  tags_VD = tags_VMD.sum(axis=1) / np.maximum(1, (TAGS < 6).sum(axis=1))[:, None]
  v_V1 = ((np.log1p(PRICE) - 1) / 2)[:, None]
  price = v_V1 * p['item.price']['weight'] + p['item.price']['bias']
  price_VD = np.where(np.isnan(v_V1), p['item.price']['missing'], price)
  text_VD = TABLES['item.text'] @ p['item.text']['kernel']
  rows = np.concatenate([TABLES['item.genre'][GENRE], tags_VD, price_VD, text_VD], axis=1)
  return TABLES['item'] + rows @ p['project']['kernel']


def make_batch():
  """Lanes of one to T events with targets and negatives."""
  rng = np.random.default_rng(1)
  real = np.arange(T)[None] < np.arange(B)[:, None] % T + 1
  item, target = (np.where(real, rng.integers(1, V, (B, T)), V).astype(np.int32) for _ in range(2))
  return dict(
    item=item, target=target, first=np.ones(B, bool), user=np.zeros(B, np.int32),
    negative=rng.integers(1, V, (B, T, N)).astype(np.int32),
    log_q=rng.normal(size=(B, T)).astype(np.float32),
    negative_log_q=rng.normal(size=(B, T, N)).astype(np.float32),
  )  # fmt: skip


def build(schema=SCHEMA, name='gru4rec', **fields):
  config = tiny_next(name, **(dict(width=D, item_fields=True) | fields))
  return config, registry.build(config.model.to_dict(), schema, 'next_item')


def test_rows_equal_the_equations():
  fields, ids = ItemFields(SCHEMA, D, output=D), np.array([[3, V, 0], [11, 3, V + 400]], np.int32)
  read, ids_BT = reader_of(TABLES), jnp.asarray(ids)
  variables = fields.init(jax.random.key(0), ids_BT, read)
  assert variables[CONSTANTS]['words'].shape == WORDS.shape
  e_VD = expected_rows(jax.tree.map(np.asarray, variables['params']))
  c = np.asarray(fields.apply(variables | {CONSTANTS: {'words': jnp.asarray(WORDS)}}, ids_BT, read))
  expected = (e_VD - TABLES['item'])[ids[ids < V]]
  np.testing.assert_allclose(c[ids < V], expected, rtol=1e-4, atol=1e-5)
  assert not c[ids >= V].any() and np.isnan(PRICE).any() and (TAGS == 6).any()


@pytest.mark.parametrize('loss, sampler', [
  ('softmax', 'uniform'), ('sampled_softmax', 'popularity'), ('gbce', 'in_batch'),
])  # fmt: skip
def test_a_model_equals_one_of_ids_alone_with_these_rows(loss, sampler):
  """In its vectors and its loss, so as events, targets and negatives, and in the rows to rank."""
  _, model = build(loss=loss, sampler=sampler)
  _, plain = build(IDS_ALONE, loss=loss, sampler=sampler, item_fields=False)
  batch, read = jax.tree.map(jnp.asarray, make_batch()), reader_of(TABLES)
  carry = model.carry(batch)
  variables = model.init(jax.random.key(0), batch, read, carry, train=True)
  constants = {CONSTANTS: {'item_fields': {'words': jnp.asarray(WORDS)}}}
  outputs = model.apply(variables | constants, batch, read, carry, train=True)
  params = dict(variables['params'])
  rows = expected_rows(jax.tree.map(np.asarray, params.pop('item_fields')))
  ranked = model.item_rows(variables | constants, jnp.arange(V + 1), read)
  np.testing.assert_allclose(ranked[:V], rows, rtol=1e-4, atol=1e-5)
  assert not np.any(ranked[V])
  read = reader_of({'item': rows})
  expected = plain.apply({'params': params}, batch, read, carry, train=True)
  np.testing.assert_allclose(outputs.value, expected.value, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    outputs.losses['next_item'], expected.losses['next_item'], rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['softmax', 'sampled_softmax'])
def test_a_step_on_eight_devices_equals_that_on_one(loss):
  """Every table of the items moves but the frozen one, and the folded rows are alike."""
  config, model = build(loss=loss)
  for group in ('dense', 'embedding'):
    config.optimizer[group].update(dict(name='sgd', rate=1.0))
  batch, results = make_batch(), []
  for shape in ((1, 1), (4, 2)):
    mesh = mesh_of(*shape)
    built = program.make(config, model, batch, mesh)
    trainer = compile_program(built)
    state = trainer.init(0)
    words = meshes.replicated(mesh, WORDS)
    state = state._replace(stats={CONSTANTS: {'item_fields': {'words': words}}})
    before = {name: np.array(t.rows_RD) for name, t in state.tables.items()}
    state, _ = trainer.update(state, meshes.place(mesh, batch), 0.0)
    np.testing.assert_array_equal(state.stats[CONSTANTS]['item_fields']['words'], WORDS)
    setup = Setup(None, mesh, model, {}, {}, built, trainer)
    folded, of_ids = fold_item_fields(setup, state)
    assert set(of_ids.tables) == {'item'} and not of_ids.stats and not folded.model.item_fields
    assert of_ids.tables['item'].rows_RD.sharding == state.tables['item'].rows_RD.sharding
    results.append(jax.device_get((state.params, {k: t.rows_RD for k, t in state.tables.items()},
                                   of_ids.tables['item'].rows_RD)))  # fmt: skip
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *results)
  moved = {name for name, rows in results[1][1].items() if (rows != before[name]).any()}
  assert moved == {'item', 'item.genre', 'item.tags'}


def test_constants_are_the_features_of_the_store_and_else_a_line_says_they_are_not_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  config = tiny_next('gru4rec', item_fields=True)
  store = prepare.prepare(config.data, tmp_path)
  setup = setups.set_up(config, store)
  (words,) = jax.tree.leaves(initial_state(setup, store, 0).stats)
  np.testing.assert_array_equal(words[:, 0], store.items['item.category'])
  assert not config_warnings.doubts(config, store, setup.sources)
  config.model.item_fields = False
  (line,) = config_warnings.doubts(config, store, setup.sources)
  assert line.startswith('the model does not read item.category, the features of the items, since')


def test_what_cannot_be_read_is_refused():
  _, model = build(IDS_ALONE)
  with pytest.raises(UserError, match='item_fields=True, but the items have no features; set it'):
    model.tables()
  for fields in (dict(item_fields=False, tuned=('item.text',)), dict(tuned=('user.text',))):
    with pytest.raises(UserError, match='next-item models read only vectors of items'):
      build(**fields)
  _, model = build()
  batch = jax.tree.map(jnp.asarray, make_batch())
  with pytest.raises(TypeError, match='fold_item_fields'):
    model.init(jax.random.key(0), batch, reader_of(TABLES), model.carry(batch))
