"""The cases of kernels.py: sizes, arguments, and contestants that compute the same.

Each task has the path of the library as it is, other forms of it in XLA, and kernels. A contestant
is a function of (constant, batch); batches are stacked, so that each step reads other rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernel_reads
import kernel_sam
import optax
from jax import Array

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.target_attention import TargetAttention, Unit
from lmn_jax.tables import embedding_bag, optimizers, reader
from lmn_jax.tables.embedding_bag import Reads
from lmn_jax.tables.table import RowGrads, Table, gather, owners

PASSES = 3  # of SAM


class Blocks(NamedTuple):
  """Sizes of the kernels."""

  read: kernel_reads.ReadBlocks = kernel_reads.ReadBlocks()
  segment: kernel_reads.SegmentBlocks = kernel_reads.SegmentBlocks()
  atomic: kernel_reads.AtomicBlocks = kernel_reads.AtomicBlocks()
  sam: kernel_sam.PassBlocks = kernel_sam.PassBlocks()


# A few sizes of each kernel, for --sweep.
SWEEP = {
  'read': [kernel_reads.ReadBlocks(*x) for x in (
    (1, 32, 1), (1, 32, 4), (8, 4, 4), (16, 1, 4), (2, 16, 4), (8, 8, 8),
  )],
  'segment': [kernel_reads.SegmentBlocks(*x) for x in (
    (8, 16, 4), (8, 32, 2), (16, 16, 4), (32, 32, 8), (4, 64, 1),
  )],
  'atomic': [kernel_reads.AtomicBlocks(*x) for x in ((4, 1), (32, 1), (64, 1))],
  'sam': [kernel_sam.PassBlocks(*x) for x in (
    (32, 1, 4), (32, 1, 2), (32, 4, 4), (64, 4, 4), (128, 1, 8), (64, 1, 4, False),
  )],
}  # fmt: skip


class Reading(NamedTuple):
  """Sizes of a weighted read. power: ids are R u^power, u uniform in [0, 1): 1 for all alike."""

  T: int
  K: int
  D: int
  R: int
  dtype: str = 'float32'
  power: int = 1


class History(NamedTuple):
  """Sizes of SAM: examples, positions, width, hidden width."""

  B: int
  L: int
  D: int
  H: int
  dtype: str = 'float32'


class Case(NamedTuple):
  """A task at a size.

  counted: what `count`, the work of a step, counts. bytes: least traffic of a step.
  make: returns (constant, stacked batches). stateful: whether a contestant returns the constant of
  the next step. contestants: by name, the library first; kernels, by name, their blocks.
  """

  task: str
  sizes: Reading | History
  counted: str
  count: int
  bytes: int
  make: Callable[[int], tuple[Any, Any]]
  contestants: dict[str, Callable[[Any, Any], Any]]
  blocks: dict[str, tuple]
  stateful: bool = False


def make_reads(sizes: Reading, steps: int) -> tuple[Array, Reads]:
  """Returns rows [R, D], and reads of some steps; the first read of each is padding."""
  T, K, D, R, dtype, power = sizes
  keys = jax.random.split(jax.random.key(0), 3)
  ids = (R * jax.random.uniform(keys[0], (steps, T, K)) ** power).astype(jnp.int32)
  weights, g = (
    jax.random.normal(key, (steps, T, n)) for key, n in zip(keys[1:], (K, D), strict=True)
  )
  # Cheap numbers of order 1: drawing 2^31 of them would take longer than the measurement.
  row_R1 = jnp.cos(jnp.arange(R, dtype=jnp.float32))[:, None]
  rows_RD = (row_R1 + jnp.arange(D, dtype=jnp.float32)[None] / D).astype(dtype)
  return rows_RD, Reads(jnp.minimum(ids, R - 1).at[:, 0].set(R), weights, g)


def read_in_blocks(rows_RD: Array, reads: Reads, block: int, clip: bool) -> Array:
  """Returns `sum_k w_tk row[id_tk]`, `block` rows of a read at a time.

  Args:
    clip: reads row R - 1 with weight 0 for padding, instead of zeros: XLA on a GPU computes the
      masks of zeros in a kernel for each k.
  """
  (T, K), (R, D) = reads.ids_TK.shape, rows_RD.shape
  ids_KT, weights_KT = reads.ids_TK.T, reads.weights_TK.T
  if clip:
    weights_KT = jnp.where(ids_KT < R, weights_KT, 0)
    ids_KT = jnp.minimum(ids_KT, R - 1)

  def rows_of(ids_T):
    if clip:
      return rows_RD.at[ids_T].get(mode='promise_in_bounds').astype(jnp.float32)
    return gather(rows_RD, ids_T, R)

  def add(sum_TD, block):
    for ids_T, weights_T in zip(*block, strict=True):
      sum_TD += weights_T[:, None] * rows_of(ids_T)
    return sum_TD, None

  split = K // block, block, T
  blocks = ids_KT.reshape(split), weights_KT.reshape(split)
  return jax.lax.scan(add, jnp.zeros((T, D)), blocks)[0]


def weight_grads_whole(rows_RD: Array, reads: Reads) -> Array:
  """Returns `row[id_tk] . g_t` of all k in one expression, whose rows XLA does not store."""
  return jnp.einsum('tkd,td->tk', gather(rows_RD, reads.ids_TK, rows_RD.shape[0]), reads.g_TD)


def row_grads_by_sort(reads: Reads, R: int) -> RowGrads:
  """Sorts the entries by id, then adds them with sorted indices."""
  K, N = reads.ids_TK.shape[1], reads.ids_TK.size
  place_N = jnp.arange(N, dtype=jnp.int32)
  ids_N, entry_N = jax.lax.sort_key_val(jnp.minimum(reads.ids_TK, R).reshape(-1), place_N)
  first_N = jnp.append(True, ids_N[1:] != ids_N[:-1])
  rank_N = jnp.cumsum(first_N.astype(jnp.int32)) - 1
  weights_N = jnp.where(ids_N < R, reads.weights_TK.reshape(-1)[entry_N], 0)
  g_ND = weights_N[:, None] * reads.g_TD[entry_N // K]
  sums_ND = jax.ops.segment_sum(g_ND, rank_N, num_segments=N, indices_are_sorted=True)
  return RowGrads(jnp.full(N, R, jnp.int32).at[rank_N].set(ids_N), sums_ND)


def row_grads_by_owner(reads: Reads, R: int) -> RowGrads:
  """Adds the K entries of all reads in turn to the rows of their owners (table.owners)."""
  (T, K), N = reads.ids_TK.shape, reads.ids_TK.size
  ids_N = jnp.minimum(reads.ids_TK, R).reshape(-1)
  owner_N = owners(ids_N, R)
  weights_TK = jnp.where(reads.ids_TK < R, reads.weights_TK, 0)

  def add(sums_ND, k):
    owner_T, weights_T = k
    return sums_ND.at[owner_T].add(weights_T[:, None] * reads.g_TD), None

  zeros_ND = jnp.zeros((N, reads.g_TD.shape[1]))
  sums_ND = jax.lax.scan(add, zeros_ND, (owner_N.reshape(T, K).T, weights_TK.T))[0]
  return RowGrads(jnp.where(owner_N == jnp.arange(N, dtype=jnp.int32), ids_N, R), sums_ND)


class Forms(NamedTuple):
  """A form of each part of a step: read(rows, reads), weights(rows, reads), rows(reads, R)."""

  read: Callable[[Array, Reads], Array]
  weights: Callable[[Array, Reads], Array]
  rows: Callable[[Reads, int], RowGrads]


def forms(sizes: Reading, blocks: Blocks, interpret: bool) -> dict[str, Forms]:
  """Returns the library, the best of XLA so far by the number of launches, and the kernels."""
  V, mesh = sizes.R, meshes.make_mesh(1, jax.devices()[:1])

  def library_read(rows_RD, reads):
    return embedding_bag.read(mesh, V, rows_RD, reads.ids_TK, reads.weights_TK)

  def library_weights(rows_RD, reads):
    pull = jax.vjp(lambda w: library_read(rows_RD, reads._replace(weights_TK=w)), reads.weights_TK)
    return pull[1](reads.g_TD)[0]

  def kernel_read(rows_RD, reads):
    return kernel_reads.read(rows_RD, *reads[:2], V, blocks.read, interpret)

  def kernel_weights(rows_RD, reads):
    return kernel_reads.weight_grads(rows_RD, reads.ids_TK, reads.g_TD, V, blocks.read, interpret)

  def kernel_rows(reads, R):
    return kernel_reads.row_grads_sorted(*reads, V, R, blocks.segment, interpret)

  def library_rows(reads, R):
    return reader.row_grads([reads], V, R)

  whole = functools.partial(read_in_blocks, block=sizes.K, clip=True)
  return {
    'library': Forms(library_read, library_weights, library_rows),
    'xla': Forms(whole, weight_grads_whole, library_rows),
    'kernels': Forms(kernel_read, kernel_weights, kernel_rows),
  }


class Options(NamedTuple):
  """blocks: of the kernels. interpret: whether there is no GPU. variants: whether to add the forms
  in XLA that decide the blocks of the library. sweep: whether to add SWEEP."""

  blocks: Blocks
  interpret: bool
  variants: bool = True
  sweep: bool = False

  def sizes(self, kernel: str) -> list[tuple]:
    """The sizes of a kernel's blocks that take part."""
    return [getattr(self.blocks, kernel), *(SWEEP[kernel] if self.sweep else ())]


