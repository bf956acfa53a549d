"""SASRec: causal self-attention over the history (Kang & McAuley 2018), for both tasks."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lmn_jax.layers import MLP, repeat, rows_at
from lmn_jax.models.ctr import CTRModel, Encoded
from lmn_jax.models.next_item import NextItemModel, Vectors
from lmn_jax.transformer import SelfAttention, check_heads


def causal_blocks(
  x_BLD: Float[Array, 'B L D'],
  blocks: int,
  heads: int,
  dropout: float,
  train: bool,
  dtype: DTypeLike,
  begin_BL: Int[Array, 'B L'] | None = None,
  asked_BP: Int[Array, 'B P'] | None = None,
) -> Float[Array, 'B P D']:
  """The blocks of Kang & McAuley 2018, section III, in a module's compact method.

      x <- x + Dropout(SA(LayerNorm(x)))                            causal
      x <- x + Dropout(W2 relu(W1 LayerNorm(x) + b1) + b2)          W1, W2: D x D
      F  = LayerNorm(x)                                             the last norm [code]

  x comes dropped, by who calls. As the paper has it; in the released code queries alone are normed,
  and x is then the normed one. It also has biases of q, k and v, and drops attention's weights and
  the units behind relu. [ours: without]

  Padding stands behind the events: no event sees it, for attention is causal. The sum that the
  blocks add to is float32, whatever they compute in. begin_BL: of several histories side by side,
  where that of each event begins. asked_BP: positions of which the last block, and so the
  result, is made; None for all.
  """

  def drop(x_BLD):
    return nn.Dropout(dropout, deterministic=not train)(x_BLD.astype(jnp.float32))

  D = x_BLD.shape[-1]
  for k in range(blocks):
    asked = asked_BP if k == blocks - 1 else None
    # Without biases of q, k, v, and without dropout of its weights. [ours]
    attention = SelfAttention(heads, causal=True, dtype=dtype)
    found = attention(nn.LayerNorm()(x_BLD), begin_BT=begin_BL, asked_BP=asked)
    x_BLD = (x_BLD if asked is None else rows_at(x_BLD, asked)) + drop(found)
    x_BLD = x_BLD + drop(MLP((D,), D, dtype=dtype)(nn.LayerNorm()(x_BLD)))
  return nn.LayerNorm()(x_BLD)


class SASRec(CTRModel):
  """Kang & McAuley 2018, section III, as an encoder for clicks; D is the width of a behaviour.

      x_t    = s_t + P_t                    P learned
      F      = causal_blocks(x)_T           T the newest event
      encode = [F ; F * e_i]                the paper scores an item by their inner product F . e_i

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
  any_length = False  # each position has a row of its own

  def check(self):
    super().check()
    check_heads(self.heads, self.width * (1 + len(self.schema.item)))

  def encode(self, x, batch, read, train):
    L, D = x.s_BLI.shape[1:]
    length_B1 = jnp.sum(x.mask_BL, axis=1, keepdims=True)
    positions_LD = self.param('positions', nn.initializers.normal(0.02), (L, D))
    # The newest event has the last position, as in the paper, which pads in front.
    position_BL = jnp.minimum(L - length_B1 + jnp.arange(L)[None, :], L - 1)
    x_BLD = x.s_BLI.astype(jnp.float32) + positions_LD[position_BL]
    x_BLD = nn.Dropout(self.dropout, deterministic=not train)(x_BLD)
    newest_B1 = jnp.maximum(length_B1 - 1, 0)
    x_BLD = causal_blocks(
      x_BLD, self.blocks, self.heads, self.dropout, train, self.dtype, asked_BP=newest_B1
    )
    F_BD = x_BLD[:, 0]
    F_BD = jnp.where(length_B1 > 0, F_BD, 0).astype(self.dtype)  # zeros for an empty history
    F_BQD = repeat(F_BD, x.i_BQI.shape[1])
    return Encoded(jnp.concatenate([F_BQD, F_BQD * x.i_BQI], axis=-1))


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
      events.asked_BP,
    )  # fmt: skip
    return Vectors(v_BTD, carry)
