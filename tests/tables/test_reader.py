"""Reads with taps, and the embedding bag on shards, against plain gathers and their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmn_jax.config import base
from lmn_jax.distributed import mesh as meshes
from lmn_jax.tables import embedding_bag, optimizers, reader, table
from lmn_jax.tables.embedding_bag import Reads
from lmn_jax.tables.spec import TableSpec
from tests.blocks import set_sizes
from tests.runs import but_slow, mesh_of

# The tests read compiled programs.
pytestmark = pytest.mark.usefixtures('uncached')

SPEC = TableSpec(10, 3, 0.1)
RULES = tuple(optimizers.ROW_RULES)
SHAPES = [(8, 1), (4, 2), (2, 4), (1, 2)]


def fresh(spec=SPEC, tx=None, dtype=jnp.float32):
  return table.init(spec, jax.random.key(0), tx or optax.sgd(1.0), 8, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradient_of_the_tap_is_the_gradient_of_the_rows(dtype):
  """In float32 for rows of any type."""
  ids = jnp.array([[1, 4, 4], [10, 0, 4]])
  weights = jnp.array([[0.5, 1.0, 2.0], [1.0, -1.0, 3.0]])
  t = fresh(dtype=dtype)
  rows = t.rows_RD.astype(jnp.float32)[:10]

  def plain(rows):
    x = jnp.where((ids < 10)[..., None], rows[jnp.minimum(ids, 9)], 0)
    return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(jnp.einsum('bk,bkd->bd', weights, x)))

  def tapped(taps):
    read = reader.Reader({'t': t}, {'t': SPEC}, mesh_of(1), taps)
    return jnp.sum(jnp.sin(read('t', ids))) + jnp.sum(jnp.cos(read('t', ids, weights))), read.used

  shape = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
  taps = reader.zero_taps({'t': [reader.Use(shape, None), reader.Use(shape, weights)]}, {'t': SPEC})
  assert [x.shape for x in taps['t']] == [(2, 3, 3), (2, 3)]
  (value, used), grads = jax.value_and_grad(tapped, has_aux=True)(taps)
  assert float(value) == pytest.approx(float(plain(rows)), rel=1e-6)
  summed = reader.row_grads(reader.reads_of(used['t'], grads['t']), 10, 512)
  dense = np.zeros((513, 3), np.float32)
  np.add.at(dense, np.asarray(summed.ids_N), np.asarray(summed.grads_ND))
  np.testing.assert_allclose(dense[:10], jax.grad(plain)(rows), rtol=1e-5, atol=1e-6)


def random_reads(V, T=16, K=5, seed=0):
  """Ids with duplicates and padding, and weights."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, V + V // 8 + 1, (T, K)).astype(np.int32)
  return jnp.array(ids), jnp.array(rng.normal(size=(T, K)).astype(np.float32))


@pytest.mark.parametrize(
  'shape, dtype',
  [(shape, jnp.float32) for shape in [(1, 1), *SHAPES]]
  + [(shape, jnp.bfloat16) for shape in ((1, 1), (4, 2))],
)
@pytest.mark.parametrize('V', [40, 1000])  # 40: all ids on the first shard, many rounds
def test_sums_on_shards_equal_a_plain_sum(shape, dtype, V):
  """In float32 for rows of any type."""
  rows = jax.random.normal(jax.random.key(1), (1024, 3)).astype(dtype)
  ids, weights = random_reads(V, K=11)
  target = np.random.default_rng(2).normal(size=(16, 3)).astype(np.float32)

  def plain(weights):
    rows_TKD = jnp.where((ids < V)[..., None], rows.astype(jnp.float32)[jnp.minimum(ids, V - 1)], 0)
    return jnp.sum(jnp.square(jnp.einsum('tk,tkd->td', weights, rows_TKD) - target))

  def ours(weights, mesh):
    return jnp.sum(jnp.square(embedding_bag.read(mesh, V, rows, ids, weights) - target))

  want = jax.value_and_grad(plain)(weights)
  value, grad = jax.jit(jax.value_and_grad(ours), static_argnums=1)(weights, mesh_of(*shape))
  np.testing.assert_allclose(value, want[0], rtol=1e-5)
  np.testing.assert_allclose(grad, want[1], rtol=1e-4, atol=1e-5)


def test_a_sum_needs_no_array_of_all_its_rows():
  T, K, D = 64, 64, 32
  array = jax.ShapeDtypeStruct

  def loss(weights, rows, ids):
    return jnp.sum(jnp.square(embedding_bag.read(mesh_of(1), 1024, rows, ids, weights)))

  shapes = array((T, K), jnp.float32), array((1024, D), jnp.float32), array((T, K), jnp.int32)
  compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < T * K * D * 4 / 2