def read_case(sizes: Reading, options: Options) -> Case:
  def kernel(read_blocks):
    blocks = options.blocks._replace(read=read_blocks)
    return forms(sizes, blocks, options.interpret)['kernels'].read

  contestants = {'library': forms(sizes, options.blocks, options.interpret)['library'].read}
  tried = [(block, clip) for block in (8, 16, 32) for clip in (False, True) if block < sizes.K]
  for block, clip in (*(tried if options.variants else ()), (sizes.K, True)):
    name = f'xla {"clip" if clip else "fill"} {block}'
    contestants[name] = functools.partial(read_in_blocks, block=block, clip=clip)
  return _with_kernels('read', sizes, contestants, kernel, options)


def weights_case(sizes: Reading, options: Options) -> Case:
  def kernel(read_blocks):
    blocks = options.blocks._replace(read=read_blocks)
    return forms(sizes, blocks, options.interpret)['kernels'].weights

  contestants = {
    'library': forms(sizes, options.blocks, options.interpret)['library'].weights,
    'xla whole': weight_grads_whole,
  }
  return _with_kernels('weights', sizes, contestants, kernel, options)


def _with_kernels(task, sizes, contestants, kernel, options):
  T, K, D, _, dtype, _ = sizes
  kernels = {f'kernel {tuple(b)}': b for b in options.sizes('read')}
  traffic = T * K * (D * jnp.dtype(dtype).itemsize + 8) + 4 * T * D
  contestants |= {name: kernel(b) for name, b in kernels.items()}
  make = functools.partial(make_reads, sizes)
  return Case(task, sizes, 'rows', T * K, traffic, make, contestants, kernels)


