"""Checkpoints restore the whole state, on any mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.training import update
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.step_folders import steps_of
from tests.examples import make_batch, make_config, make_trainer
from tests.runs import mesh_of, saved


def stored_config():
  """bfloat16 rows with their master, counters, and accumulators of one number for each row."""
  config = make_config('lmn')
  config.optimizer.memory.update(dict(name='adam', rows='bfloat16'))
  config.optimizer.embedding.name = 'rowwise_adagrad'
  return config


@pytest.fixture(scope='module')
def trained():
  """(trainer on 8 devices, state after two steps)."""
  mesh = mesh_of(8)
  _, trainer = make_trainer(stored_config(), mesh)
  state = trainer.init(0)
  for step in range(2):
    state, _ = trainer.update(state, meshes.place(mesh, make_batch(step)))
  return trainer, state


def test_a_state_is_restored_on_another_mesh(trained, tmp_path):
  """8 devices -> 4 x 2 -> 1: the same numbers and predictions, sharded over the new mesh."""
  trainer, state = trained
  expected = jax.device_get(trainer.predict(state, meshes.place(mesh_of(8), make_batch(7))))
  saved_state = jax.device_get(state)
  for k, shape in enumerate([(4, 2), (1, 1)]):
    saved(tmp_path / str(k), state, {2: 0.5})
    mesh = mesh_of(*shape)
    _, trainer = make_trainer(stored_config(), mesh)
    with Checkpoints(tmp_path / str(k)) as checkpoints:
      state = checkpoints.restore(2, trainer.abstract).state
    rows = state.tables['memory'].rows_RD
    assert rows.dtype == jnp.bfloat16
    assert len({shard.device for shard in rows.addressable_shards}) == shape[0] * shape[1]
    assert rows.addressable_shards[0].data.shape[0] == rows.shape[0] // (shape[0] * shape[1])
    chex.assert_trees_all_equal(jax.device_get(state), saved_state)
    result = trainer.predict(state, meshes.place(mesh, make_batch(7)))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_the_padding_of_tables_may_differ(trained, tmp_path):
  """8 devices pad tables to 512 rows, 6 to 1,536, and 1 to 512 again."""
  trainer, state = trained
  expected = jax.device_get(trainer.predict(state, meshes.place(mesh_of(8), make_batch(7))))
  saved_state = jax.device_get(state)
  for k, (shape, rows) in enumerate([((2, 3), 1536), ((1, 1), 512)]):
    saved(tmp_path / str(k), state, {2: 0.5})
    mesh = mesh_of(*shape)
    _, trainer = make_trainer(stored_config(), mesh)
    with Checkpoints(tmp_path / str(k)) as checkpoints:
      state = checkpoints.restore(2, trainer.abstract).state
    assert state.tables['memory'].rows_RD.shape[0] == rows
    result = trainer.predict(state, meshes.place(mesh, make_batch(7)))
    np.testing.assert_allclose(result, expected, atol=1e-6)
  ids = saved_state.tables['item'].rows_RD[:60]
  np.testing.assert_array_equal(jax.device_get(state.tables['item'].rows_RD)[:60], ids)


def test_another_shape_is_refused(trained, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, {2: 0.5})
  step = jax.ShapeDtypeStruct((3,), jnp.int32)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(
      UserError, match=r'step 2: step has the shape \(\), and this version expects \(3,\)'
    ),
  ):
    checkpoints.restore(2, trainer.abstract._replace(step=step))


def test_a_weight_that_was_not_saved_is_refused(trained, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, {2: 0.5})
  new = jax.ShapeDtypeStruct((3,), jnp.float32)
  abstract = trainer.abstract._replace(params=trainer.abstract.params | {'names': new})
  message = r'step 2 has no params.names: another version .*; use that version, or train again'
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(2, abstract)


def test_the_numbers_of_the_loop_and_the_config_are_restored(trained, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, {2: None})
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(2, trainer.abstract).loop == {'in_row': 2}
    assert checkpoints.config(2) == {'seed': 0}


@pytest.mark.parametrize(
  'aucs, best',
  [
    ({2: None, 4: 0.6, 6: 0.5, 8: None}, 4),
    ({2: 0.6, 4: 0.7, 6: 0.7}, 4),
    ({2: 0.0, 4: None}, 2),
    ({2: None, 4: None}, 4),
  ],
  ids=['best', 'first of equals', 'any before none', 'newest without validation'],
)
def test_best_and_newest_are_kept(tmp_path, aucs, best):
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  state = trainer.init(0)
  assert saved(tmp_path, state, aucs) == (best, max(aucs))
  with Checkpoints(tmp_path) as checkpoints:  # read from disk
    assert (checkpoints.best(), checkpoints.latest()) == (best, max(aucs))
  assert set(steps_of(tmp_path)) == {best, max(aucs)}


def test_an_unfinished_step_is_ignored_and_removed_by_the_next_save(trained, tmp_path):
  _, state = trained
  saved(tmp_path, state, {2: 0.5})
  half = tmp_path / 'step_7.orbax-checkpoint-tmp'
  half.mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 2
  assert saved(tmp_path, state, {9: 0.6}) == (9, 9)
  assert steps_of(tmp_path) == [9] and not half.exists()


def test_an_infinite_weight_is_named(trained):
  trainer, state = trained
  assert not update.first_not_finite(trainer.finite(state))
  memory = state.tables['memory']
  damaged = memory._replace(rows_RD=memory.rows_RD.at[3, 1].set(np.inf))
  result = trainer.finite(state._replace(tables=state.tables | {'memory': damaged}))
  assert update.first_not_finite(result) == 'weights/memory/rows_RD'