@pytest.mark.parametrize(
  'shape, V, name, dtype',
  but_slow(
    [(shape, V, 'adam', jnp.float32) for shape in SHAPES for V in (40, 1000)]
    + [((4, 2), V, name, jnp.float32) for V in (40, 1000) for name in RULES if name != 'adam']
    + [((4, 2), V, 'adam', jnp.bfloat16) for V in (40, 1000)],
    {1, 11},
  ),
)
def test_row_updates_on_shards_equal_those_on_one_device(shape, V, name, dtype):
  """Two steps, so that the optimizer's state matters, also the warm-up's step count."""
  config = base('pooling').optimizer
  config.update(dict(warmup_steps=2, memory=dict(name=name, rate=0.1, decay=0.01)))
  tx = optimizers.make(config, 'memory', 10)
  spec = TableSpec(V, 3, 0.5)
  alone, sharded = fresh(spec, tx, dtype), fresh(spec, tx, dtype)
  for seed in (0, 1):
    reads = []
    for T, K in ((16, 5), (13, 1)):  # the devices do not divide 13
      ids, weights = random_reads(V, T, K, seed)
      g = jax.random.normal(jax.random.key(seed + K), (T, 3))
      reads.append(Reads(ids, weights, g))
    grads = reader.row_grads(reads, V, alone.rows_RD.shape[0])
    alone = optimizers.update_rows(tx, alone, table.RowGrads(grads.ids_N, grads.grads_ND * 0.5))
    update = jax.jit(embedding_bag.update, static_argnums=(0, 1, 2))
    sharded, squares = update(mesh_of(*shape), V, tx, sharded, reads, jnp.full((), 0.5))
    assert float(squares) == pytest.approx(float(np.sum(np.square(grads.grads_ND))), rel=1e-4)
  if dtype == jnp.bfloat16:  # masters that differ in their last bit may round differently
    np.testing.assert_array_equal(sharded.rows_RD, sharded.master_RD.astype(dtype))
    alone, sharded = alone._replace(rows_RD=None), sharded._replace(rows_RD=None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), alone, sharded)


def test_the_rounds_of_an_accelerator_are_long_enough(monkeypatch):
  """All reads of a table of few rows are on one shard: 128 rounds of the mean's double, or one."""
  assert embedding_bag._capacity(512, 8) == 128
  set_sizes(monkeypatch, 'tpu', shard_reads=1024)
  assert embedding_bag._capacity(512, 256) == 512
  assert embedding_bag._capacity(26_112, 256) == 1024
  assert embedding_bag._capacity(2**20, 256) == 2**13


def test_the_length_of_rounds_changes_no_result(monkeypatch):
  """Sums and rows to the bit, since the order of additions is the same; the norm by rounding."""
  V, mesh, tx = 40, mesh_of(8), optax.sgd(1.0)
  ids, weights = random_reads(V, K=11)
  reads = [Reads(ids, weights, jax.random.normal(jax.random.key(0), (16, 3)))]
  results = []
  for least in (1, 1024):  # rounds of 44 of 176 reads, and of all
    set_sizes(monkeypatch, shard_reads=least)

    @jax.jit
    def step(t):
      sums = embedding_bag.read(mesh, V, t.rows_RD, ids, weights)
      updated, squares = embedding_bag.update(mesh, V, tx, t, reads, jnp.ones(()))
      return sums, updated.rows_RD, squares

    results.append(step(fresh(TableSpec(V, 3, 0.5), tx)))
  (*short, less), (*long, more) = results
  jax.tree.map(np.testing.assert_array_equal, short, long)
  assert float(less) == pytest.approx(float(more), rel=1e-6)


def collective_bytes(compiled):
  """Bytes of every collective's result in a compiled program, on one device."""
  size = {'f32': 4, 's32': 4, 'u32': 4, 'pred': 1}
  kinds = r'(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
  total = 0
  for shapes in re.findall(rf'= (\(?[a-z0-9]+\[.*?) {kinds}', compiled.as_text()):
    for kind, dims in re.findall(r'([a-z]+[0-9]*)\[([0-9,]*)\]', shapes[0]):
      total += size[kind] * int(np.prod([int(d) for d in dims.split(',') if d]))
  return total


def test_no_row_moves_between_devices():
  """The communication is a few times the batch's sums and weights, for any number of rows."""
  T, K, D = 64, 32, 48
  mesh = mesh_of(4, 2)

  def step(t, ids, weights, target, V):
    def loss(weights, tap):
      out = embedding_bag.read(mesh, V, jax.lax.stop_gradient(t.rows_RD), ids, weights) + tap
      return jnp.sum(jnp.square(out - target))

    dw, g = jax.grad(loss, (0, 1))(weights, jnp.zeros((T, D)))
    t, _ = embedding_bag.update(mesh, V, optax.sgd(0.1), t, [Reads(ids, weights, g)], jnp.ones(()))
    return t, dw

  by_rows, by_batch = (jax.NamedSharding(mesh, spec) for spec in (meshes.ROWS, meshes.BATCH))
  moved = []
  for V in (2**12, 2**14):
    t = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows),
      jax.eval_shape(lambda V=V: fresh(TableSpec(V, D, 0.1))),
    )
    arrays = [
      jax.ShapeDtypeStruct((T, n), dtype, sharding=by_batch)
      for n, dtype in ((K, jnp.int32), (K, jnp.float32), (D, jnp.float32))
    ]
    compiled = jax.jit(step, static_argnums=4, donate_argnums=0).lower(t, *arrays, V).compile()
    moved.append(collective_bytes(compiled))
  assert moved[0] == moved[1]
  assert T * (D + K) * 4 < moved[0] < 5 * T * (D + K) * 4 < T * K * D * 4
