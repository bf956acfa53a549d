"""Row-sharded tables: rows live beside the module and are read by id.

Ids at or past V read zeros and write nothing (V is the padding id); negative ids would wrap, so
they are refused where data enters.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmn_jax.tables.spec import TableSpec

# Rows are padded to a multiple of this and of the devices: one shape on every common mesh.
ROW_MULTIPLE = 512


class Table(NamedTuple):
  """rows_RD: float32 or bfloat16 [R, D], R >= V: what is read.

  master_RD: float32 [R, D], what the optimizer moves where the rows are bfloat16, always their
  roundings; None where the rows themselves move (float32) or nothing does (frozen).
  opt: the optimizer's state, leaves [R, ...] or scalars.
  reads_R: int32, reads of each row since the last evaluation, or None if they are not counted.
  ever_R: bool, whether the row was ever read, or None.
  """

  rows_RD: Array
  master_RD: Array | None
  opt: Any
  reads_R: Array | None
  ever_R: Array | None


def padded_rows(V: int, devices: int) -> int:
  """R, the rows a table of V ids has in memory: a multiple of ROW_MULTIPLE and of the devices."""
  multiple = math.lcm(ROW_MULTIPLE, devices)
  return -(-V // multiple) * multiple


def init(
  spec: TableSpec,
  key: Array,
  tx: optax.GradientTransformation,
  devices: int,
  dtype: Any = jnp.float32,
) -> Table:
  """A fresh table; call it under `jit` with `out_shardings` so that it is born sharded.

  Args:
    spec: rows, width, scale and group. key: PRNG key. tx: the rows' optimizer. devices: of the
      mesh. dtype: of the rows, float32 or bfloat16.

  Returns:
    Table with rows ~ N(0, scale^2); the same values on every mesh.
  """
  R = padded_rows(spec.rows, devices)
  rows_RD = _normal(key, spec.scale, R, spec.width, devices)
  counters = (jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.bool)) if spec.count_reads else (None, None)
  rounded = dtype != jnp.float32 and spec.group != 'frozen'
  master_RD = rows_RD if rounded else None
  return Table(rows_RD.astype(dtype), master_RD, tx.init(rows_RD), *counters)


# Rows that a device makes at a time: a table twice over does not fit where it fits once.
ROWS_AT_ONCE = 1024


def _normal(key: Array, scale: float, R: int, D: int, devices: int) -> Float[Array, 'R D']:
  """Rows ~ N(0, scale^2), each of its own key: the same on every mesh, however they are made."""
  own = R // devices
  M = math.gcd(own, ROWS_AT_ONCE)
  first_S1 = own * jnp.arange(devices, dtype=jnp.int32)[:, None]

  def row(i):
    return scale * jax.random.normal(jax.random.fold_in(key, i), (D,))

  def fill(c, rows_SOD):
    ids_SM = first_S1 + (c * M + jnp.arange(M, dtype=jnp.int32))[None]
    return jax.lax.dynamic_update_slice_in_dim(
      rows_SOD, jax.vmap(jax.vmap(row))(ids_SM), c * M, axis=1
    )

  # The axis of devices comes first, so that each fills its own rows.
  return jax.lax.fori_loop(0, own // M, fill, jnp.zeros((devices, own, D))).reshape(R, D)


def by_row(leaf: Any, R: int) -> bool:
  """Whether a leaf of a table, or its shape, has one entry for each of R rows."""
  return leaf.ndim > 0 and leaf.shape[0] == R


def gather(rows_RD: Float[Array, 'R D'], ids: Int[Array, '...'], V: int) -> Array:
  """Rows by id: float32 [..., D]; zeros for ids >= V."""
  ids = jnp.where(ids < V, ids, rows_RD.shape[0])
  return rows_RD.at[ids].get(mode='fill', fill_value=0).astype(jnp.float32)


class RowGrads(NamedTuple):
  """ids_N: distinct ids, R where unused. grads_ND: the summed gradient of each."""

  ids_N: Array
  grads_ND: Array


# Places for each read in the array where equal ids meet: few ids meet another one there.
PLACES_PER_READ = 8


def owners(ids_N: Int[Array, 'N'], R: int) -> Int[Array, 'N']:
  """For every read one of the reads of the same id, the same for all of them.

  Every read signs a place of an array that its id is hashed to, and the last signature stands;
  who finds another id's there tries again with another hash. So it costs what is read, whatever
  the table's size. Sorting the ids takes 19 ms where this takes 1 to 4, for 82 k ids on two CPU
  cores (experiments/search_speed.py), and an array of R integers must be cleared in every step.

  Args:
    ids_N: int32 [N]; R and above are nobody's. R: ids are below.

  Returns:
    int32 [N] in [0, N); a read of nobody's owns itself.
  """
  N = ids_N.shape[0]
  place_N = jnp.arange(N, dtype=jnp.int32)
  bits = max(PLACES_PER_READ * N - 1, 1).bit_length()
  direct = R <= 2**bits  # then an id is its own hash, and none meets another

  def hashed(turn):
    if direct:
      return ids_N
    # Multiplications by odd numbers mix upwards, so the upper bits are taken.
    x_N = (ids_N.astype(jnp.uint32) ^ (turn * jnp.uint32(0x85EBCA6B))) * jnp.uint32(0x9E3779B1)
    x_N = (x_N ^ (x_N >> 15)) * jnp.uint32(0xC2B2AE35)
    return (x_N >> (32 - bits)).astype(jnp.int32)

  def look(carry):
    owner_N, open_N, turn = carry
    at_N = jnp.where(open_N, hashed(turn), 2**bits)
    # max: the same signature stands on every backend.
    signed = jnp.zeros(2**bits, jnp.int32).at[at_N].max(place_N, mode='drop')
    found_N = signed.at[at_N].get(mode='fill', fill_value=0)
    mine_N = open_N & (ids_N[found_N] == ids_N)
    return jnp.where(mine_N, found_N, owner_N), open_N & ~mine_N, turn + 1

  start = (place_N, ids_N < R, jnp.zeros((), jnp.uint32))
  if direct:
    return look(start)[0]
  return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), look, start)[0]


def sum_duplicates(
  ids_N: Int[Array, 'N'], grads_ND: Float[Array, 'N D'], V: int, R: int
) -> RowGrads:
  """Sums the gradients of equal ids, each exactly once.

  Args:
    ids_N: int32 [N], padding >= V. grads_ND: gradient of each read. V: ids. R: rows in memory.

  Returns:
    RowGrads of min(N, R) entries; one entry of each set of equal ids carries their sum, the others
    have id R, which a scatter drops, as have the padding's.
  """
  N = ids_N.shape[0]
  ids_N = jnp.where(ids_N < V, ids_N, R)
  if R <= N:  # less than to find owners: a place for each row, and none of them twice
    touched_R = jnp.zeros(R, bool).at[ids_N].set(True, mode='drop')
    sums_RD = jnp.zeros((R, grads_ND.shape[1])).at[ids_N].add(grads_ND, mode='drop')
    return RowGrads(jnp.where(touched_R, jnp.arange(R, dtype=jnp.int32), R), sums_RD)
  owner_N = owners(ids_N, R)
  own_N = jnp.where(owner_N == jnp.arange(N, dtype=jnp.int32), ids_N, R)
  # Padding reads zeros, but what its tap is multiplied with need not be zero.
  grads_ND = jnp.where((ids_N < R)[:, None], grads_ND, 0)
  return RowGrads(own_N, jax.ops.segment_sum(grads_ND, owner_N, num_segments=N))
