"""BST: a transformer over the history and the target.

Chen et al., Behavior Sequence Transformer for E-commerce Recommendation in Alibaba, DLP-KDD 2019.
"""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.errors import one_of
from lmn_jax.layers.basic import MLP
from lmn_jax.layers.self_attention import SelfAttention, check_heads
from lmn_jax.layers.time_gaps import Times
from lmn_jax.models.ctr.base import CTRModel, Encoded

OUTPUTS = ('all', 'target')


class BST(CTRModel):
  """A transformer over the target and the history (section 2.2, equations 2-8).

      E      = [e_i ; s_T ; s_{T-1} ; ... ; s_1] + P           P learned, by order
      S      = LayerNorm(E + Dropout(MH(E)))                   MH(E) = SelfAttention(E) W^H
      F      = LayerNorm(S + Dropout(W2 LeakyReLU(W1 S + b1) + b2))    and so in each block
      encode = [F_0 ; F_1 ; ... ; F_L]                         zeros where padded

  D is the width of a behaviour. The paper's position is the time between a behaviour and the
  target. Here it is the rank by recency [ours], and with time='buckets' the time, too: s_l has a
  row for it (fields.EventFields). With time='bias', each attention has a bias by the time between
  two of its behaviours; that of the target is the request. [ours]

  Attributes:
    blocks: number of blocks; 1 is best in the paper.
    heads: of each block; must divide D.
    output: 'all' for the formula above, which makes the input of the head L + 1 times as wide;
      'target' for F_0 alone. [ours]
    dropout: in the encoder and the head.
  """

  blocks: int = 1
  heads: int = 4
  output: str = 'all'
  positive_fields = ('blocks', 'heads')
  has_time_bias = True
  any_length = False  # the positional embeddings have a fixed number of rows

  def check(self):
    super().check()
    one_of('config.model.output', self.output, OUTPUTS)
    check_heads(self.heads, self.item_width)

  def encode(self, x, batch, read, train):
    B, L, D = x.s_BLI.shape
    Q = x.i_BQI.shape[1]
    length_B1 = jnp.sum(x.mask_BL, axis=1, keepdims=True)
    # Newest first: a position means the same recency in every example, and padding comes last.
    order_BL = jnp.maximum(length_B1 - 1 - jnp.arange(L)[None, :], 0)
    s_BLD = jnp.take_along_axis(x.s_BLI, order_BL[:, :, None], axis=1)
    positions_TD = self.param('positions', nn.initializers.normal(0.02), (L + 1, D))
    # Every behaviour attends to the target, so the history is encoded for each of Q candidates.
    s_BQLD = jnp.broadcast_to(s_BLD[:, None], (B, Q, L, D))
    x_BQTD = jnp.concatenate([x.i_BQI[:, :, None], s_BQLD], axis=2)
    # The residual stream is float32 for every compute type. From here on, B is B * Q.
    x_BTD = x_BQTD.reshape(B * Q, L + 1, D).astype(jnp.float32) + positions_TD[None]
    seen_B = jnp.repeat(length_B1[:, 0] + 1, Q)
    times = self._times(batch, order_BL, Q)

    def add_norm(x_BTD, change_BTD):
      dropout = nn.Dropout(self.dropout, deterministic=not train)
      return nn.LayerNorm()(x_BTD + dropout(change_BTD.astype(jnp.float32)))

    for _ in range(self.blocks):
      attended_BTD = SelfAttention(self.heads, dtype=self.dtype)(x_BTD, seen_B, times=times)
      x_BTD = add_norm(x_BTD, nn.Dense(D, use_bias=False, dtype=self.dtype)(attended_BTD))
      # The inner width is not in the paper; 4 D as in Vaswani et al. 2017. [ours]
      x_BTD = add_norm(x_BTD, MLP((4 * D,), D, 'leaky_relu', dtype=self.dtype)(x_BTD))
    x_BTD = x_BTD.astype(self.dtype)
    if self.output == 'target':
      return Encoded(x_BTD[:, 0].reshape(B, Q, D))
    seen_BT = jnp.arange(L + 1)[None, :] < seen_B[:, None]
    return Encoded(jnp.where(seen_BT[:, :, None], x_BTD, 0).reshape(B, Q, (L + 1) * D))

  def _times(self, batch, order_BL, Q):
    """The times of target and behaviours, [B * Q, L + 1]; None unless `time` is 'bias'."""
    if self.time != 'bias':
      return None
    gap_BL = jnp.take_along_axis(batch['time_gap'], order_BL, axis=1)
    time_BT = jnp.repeat(jnp.pad(-gap_BL, ((0, 0), (1, 0))), Q, axis=0)
    return Times(time_BT, jnp.zeros_like(time_BT))
