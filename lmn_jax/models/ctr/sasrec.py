"""SASRec for clicks: causal self-attention over the history.

Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.
"""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.layers.basic import repeat
from lmn_jax.layers.self_attention import causal_blocks, check_heads
from lmn_jax.layers.time_gaps import times_of_history
from lmn_jax.models.ctr.base import CTRModel, Encoded


class SASRec(CTRModel):
  """The blocks of section III as an encoder for clicks.

      x_t    = s_t + P_t                    P learned
      F      = causal_blocks(x)_T           T the newest event
      encode = [F ; F * e_i]                the paper scores an item by their inner product F . e_i

  D is the width of a behaviour. The paper ranks items by F . e_i. Here the scores are those of the
  shared head, whose inputs include F and the terms of this product. [ours] With time='bias', each
  attention has the bias by time of HSTU: the time from event s to event t + 1, or to the request of
  the batch for the newest event. [ours]

  Attributes:
    blocks: number of self-attention blocks.
    heads: of each block; must divide D. The paper has one.
    dropout: in the encoder and the head.
  """

  blocks: int = 2
  heads: int = 1
  positive_fields = ('blocks', 'heads')
  has_time_bias = True
  any_length = False  # the positional embeddings have a fixed number of rows

  def check(self):
    super().check()
    check_heads(self.heads, self.item_width)

  def encode(self, x, batch, read, train):
    L, D = x.s_BLI.shape[1:]
    length_B1 = jnp.sum(x.mask_BL, axis=1, keepdims=True)
    positions_LD = self.param('positions', nn.initializers.normal(0.02), (L, D))
    # The newest event has the last position, as in the paper, which pads at the start.
    position_BL = jnp.minimum(L - length_B1 + jnp.arange(L)[None, :], L - 1)
    x_BLD = x.s_BLI.astype(jnp.float32) + positions_LD[position_BL]
    x_BLD = nn.Dropout(self.dropout, deterministic=not train)(x_BLD)
    newest_B1 = jnp.maximum(length_B1 - 1, 0)
    times = times_of_history(batch['time_gap'], x.mask_BL) if self.time == 'bias' else None
    x_BLD = causal_blocks(
      x_BLD, self.blocks, self.heads, self.dropout, train, self.dtype, output_BP=newest_B1,
      times=times,
    )  # fmt: skip
    F_BD = x_BLD[:, 0]
    F_BD = jnp.where(length_B1 > 0, F_BD, 0).astype(self.dtype)  # zeros for an empty history
    F_BQD = repeat(F_BD, x.i_BQI.shape[1])
    return Encoded(jnp.concatenate([F_BQD, F_BQD * x.i_BQI], axis=-1))
