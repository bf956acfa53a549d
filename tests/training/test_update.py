"""One step of training: against dense optax, over meshes, its updates and its compiled program."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.losses import total_loss
from lmn_jax.tables import optimizers, table
from lmn_jax.training import update
from tests.examples import SIZES, make_batch, make_config, make_trainer
from tests.runs import but_slow, compilations

KINDS = {
  'pooling': ('pooling', {}),
  'din': ('din', {}),
  'lmn': ('lmn', {}),
  'lmn_heads': ('lmn', dict(heads=2, query='axes', query_norm='layer', base='pooling')),
  'lmn_product': ('lmn', dict(query='product', query_norm='none', base='none', query_context=True)),
}


def mesh_of(data, model):
  devices = np.array(jax.devices()[: data * model]).reshape(data, model)
  return Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def run(config, mesh, steps=3):
  """Returns (state, losses) after some steps, on the host."""
  _, trainer = make_trainer(config, mesh)
  state, losses = trainer.init(0), []
  for step in range(steps):
    state, metrics = trainer.update(state, meshes.place(mesh, make_batch(step)))
    losses.append(float(metrics['loss']))
  return jax.device_get(state), losses


def dense_reference(config, steps=3):
  """Returns (params, stats) of the same training with whole tables as parameters of dense optax."""
  model, trainer = make_trainer(config, mesh_of(1, 1))
  specs = model.tables()
  state = jax.device_get(trainer.init(0))
  params = state.params, {name: t.rows_RD for name, t in state.tables.items()}
  stats = state.stats
  rates = config.optimizer
  tx = optax.multi_transform(
    {
      'dense': optax.adam(rates.dense.rate),
      'rows': optax.chain(optimizers.scale_by_adagrad(), optax.scale(-rates.embedding.rate)),
    },
    ('dense', 'rows'),
  )

  def loss_fn(params, stats, batch, rngs):
    def read(name, ids, weights=None):
      rows = params[1][name][jnp.minimum(ids, specs[name].rows - 1)]
      rows = jnp.where((ids < specs[name].rows)[..., None], rows, 0)
      return rows if weights is None else jnp.einsum('...k,...kd->...d', weights, rows)

    outputs, moved = model.apply(
      {'params': params[0], **stats}, batch, read, train=True, rngs=rngs, mutable=list(stats)
    )
    return total_loss(outputs.losses, model.objective, config.loss), moved

  @jax.jit
  def update(params, opt, stats, batch, rngs):
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, batch, rngs)
    with jax.numpy_dtype_promotion('standard'):  # optax needs it
      updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, stats

  opt = tx.init(params)
  for step in range(steps):
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), np.int32(step))
    dropout, positions = jax.random.split(rng)
    rngs = {'dropout': dropout, 'positions': positions}
    params, opt, stats = update(params, opt, stats, make_batch(step), rngs)
  return params, stats


@pytest.mark.parametrize('kind', but_slow(list(KINDS), {1, 4}))
def test_equals_dense_optax(kind):
  name, fields = KINDS[kind]
  config = make_config(name, **fields)
  state, _ = run(config, mesh_of(1, 1))
  (params, rows), stats = dense_reference(config)
  chex.assert_trees_all_close(state.params, jax.device_get(params), atol=2e-5)
  chex.assert_trees_all_close(state.stats, jax.device_get(stats), atol=2e-5)
  for name, rows_VD in rows.items():
    np.testing.assert_allclose(state.tables[name].rows_RD, rows_VD, atol=2e-5, err_msg=name)


def rows_in(config, dtype):
  """Returns the config with the rows of all tables in a dtype."""
  for group in ('embedding', 'memory'):
    config.optimizer[group].rows = dtype
  return config


@pytest.mark.parametrize(
  'shape, dtype',
  [
    ((4, 2), 'float32'),
    pytest.param((8, 1), 'float32', marks=pytest.mark.slow),
    pytest.param((2, 4), 'float32', marks=pytest.mark.slow),
    pytest.param((4, 2), 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_meshes_give_the_same_numbers(shape, dtype):
  config = rows_in(make_config('lmn'), dtype)
  config.optimizer.update(GUARDED)
  expected, expected_losses = run(config, mesh_of(1, 1))
  state, losses = run(config, mesh_of(*shape))
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  chex.assert_trees_all_close(state, expected, atol=1e-5)


# Two tests share the programs that are compiled with these. The norm of the gradients is 0.2.
GUARDED = dict(schedule='cosine', clip_norm=0.1)


def test_golden_step():
  """If you did not intend to change the computation, this is a bug; otherwise copy the new numbers
  here and state the reason in the commit message."""
  config = make_config('lmn')
  _, trainer = make_trainer(config, mesh_of(1, 1))
  state = trainer.init(0)
  metrics = {}
  for step in range(3):
    state, metrics = trainer.update(state, make_batch(step))
  values = {name: float(value) for name, value in sorted(metrics.items())}
  assert values == pytest.approx(GOLDEN, rel=1e-3), values


GOLDEN = {
  'grad_norm': 0.16737585,
  'skipped': 0.0,
  'loss': 0.69180554,
  'loss/click': 0.69142509,
  'loss/memory': 0.00380461,
  'loss/memory_of_mean': 0.00217471,
  'memory/top1_weight': 0.42531803,
}


def large_lmn():
  """LMN with a memory much larger than all else: 2^16 slots on 8 devices."""
  config = make_config('lmn', slots_per_axis=256)
  mesh = mesh_of(8, 1)
  _, trainer = make_trainer(config, mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in meshes.place(mesh, make_batch()).items()
  }
  return trainer, trainer.update.lower(trainer.abstract, batch).compile()


@pytest.mark.usefixtures('uncached')
def test_no_collective_and_no_copy_of_a_table():
  """In the compiled step, collectives and copies are much smaller than a shard of the memory."""
  trainer, compiled = large_lmn()
  memory = trainer.abstract.tables['memory'].rows_RD
  shard = memory.size // 8
  moves = re.compile(
    r'= \(?([a-z0-9]+\[[0-9,]*\].*?) '
    r'(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|copy)\('
  )
  count = 0
  for shapes, operation in moves.findall(compiled.as_text()):
    for dims in re.findall(r'\[([0-9,]+)\]', shapes):
      size = int(np.prod([int(d) for d in dims.split(',')]))
      assert size < shard / 4, f'{operation} of {shapes}'
      count += 1
  assert count > 10, 'the pattern no longer matches what XLA prints'
  rows_bytes = shard * 4
  assert compiled.memory_analysis().temp_size_in_bytes < rows_bytes
  assert compiled.memory_analysis().alias_size_in_bytes > 2 * rows_bytes, 'tables are not donated'


@pytest.mark.parametrize('name, leaves', [('adam', 6), ('rowwise_adagrad', 5)])
def test_tables_are_sharded_from_the_start(name, leaves):
  """bfloat16 rows, master, two counters, and the optimizer state of the rows."""
  config = rows_in(make_config('lmn'), 'bfloat16')
  config.optimizer.memory.name = name
  memory = make_trainer(config, mesh_of(4, 2))[1].init(0).tables['memory']
  R = memory.rows_RD.shape[0]
  sharded = [x for x in jax.tree.leaves(memory) if table.by_row(x, R)]
  assert len(sharded) == leaves
  for x in sharded:
    assert {s.data.shape for s in x.addressable_shards} == {(R // 8, *x.shape[1:])}


def test_one_compilation():
  _, trainer = make_trainer(make_config('lmn'), mesh_of(1, 1), shared=False)
  state = trainer.init(0)
  with compilations() as compiled:
    for step in range(4):
      state, _ = trainer.update(state, meshes.place(mesh_of(1, 1), make_batch(step)))
  assert len(compiled) == 1


@pytest.mark.parametrize(
  'frozen, dtype',
  but_slow(
    [(False, 'float32'), (True, 'float32'), (False, 'bfloat16'), (True, 'bfloat16')], {0, 3}
  ),
)
def test_a_step_updates_the_rows_that_it_reads(frozen, dtype):
  """Rows that are read change and are counted; others, including padding rows, do not change."""
  config = make_config('lmn', freeze_values=frozen)
  config.optimizer.memory.rows = dtype
  _, trainer = make_trainer(config, mesh_of(1, 1))
  start = jax.device_get(trainer.init(0))
  # Without events nothing is injected: the read has no weight and no gradient.
  batch = make_batch() | {'length': np.maximum(make_batch()['length'], 1)}
  state, _ = trainer.update(trainer.init(0), batch)
  state = jax.device_get(state)
  moved = np.any(state.tables['item'].rows_RD != start.tables['item'].rows_RD, axis=1)
  in_batch = set(batch['item']) | set(batch['history'][batch['history'] < SIZES['item']])
  assert set(np.flatnonzero(moved)) == in_batch
  memory, before = state.tables['memory'], start.tables['memory']
  assert memory.rows_RD.dtype == dtype
  assert (memory.master_RD is None) == (frozen or dtype == 'float32')
  changed = set(np.flatnonzero(np.any(memory.rows_RD != before.rows_RD, axis=1)))
  read = set(np.flatnonzero(memory.reads_R))
  # 16 targets and 32 injected items, 3 slots each.
  assert memory.reads_R.sum() == 48 * 3
  assert set(np.flatnonzero(memory.ever_R)) == read
  assert changed == (set() if frozen else read)


def test_memory_loss_does_not_move_embeddings_through_its_target():
  """With the memory loss alone, item rows get gradients through the query only; with query='item'
  the user rows get no gradient."""
  config = make_config('lmn', query='item', base='none', query_norm='none')
  config.loss.memory_weight = 1.0
  _, trainer = make_trainer(config, mesh_of(1, 1))
  start = jax.device_get(trainer.init(0))
  batch = make_batch() | {'weight': np.zeros(16, np.float32)}  # no click loss
  state, metrics = trainer.update(trainer.init(0), batch)
  assert float(metrics['loss/memory']) > 0
  np.testing.assert_array_equal(state.tables['user'].rows_RD, start.tables['user'].rows_RD)
  assert np.any(np.asarray(state.tables['memory'].rows_RD) != start.tables['memory'].rows_RD)


def test_clipping_bounds_the_step():
  config = make_config('din')
  config.optimizer.clip_norm = 1e-3
  for group in ('dense', 'embedding'):
    config.optimizer[group].update(dict(name='sgd', rate=1.0))
  _, trainer = make_trainer(config, mesh_of(1, 1))
  start = jax.device_get(trainer.init(0))
  state, metrics = trainer.update(trainer.init(0), make_batch())
  assert float(metrics['grad_norm']) > 1e-3
  rows = {k: t.rows_RD for k, t in state.tables.items()}
  rows_before = {k: t.rows_RD for k, t in start.tables.items()}
  step = jax.tree.map(lambda a, b: a - b, (state.params, rows), (start.params, rows_before))
  assert float(optax.tree.norm(step)) == pytest.approx(1e-3, rel=1e-3)


def test_shuffle_user_changes_the_user_in_the_query_only():
  _, plain = make_trainer(make_config('lmn'), mesh_of(1, 1))
  _, shuffled = make_trainer(make_config('lmn', shuffle_user=True), mesh_of(1, 1))
  state, batch = plain.init(0), make_batch()
  same_user = batch | {'user': np.full(16, 3, np.int32), 'user.age': np.full(16, 2, np.int32)}
  assert np.any(plain.predict(state, batch) != shuffled.predict(state, batch))
  np.testing.assert_allclose(
    plain.predict(state, same_user), shuffled.predict(state, same_user), rtol=1e-5
  )


@pytest.mark.parametrize('norm', but_slow(['batch', 'layer'], {0}))
def test_injected_queries_without_their_loss_change_nothing(norm):
  """With lambda = 0, training with positions equals training without, bit for bit, except the
  counters of reads."""

  def trained(positions):
    config = make_config('lmn', positions=positions, query_norm=norm, dropout=0.2)
    config.loss.memory_weight = 0.0
    state, _ = run(config, mesh_of(1, 1), steps=4)
    memory = state.tables['memory']._replace(reads_R=None, ever_R=None)
    return state._replace(tables=state.tables | {'memory': memory})

  chex.assert_trees_all_equal(trained(3), trained(0))


def test_no_parameter_of_the_model_is_a_table():
  """No leaf has as many rows as a vocabulary or the memory."""
  _, trainer = make_trainer(make_config('lmn'), mesh_of(1, 1))
  tall = {spec for spec in (*SIZES.values(), 64)}
  for leaf in jax.tree.leaves(trainer.abstract.params):
    assert not (leaf.ndim == 2 and leaf.shape[0] in tall and leaf.shape[1] == 4), leaf.shape
  assert isinstance(trainer.abstract.tables['memory'], table.Table)


@pytest.mark.parametrize('name', ['lmn', 'din'])
def test_clear_reads_changes_the_counters_only(name):
  _, trainer = make_trainer(make_config(name), mesh_of(1, 1))
  state, _ = trainer.update(trainer.init(0), make_batch())
  before = jax.device_get(state)
  expected = before
  if name == 'lmn':
    memory = before.tables['memory']
    assert memory.reads_R.any() and memory.ever_R.any()
    memory = memory._replace(reads_R=np.zeros_like(memory.reads_R))
    expected = before._replace(tables=before.tables | {'memory': memory})
  chex.assert_trees_all_equal(jax.device_get(trainer.clear_reads(state)), expected)


@pytest.mark.parametrize('shape', but_slow([((1, 1),), ((4, 2),)], {0}))
def test_a_step_that_is_not_finite_changes_nothing_but_step(shape):
  """Its cause is named: a weight, otherwise a loss, otherwise a gradient."""
  config, mesh = make_config('lmn'), mesh_of(*shape)
  if shape == (1, 1):
    config.optimizer.memory.name, config.optimizer.schedule = 'adam', 'cosine'
  else:
    rows_in(config, 'bfloat16').optimizer.update(GUARDED)
  _, trainer = make_trainer(config, mesh)
  state, metrics = trainer.update(trainer.init(0), meshes.place(mesh, make_batch()))
  assert metrics['skipped'] == 0
  before = jax.device_get(state)
  bad = make_batch(1)
  bad['label'][3] = np.nan
  bad = meshes.place(mesh, bad)
  assert update.first_not_finite(trainer.diagnose(state, meshes.place(mesh, make_batch(1)))) == ''
  assert update.first_not_finite(trainer.diagnose(state, bad)).startswith('losses/click and ')
  state, metrics = trainer.update(state, bad)
  assert metrics['skipped'] == 1 and np.isnan(metrics['loss'])
  after = jax.device_get(state)
  assert (before.step, after.step) == (1, 2)
  chex.assert_trees_all_equal(after._replace(step=before.step), before)
  state, metrics = trainer.update(state, meshes.place(mesh, make_batch(2)))
  assert metrics['skipped'] == 0
  chex.assert_tree_all_finite(jax.device_get(state))
  assert (jax.device_get(state.tables['memory'].rows_RD) != after.tables['memory'].rows_RD).any()
  item = state.tables['item']
  damaged = state.tables | {'item': item._replace(rows_RD=item.rows_RD.at[7].set(np.inf))}
  parts = trainer.diagnose(state._replace(tables=damaged), meshes.place(mesh, make_batch()))
  assert update.first_not_finite(parts).startswith('weights/item/rows_RD')


def test_counters_of_reads_do_not_overflow():
  full = jnp.array([update.MOST_READS - 1, 5, 0], jnp.int32)
  counted = table.Table(jnp.zeros((3, 2)), None, (), full, jnp.zeros(3, bool))
  counted = update.count_reads(counted, jnp.array([0, 0, 0, 1, 7]), 3)
  assert counted.reads_R.tolist() == [update.MOST_READS, 6, 0]
