"""Self-attention over a sequence, by JAX's own routine, which is fused where the device can."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lmn_jax import mesh as meshes
from lmn_jax.errors import UserError

# Scores of all pairs of positions, [B, H, T, T], are held whole up to so many, and beyond for
# blocks of examples with so many together, which the gradient makes anew.
WHOLE = 2**22
BLOCK = 2**19


def check_heads(heads: int, D: int) -> None:
  """Refuses a number of heads that does not divide the width.

  Args:
    heads: config.model.heads. D: width of a behaviour, all its fields together.

  Raises:
    UserError: naming both, with what would do.
  """
  if D % heads:
    fits = ', '.join(str(h) for h in range(1, D + 1) if D % h == 0)
    raise UserError(
      f'config.model.heads={heads} must divide {D}, the width of a behaviour (config.model.width '
      f'for each of its fields); take one of {fits}'
    )


class SelfAttention(nn.Module):
  """Heads side by side, without the projection after them (Vaswani et al. 2017, section 3.2).

      head_h = softmax(x Q_h (x K_h)^T / sqrt(D / H)) x V_h
      out    = [head_1 ; ... ; head_H]

  Attributes:
    heads: H, dividing the width D of the sequence.
    causal: a position sees itself and those before it.
    dtype: compute type; the softmax is float32.
  """

  heads: int
  causal: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], length_B: Int[Array, 'B'] | None = None
  ) -> Float[Array, 'B T D']:
    """Attends.

    Args:
      x_BTD: the sequence. length_B: positions of it that can be seen, at least 1; None for all.
    """
    B, T, D = x_BTD.shape
    H = self.heads
    x_BT3D = nn.Dense(3 * D, use_bias=False, dtype=self.dtype, name='qkv')(x_BTD)
    q, k, v = (x.reshape(B, T, H, D // H) for x in jnp.split(x_BT3D, 3, axis=-1))
    over = (meshes.BATCH,) * 4
    attend = meshes.each_device(functools.partial(_attend, self.causal), over, meshes.BATCH)
    return attend(q, k, v, length_B).reshape(B, T, D)


def _attend(causal, q_BTHE, k_BTHE, v_BTHE, length_B):
  def attend(q, k, v, length):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=length)

  B, T, H, _ = q_BTHE.shape
  if B * H * T * T <= WHOLE:
    return attend(q_BTHE, k_BTHE, v_BTHE, length_B)

  @jax.checkpoint
  def one(example):
    return attend(*jax.tree.map(lambda x: x[None], example))[0]

  each = max(1, BLOCK // (H * T * T))
  return jax.lax.map(one, (q_BTHE, k_BTHE, v_BTHE, length_B), batch_size=min(each, B))
