"""SASRec for next items: causal self-attention over the history.

Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.
"""

import flax.linen as nn

from lmn_jax.layers.self_attention import causal_blocks, check_heads
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class SASRecNext(NextItemModel):
  """The published model (section III): the score of item i is v_t . e_i.

      x_t = Dropout(sqrt(D) e_t + P_t)        P learned; sqrt(D) [code]
      v   = causal_blocks(x)

  t is the index in the window of the event; a lane may have several windows. loss='bce' with one
  negative is the paper's loss; loss='gbce' is gSASRec (Petrov & Macdonald 2023). With time='bias',
  each attention has the bias by time of HSTU (models/next_item/hstu.py). [ours]

  Attributes:
    blocks: number of self-attention blocks.
    heads: of each block; must divide D. The paper has one.
  """

  blocks: int = 2
  heads: int = 1
  positive_fields = ('negatives', 'blocks', 'heads')
  has_time_bias = True
  packs = True
  picks = True

  def check(self):
    super().check()
    check_heads(self.heads, self.width)

  def embed(self, events):
    shape = events.x_BTD.shape[1:]
    return events.with_positions(self.param('positions', nn.initializers.normal(0.02), shape))

  def encode(self, events, carry, train):
    v_BTD = causal_blocks(
      events.x_BTD, self.blocks, self.heads, self.dropout, train, self.dtype, events.begin_BT,
      events.output_BP, events.times,
    )  # fmt: skip
    return Vectors(v_BTD, carry)
