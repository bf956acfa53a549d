"""Pallas kernels (Triton, for a GPU) of weighted reads of rows, contestants of kernels.py.

    out_t = sum_k w_tk row[id_tk]          d w_tk = row[id_tk] . g_t          d row_i = sum w_tk g_t

They compute what tables/embedding_bag.py and reader.row_grads compute on one device. No array
[T, K, D] is in memory, except the result of the last: one row for each of the N = T K entries.
Ids >= V read zeros and write nothing; ids are not negative.

Lower-case sizes are of a block. Triton needs powers of two, so blocks are rounded up and masks cut
them to the arrays. `interpret` runs a kernel without a GPU, to test it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lmn_jax.tables.table import RowGrads, owners


class ReadBlocks(NamedTuple):
  """Sizes of `read` and `weight_grads`, powers of two.

  reads: t, reads of a program. rows: k, rows of a read that are gathered together; t k D numbers
  are in registers. warps: of a program.
  """

  reads: int = 4
  rows: int = 8
  warps: int = 4


class SegmentBlocks(NamedTuple):
  """Sizes of `row_grads_sorted`, powers of two.

  streams: s, runs of sorted entries that a program sums side by side. length: entries of a run.
  warps: of a program.
  """

  streams: int = 16
  length: int = 32
  warps: int = 4


class AtomicBlocks(NamedTuple):
  """Sizes of `row_grads_atomic`. length: entries that a program adds in turn. warps: of it."""

  length: int = 16
  warps: int = 1


def read(
  rows_RD: Array,
  ids_TK: Array,
  weights_TK: Array,
  V: int,
  blocks: ReadBlocks,
  interpret: bool,
) -> Array:
  """Returns `sum_k w_tk row[id_tk]`, float32 [T, D], summed in float32.

  Args:
    rows_RD: float32 or bfloat16. ids_TK: int32, padding >= V. weights_TK: float32. V: ids of the
      table. blocks: sizes. interpret: whether to run without a GPU.
  """
  T, D = ids_TK.shape[0], rows_RD.shape[1]
  return pl.pallas_call(
    functools.partial(_read, V, blocks),
    out_shape=jax.ShapeDtypeStruct((T, D), jnp.float32),
    grid=(pl.cdiv(T, blocks.reads),),
    compiler_params=triton.CompilerParams(num_warps=blocks.warps),
    interpret=interpret,
    name='weighted_read',
  )(rows_RD, ids_TK, weights_TK)


def _read(V, blocks, rows_ref, ids_ref, weights_ref, out_ref):
  K, d = ids_ref.shape[1], pl.next_power_of_2(rows_ref.shape[1])
  t_t = _places(blocks.reads)

  def add(block, sum_td):
    at = t_t[:, None], (block * blocks.rows + jnp.arange(blocks.rows))[None]
    rows_tkd = _rows(rows_ref, _load(ids_ref, at, V), V)
    return sum_td + jnp.sum(_load(weights_ref, at, 0)[:, :, None] * rows_tkd, axis=1)

  zeros_td = jnp.zeros((blocks.reads, d), jnp.float32)
  _store(out_ref, t_t, jax.lax.fori_loop(0, pl.cdiv(K, blocks.rows), add, zeros_td))


def weight_grads(
  rows_RD: Array,
  ids_TK: Array,
  g_TD: Array,
  V: int,
  blocks: ReadBlocks,
  interpret: bool,
) -> Array:
  """Returns `row[id_tk] . g_t`, float32 [T, K]; arguments as for `read`, g_TD: float32."""
  return pl.pallas_call(
    functools.partial(_weight_grads, V, blocks),
    out_shape=jax.ShapeDtypeStruct(ids_TK.shape, jnp.float32),
    grid=(pl.cdiv(ids_TK.shape[0], blocks.reads),),
    compiler_params=triton.CompilerParams(num_warps=blocks.warps),
    interpret=interpret,
    name='weight_grads',
  )(rows_RD, ids_TK, g_TD)


def _weight_grads(V, blocks, rows_ref, ids_ref, g_ref, dw_ref):
  t_t = _places(blocks.reads)
  g_td = _rows(g_ref, t_t, g_ref.shape[0])

  def dot(block, _):
    at = t_t[:, None], (block * blocks.rows + jnp.arange(blocks.rows))[None]
    rows_tkd = _rows(rows_ref, _load(ids_ref, at, V), V)
    dw_tk = jnp.sum(rows_tkd * g_td[:, None], axis=2)
    triton.store(dw_ref.at[at], dw_tk, mask=_inside(dw_ref, at))

  jax.lax.fori_loop(0, pl.cdiv(ids_ref.shape[1], blocks.rows), dot, None)


def row_grads_sorted(
  ids_TK: Array,
  weights_TK: Array,
  g_TD: Array,
  V: int,
  R: int,
  blocks: SegmentBlocks,
  interpret: bool,
) -> RowGrads:
  """Returns the summed gradient of each distinct row; the same bits in every run.

  XLA sorts the entries by id. A program sums runs of sorted entries and stores each sum where its
  id ends. The rest of a run whose last id goes on in the next run is added there by XLA.

  Args:
    ids_TK: int32, padding >= V. weights_TK, g_TD: float32. V: ids of the table. R: its rows in
      memory. blocks: sizes. interpret: whether to run without a GPU.

  Returns:
    RowGrads of N = T K entries; those without a sum have id R and zeros.
  """
  (K, D), N = (ids_TK.shape[1], g_TD.shape[1]), ids_TK.size
  ids_N = jnp.where(ids_TK < V, ids_TK, R).reshape(-1)
  ids_N, entry_N = jax.lax.sort_key_val(ids_N, jnp.arange(N, dtype=jnp.int32))
  programs = pl.cdiv(N, blocks.streams * blocks.length)
  S = programs * blocks.streams
  sums_ND, rest_SD, rest_at_S = pl.pallas_call(
    functools.partial(_sum_segments, V, K, blocks),
    out_shape=(
      jax.ShapeDtypeStruct((N, D), jnp.float32),
      jax.ShapeDtypeStruct((S, D), jnp.float32),
      jax.ShapeDtypeStruct((S,), jnp.int32),
    ),
    grid=(programs,),
    compiler_params=triton.CompilerParams(num_warps=blocks.warps),
    interpret=interpret,
    name='sum_segments',
  )(ids_N, entry_N, weights_TK.reshape(-1), g_TD)
  sums_ND = sums_ND.at[rest_at_S].add(rest_SD, mode='drop')
  ends_N = jnp.append(ids_N[1:] != ids_N[:-1], True)
  return RowGrads(jnp.where(ends_N, ids_N, R), sums_ND)


def _sum_segments(
  V, K, blocks, ids_ref, entry_ref, weights_ref, g_ref, sums_ref, rest_ref, rest_at_ref
):
  N, d = ids_ref.shape[0], pl.next_power_of_2(g_ref.shape[1])
  stream_s = _places(blocks.streams)
  first_s = stream_s * blocks.length

  def add(i, sum_sd):
    n_s = first_s + i
    id_s, next_s = _load(ids_ref, (n_s,), V), _load(ids_ref, (n_s + 1,), -1)
    entry_s = _load(entry_ref, (n_s,), 0)
    t_s = jnp.where(id_s < V, entry_s // K, g_ref.shape[0])
    weight_s = _load(weights_ref, (entry_s,), 0)
    sum_sd = sum_sd + weight_s[:, None] * _rows(g_ref, t_s, g_ref.shape[0])
    ends_s1 = (id_s != next_s)[:, None]
    _store(sums_ref, n_s, jnp.where(ends_s1, sum_sd, 0))
    return jnp.where(ends_s1, 0, sum_sd)

  zeros_sd = jnp.zeros((blocks.streams, d), jnp.float32)
  _store(rest_ref, stream_s, jax.lax.fori_loop(0, blocks.length, add, zeros_sd))
  last_s = first_s + blocks.length - 1
  id_s, next_s = _load(ids_ref, (last_s,), V), _load(ids_ref, (last_s + 1,), -1)
  rest_at_s = jnp.where((id_s < V) & (id_s == next_s), _end(ids_ref, last_s, id_s), N)
  triton.store(rest_at_ref.at[stream_s], rest_at_s)


def _end(ids_ref, last_s, id_s):
  """Returns the last place of an id in sorted ids, by binary search from a place that has it."""
  N = ids_ref.shape[0]

  def halve(_, bounds):
    low_s, high_s = bounds  # ids up to low are at most id; ids from high on are larger
    middle_s = (low_s + high_s) // 2
    same_s = _load(ids_ref, (middle_s,), jnp.iinfo(jnp.int32).max) <= id_s
    return jnp.where(same_s, middle_s, low_s), jnp.where(same_s, high_s, middle_s)

  return jax.lax.fori_loop(0, N.bit_length(), halve, (last_s, jnp.full_like(last_s, N)))[0]


def row_grads_atomic(
  ids_TK: Array,
  weights_TK: Array,
  g_TD: Array,
  V: int,
  R: int,
  blocks: AtomicBlocks,
  interpret: bool,
) -> RowGrads:
  """Returns what `row_grads_sorted` returns, by atomic additions to the row of each id's owner.

  XLA finds the owners (table.owners). The order of the additions, and so the rounding, differs from
  run to run. D must be a power of two. Arguments and result as for `row_grads_sorted`.
  """
  K, N = ids_TK.shape[1], ids_TK.size
  ids_N = jnp.where(ids_TK < V, ids_TK, R).reshape(-1)
  owner_N = owners(ids_N, R)
  place_N = jnp.arange(N, dtype=jnp.int32)
  # Entries of padding add zero to themselves.
  weights_N = jnp.where(ids_N < R, weights_TK.reshape(-1), 0)
  more = -N % blocks.length
  zeros_ND = jnp.zeros((N, g_TD.shape[1]), jnp.float32)
  sums_ND = pl.pallas_call(
    functools.partial(_add_entries, K, blocks.length),
    out_shape=jax.ShapeDtypeStruct(zeros_ND.shape, jnp.float32),
    grid=((N + more) // blocks.length,),
    input_output_aliases={3: 0},
    compiler_params=triton.CompilerParams(num_warps=blocks.warps),
    interpret=interpret,
    name='add_entries',
  )(jnp.pad(owner_N, (0, more)), jnp.pad(weights_N, (0, more)), g_TD, zeros_ND)
  return RowGrads(jnp.where(owner_N == place_N, ids_N, R), sums_ND)


def _add_entries(K, length, owner_ref, weights_ref, g_ref, zeros_ref, sums_ref):
  del zeros_ref  # the same memory as sums_ref
  T, D = g_ref.shape
  first = pl.program_id(0) * length

  def add(i, _):
    n = first + i
    g_D = g_ref[jnp.minimum(n // K, T - 1), :]
    triton.atomic_add(sums_ref, (owner_ref[n], pl.ds(0, D)), weights_ref[n] * g_D)

  jax.lax.fori_loop(0, length, add, None)


def _places(count: int) -> Array:
  """Returns the indices of this program's `count` reads or streams."""
  return pl.program_id(0) * count + jnp.arange(count)


def _inside(ref: Any, at: tuple[Array, ...]) -> Array:
  inside = [index < size for index, size in zip(at, ref.shape, strict=True)]
  return functools.reduce(jnp.logical_and, inside)


def _load(ref: Any, at: tuple[Array, ...], fill: int) -> Array:
  """Returns the numbers at some indices, `fill` past the end."""
  return triton.load(ref.at[at], mask=_inside(ref, at), other=fill)


def _columns(ndim: int, D: int) -> Array:
  shape = (*[1] * ndim, pl.next_power_of_2(D))
  return jax.lax.broadcasted_iota(jnp.int32, shape, ndim)


def _rows(ref: Any, ids: Array, V: int) -> Array:
  """Returns rows by id in float32, zeros for ids >= V and in the columns from D on."""
  at = ids[..., None], _columns(ids.ndim, ref.shape[1])
  mask = (at[0] < V) & (at[1] < ref.shape[1])
  return triton.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def _store(ref: Any, places_n: Array, rows_nd: Array) -> None:
  """Stores rows, without those past the end."""
  at = places_n[:, None], _columns(1, ref.shape[1])
  triton.store(ref.at[at], rows_nd, mask=_inside(ref, at))
