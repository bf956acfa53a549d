"""Row-sharded tables, stored outside the Flax module and read by id.

Ids >= V read zeros and write nothing (V is the padding id). Negative ids would wrap around; the
data pipeline rejects them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmn_jax.distributed import block_sizes
from lmn_jax.tables.spec import TableSpec

# Rows are padded to a multiple of this and of the number of devices, so that common meshes share
# one shape.
ROW_MULTIPLE = 512


class Table(NamedTuple):
  """A table and the state of its optimizer.

  rows_RD: float32 or bfloat16 [R, D], R >= V: the rows that are read.
  master_RD: float32 [R, D], the weights that the optimizer updates if the rows are bfloat16; the
  rows are always their rounded values. None if the rows are updated themselves (float32) or never
  (frozen).
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
  """R, the rows of a table of V ids in memory: a multiple of ROW_MULTIPLE and of the devices."""
  multiple = math.lcm(ROW_MULTIPLE, devices)
  return -(-V // multiple) * multiple


def init(
  spec: TableSpec,
  key: Array,
  tx: optax.GradientTransformation,
  devices: int,
  dtype: Any = jnp.float32,
) -> Table:
  """Creates a table. Call it under `jit` with `out_shardings`, so that it is created sharded.

  Args:
    spec: rows, width, scale and group. key: PRNG key. tx: the optimizer of the rows. devices:
      number of devices of the mesh. dtype: of the rows, float32 or bfloat16.

  Returns:
    Table with rows ~ N(0, scale^2), of zeros for scale 0; the same values on every mesh.
  """
  R, D = padded_rows(spec.rows, devices), spec.width
  rows_RD = _normal(key, spec.scale, R, D, devices) if spec.scale else jnp.zeros((R, D))
  counters = (jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.bool)) if spec.count_reads else (None, None)
  rounded = dtype != jnp.float32 and spec.group != 'frozen'
  master_RD = rows_RD if rounded else None
  return Table(rows_RD.astype(dtype), master_RD, tx.init(rows_RD), *counters)


# Rows that a device draws at a time: the table fits in memory, a second copy of it may not.
ROWS_AT_ONCE = 1024


def _normal(key: Array, scale: float, R: int, D: int, devices: int) -> Float[Array, 'R D']:
  """Rows ~ N(0, scale^2). Each row has its own key, so the values do not depend on the mesh."""
  rows_each = R // devices
  M = math.gcd(rows_each, ROWS_AT_ONCE)
  first_S1 = rows_each * jnp.arange(devices, dtype=jnp.int32)[:, None]

  def row(i):
    return scale * jax.random.normal(jax.random.fold_in(key, i), (D,))

  def fill(c, rows_SOD):
    ids_SM = first_S1 + (c * M + jnp.arange(M, dtype=jnp.int32))[None]
    return jax.lax.dynamic_update_slice_in_dim(
      rows_SOD, jax.vmap(jax.vmap(row))(ids_SM), c * M, axis=1
    )

  # The axis of devices comes first, so that each device fills its own rows.
  rows_SOD = jax.lax.fori_loop(0, rows_each // M, fill, jnp.zeros((devices, rows_each, D)))
  return rows_SOD.reshape(R, D)


def by_row(leaf: Any, R: int) -> bool:
  """Whether a leaf of a table (an array or its shape) has one entry for each of R rows."""
  return leaf.ndim > 0 and leaf.shape[0] == R


def gather(rows_RD: Float[Array, 'R D'], ids: Int[Array, '...'], V: int) -> Array:
  """Returns rows by id: float32 [..., D]; zeros for ids >= V."""
  ids = jnp.where(ids < V, ids, rows_RD.shape[0])
  return rows_RD.at[ids].get(mode='fill', fill_value=0).astype(jnp.float32)


class RowGrads(NamedTuple):
  """Gradients of rows. ids_N: distinct ids, R where unused. grads_ND: summed gradient of each."""

  ids_N: Array
  grads_ND: Array


# Slots of the hash table in `owners` for each read: enough that few different ids collide.
PLACES_PER_READ = 8


def owners(ids_N: Int[Array, 'N'], R: int) -> Int[Array, 'N']:
  """Maps every read to one read of the same id (its owner), the same for all reads of that id.

  Every read writes its index into a hash table at the hash of its id; the highest index wins. A
  read that finds another id in its slot tries again with another hash. The cost depends on the
  number of reads and not on the size of the table. For 82 k ids on two CPU cores this takes 1 to
  4 ms and sorting the ids 19 ms (experiments/search_speed.py); an array of R integers would have
  to be cleared in every step.

  Args:
    ids_N: int32 [N]; ids >= R are ignored. R: rows of the table.

  Returns:
    int32 [N] in [0, N); ignored ids map to themselves.
  """
  N = ids_N.shape[0]
  place_N = jnp.arange(N, dtype=jnp.int32)
  bits = max(PLACES_PER_READ * N - 1, 1).bit_length()
  # Then an id is its own hash, and there are no collisions.
  direct = R <= max(2**bits, block_sizes.sizes().owner_rows)
  places = R if direct else 2**bits

  def hashed(turn):
    if direct:
      return ids_N
    # A multiplication by an odd number mixes towards the upper bits, so these are taken.
    x_N = (ids_N.astype(jnp.uint32) ^ (turn * jnp.uint32(0x85EBCA6B))) * jnp.uint32(0x9E3779B1)
    x_N = (x_N ^ (x_N >> 15)) * jnp.uint32(0xC2B2AE35)
    return (x_N >> (32 - bits)).astype(jnp.int32)

  def try_hash(carry):
    owner_N, open_N, turn = carry
    slot_N = jnp.where(open_N, hashed(turn), places)
    # max: the same read wins on every backend.
    winners = jnp.zeros(places, jnp.int32).at[slot_N].max(place_N, mode='drop')
    winner_N = winners.at[slot_N].get(mode='fill', fill_value=0)
    same_id_N = open_N & (ids_N[winner_N] == ids_N)
    return jnp.where(same_id_N, winner_N, owner_N), open_N & ~same_id_N, turn + 1

  start = (place_N, ids_N < R, jnp.zeros((), jnp.uint32))
  if direct:
    return try_hash(start)[0]
  return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), try_hash, start)[0]


def sum_duplicates(
  ids_N: Int[Array, 'N'], grads_ND: Float[Array, 'N D'], V: int, R: int
) -> RowGrads:
  """Sums the gradients of equal ids.

  Args:
    ids_N: int32 [N], padding >= V. grads_ND: gradient of each read. V: ids. R: rows in memory.

  Returns:
    RowGrads of min(N, R) entries. One entry of each set of equal ids has their sum; the other
    entries and those of padding have id R, which a scatter drops.
  """
  N = ids_N.shape[0]
  ids_N = jnp.where(ids_N < V, ids_N, R)
  if R <= N:  # one entry for each row of the table costs less than to find owners
    touched_R = jnp.zeros(R, bool).at[ids_N].set(True, mode='drop')
    sums_RD = jnp.zeros((R, grads_ND.shape[1])).at[ids_N].add(grads_ND, mode='drop')
    return RowGrads(jnp.where(touched_R, jnp.arange(R, dtype=jnp.int32), R), sums_RD)
  owner_N = owners(ids_N, R)
  distinct_N = jnp.where(owner_N == jnp.arange(N, dtype=jnp.int32), ids_N, R)
  # Padding reads zeros, but the gradient of its tap need not be zero.
  grads_ND = jnp.where((ids_N < R)[:, None], grads_ND, 0)
  return RowGrads(distinct_N, jax.ops.segment_sum(grads_ND, owner_N, num_segments=N))
