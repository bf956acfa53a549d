"""SDM: short-term interests of the current session, gated with long-term interests.

Lv et al., SDM: Sequential Deep Matching Model for Online Large-scale Recommender System, CIKM 2019.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmn_jax.layers.basic import stop
from lmn_jax.layers.prefix_attention import last_of, mean_of, no_events, prefixes
from lmn_jax.layers.recurrent import GRU
from lmn_jax.layers.self_attention import SelfAttention, check_heads
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class SDM(NextItemModel):
  """Self-attention over the segment, attention over earlier segments, and a gate (section 3).

      h_t  = RNN(x_t)                                         1: within the segment
      X^_t = W_o MultiHead(h)_t                               2-5: causal
      s_t  = sum_{k <= t} softmax(X^_k . e_u) X^_k            6, 7: the user's attention
      p    = sum_j softmax(g_j . e_u) g_j                     8, 9: over earlier segments
      p    = tanh(W_p p + b)                                  10
      G    = sigmoid(W1 e_u + W2 s_t + W3 p + b)              11
      v    = (1 - G) * p + G * s_t                            12

  e_u is the user's row, g_j the rows of the events of earlier segments. The RNN is a GRU; the
  paper's is an LSTM. [ours] In the code, X^ is LayerNorm(h + Dropout(W_o ..)), the scores in 6 are
  divided by sqrt(D), and X^_t is added to s_t. [ours: without these three] The paper has a
  long-term set for each feature of an item; here there is one, of the items. [ours]

  Attributes:
    heads: of the self-attention; must divide D.
  """

  heads: int = 4
  positive_fields = ('negatives', 'heads')
  whole = True
  reads_user = True

  def check(self):
    super().check()
    check_heads(self.heads, self.width)

  def carry(self, batch):
    return no_events(batch['item'].shape[0], self.width)

  def encode(self, events, carry, train):
    x_BTD, mask_BT, u_BD, *_ = events
    B, _, D = x_BTD.shape
    del train
    h_BTQD, _ = GRU(D, self.dtype, name='gru')(x_BTD, mask_BT)
    attention = SelfAttention(self.heads, causal=True, dtype=self.dtype, name='attention')
    attended_BTD = attention(h_BTQD[:, :, 0])
    # Neither a residual nor a norm. [ours]
    out = nn.Dense(D, use_bias=False, dtype=self.dtype, name='out')
    x_hat_BTD = out(attended_BTD).astype(jnp.float32)

    # Scores and sums are float32 for every compute type: they are exponents, and sums over a whole
    # history. So are the gate and the two vectors that it mixes.
    def score(v_BTD):  # not divided by sqrt(D). [ours]
      return jnp.einsum('bd,btd->bt', u_BD, v_BTD)

    s_BTD = mean_of(prefixes(score(x_hat_BTD), x_hat_BTD, mask_BT, no_events(B, D)))
    long = nn.Dense(D, dtype=self.dtype, name='long')
    p_B1D = jnp.tanh(long(mean_of(carry)).astype(jnp.float32))[:, None]
    gate = nn.Dense(D, dtype=self.dtype, name='gate')
    u_BTD = jnp.broadcast_to(u_BD[:, None], s_BTD.shape)
    p_BTD = jnp.broadcast_to(p_B1D, s_BTD.shape)
    g_BTD = gate(jnp.concatenate([u_BTD, s_BTD, p_BTD], axis=-1)).astype(jnp.float32)
    g_BTD = nn.sigmoid(g_BTD)
    carry = jax.tree.map(stop, last_of(prefixes(score(x_BTD), x_BTD, mask_BT, carry)))
    return Vectors((1 - g_BTD) * p_BTD + g_BTD * s_BTD, carry)
