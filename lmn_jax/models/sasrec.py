"""SASRec's encoder for clicks: causal self-attention over the history (Kang & McAuley 2018)."""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.layers import MLP, repeat
from lmn_jax.models.ctr import CTRModel, Encoded
from lmn_jax.transformer import SelfAttention, check_heads


class SASRec(CTRModel):
  """Kang & McAuley 2018, section III; D is the width of a behaviour.

      x_t    = s_t + P_t                                       P learned
      x     <- x + Dropout(SA(LayerNorm(x)))                   causal
      x     <- x + Dropout(W2 relu(W1 LayerNorm(x) + b1) + b2)     W1, W2: D x D
      F      = LayerNorm(x_T)          T the newest event
      encode = [F ; F * e_i]           the paper scores an item by their inner product F . e_i

  The paper ranks items by F . e_i; here the head is every model's, and gets the product's terms
  beside F, from which it could not well make them. [ours]

  Attributes:
    blocks: self-attention blocks.
    heads: of each, dividing D; the paper has one.
    dropout: of the encoder too.
  """

  blocks: int = 2
  heads: int = 1
  positive_fields = ('blocks', 'heads')

  def check(self):
    super().check()
    check_heads(self.heads, self.width * (1 + len(self.schema.item)))

  def encode(self, x, batch, read, train):
    L, D = x.s_BLI.shape[1:]
    length_B1 = jnp.sum(x.mask_BL, axis=1, keepdims=True)
    positions_LD = self.param('positions', nn.initializers.normal(0.02), (L, D))
    # The newest event has the last position, as in the paper, which pads in front.
    position_BL = jnp.minimum(L - length_B1 + jnp.arange(L)[None, :], L - 1)
    # Padding stands behind the events: no event sees it, for attention is causal. The sum that the
    # blocks add to is float32, whatever they compute in.
    x_BLD = x.s_BLI.astype(jnp.float32) + positions_LD[position_BL]

    def dropout(x_BLD):
      return nn.Dropout(self.dropout, deterministic=not train)(x_BLD.astype(jnp.float32))

    x_BLD = dropout(x_BLD)
    for _ in range(self.blocks):
      attention = SelfAttention(self.heads, causal=True, dtype=self.dtype)
      x_BLD = x_BLD + dropout(attention(nn.LayerNorm()(x_BLD)))
      x_BLD = x_BLD + dropout(MLP((D,), D, dtype=self.dtype)(nn.LayerNorm()(x_BLD)))
    newest_B1 = jnp.maximum(length_B1 - 1, 0)
    # The norm after the last block is the released code's. [code]
    F_BD = nn.LayerNorm()(jnp.take_along_axis(x_BLD, newest_B1[:, :, None], axis=1)[:, 0])
    F_BD = jnp.where(length_B1 > 0, F_BD, 0).astype(self.dtype)  # zeros for an empty history
    F_BQD = repeat(F_BD, x.i_BQI.shape[1])
    return Encoded(jnp.concatenate([F_BQD, F_BQD * x.i_BQI], axis=-1))
