"""The kernel of a pass of SAM computes what the library computes, run by Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.target_attention import TargetAttention, Unit
from tests.runs import load_experiment

kernel_sam = load_experiment('kernel_sam')

# B, L, D, H and blocks: blocks that the positions do not fill, parts without positions.
CASES = [
  (3, 37, 32, 16, kernel_sam.PassBlocks(positions=16)),
  (3, 100, 20, 5, kernel_sam.PassBlocks(positions=32, splits=2)),
  (2, 5, 8, 8, kernel_sam.PassBlocks(positions=16, splits=4, tf32=False)),
]


def arguments(B, L, D, H):
  """History, query, memory, unit, mask and cotangents; the first example has no behaviours."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  mask_BL = jnp.asarray(rng.integers(0, 2, (B, L)), jnp.bool).at[0].set(False)
  unit = Unit(normal(4 * D, H) / (4 * D) ** 0.5, normal(H), normal(H, 1), normal(1))
  floats = normal(B, L, D), normal(B, D), normal(B, D), unit
  return floats, mask_BL, (normal(B, D), normal(B, L), normal(B, L, D))


def library(v_BLD, q_BD, m_BD, unit, mask_BL):
  second = {'kernel': unit.w2_H1, 'bias': unit.b2_1}
  params = {'w1': unit.w1_4DH, 'b1': unit.b1_H, 'Dense_0': second}
  module = TargetAttention(unit.b1_H.size, gate='sigmoid', dtype=v_BLD.dtype)
  inputs = q_BD[:, None], v_BLD, mask_BL, m_BD[:, None]
  p_BQD, w_BLQ, v_BLD = module.apply({'params': params}, *inputs)
  return p_BQD[:, 0], w_BLQ[:, :, 0], v_BLD


def both(case, dtype):
  """(outputs, gradients) of the library in float32 and of the kernel, of the same numbers."""
  *sizes, blocks = case
  floats, mask_BL, grads = jax.tree.map(
    lambda x: x if x.dtype == jnp.bool else x.astype(dtype), arguments(*sizes)
  )

  def run(function, dtype):
    @jax.jit
    def outputs_and_gradients(floats, grads):
      outputs, pull = jax.vjp(function, *floats)
      return outputs, pull(grads)

    return outputs_and_gradients(*jax.tree.map(lambda x: x.astype(dtype), (floats, grads)))

  ours = run(lambda *args: library(*args, mask_BL), jnp.float32)
  return ours, run(
    lambda v, q, m, unit: kernel_sam.sam_pass(v, mask_BL, q, m, unit, blocks, interpret=True), dtype
  )


def close(result, expected, tolerance):
  """Compares relative to the largest number of each array."""
  for x, y in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
    y = np.asarray(y, np.float32)
    np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients(case):
  expected, result = both(case, jnp.float32)
  close(result, expected, 1e-5)


def test_bfloat16():
  """Beside float32 of the same rounded inputs: bfloat16 has 8 bits, and W1 is rounded twice."""
  expected, result = both(CASES[0], jnp.bfloat16)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(result))
  close(result, expected, 3e-2)


# From JAX 0.11 the lowering needs a GPU, or an abstract device of it.
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason='JAX 0.11 lowers Triton on a GPU only')
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_lowering_for_a_gpu(dtype):
  floats, mask_BL, _ = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype if x.dtype == jnp.bool else dtype),
    jax.eval_shape(lambda: arguments(4, 100, 32, 16)),
  )

  def loss(floats, mask_BL):
    v, q, m, unit = floats
    p_BD = kernel_sam.sam_pass(v, mask_BL, q, m, unit, kernel_sam.PassBlocks(), interpret=False)[0]
    return jnp.sum(jnp.square(p_BD.astype(jnp.float32)))

  lowered = jax.jit(jax.grad(loss)).trace(floats, mask_BL).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('xla.gpu.triton') == 2
