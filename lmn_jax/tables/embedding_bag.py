"""The embedding bag: weighted sums of rows, computed on the shards of the rows.

    out_t = sum_k w_tk row[id_tk]          d w_tk = row[id_tk] . g_t          d row_i = sum w_tk g_t

No row moves between devices, forward or backward. On a mesh, ids and weights [T, K] are gathered
on every shard. Each shard sums its rows, and the sums [T, D] are reduce-scattered.
Backward, the cotangents g [T, D] are gathered and the gradients of the weights are
reduce-scattered. The communicated bytes depend neither on the number of rows nor on K times D.

A shard processes the reads of its rows in rounds of `capacity` reads, twice the mean number of
reads of a shard, and at least `shard_reads` of BlockSizes. So memory is bounded; a shard with more
reads needs more rounds, and no read is dropped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.tables import optimizers
from lmn_jax.tables.blocks import in_blocks
from lmn_jax.tables.table import RowGrads, Table, by_row, owners

SLACK = 2  # reads of one round, in units of the mean number of reads of a shard


class Reads(NamedTuple):
  """Weighted reads and the cotangents of their sums, from which the rows' gradients are computed.

  ids_TK: int32 [T, K], padding >= V. weights_TK: [T, K]. g_TD: [T, D].
  """

  ids_TK: Int[Array, 'T K']
  weights_TK: Float[Array, 'T K']
  g_TD: Float[Array, 'T D']


def read(
  mesh: Mesh,
  V: int,
  rows_RD: Float[Array, 'R D'],
  ids_TK: Int[Array, 'T K'],
  weights_TK: Float[Array, 'T K'],
) -> Float[Array, 'T D']:
  """Computes `out_t = sum_k w_tk row[id_tk]`; ids >= V add nothing.

  Args:
    mesh: of the tables. V: ids of the table.
    rows_RD: float32 or bfloat16 [R, D], sharded over the mesh; they get no gradient here (see
      `Reader`). ids_TK: int32 [T, K]. weights_TK: float [T, K], sharded like a batch.

  Returns:
    float32 [T, D], summed in float32, sharded like a batch; gradients flow to the weights.
  """
  if mesh.size == 1:
    return _read_one_device(V, rows_RD, ids_TK, weights_TK)
  return _read_shards(mesh, V, rows_RD, ids_TK, weights_TK)


def sum_rows(
  rows_of: Callable[[Array], Array],
  V: int,
  D: int,
  ids_TK: Int[Array, 'T K'],
  weights_TK: Float[Array, 'T K'],
) -> Float[Array, 'T D']:
  """Computes `sum_k w_tk row[id_tk]` on one device without an array [T, K, D].

  Args:
    rows_of: ids [T] below V -> rows float32 [T, D]. V: ids of the table; larger ids add nothing. D:
      its width.
  """
  ids_TK, weights_TK = _within(V, ids_TK, weights_TK)

  def add(sum_TD, block):
    ids_bT, weights_bT = block
    for ids_T, weights_T in zip(ids_bT, weights_bT, strict=True):
      sum_TD += weights_T[:, None] * rows_of(ids_T)
    return sum_TD, None

  size = block_sizes.sizes().bag_rows
  blocks = in_blocks(ids_TK, size), in_blocks(weights_TK, size)
  return jax.lax.scan(add, jnp.zeros((ids_TK.shape[0], D)), blocks)[0]


def _within(V, ids_TK, values_TK):
  """Returns ids below V, and values that are 0 where the ids are not.

  So that no read is out of bounds, and XLA on a GPU fuses all K reads and their sum into a kernel:
  with reads that are filled it computes a mask of each in a kernel of its own.
  """
  within_TK = ids_TK < V
  return jnp.where(within_TK, ids_TK, 0), jnp.where(within_TK, values_TK, 0)


def _rows_within(rows_RD, ids):
  """Returns rows of ids that are all in bounds, converted to float32."""
  return rows_RD.at[ids].get(mode='promise_in_bounds').astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_one_device(V, rows_RD, ids_TK, weights_TK):
  rows_of = functools.partial(_rows_within, rows_RD)
  return sum_rows(rows_of, V, rows_RD.shape[1], ids_TK, weights_TK)


def _read_one_device_forward(V, rows_RD, ids_TK, weights_TK):
  return _read_one_device(V, rows_RD, ids_TK, weights_TK), (rows_RD, ids_TK)


def _read_one_device_backward(V, residuals, g_TD):
  rows_RD, ids_TK = residuals
  sizes = block_sizes.sizes()

  def dot(ids_bT):
    return jnp.einsum('btd,td->bt', _rows_within(rows_RD, ids_bT), g_TD)

  size = min(sizes.bag_rows, max(1, sizes.bag_floats // g_TD.size))
  blocks = in_blocks(jnp.where(ids_TK < V, ids_TK, 0), size)
  dw_KT = jax.lax.map(dot, blocks).reshape(-1, ids_TK.shape[0])
  return None, None, jnp.where(ids_TK < V, dw_KT[: ids_TK.shape[1]].T, 0)


_read_one_device.defvjp(_read_one_device_forward, _read_one_device_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read_shards(mesh, V, rows_RD, ids_TK, weights_TK):
  T, K = ids_TK.shape

  def shard(rows_RD, ids_TK, weights_TK):
    R, D = rows_RD.shape
    local_N = _local(_all_gather(ids_TK).reshape(-1), V, R)
    weights_N = _all_gather(weights_TK).reshape(-1)

    def add(sum_TD, e_M):
      rows_MD = _rows(rows_RD, _take(local_N, e_M, R))
      w_M = _take(weights_N, e_M)
      return sum_TD.at[e_M // K].add(w_M[:, None] * rows_MD, mode='drop')

    sum_TD = _in_rounds(local_N < R, _capacity(T * K, mesh.size), add, jnp.zeros((T, D)))
    return _reduce_scatter(sum_TD)

  in_specs = (meshes.ROWS, meshes.BATCH, meshes.BATCH)
  return _on_shards(shard, mesh, in_specs, meshes.BATCH)(rows_RD, ids_TK, weights_TK)


def _read_shards_forward(mesh, V, rows_RD, ids_TK, weights_TK):
  return _read_shards(mesh, V, rows_RD, ids_TK, weights_TK), (rows_RD, ids_TK)


def _read_shards_backward(mesh, V, residuals, g_TD):
  rows_RD, ids_TK = residuals
  T, K = ids_TK.shape

  def shard(rows_RD, ids_TK, g_TD):
    R = rows_RD.shape[0]
    local_N = _local(_all_gather(ids_TK).reshape(-1), V, R)
    g_TD = _all_gather(g_TD)

    def add(dw_N, e_M):
      rows_MD = _rows(rows_RD, _take(local_N, e_M, R))
      return dw_N.at[e_M].set(jnp.sum(rows_MD * _take(g_TD, e_M // K), axis=-1), mode='drop')

    dw_N = _in_rounds(local_N < R, _capacity(T * K, mesh.size), add, jnp.zeros(T * K))
    return _reduce_scatter(dw_N.reshape(T, K))

  in_specs = (meshes.ROWS, meshes.BATCH, meshes.BATCH)
  return None, None, _on_shards(shard, mesh, in_specs, meshes.BATCH)(rows_RD, ids_TK, g_TD)


_read_shards.defvjp(_read_shards_forward, _read_shards_backward)


class Entries(NamedTuple):
  """The weighted reads of a whole batch in one list of N entries, as a shard sees them.

  local_N: int32, the entry's row on this shard; R for padding and rows of other shards.
  weights_N: float. t_N: int32, the entry's cotangent in g_TD. g_TD: cotangents.
  """

  local_N: Int[Array, 'N']
  weights_N: Float[Array, 'N']
  t_N: Int[Array, 'N']
  g_TD: Float[Array, 'T D']


class DistinctRows(NamedTuple):
  """The distinct rows of this shard among N entries.

  first_N: whether the entry is the owner of its row (table.owners). rank_N: int32, the rank of the
  entry's row among the distinct rows. count: int32, the number of distinct rows.
  """

  first_N: Bool[Array, 'N']
  rank_N: Int[Array, 'N']
  count: Int[Array, '']


def update(
  mesh: Mesh,
  V: int,
  tx: optax.GradientTransformation,
  table: Table,
  reads: list[Reads],
  factor: Float[Array, ''],
) -> tuple[Table, Float[Array, '']]:
  """Updates the rows of a table that were read; each shard sums duplicates and updates its rows.

  Args:
    mesh: of the tables. V: ids of the table. tx: as for `optimizers.update_rows`. table: to update.
    reads: all weighted reads of the step. factor: multiplies the gradients.

  Returns:
    The table, and the squared norm of the rows' gradients before the factor.
  """
  updated = table._replace(reads_R=None, ever_R=None)
  specs = jax.tree.map(
    lambda x: meshes.ROWS if by_row(x, table.rows_RD.shape[0]) else meshes.REPLICATED, updated
  )
  in_specs = (specs, jax.tree.map(lambda _: meshes.BATCH, reads), meshes.REPLICATED)
  # The devices divide a batch; they need not divide other reads, such as of all rows.
  reads = [_padded(r, V, mesh.shape['data']) for r in reads]
  shard = functools.partial(_update_shard, mesh, V, tx)
  run = _on_shards(shard, mesh, in_specs, (specs, meshes.REPLICATED))
  updated, squares = run(updated, reads, factor)
  return updated._replace(reads_R=table.reads_R, ever_R=table.ever_R), squares


def _update_shard(mesh, V, tx, table, reads, factor):
  """Updates the rows of one shard, `capacity` distinct rows at a time."""
  R, D = table.rows_RD.shape
  entries = _entries(reads, V, R)
  rows = _distinct_rows(entries.local_N, R)
  capacity = _capacity(entries.local_N.shape[0], mesh.size)

  def step(c, carry):
    table, squares = carry
    block = _block_grads(entries, rows, c, capacity, R)
    new = optimizers.update_rows(tx, table, RowGrads(block.ids_N, block.grads_ND * factor))
    # State without an entry for each row, such as a step count, changes once a step: below.
    new = jax.tree.map(lambda before, after: after if by_row(after, R) else before, table, new)
    return new, squares + jnp.sum(jnp.square(block.grads_ND))

  rounds = (rows.count + capacity - 1) // capacity
  table, squares = jax.lax.fori_loop(0, rounds, step, (table, jnp.zeros(())))
  # Applied to no rows, the optimizer changes only the state that is not stored by row.
  empty = jax.tree.map(lambda x: x[:0] if by_row(x, R) else x, table.opt)
  _, opt = tx.update(jnp.zeros((0, D)), empty, jnp.zeros((0, D)))
  opt = jax.tree.map(lambda rowwise, new: rowwise if by_row(rowwise, R) else new, table.opt, opt)
  return table._replace(opt=opt), jax.lax.psum(squares, ('data', 'model'))


def _entries(reads: list[Reads], V: int, R: int) -> Entries:
  """Gathers the reads of all devices and concatenates them."""
  reads = jax.tree.map(_all_gather, reads)
  local_N = _local(jnp.concatenate([r.ids_TK.reshape(-1) for r in reads]), V, R)
  weights_N = jnp.concatenate([r.weights_TK.reshape(-1) for r in reads])
  g_TD = jnp.concatenate([r.g_TD for r in reads])
  t_N, begin = [], 0
  for T, K in (r.ids_TK.shape for r in reads):
    t_N.append(begin + jnp.arange(T * K, dtype=jnp.int32) // K)
    begin += T
  return Entries(local_N, weights_N, jnp.concatenate(t_N), g_TD)


def _distinct_rows(local_N: Int[Array, 'N'], R: int) -> DistinctRows:
  """Ranks the distinct rows among the entries; entries of the same row have the same rank."""
  place_N = jnp.arange(local_N.shape[0], dtype=jnp.int32)
  owner_N = owners(local_N, R)
  first_N = (local_N < R) & (owner_N == place_N)
  rank_N = (jnp.cumsum(first_N.astype(jnp.int32)) - 1)[owner_N]
  return DistinctRows(first_N, rank_N, jnp.sum(first_N.astype(jnp.int32)))


def _block_grads(entries: Entries, rows: DistinctRows, c: Array, capacity: int, R: int) -> RowGrads:
  """Returns the summed gradients of the c-th `capacity` distinct rows; unused ids are R."""
  in_block_N = (entries.local_N < R) & (rows.rank_N // capacity == c)
  place_N = rows.rank_N - c * capacity
  D = entries.g_TD.shape[1]

  def add(grads_MD, e_M):
    to_M = _take(place_N, e_M, capacity)
    t_M = _take(entries.t_N, e_M, entries.g_TD.shape[0])
    g_MD = _take(entries.weights_N, e_M)[:, None] * _take(entries.g_TD, t_M)
    return grads_MD.at[to_M].add(g_MD, mode='drop')

  grads_MD = _in_rounds(in_block_N, capacity, add, jnp.zeros((capacity, D)))
  to_N = jnp.where(rows.first_N & in_block_N, place_N, capacity)
  ids_M = jnp.full(capacity, R, jnp.int32).at[to_N].set(entries.local_N, mode='drop')
  return RowGrads(ids_M, grads_MD)


def _on_shards(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
  # The collectives inside make the replicated results equal on all devices; the check cannot infer
  # that through a loop of unknown length.
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _all_gather(x: Array) -> Array:
  """This device's share of a batch -> the whole batch."""
  return jax.lax.all_gather(x, 'data', tiled=True)


