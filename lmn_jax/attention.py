"""Attention of a target over a behaviour history, without the [B, L, 4D] tensor."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.layers import ACTIVATIONS


class TargetAttention(nn.Module):
  """DIN's local activation unit (Zhou et al. 2018, section 4.3), its first layer in blocks.

      x_j = [q ; v_j ; q - v_j ; q * v_j]
      w_j = w2 . act(W1 x_j + b1) + b2
      out = sum_j mask_j w_j v_j                 no softmax: the intensity of interest is kept

  W1 = [Wa Wb Wc Wd] splits by block, so `W1 x_j = (Wa + Wc) q + (Wb - Wc + Wd diag(q)) v_j`: one
  batched [L, D] x [D, h] product for each example, equal to the plain form.

  Attributes:
    hidden: h, width of the unit's hidden layer.
    activation: key of ACTIVATIONS.
    softmax: normalise the weights over the history; the paper does not. [ours: an option]
    dtype: compute type.
  """

  hidden: int = 32
  activation: str = 'sigmoid'
  softmax: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, q_BD: Float[Array, 'B D'], v_BLD: Float[Array, 'B L D'], mask_BL: Bool[Array, 'B L']
  ) -> Float[Array, 'B D']:
    D = q_BD.shape[-1]
    # One initialiser over the whole 4D input, so that the blocks have the plain form's scale.
    w1_4DH = self.param('w1', nn.initializers.lecun_normal(), (4 * D, self.hidden))
    b1_H = self.param('b1', nn.initializers.zeros, (self.hidden,))
    wq_DH, wv_DH, wd_DH, wp_DH = jnp.split(w1_4DH.astype(self.dtype), 4)
    own_BH = q_BD @ (wq_DH + wd_DH) + b1_H.astype(self.dtype)[None, :]
    mix_BDH = (wv_DH - wd_DH)[None] + q_BD[:, :, None] * wp_DH[None]
    hidden_BLH = ACTIVATIONS[self.activation](
      own_BH[:, None, :] + jnp.einsum('bld,bdh->blh', v_BLD, mix_BDH)
    )
    w_BL = nn.Dense(1, dtype=self.dtype)(hidden_BLH)[:, :, 0]
    if self.softmax:
      w_BL = jnp.where(mask_BL, w_BL.astype(jnp.float32), -1e30)
      # A history without events: all weights equal, then masked to zero below.
      w_BL = nn.softmax(w_BL, axis=-1).astype(self.dtype)
    w_BL = jnp.where(mask_BL, w_BL, 0)
    return jnp.einsum('bl,bld->bd', w_BL, v_BLD)
