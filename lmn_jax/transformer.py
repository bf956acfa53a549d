"""Self-attention over a sequence: of all pairs by JAX's own routine, the causal in pieces."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

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
    causal: a position sees itself and those before it, from the beginning of its own sequence.
    dtype: compute type; the softmax is float32.
  """

  heads: int
  causal: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    length_B: Int[Array, 'B'] | None = None,
    begin_BT: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T D']:
    """Attends.

    Args:
      x_BTD: the sequence. length_B: positions of it that can be seen, at least 1; None for all; not
        for a causal one. begin_BT: of several sequences side by side, where that of each position
        begins, for a causal one; None for one sequence.
    """
    B, T, D = x_BTD.shape
    H = self.heads
    x_BT3D = nn.Dense(3 * D, use_bias=False, dtype=self.dtype, name='qkv')(x_BTD)
    q, k, v = (x.reshape(B, T, H, D // H) for x in jnp.split(x_BT3D, 3, axis=-1))
    over = (meshes.BATCH,) * 4
    if self.causal:
      attend = meshes.each_device(functools.partial(_by_examples, _causal), over, meshes.BATCH)
      return attend(q, k, v, begin_BT).reshape(B, T, D)
    attend = meshes.each_device(functools.partial(_by_examples, _full), over, meshes.BATCH)
    return attend(q, k, v, length_B).reshape(B, T, D)


def _by_examples(attend, q_BTHE, k_BTHE, v_BTHE, which):
  B, T, H, _ = q_BTHE.shape
  if B * H * T * T <= WHOLE:
    return attend(q_BTHE, k_BTHE, v_BTHE, which)

  @jax.checkpoint
  def one(example):
    return attend(*jax.tree.map(lambda x: x[None], example))[0]

  each = max(1, BLOCK // (H * T * T))
  return jax.lax.map(one, (q_BTHE, k_BTHE, v_BTHE, which), batch_size=min(each, B))


def _full(q_BTHE, k_BTHE, v_BTHE, length_B):
  return jax.nn.dot_product_attention(q_BTHE, k_BTHE, v_BTHE, key_value_seq_lengths=length_B)


# Of all pairs of positions a causal sequence has half. In four pieces five eighths are made, and on
# CPU the gradient of 200 positions takes 20 ms where JAX's routine with is_causal takes 50.
PIECES = 4


def _causal(q_BTHE, k_BTHE, v_BTHE, begin_BT):
  T, E = q_BTHE.shape[1], q_BTHE.shape[3]
  # Heads before positions: XLA on CPU would turn the scores instead.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTHE / E**0.5, k_BTHE, v_BTHE))
  found, size = [], -(-T // PIECES)
  for low in range(0, T, size):
    high = min(low + size, T)
    score_BHtS = jnp.einsum(
      'bhte,bhse->bhts', q[:, :, low:high], k[:, :, :high], preferred_element_type=jnp.float32
    )
    seen = causal_mask(low, high, begin_BT)[:, None]
    weight_BHtS = nn.softmax(jnp.where(seen, score_BHtS, -1e30), axis=-1).astype(v.dtype)
    found.append(jnp.einsum('bhts,bhse->bhte', weight_BHtS, v[:, :, :high]))
  return jnp.concatenate(found, axis=2).transpose(0, 2, 1, 3)


def causal_mask(low: int, high: int, begin_BT: Int[Array, 'B T'] | None) -> Bool[Array, '#B t S']:
  """Which of the positions up to `high` each of `low` to `high` sees: its sequence up to itself.

  Args:
    low, high: bounds. begin_BT: where the sequence of each position begins; None for one sequence.
  """
  to, at = jnp.arange(low, high)[:, None], jnp.arange(high)[None, :]
  seen = (at <= to)[None]
  return seen if begin_BT is None else seen & (at[None] >= begin_BT[:, low:high, None])
