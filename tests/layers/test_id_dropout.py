"""Id dropout: which ids are dropped, and what a model then learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.data import item_index
from lmn_jax.distributed.mesh import place
from lmn_jax.layers.id_dropout import drop_item_ids
from tests.examples import SIZES, make_batch, make_config, make_trainer
from tests.runs import mesh_of

V = SIZES['item']


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_a_dropped_target_is_dropped_in_its_history_and_nothing_else_is(rate):
  rng = np.random.default_rng(0)
  item = rng.integers(0, 5, (500, 2)).astype(np.int32)
  item[::7, 1] = V  # no target
  history = rng.integers(0, 5, (500, 6)).astype(np.int32)
  history[:, 4:] = V
  batch = {'item': item, 'history': history, 'item.category': item + 1}
  on_device = jax.tree.map(jnp.asarray, batch)
  dropped = drop_item_ids(jax.random.key(0), on_device, rate, V)
  assert dropped['item.category'] is on_device['item.category']
  dropped = jax.device_get(dropped)
  np.testing.assert_array_equal(dropped['item_index'], item)
  np.testing.assert_array_equal(dropped['history_index'], history)
  gone = (dropped['item'] == 0) & (item > 0)
  np.testing.assert_array_equal(dropped['item'], np.where(gone, 0, item))
  assert not gone[::7, 1].any()
  there = (item > 0) & (item < V)
  assert abs(gone.sum() / there.sum() - rate) < 0.06
  same = ((history[:, None] == item[..., None]) & gone[..., None]).any(1)
  np.testing.assert_array_equal(dropped['history'], np.where(same, 0, history))


def test_indices_of_cold_items_stay():
  indices = {'item': [V + 3, 2], 'history': [[V + 1, 2], [2, V]], 'orders:history': [[V + 2], [2]]}
  indices = {name: jnp.array(x) for name, x in indices.items()}
  batch = item_index.with_rows(indices, V, keeps=True)
  assert batch['orders:history'].tolist() == [[0], [2]]
  dropped = drop_item_ids(jax.random.key(0), batch, 1.0, V)
  assert {name: x.tolist() for name, x in dropped.items()} == {
    'item': [0, 0], 'history': [[0, 2], [0, V]], 'orders:history': [[0], [0]],
    'item_index': [V + 3, 2], 'history_index': [[V + 1, 2], [2, V]],
    'orders:history_index': [[V + 2], [2]],
  }  # fmt: skip


@pytest.mark.slow
def test_the_same_ids_are_dropped_on_every_mesh():
  batch, losses = make_batch(), []
  for mesh in (mesh_of(1), mesh_of(2)):
    _, trainer = make_trainer(make_config('pooling', id_dropout=0.5), mesh, batch)
    state, metrics = trainer.update(trainer.init(0), place(mesh, batch))
    losses += [metrics['loss'], trainer.update(state, place(mesh, batch))[1]['loss']]
  first, second, *others = map(float, losses)
  np.testing.assert_allclose(others, [first, second], rtol=1e-6)
  assert first != second


def test_training_without_ids_depends_on_features_alone():
  mesh, batch = mesh_of(1), make_batch()
  batch['history'] = np.where(batch['history'] < V, batch['history'] % 9, V).astype(np.int32)
  batch['item'] = np.arange(10, 26, dtype=np.int32)  # of no history
  _, trainer = make_trainer(make_config('din', id_dropout=1.0), mesh, batch)

  def step(**changes):
    new, metrics = trainer.update(trainer.init(0), place(mesh, batch | changes))
    return float(metrics['loss']), np.asarray(new.tables['item'].rows_RD)

  state = trainer.init(0)
  before = np.asarray(state.tables['item'].rows_RD)
  loss, rows = step()
  assert np.any(rows[0] != before[0])
  np.testing.assert_array_equal(rows[10:], before[10:])
  assert step(item=batch['item'][::-1].copy())[0] == loss
  assert step(**{'item.category': (batch['item.category'] + 1) % 7})[0] != loss
  # It is dropped in training alone.
  logit, other = (
    jax.device_get(trainer.predict(state, place(mesh, batch | {'item': item})))
    for item in (batch['item'], batch['item'][::-1].copy())
  )
  assert np.all(logit != other)