def _padded(reads: Reads, V: int, devices: int) -> Reads:
  """Pads the reads so that their number is a multiple of `devices`."""
  more = -reads.ids_TK.shape[0] % devices
  return Reads(
    jnp.pad(reads.ids_TK, ((0, more), (0, 0)), constant_values=V),
    *(jnp.pad(x, ((0, more), (0, 0))) for x in (reads.weights_TK, reads.g_TD)),
  )


def _reduce_scatter(x: Array) -> Array:
  """Each shard's part of a sum over the whole batch -> the sum, for this device's share of it."""
  return jax.lax.psum(jax.lax.psum_scatter(x, 'data', tiled=True), 'model')


def _local(ids_N, V, R):
  """Ids of the table -> rows of this shard; R for padding and rows of other shards."""
  shard = jax.lax.axis_index(('data', 'model'))
  local_N = ids_N - shard * R
  return jnp.where((ids_N < V) & (local_N >= 0) & (local_N < R), local_N, R)


def _take(x, index, fill=0):
  """Entries by index, `fill` past the end."""
  return x.at[index].get(mode='fill', fill_value=fill)


def _rows(rows_RD, index):
  """Rows by index, converted to float32; zeros past the end."""
  return _take(rows_RD, index).astype(jnp.float32)


def _capacity(N: int, devices: int) -> int:
  """Returns the reads of one round, of N reads of the whole mesh."""
  return min(N, max(block_sizes.sizes().shard_reads, -(-SLACK * N // devices)))


def _in_rounds(mask_N: Array, capacity: int, add: Callable, start: Array) -> Array:
  """Folds `add(carry, e_M)` over the entries e of the mask, `capacity` at a time.

  e_M: int32 [capacity]; the last round is filled with N.
  """
  N = mask_N.shape[0]
  rank_N = jnp.cumsum(mask_N.astype(jnp.int32)) - 1

  def step(c, carry):
    place_N = jnp.where(mask_N & (rank_N // capacity == c), rank_N - c * capacity, capacity)
    e_M = (
      jnp.full(capacity, N, jnp.int32).at[place_N].set(jnp.arange(N, dtype=jnp.int32), mode='drop')
    )
    return add(carry, e_M)

  rounds = (rank_N[-1] + capacity) // capacity
  return jax.lax.fori_loop(0, rounds, step, start)
