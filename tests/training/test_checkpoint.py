"""Checkpoints come back whole, on any mesh, and only into the experiment they are of."""

import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.data.batches import BatchSource, loader
from lmn_jax.distributed import mesh
from lmn_jax.errors import UserError
from lmn_jax.training import integrity, update
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.compatibility import check_same
from lmn_jax.training.step_folders import steps_of
from lmn_jax.training.validations import standing
from tests.examples import make_batch, make_config, make_trainer
from tests.runs import mesh_of, tiny_config


def identity(store='a' * 64, **fields):
  config = tiny_config('lmn')
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config.to_dict() | {'store': store}


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'model.width': 5},
      'holds another experiment: config.model.width was 4 and is 5; use another',
    ),
    ({'batch_size': 64, 'seed': 3}, r'config.batch_size was 32 and is 64 \(and 1 more\)'),
    ({'optimizer.dense.rate': 0.5}, 'config.optimizer.dense.rate was 0.001 and is 0.5'),
    ({'model.hidden': (9,)}, r'config.model.hidden was \[8\] and is \[9\]'),
    (
      {'store': 'b' * 64},
      'another content of the store .fingerprint aaaaaaaaaaaa, now bbbbbbbbbbbb.',
    ),
    ({'store': 'b' * 64, 'data.min_count': 2}, 'config.data.min_count was 1 and is 2; use another'),
  ],
)
def test_another_experiment_is_refused(changes, message, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    check_same(tmp_path, identity(), identity(**changes))
  assert str(tmp_path) in str(caught.value)
  if 'store' not in changes or len(changes) > 1:
    assert 'What may change when a run goes on: steps, log_every, eval_every' in str(caught.value)


def test_a_field_that_one_side_lacks_is_named(tmp_path):
  old = identity()
  del old['model']['top_k']
  with pytest.raises(UserError, match='config.model.top_k was absent and is 3; use another'):
    check_same(tmp_path, old, identity())


def test_a_run_from_before_a_field_is_of_what_it_computed_then(tmp_path):
  old, field = identity(), 'optimizer.embedding.initial_accumulator'
  del old['optimizer']['embedding']['initial_accumulator']
  check_same(tmp_path, old, identity())
  with pytest.raises(UserError, match=f'config.{field} was 0.0 and is 0.1; use another'):
    check_same(tmp_path, old, identity(**{field: 0.1}))


def test_what_changes_no_update_may_change(tmp_path):
  moved = {'steps': 99, 'patience': 1, 'buckets': (1, 2), 'data.source': 'elsewhere'}
  check_same(tmp_path, identity(), identity(**moved))
  check_same(tmp_path, identity(), identity(sampled_negatives=100))


def test_steps_may_not_change_where_a_schedule_ends_with_them(tmp_path):
  cosine = {'optimizer.schedule': 'cosine'}
  check_same(tmp_path, identity(**cosine), identity(**cosine))
  with pytest.raises(UserError, match='config.steps was 16 and is 32'):
    check_same(tmp_path, identity(**cosine), identity(steps=32, **cosine))


def test_a_run_from_before_a_field_went_goes_on_where_it_had_no_effect(tmp_path):
  """Its config had `revive`, which moved keys where it was not 0; such a run is still read."""
  old = identity()
  old['model'] |= {'revive': 0.0, 'revive_noise': 0.3}
  check_same(tmp_path, old, identity())
  old['model']['revive'] = 0.1
  with pytest.raises(UserError, match='config.model.revive was 0.1 and is absent; use another'):
    check_same(tmp_path, old, identity())
  check_same(tmp_path, old, identity(), trains=False)


def saved(folder, state, source, taken, aucs):
  """Saves `state` under the steps of `aucs`, in order, each validated unless its AUC is None.

  The data have given `taken` batches.
  """
  data = loader(source)
  for _ in range(taken):
    next(data)
  with Checkpoints(folder) as checkpoints:
    for step, auc in aucs.items():
      checkpoints.save(state._replace(step=jnp.int32(step)), data, {'in_row': step}, {'seed': 0})
      if auc is not None:
        checkpoints.validated(step, auc)
    checkpoints.prune()
    return checkpoints.best(), checkpoints.latest()


@pytest.fixture(scope='module')
def source(tiny_store):
  return BatchSource(tiny_store.path, 'train', 16, 8, 0, True)


def kept_config():
  """bfloat16 rows with their master, counts of touches, and accumulators of one number a row."""
  config = make_config('lmn')
  config.optimizer.memory.update(dict(name='adam', rows='bfloat16'))
  config.optimizer.embedding.name = 'rowwise_adagrad'
  return config


@pytest.fixture(scope='module')
def trained():
  """(trainer on 8 devices, state after two steps)."""
  grid = mesh_of(8)
  _, trainer = make_trainer(kept_config(), grid)
  state = trainer.init(0)
  for step in range(2):
    state, _ = trainer.update(state, mesh.place(grid, make_batch(step)))
  return trainer, state


def test_a_state_lands_on_another_mesh(trained, source, tmp_path):
  """8 devices -> 4 x 2 -> 1, the same numbers and predictions, and sharded as that mesh is."""
  trainer, state = trained
  wanted = jax.device_get(trainer.predict(state, mesh.place(mesh_of(8), make_batch(7))))
  begun = jax.device_get(state)
  for k, shape in enumerate([(4, 2), (1, 1)]):
    saved(tmp_path / str(k), state, source, 0, {2: 0.5})
    grid = mesh_of(*shape)
    _, trainer = make_trainer(kept_config(), grid)
    with Checkpoints(tmp_path / str(k)) as checkpoints:
      state = checkpoints.restore(2, trainer.abstract).state
    rows = state.tables['memory'].rows_RD
    assert rows.dtype == jnp.bfloat16
    assert len({shard.device for shard in rows.addressable_shards}) == shape[0] * shape[1]
    assert rows.addressable_shards[0].data.shape[0] == rows.shape[0] // (shape[0] * shape[1])
    chex.assert_trees_all_equal(jax.device_get(state), begun)
    found = trainer.predict(state, mesh.place(grid, make_batch(7)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_padding_of_tables_may_differ(trained, source, tmp_path):
  """8 devices pad tables to 512 rows, 6 to 1,536; and back again."""
  trainer, state = trained
  wanted = jax.device_get(trainer.predict(state, mesh.place(mesh_of(8), make_batch(7))))
  begun = jax.device_get(state)
  for k, (shape, rows) in enumerate([((2, 3), 1536), ((1, 1), 512)]):
    saved(tmp_path / str(k), state, source, 0, {2: 0.5})
    grid = mesh_of(*shape)
    _, trainer = make_trainer(kept_config(), grid)
    with Checkpoints(tmp_path / str(k)) as checkpoints:
      state = checkpoints.restore(2, trainer.abstract).state
    assert state.tables['memory'].rows_RD.shape[0] == rows
    found = trainer.predict(state, mesh.place(grid, make_batch(7)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
  ids = begun.tables['item'].rows_RD[:60]
  np.testing.assert_array_equal(jax.device_get(state.tables['item'].rows_RD)[:60], ids)


def test_another_shape_is_not_padded(trained, source, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, source, 0, {2: 0.5})
  step = jax.ShapeDtypeStruct((3,), jnp.int32)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(
      UserError, match=r'step 2: step has the shape \(\) and this program makes \(3,\)'
    ),
  ):
    checkpoints.restore(2, trainer.abstract._replace(step=step))


def test_a_weight_that_was_not_saved_is_refused_in_a_line(trained, source, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, source, 0, {2: 0.5})
  new = jax.ShapeDtypeStruct((3,), jnp.float32)
  abstract = trainer.abstract._replace(params=trainer.abstract.params | {'names': new})
  message = r'step 2 has no params.names: another version .*; use that one, or train anew'
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(2, abstract)


def test_data_go_on_where_they_were(trained, source, tmp_path):
  trainer, state = trained
  saved(tmp_path, state, source, 5, {2: None})
  data = loader(source)
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(2, trainer.abstract, data)
    assert checkpoints.config(2) == {'seed': 0} and restored.loop == {'in_row': 2}
  chex.assert_trees_all_equal(next(data), source[5])


def test_data_go_on_with_another_number_of_hosts(trained, source, tmp_path):
  """The step is the position, unless workers, who read ahead, have positions of their own."""
  trainer, state = trained
  saved(tmp_path, state, source, 5, {2: None})
  (tmp_path / 'step_2' / 'data' / 'process_1-of-2.json').write_text('{}')
  data = loader(source)

  class OfWorkers:
    def get_state(self):
      return {'workers_state': {}}

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(2, trainer.abstract, data)
    message = 'step 2 was written by 2 hosts whose workers read the data, now there are 1; go on'
    with pytest.raises(UserError, match=message):
      checkpoints.restore(2, trainer.abstract, OfWorkers())
  chex.assert_trees_all_equal(next(data), source[2])


@pytest.mark.parametrize(
  'aucs, best',
  [
    ({2: None, 4: 0.6, 6: 0.5, 8: None}, 4),
    ({2: 0.6, 4: 0.7, 6: 0.7}, 4),
    ({2: 0.0, 4: None}, 2),
    ({2: None, 4: None}, 4),
  ],
  ids=['best is kept', 'first of equals', 'any before none', 'newest without validation'],
)
def test_best_and_newest_are_kept(source, tmp_path, aucs, best):
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  state = trainer.init(0)
  assert saved(tmp_path, state, source, 0, aucs) == (best, max(aucs))
  with Checkpoints(tmp_path) as checkpoints:  # read from the disk
    assert (checkpoints.best(), checkpoints.latest()) == (best, max(aucs))
  assert set(steps_of(tmp_path)) == {best, max(aucs)}


def test_a_half_written_step_is_no_checkpoint(trained, source, tmp_path):
  """It is not seen, and goes with the next save."""
  _, state = trained
  saved(tmp_path, state, source, 0, {2: 0.5})
  half = tmp_path / 'step_7.orbax-checkpoint-tmp'
  half.mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 2
  assert saved(tmp_path, state, source, 0, {9: 0.6}) == (9, 9)
  assert steps_of(tmp_path) == [9] and not half.exists()


def spoil(folder, how):
  """Spoils a step in one of the ways in which disks, copies and people do."""
  own = max((folder / 'state').rglob('*'), key=lambda x: x.stat().st_size * x.is_file())
  data = bytearray(own.read_bytes())
  if how == 'flipped':
    data[len(data) // 2] ^= 1
    own.write_bytes(data)
  elif how == 'truncated':
    own.write_bytes(data[:-1])
  elif how == 'missing':
    own.unlink()
  elif how == 'no item':
    shutil.rmtree(folder / 'loop')
  elif how == 'no seal':
    (folder / 'seal.json').unlink()
  else:
    (folder / 'seal.json').write_text(how)
  return str(own.relative_to(folder))


WAYS = [
  ('flipped', 'is not what was written'),
  ('truncated', r'has \d+ bytes and had \d+'),
  ('missing', 'is missing'),
  ('no item', 'loop/.* is missing'),
  ('no seal', 'it has no seal.json'),
  ('{"state":', 'seal.json is damaged'),
  ('[1, 2]', 'seal.json is damaged'),
  ('{"state": 3}', 'seal.json is damaged'),
]


@pytest.mark.parametrize('how, message', WAYS, ids=[how for how, _ in WAYS])
def test_a_spoilt_step_is_put_aside_and_said(source, tmp_path, caplog, how, message):
  """The one before is the newest then; a spoilt one is never read."""
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  folder = tmp_path / 'checkpoints'
  saved(folder, trainer.init(0), source, 0, {2: 0.6, 4: 0.5})
  spoil(folder / 'step_4', how)
  said = f'step_4 is spoilt: .*{message}'
  with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match=said):
    checkpoints.restore(4, trainer.abstract)
  integrity.set_aside(folder)
  assert re.search(f'{said}.*; it is now .*spoilt/step_4', caplog.text)
  assert steps_of(folder) == [2] and (tmp_path / 'spoilt' / 'step_4').is_dir()
  with Checkpoints(folder) as checkpoints:
    assert (checkpoints.latest(), checkpoints.best()) == (2, 2)
    checkpoints.restore(2, trainer.abstract)


def test_where_all_steps_are_spoilt_nothing_begins_anew(source, tmp_path):
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  saved(tmp_path, trainer.init(0), source, 0, {2: 0.6, 4: 0.5})
  for step in (2, 4):
    spoil(tmp_path / f'step_{step}', 'flipped')
  with pytest.raises(UserError, match='step_4 is spoilt: .* no other checkpoint is sound, so'):
    integrity.set_aside(tmp_path)
  assert steps_of(tmp_path) == [2, 4]
  integrity.set_aside(tmp_path / 'none')


def test_validations_that_are_damaged_are_no_validations(tmp_path):
  for text in ('[[1', '[1]', '[[1, "x"]]', '{"a": 1}'):
    (tmp_path / 'validations.json').write_text(text)
    with pytest.raises(UserError, match='validations.json is damaged .* delete it'):
      Checkpoints(tmp_path)


def test_where_a_run_stands():
  assert standing([]) == (None, None, 0)
  assert standing([(4, 0.6), (8, 0.7), (12, 0.7), (16, 0.5)]) == (0.7, 8, 2)
  assert standing([(4, -3.0)]) == (-3.0, 4, 0)


def test_finite(trained):
  trainer, state = trained
  assert not update.first_not_finite(trainer.finite(state))
  memory = state.tables['memory']
  spoilt = memory._replace(rows_RD=memory.rows_RD.at[3, 1].set(np.inf))
  found = trainer.finite(state._replace(tables=state.tables | {'memory': spoilt}))
  assert update.first_not_finite(found) == 'weights/memory/rows_RD'
