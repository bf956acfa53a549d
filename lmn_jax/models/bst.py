"""BST: a transformer over the history and the target (Chen et al. 2019)."""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.errors import one_of
from lmn_jax.layers import MLP
from lmn_jax.models.ctr import CTRModel, Encoded
from lmn_jax.transformer import SelfAttention, check_heads

OUTPUTS = ('all', 'target')


class BST(CTRModel):
  """Chen et al. 2019, section 2.2, equations 2-8; D is the width of a behaviour.

      E      = [e_i ; s_T ; s_{T-1} ; ... ; s_1] + P           P learned, by order
      S      = LayerNorm(E + Dropout(MH(E)))                   MH(E) = SelfAttention(E) W^H
      F      = LayerNorm(S + Dropout(W2 LeakyReLU(W1 S + b1) + b2))    and so in each block
      encode = [F_0 ; F_1 ; ... ; F_L]                         zeros where padded

  The paper's position is the time between a behaviour and the target; here it is the order, the
  newest first, for batches hold no times. [ours]

  Attributes:
    blocks: the paper's tables have 1 best.
    heads: of each block, dividing D.
    output: 'all' the formula above, a head L + 1 times as wide; 'target' F_0 alone. [ours]
    dropout: of the encoder too.
  """

  blocks: int = 1
  heads: int = 4
  output: str = 'all'
  positive_fields = ('blocks', 'heads')

  def check(self):
    super().check()
    one_of('config.model.output', self.output, OUTPUTS)
    check_heads(self.heads, self.width * (1 + len(self.schema.item)))

  def encode(self, x, batch, read, train):
    B, L, D = x.s_BLI.shape
    length_B1 = jnp.sum(x.mask_BL, axis=1, keepdims=True)
    # Newest first: what stands at a place is then as old in every example, and padding is behind.
    order_BL = jnp.maximum(length_B1 - 1 - jnp.arange(L)[None, :], 0)
    s_BLD = jnp.take_along_axis(x.s_BLI, order_BL[:, :, None], axis=1)
    positions_TD = self.param('positions', nn.initializers.normal(0.02), (L + 1, D))
    # The sum that the blocks add to is float32, whatever they compute in.
    x_BTD = jnp.concatenate([x.i_BI[:, None], s_BLD], axis=1).astype(jnp.float32)
    x_BTD = x_BTD + positions_TD[None]

    def add_norm(x_BTD, change_BTD):
      dropout = nn.Dropout(self.dropout, deterministic=not train)
      return nn.LayerNorm()(x_BTD + dropout(change_BTD.astype(jnp.float32)))

    for _ in range(self.blocks):
      attended_BTD = SelfAttention(self.heads, dtype=self.dtype)(x_BTD, length_B1[:, 0] + 1)
      x_BTD = add_norm(x_BTD, nn.Dense(D, use_bias=False, dtype=self.dtype)(attended_BTD))
      # The inner width is not in the paper: that of Vaswani et al. 2017. [ours]
      x_BTD = add_norm(x_BTD, MLP((4 * D,), D, 'leaky_relu', dtype=self.dtype)(x_BTD))
    x_BTD = x_BTD.astype(self.dtype)
    if self.output == 'target':
      return Encoded(x_BTD[:, 0])
    seen_BT = jnp.arange(L + 1)[None, :] <= length_B1
    return Encoded(jnp.where(seen_BT[:, :, None], x_BTD, 0).reshape(B, (L + 1) * D))
