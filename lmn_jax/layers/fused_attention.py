"""Causal self-attention by the kernel of JAX for TPUs, without an array [B, H, T, T]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 128  # positions of the smallest block of the kernel
BLOCK = 4 * LANES  # positions of queries and of keys that the kernel multiplies at a time


def splash(
  q_BTHE: Float[Array, 'B T H E'],
  k_BTHE: Float[Array, 'B T H E'],
  v_BTHE: Float[Array, 'B T H E'],
  begin_BT: Int[Array, 'B T'] | None,
) -> Float[Array, 'B T H E']:
  """Computes `softmax(q_t . k_s / sqrt(E)) v_s` over begin_t <= s <= t; None for begin_t = 0.

  Positions of one sequence have the same begin, which is the number of their segment; the kernel
  attends within segments. It skips blocks of keys that follow all queries of a block.

  Args:
    q_BTHE, k_BTHE, v_BTHE: float32 or bfloat16, of one type. begin_BT: int32, at least 0.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention  # a second of imports, for TPUs only

  T, H, E = q_BTHE.shape[1:]
  size = min(BLOCK, -(-T // LANES) * LANES)
  more = -T % size
  mask = splash_attention.CausalMask((T + more, T + more))
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * H),
    block_sizes=splash_attention.BlockSizes(
      block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
      block_kv_dq=size,
    ),
  )  # fmt: skip
  q_BHTE, k_BHTE, v_BHTE = (
    jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (q_BTHE / E**0.5, k_BTHE, v_BTHE)
  )
  segments = None
  if begin_BT is not None:
    # Padding is a segment of its own; as the last positions, causal attention does not see it.
    begin_BT = jnp.pad(begin_BT, ((0, 0), (0, more)), constant_values=-1)
    segments = splash_attention.SegmentIds(begin_BT, begin_BT)
  out_BHTE = jax.vmap(kernel)(q_BHTE, k_BHTE, v_BHTE, segments)
  return out_BHTE.swapaxes(1, 2)[:, :T]
