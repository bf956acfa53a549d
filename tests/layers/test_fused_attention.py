"""The fused causal attention against the formula, interpreted; and compiled for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import fused_attention, self_attention
from lmn_jax.planning import slices
from tests.blocks import set_sizes


def formula(q_BTHE, k_BTHE, v_BTHE, begin_BT):
  T, E = q_BTHE.shape[1], q_BTHE.shape[3]
  q_BTHE, k_BTHE, v_BTHE = (x.astype(jnp.float32) for x in (q_BTHE, k_BTHE, v_BTHE))
  at = jnp.arange(T)
  seen_BTT = jnp.broadcast_to(at[None, None] <= at[None, :, None], (len(q_BTHE), T, T))
  if begin_BT is not None:
    seen_BTT &= at[None, None] >= begin_BT[:, :, None]
  score_BHTT = jnp.einsum('bthe,bshe->bhts', q_BTHE, k_BTHE) / E**0.5
  weight_BHTT = jax.nn.softmax(jnp.where(seen_BTT[:, None], score_BHTT, -jnp.inf))
  return jnp.einsum('bhts,bshe->bthe', weight_BHTT, v_BTHE)


def packed(B, T, H, E, dtype):
  """q, k, v, and sequences of different lengths in each lane."""
  rng = np.random.default_rng(0)
  qkv = (jnp.asarray(rng.normal(size=(B, T, H, E)), dtype) for _ in range(3))
  cuts = np.sort(rng.integers(1, T, (B, 2)), axis=1)
  cuts = np.concatenate([np.zeros((B, 1), int), cuts], axis=1)
  begins = [row[np.searchsorted(row, np.arange(T), side='right') - 1] for row in cuts]
  return *qkv, jnp.asarray(np.stack(begins), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.03)])
@pytest.mark.parametrize('whole', [True, False], ids=['one sequence', 'packed'])
def test_the_kernel_equals_the_formula(monkeypatch, dtype, tolerance, whole):
  """131 positions are padded to two blocks of 128. bfloat16 rounds by at most 2^-8 of a value."""
  set_sizes(monkeypatch, 'tpu', fused_positions=131)
  monkeypatch.setattr(fused_attention, 'BLOCK', fused_attention.LANES)
  *qkv, begin_BT = packed(1, 131, 2, 8, dtype)
  begin_BT = None if whole else begin_BT

  def graded(attend):
    def loss(qkv):
      return jnp.sum(jnp.cos(attend(*qkv, begin_BT).astype(jnp.float32)))

    return jax.value_and_grad(loss)(qkv)

  interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
  monkeypatch.setattr(splash_attention, 'make_splash_mha_single_device', interpreted)
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    result = graded(self_attention.causal_attention)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance
    ),
    result, graded(formula),
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures('uncached')
@pytest.mark.parametrize('topology', ['v5e:1x1', 'v5e:2x2'])
@pytest.mark.parametrize('E, dtype', [(20, 'float32'), (64, 'bfloat16')])
def test_the_kernel_compiles_for_a_tpu_with_its_gradient(topology, E, dtype):
  """Each device computes its examples: no communication, and no array of scores."""
  pytest.importorskip('libtpu')
  mesh = meshes.make_mesh(devices=slices.slice_of(topology))
  sharding = NamedSharding(mesh, meshes.BATCH)
  shape = jax.ShapeDtypeStruct((8, 520, 2, E), dtype, sharding=sharding)
  begin = jax.ShapeDtypeStruct((8, 520), 'int32', sharding=sharding)

  def loss(q, k, v, begin_BT):
    with meshes.use_mesh(mesh):
      attend = meshes.each_device(
        self_attention.causal_attention, (meshes.BATCH,) * 4, meshes.BATCH
      )
      return jnp.sum(jnp.cos(attend(q, k, v, begin_BT).astype(jnp.float32)))

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape, begin)
  text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  assert text.count('tpu_custom_call') >= 3  # forward, gradients of queries, of keys and values
  assert 'all-gather' not in text and '520,520' not in text and '1024,1024' not in text
