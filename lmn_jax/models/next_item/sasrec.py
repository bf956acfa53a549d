"""SASRec: causal self-attention over the history (Kang & McAuley 2018), for next items."""

import flax.linen as nn

from lmn_jax.layers.self_attention import causal_blocks, check_heads
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class SASRecNext(NextItemModel):
  """Kang & McAuley 2018, section III, as it was published: the score of item i is F_t . e_i.

      x_t = Dropout(sqrt(D) e_t + P_t)        P learned; sqrt(D) [code]
      v   = causal_blocks(x)

  t counts within the history's own window, of which several stand side by side. With loss='bce' and
  one negative the paper's; with 'gbce' gSASRec (Petrov & Macdonald 2023).

  Attributes:
    blocks: self-attention blocks. heads: of each, dividing D; the paper has one.
  """

  blocks: int = 2
  heads: int = 1
  positive_fields = ('negatives', 'blocks', 'heads')
  in_bfloat16 = True
  packs = True
  picks = True

  def check(self):
    super().check()
    check_heads(self.heads, self.width)

  def take_in(self, events):
    shape = events.x_BTD.shape[1:]
    return events.placed(self.param('positions', nn.initializers.normal(0.02), shape))

  def encode(self, events, carry, train):
    v_BTD = causal_blocks(
      events.x_BTD, self.blocks, self.heads, self.dropout, train, self.dtype, events.begin_BT,
      events.output_BP,
    )  # fmt: skip
    return Vectors(v_BTD, carry)
