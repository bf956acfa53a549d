"""Weighted sums of rows, made where the rows lie: no row crosses devices, forward or backward.

    out_t = sum_k w_tk row[id_tk]          d w_tk = row[id_tk] . g_t          d row_i = sum w_tk g_t

On a mesh ids and weights, [T, K], go to every shard. Each sums the rows that it holds, and the
sums, [T, D], are reduce-scattered; backward the cotangents g, [T, D], go out and the gradients of
the weights come back. The bytes that move do not depend on the number of slots, nor on K times D.

A shard works through the reads that fall on it `capacity` at a time, twice its fair share: memory
is bounded, and reads that crowd on one shard take more rounds and are not lost.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.tables import optimizers
from lmn_jax.tables.blocks import in_blocks
from lmn_jax.tables.table import RowGrads, Table, by_row, gather, owners

SLACK = 2  # rounds begin when a shard is asked for more than this times its share


class Reads(NamedTuple):
  """What was read with weights, and the cotangents: all that the rows' gradients are made of.

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
  """`out_t = sum_k w_tk row[id_tk]`; ids at or past V add nothing.

  Args:
    mesh: of the tables. V: ids of the table.
    rows_RD: float32 or bfloat16 [R, D], rows over the mesh; no gradient flows to them (see
      `Reader`). ids_TK: int32 [T, K]. weights_TK: float [T, K], sharded like a batch.

  Returns:
    float32 [T, D], summed in float32, sharded like a batch; gradients flow to the weights.
  """
  if mesh.size == 1:
    return _read_here(V, rows_RD, ids_TK, weights_TK)
  return _read(mesh, V, rows_RD, ids_TK, weights_TK)


def sum_rows(
  rows_of: Callable[[Array], Array],
  V: int,
  D: int,
  ids_TK: Int[Array, 'T K'],
  weights_TK: Float[Array, 'T K'],
) -> Float[Array, 'T D']:
  """`sum_k w_tk row[id_tk]` of one device; [T, K, D] is never made.

  Args:
    rows_of: ids [T] -> rows float32 [T, D], zeros for V. V: ids of the table. D: its width.
  """

  def add(sum_TD, block):
    ids_bT, weights_bT = block
    for ids_T, weights_T in zip(ids_bT, weights_bT, strict=True):
      sum_TD += weights_T[:, None] * rows_of(ids_T)
    return sum_TD, None

  blocks = in_blocks(ids_TK, V), in_blocks(weights_TK)
  return jax.lax.scan(add, jnp.zeros((ids_TK.shape[0], D)), blocks)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_here(V, rows_RD, ids_TK, weights_TK):
  D = rows_RD.shape[1]
  return sum_rows(lambda ids_T: gather(rows_RD, ids_T, V), V, D, ids_TK, weights_TK)


def _read_here_forward(V, rows_RD, ids_TK, weights_TK):
  return _read_here(V, rows_RD, ids_TK, weights_TK), (rows_RD, ids_TK)


def _read_here_backward(V, kept, g_TD):
  rows_RD, ids_TK = kept

  def dot(ids_bT):
    return jnp.einsum('btd,td->bt', gather(rows_RD, ids_bT, V), g_TD)

  dw_KT = jax.lax.map(dot, in_blocks(ids_TK, V)).reshape(-1, ids_TK.shape[0])
  return None, None, dw_KT[: ids_TK.shape[1]].T