def rows_case(sizes: Reading, options: Options) -> Case:
  T, K, D, R, _, _ = sizes
  tried = {'segment': kernel_reads.row_grads_sorted, 'atomic': kernel_reads.row_grads_atomic}
  kernels = {
    f'kernel {name} {tuple(b)}': (kernel, b)
    for name, kernel in tried.items()
    for b in options.sizes(name)
  }

  def by(kernel, b):
    return lambda rows_RD, reads: kernel(*reads, R, R, b, options.interpret)

  library = forms(sizes, options.blocks, options.interpret)['library'].rows
  variants = {
    'xla sort': lambda rows_RD, reads: row_grads_by_sort(reads, R),
    'xla owner by k': lambda rows_RD, reads: row_grads_by_owner(reads, R),
  }
  contestants = {'library': lambda rows_RD, reads: library(reads, R)}
  contestants |= variants if options.variants else {}
  contestants |= {name: by(*kernel) for name, kernel in kernels.items()}
  traffic = T * K * (4 * D + 8) + 4 * T * D
  make = functools.partial(make_reads, sizes._replace(dtype='float32'))
  named = {name: b for name, (_, b) in kernels.items()}
  return Case('rows', sizes, 'rows', T * K, traffic, make, contestants, named)


def step_case(sizes: Reading, options: Options) -> Case:
  """Read, gradients, and Adam on the rows: the memory's part of a step of training.

  Least traffic of a row: read forward and for the weights, then row and moments read and written.
  """
  (T, K, D, R, _, _), blocks = sizes, options.blocks
  tx = optax.chain(optimizers.scale_by_lazy_adam(), optax.scale(-1e-3))

  def step(form):
    def run(table, reads):
      out_TD = form.read(table.rows_RD, reads)
      dw_TK = form.weights(table.rows_RD, reads)
      # So both results are needed, as in a model, and the reads precede the first update.
      g_TD, weights_TK = reads.g_TD + 0 * out_TD, reads.weights_TK + 0 * dw_TK
      grads = form.rows(Reads(reads.ids_TK, weights_TK, g_TD), R)
      return optimizers.update_rows(tx, table, grads)

    return run

  def make(steps):
    rows_RD, reads = make_reads(sizes, steps)
    return Table(rows_RD, None, tx.init(rows_RD), None, None), reads

  tried = forms(sizes, blocks, options.interpret)
  contestants = {name: step(form) for name, form in tried.items()}
  named = {'kernels': (*blocks.read, *blocks.segment)}
  traffic = T * K * 4 * D * (2 + 2 * 3)
  return Case('step', sizes, 'rows', T * K, traffic, make, contestants, named, stateful=True)


