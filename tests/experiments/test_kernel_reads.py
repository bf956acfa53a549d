"""The kernels of weighted reads compute what the library computes, run by Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.tables import embedding_bag, reader
from lmn_jax.tables.embedding_bag import Reads
from tests.runs import load_experiment, mesh_of

kernel_reads = load_experiment('kernel_reads')

# T, K, D, V, R: no size divides a block; few ids, so that sums span blocks; one read of one row.
SIZES = [(13, 5, 12, 30, 512), (37, 32, 16, 3, 512), (1, 1, 64, 1000, 1024)]
BLOCKS = kernel_reads.ReadBlocks(reads=4, rows=4, warps=1)
SEGMENTS = kernel_reads.SegmentBlocks(streams=2, length=4, warps=1)


def arguments(T, K, D, V, R, dtype=jnp.float32):
  """Rows, and reads of which some are padding."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  ids_TK = jnp.asarray(rng.integers(0, V + 2, (T, K)), jnp.int32)
  return normal(R, D).astype(dtype), Reads(ids_TK, normal(T, K), normal(T, D))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('sizes', SIZES)
def test_the_read_and_the_gradient_of_its_weights(sizes, dtype):
  """The rows are converted to float32, so bfloat16 has the same tolerance."""
  V = sizes[3]
  rows_RD, (ids_TK, weights_TK, g_TD) = arguments(*sizes, dtype)

  @jax.jit
  def library(weights_TK):
    out_TD, pull = jax.vjp(
      lambda weights: embedding_bag.read(mesh_of(1), V, rows_RD, ids_TK, weights), weights_TK
    )
    return out_TD, pull(g_TD)[0]

  expected_TD, expected_TK = library(weights_TK)
  out_TD = kernel_reads.read(rows_RD, ids_TK, weights_TK, V, BLOCKS, interpret=True)
  np.testing.assert_allclose(out_TD, expected_TD, atol=1e-5)
  dw_TK = kernel_reads.weight_grads(rows_RD, ids_TK, g_TD, V, BLOCKS, interpret=True)
  np.testing.assert_allclose(dw_TK, expected_TK, atol=1e-5)


def dense(grads, R):
  """The gradients as an array of all rows; fails if a row has two of them."""
  used = np.asarray(grads.ids_N)[np.asarray(grads.ids_N) < R]
  assert len(set(used)) == len(used)
  return np.asarray(jnp.zeros((R, grads.grads_ND.shape[1])).at[grads.ids_N].add(grads.grads_ND))


def sums(kernel, reads, V, R, blocks):
  return jax.jit(lambda reads: kernel(*reads, V, R, blocks, interpret=True))(reads)


KERNELS = [
  (kernel_reads.row_grads_sorted, SEGMENTS),
  (kernel_reads.row_grads_sorted, kernel_reads.SegmentBlocks(streams=16, length=32)),
  (kernel_reads.row_grads_atomic, kernel_reads.AtomicBlocks(length=4)),
]


@pytest.mark.parametrize('kernel, blocks', KERNELS)
@pytest.mark.parametrize('sizes', SIZES)
def test_the_summed_gradients_of_rows(sizes, kernel, blocks):
  *_, V, R = sizes
  reads = arguments(*sizes)[1]
  if kernel is kernel_reads.row_grads_atomic:  # it needs a power of two
    reads = reads._replace(g_TD=jnp.pad(reads.g_TD, ((0, 0), (0, -reads.g_TD.shape[1] % 16))))
  expected = dense(reader.row_grads([reads], V, R), R)
  grads = sums(kernel, reads, V, R, blocks)
  np.testing.assert_allclose(dense(grads, R), expected, atol=2e-5)
  # The norm of all gradients is computed from the array, so entries without a sum are zero.
  assert not np.any(np.where(np.asarray(grads.ids_N)[:, None] == R, grads.grads_ND, 0))


@pytest.mark.parametrize('kernel, blocks', KERNELS)
def test_only_padding(kernel, blocks):
  reads = arguments(3, 2, 16, 4, 512)[1]
  reads = reads._replace(ids_TK=jnp.full_like(reads.ids_TK, 4))
  grads = sums(kernel, reads, 4, 512, blocks)
  assert not np.any(np.asarray(grads.grads_ND)) and np.all(np.asarray(grads.ids_N) == 512)


def test_the_blocks_of_streams_do_not_change_the_bits():
  """The entries of an id are added in their order, and those of a run do not depend on others."""
  sizes = *_, V, R = 37, 32, 16, 3, 512
  reads = arguments(*sizes)[1]
  few, many = (
    sums(kernel_reads.row_grads_sorted, reads, V, R, SEGMENTS._replace(streams=streams))
    for streams in (2, 8)
  )
  np.testing.assert_array_equal(few.grads_ND, many.grads_ND)


LOWERED = {
  'read': lambda rows, reads, V, R: kernel_reads.read(
    rows, reads.ids_TK, reads.weights_TK, V, kernel_reads.ReadBlocks(), interpret=False
  ),
  'weight_grads': lambda rows, reads, V, R: kernel_reads.weight_grads(
    rows, reads.ids_TK, reads.g_TD, V, kernel_reads.ReadBlocks(), interpret=False
  ),
  'sorted': lambda rows, reads, V, R: kernel_reads.row_grads_sorted(
    *reads, V, R, kernel_reads.SegmentBlocks(), interpret=False
  ),
  'atomic': lambda rows, reads, V, R: kernel_reads.row_grads_atomic(
    *reads, V, R, kernel_reads.AtomicBlocks(), interpret=False
  ),
}


# From JAX 0.11 the lowering needs a GPU, or an abstract device of it.
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason='JAX 0.11 lowers Triton on a GPU only')
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', LOWERED)
def test_lowering_for_a_gpu(name, dtype):
  V = R = 2**20
  arrays = jax.eval_shape(lambda: arguments(64, 32, 64, 100, 512, dtype))
  rows = jax.ShapeDtypeStruct((R, 64), dtype)
  function = jax.jit(lambda rows, reads: LOWERED[name](rows, reads, V, R))
  lowered = function.trace(rows, arrays[1]).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('xla.gpu.triton') == 1