_read_here.defvjp(_read_here_forward, _read_here_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(mesh, V, rows_RD, ids_TK, weights_TK):
  T, K = ids_TK.shape

  def shard(rows_RD, ids_TK, weights_TK):
    local_N = _local(_everywhere(ids_TK).reshape(-1), V, rows_RD.shape[0])
    weights_N = _everywhere(weights_TK).reshape(-1)

    def add(sum_TD, e):
      rows_MD = _rows(rows_RD, _take(local_N, e, rows_RD.shape[0]))
      w_M = _take(weights_N, e)
      return sum_TD.at[e // K].add(w_M[:, None] * rows_MD, mode='drop')

    own_N = local_N < rows_RD.shape[0]
    sum_TD = _in_rounds(own_N, _capacity(T * K, mesh), add, jnp.zeros((T, rows_RD.shape[1])))
    return _to_owners(sum_TD)

  over = (meshes.ROWS, meshes.BATCH, meshes.BATCH)
  return _on_shards(shard, mesh, over, meshes.BATCH)(rows_RD, ids_TK, weights_TK)


def _read_forward(mesh, V, rows_RD, ids_TK, weights_TK):
  return _read(mesh, V, rows_RD, ids_TK, weights_TK), (rows_RD, ids_TK)


def _read_backward(mesh, V, kept, g_TD):
  rows_RD, ids_TK = kept
  T, K = ids_TK.shape

  def shard(rows_RD, ids_TK, g_TD):
    local_N = _local(_everywhere(ids_TK).reshape(-1), V, rows_RD.shape[0])
    g_TD = _everywhere(g_TD)

    def add(dw_N, e):
      rows_MD = _rows(rows_RD, _take(local_N, e, rows_RD.shape[0]))
      return dw_N.at[e].set(jnp.sum(rows_MD * _take(g_TD, e // K), axis=-1), mode='drop')

    own_N = local_N < rows_RD.shape[0]
    dw_N = _in_rounds(own_N, _capacity(T * K, mesh), add, jnp.zeros(T * K))
    return _to_owners(dw_N.reshape(T, K))

  over = (meshes.ROWS, meshes.BATCH, meshes.BATCH)
  return None, None, _on_shards(shard, mesh, over, meshes.BATCH)(rows_RD, ids_TK, g_TD)


_read.defvjp(_read_forward, _read_backward)


def update(
  mesh: Mesh,
  V: int,
  tx: optax.GradientTransformation,
  table: Table,
  reads: list[Reads],
  factor: Float[Array, ''],
) -> tuple[Table, Float[Array, '']]:
  """Moves the touched rows of a table, each shard its own, duplicates summed exactly once.

  Args:
    mesh: of the tables. V: ids of the table. tx: as for `optimizers.update_rows`. table: to move.
    reads: all weighted reads of the step. factor: what the gradients are multiplied with.

  Returns:
    The table, and the squared norm of the rows' gradients before the factor.
  """
  moving = table._replace(reads_R=None, ever_R=None)
  specs = jax.tree.map(
    lambda x: meshes.ROWS if by_row(x, table.rows_RD.shape[0]) else meshes.REPLICATED, moving
  )

  def shard(table, reads, factor):
    R, D = table.rows_RD.shape
    reads = jax.tree.map(_everywhere, reads)
    K_N = [r.ids_TK.shape[1] for r in reads]
    local_N = _local(jnp.concatenate([r.ids_TK.reshape(-1) for r in reads]), V, R)
    weights_N = jnp.concatenate([r.weights_TK.reshape(-1) for r in reads])
    g_TD = jnp.concatenate([r.g_TD for r in reads])
    ends = [r.ids_TK.shape[0] for r in reads]
    t_N = jnp.concatenate(
      [
        sum(ends[:i]) + jnp.arange(T * K, dtype=jnp.int32) // K
        for i, (T, K) in enumerate(zip(ends, K_N, strict=True))
      ]
    )
    N = local_N.shape[0]
    capacity = _capacity(N, mesh)
    own_N = local_N < R

    # Equal ids share the rank of their row among the distinct rows of this shard.
    place_N = jnp.arange(N, dtype=jnp.int32)
    owner_N = owners(local_N, R)
    first_N = own_N & (owner_N == place_N)
    rank_N = (jnp.cumsum(first_N.astype(jnp.int32)) - 1)[owner_N]
    count = jnp.sum(first_N.astype(jnp.int32))

    def step(c, carry):
      table, squares = carry
      here_N = own_N & (rank_N // capacity == c)

      def add(grads_MD, e):
        to_M = _take(rank_N - c * capacity, e, capacity)
        g_MD = _take(weights_N, e)[:, None] * _take(g_TD, _take(t_N, e, g_TD.shape[0]))
        return grads_MD.at[to_M].add(g_MD, mode='drop')

      grads_MD = _in_rounds(here_N, capacity, add, jnp.zeros((capacity, D)))
      place_N = jnp.where(first_N & here_N, rank_N - c * capacity, capacity)
      ids_M = jnp.full(capacity, R, jnp.int32).at[place_N].set(local_N, mode='drop')
      moved = optimizers.update_rows(tx, table, RowGrads(ids_M, grads_MD * factor))
      # What has no entry for each row, such as a count of steps, moves once a step: below.
      moved = jax.tree.map(lambda old, new: new if by_row(new, R) else old, table, moved)
      return moved, squares + jnp.sum(jnp.square(grads_MD))

    rounds = (count + capacity - 1) // capacity
    table, squares = jax.lax.fori_loop(0, rounds, step, (table, jnp.zeros(())))
    # The rule applied to no row moves what is not of rows.
    empty = jax.tree.map(lambda x: x[:0] if by_row(x, R) else x, table.opt)
    _, moved = tx.update(jnp.zeros((0, D)), empty, jnp.zeros((0, D)))
    opt = jax.tree.map(lambda old, new: old if by_row(old, R) else new, table.opt, moved)
    return table._replace(opt=opt), jax.lax.psum(squares, ('data', 'model'))

  over = (specs, jax.tree.map(lambda _: meshes.BATCH, reads), meshes.REPLICATED)
  out = (specs, meshes.REPLICATED)
  # Reads of a batch fill its devices; those of a model's own, such as of all rows, need not.
  reads = [_filled(r, V, mesh.shape['data']) for r in reads]
  moved, squares = _on_shards(shard, mesh, over, out)(moving, reads, factor)
  return moved._replace(reads_R=table.reads_R, ever_R=table.ever_R), squares


def _on_shards(fn: Callable, mesh: Mesh, over: Any, out: Any) -> Callable:
  # The collectives inside make every result alike where its spec says so; the checker cannot see
  # that through a loop of unknown length.
  return jax.shard_map(fn, mesh=mesh, in_specs=over, out_specs=out, check_vma=False)


def _everywhere(x: Array) -> Array:
  """This device's share of a batch -> the whole batch."""
  return jax.lax.all_gather(x, 'data', tiled=True)


def _filled(reads: Reads, V: int, devices: int) -> Reads:
  """The reads, and as many of the padding as make their number one that `devices` divides."""
  more = -reads.ids_TK.shape[0] % devices
  return Reads(
    jnp.pad(reads.ids_TK, ((0, more), (0, 0)), constant_values=V),
    *(jnp.pad(x, ((0, more), (0, 0))) for x in (reads.weights_TK, reads.g_TD)),
  )


def _to_owners(x: Array) -> Array:
  """Every shard's part of a sum over the whole batch -> the sum, for this device's share of it."""
  return jax.lax.psum(jax.lax.psum_scatter(x, 'data', tiled=True), 'model')


def _local(ids_N, V, R):
  """Ids of the table -> rows of this shard; R for those of other shards and for padding."""
  shard = jax.lax.axis_index(('data', 'model'))
  local_N = ids_N - shard * R
  return jnp.where((ids_N < V) & (local_N >= 0) & (local_N < R), local_N, R)


def _take(x, index, fill=0):
  """Entries by index, `fill` past the end."""
  return x.at[index].get(mode='fill', fill_value=fill)


def _rows(rows_RD, index):
  """Rows by index as float32, whatever they are kept in; zeros past the end."""
  return _take(rows_RD, index).astype(jnp.float32)


def _capacity(N: int, mesh: Mesh) -> int:
  return min(N, -(-SLACK * N // mesh.size))


def _in_rounds(mine_N: Array, capacity: int, add: Callable, start: Array) -> Array:
  """`add(sum, e)` over the entries e that are mine, `capacity` at a time; the last round has Ns."""
  N = mine_N.shape[0]
  rank_N = jnp.cumsum(mine_N.astype(jnp.int32)) - 1

  def step(c, carry):
    place_N = jnp.where(mine_N & (rank_N // capacity == c), rank_N - c * capacity, capacity)
    e_M = (
      jnp.full(capacity, N, jnp.int32).at[place_N].set(jnp.arange(N, dtype=jnp.int32), mode='drop')
    )
    return add(carry, e_M)

  rounds = (rank_N[-1] + capacity) // capacity
  return jax.lax.fori_loop(0, rounds, step, start)
