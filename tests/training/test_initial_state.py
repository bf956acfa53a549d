"""Vectors of the store as rows of tables: frozen or tuned, in every model, export and mesh."""

import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.errors import UserError
from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.training import loop as training_loop
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.initial_state import initial_state
from tests.runs import but_slow, mesh_of, tiny_config, tiny_next, untrained
from tests.test_same_answers import predict_file

WIDTH = 3


def with_vectors(config, folder):
  """The config with vectors of all items and of most users."""
  store = prepare.prepare(config.data, folder / 'plain')
  rng = np.random.default_rng(0)
  for kind, left_out in (('item', 0), ('user', 2)):
    ids = store.raw_ids(kind).to_pylist()[1 + left_out :]
    np.save(folder / f'{kind}.npy', rng.normal(size=(len(ids), WIDTH)))
    (folder / f'{kind}.txt').write_text('\n'.join(ids))
    config.data[f'{kind}_vectors'] = {'text': f'{folder / kind}.npy:{folder / kind}.txt'}
  return config


def rows_of(state, store, key):
  """Rows of a table, and the vectors of the store, without padding."""
  V = len(store.vectors[key]) - 1
  return np.asarray(state.tables[key].rows_RD)[:V], store.vectors[key][:V]


@pytest.mark.parametrize('devices', [1, 8])
def test_tables_have_the_vectors(tmp_path, monkeypatch, devices):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(devices))
  config = with_vectors(tiny_config(), tmp_path)
  store = prepare.prepare(config.data, tmp_path)
  setup = setups.set_up(config, store)
  state = initial_state(setup, store, 0)
  for key in ('item.text', 'user.text'):
    np.testing.assert_array_equal(*rows_of(state, store, key))
    table = state.tables[key]
    assert table.rows_RD.sharding == setup.trainer.abstract.tables[key].rows_RD.sharding
    assert not np.asarray(table.rows_RD)[len(store.vectors[key]) - 1 :].any()


@pytest.mark.parametrize('config_of', but_slow([tiny_config, tiny_next], {0}))
def test_only_tuned_vectors_are_trained(tmp_path, config_of):
  config = with_vectors(config_of(), tmp_path)
  if config.task == 'next_item':
    config.model.item_fields = True
  store = prepare.prepare(config.data, tmp_path)
  config.steps = config.eval_every = config.save_every = 2
  for tuned in ((), ('item.text',)):
    config.model.tuned = tuned
    workdir = tmp_path / f'run{len(tuned)}'
    training_loop.train(config, workdir, store)
    state = trained_run.best_of(config, workdir, store)[1].state
    same = np.array_equal(*rows_of(state, store, 'item.text'))
    assert same == (not tuned)


@pytest.mark.parametrize('task, model', [
  ('click', 'din'), pytest.param('next_item', 'sasrec', marks=pytest.mark.slow)
])  # fmt: skip
def test_predict_and_export_read_them(tmp_path, monkeypatch, task, model):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  config = with_vectors((tiny_config if task == 'click' else tiny_next)(model), tmp_path)
  config.model.scale = 1.0
  if task == 'next_item':
    config.model.item_fields = True
  config, workdir, store = untrained(config, tmp_path)
  users, items = store.user_ids(0).to_pylist()[:3], store.raw_ids('item').to_pylist()[1:5]
  pairs = predict_file(config, workdir, store, [(u, i, '3') for u in users for i in items])
  export.export(config, workdir, store, workdir / 'export', 'float32')
  bundle = Bundle(workdir / 'export', batch_sizes=(1,), candidate_sizes=(8,))
  context = {'query': '3'} if task == 'click' else {}
  scores = bundle.score([
    bundle.ask(u, items, bundle.known_history(u), context) for u in users
  ])  # fmt: skip
  expected = np.array([row['score'] for row in pairs]).reshape(3, -1)
  np.testing.assert_allclose([x.values for x in scores], expected, rtol=1e-4, atol=1e-5)
  assert np.ptp(expected) > 0.1


def test_the_score_depends_on_the_vectors_of_items_histories_and_users(tmp_path, monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  config = with_vectors(tiny_config('din'), tmp_path)
  store = prepare.prepare(config.data, tmp_path)
  setup = setups.set_up(config, store)
  state = initial_state(setup, store, 0)
  batch = setup.sources['train'][0]
  before = setup.trainer.predict(state, batch)
  for key in ('item.text', 'user.text'):
    table = state.tables[key]
    other = state._replace(tables=state.tables | {key: table._replace(rows_RD=-table.rows_RD)})
    assert (np.abs(setup.trainer.predict(other, batch) - before) > 1e-6).mean() > 0.5
  # The vector of an event, alone.
  only = (batch['history'] != batch['item'][:, None]).all(axis=1) & (batch['length'] > 0)
  item = batch['history'][np.argmax(only), 0]
  rows_RD = state.tables['item.text'].rows_RD.at[item].add(1.0)
  table = state.tables['item.text']._replace(rows_RD=rows_RD)
  other = state._replace(tables=state.tables | {'item.text': table})
  changed = np.asarray(setup.trainer.predict(other, batch) != before)
  assert changed[np.argmax(only)] and not changed.all()


def test_an_unknown_vector_is_refused(tmp_path):
  config = with_vectors(tiny_config(), tmp_path)
  config.model.tuned = ('item.image',)
  store = prepare.prepare(config.data, tmp_path)
  with pytest.raises(UserError, match=r"config.model.tuned='item.image' is unknown.* item.text"):
    setups.set_up(config, store)