class Sam(NamedTuple):
  """v_BLD, mask_BL: the history. units: of the passes."""

  v_BLD: Array
  mask_BL: Array
  units: list[Unit]


def sam_case(sizes: History, options: Options) -> Case:
  """The gradient of PASSES passes, m <- m + p, with respect to history, queries and units.

  Least traffic: forward each pass reads the history; backward it reads the history and its
  gradient, and writes the gradient.
  """
  kernels = {f'kernel {tuple(b)}': b for b in options.sizes('sam')}

  def by(b):
    return lambda v, mask, q, m, unit: kernel_sam.sam_pass(
      v, mask, q, m, unit, b, options.interpret
    )

  def gradient(one_pass):
    def loss(floats, mask_BL):
      v_BLD, q_BD, units = floats
      m_BD, total = q_BD, 0.0
      for unit in units:
        p_BD, w_BL, v_BLD = one_pass(v_BLD, mask_BL, q_BD, m_BD, unit)
        m_BD = m_BD + p_BD
        total += jnp.mean(jnp.square(w_BL.astype(jnp.float32)))
      return total + jnp.mean(jnp.square(m_BD.astype(jnp.float32)))

    return lambda sam, q_BD: jax.grad(loss)((sam.v_BLD, q_BD, sam.units), sam.mask_BL)

  passes = {'library': library_pass, 'xla whole': whole_pass}
  passes |= {name: by(b) for name, b in kernels.items()}
  contestants = {name: gradient(one_pass) for name, one_pass in passes.items()}
  B, L, D, _, dtype = sizes
  traffic = 4 * PASSES * B * L * D * jnp.dtype(dtype).itemsize
  make = functools.partial(make_sam, sizes)
  return Case('sam', sizes, 'examples', B, traffic, make, contestants, kernels)


def make_sam(sizes: History, steps: int) -> tuple[Sam, Array]:
  B, L, D, H, dtype = sizes

  def normal(key, *shape, scale=1.0):
    return (scale * jax.random.normal(jax.random.key(key), shape)).astype(dtype)

  def unit(key):
    scale = (4 * D) ** -0.5
    w1_4DH = normal(key, 4 * D, H, scale=scale)
    return Unit(
      w1_4DH, normal(key + 1, H), normal(key + 2, H, 1, scale=H**-0.5), normal(key + 3, 1)
    )

  units = [unit(4 * k + 2) for k in range(PASSES)]
  return Sam(normal(0, B, L, D), jnp.ones((B, L), jnp.bool), units), normal(1, steps, B, D)


def library_pass(v_BLD, mask_BL, q_BD, m_BD, unit):
  second = {'kernel': unit.w2_H1, 'bias': unit.b2_1}
  params = {'w1': unit.w1_4DH, 'b1': unit.b1_H, 'Dense_0': second}
  module = TargetAttention(unit.b1_H.size, gate='sigmoid', dtype=v_BLD.dtype)
  inputs = q_BD[:, None], v_BLD, mask_BL, m_BD[:, None]
  p_BQD, w_BLQ, v_BLD = module.apply({'params': params}, *inputs)
  return p_BQD[:, 0], w_BLQ[:, :, 0], v_BLD


def whole_pass(v_BLD, mask_BL, q_BD, m_BD, unit):
  """A pass without blocks, with the gradient of autodiff."""
  mix_BDH, term_BH = kernel_sam.mixed(q_BD, m_BD, unit)
  hidden_BLH = jax.nn.sigmoid(jnp.einsum('bld,bdh->blh', v_BLD, mix_BDH) + term_BH[:, None])
  a_BL = jnp.einsum('blh,h->bl', hidden_BLH, unit.w2_H1[:, 0]) + unit.b2_1[None]
  w_BL = jnp.where(mask_BL, jax.nn.sigmoid(a_BL), 0)
  return jnp.einsum('bl,bld->bd', w_BL, v_BLD), w_BL, v_BLD
