"""Caser: convolutions over the last few events.

Tang & Wang, Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding, WSDM
2018.
"""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.models.next_item.base import NextItemModel, Vectors


class Caser(NextItemModel):
  """Horizontal and vertical convolutions over E [L, D], the last L events (section 3).

      o  = [max_i relu(F_k . E_{i : i + h})] for every height h = 1..L and filter k     3-5
      o~ = [sum_l F~_k,l E_l] for every filter k                                        6, 7
      z  = relu(W [o ; o~] + b)                                                         8
      v  = W' [z ; P_u]                                                                 9

  E is zero before the first event. In the paper, W' in equation 9 has a row for each item, twice as
  wide as an embedding; here v is mapped to the width of the embeddings, whose product with v is the
  score. [ours] In the code, vertical filters and the items in equation 9 have biases. [ours:
  neither] Dropout is applied to the rows and to o. [ours]

  Attributes:
    window: L.
    horizontal: filters of each height.
    vertical: vertical filters.
  """

  window: int = 5
  horizontal: int = 16
  vertical: int = 4
  positive_fields = ('negatives', 'window', 'horizontal', 'vertical')
  reads_user = True

  def encode(self, events, carry, train):
    x_BTD, mask_BT, u_BD, *_ = events
    (B, T, D), W = x_BTD.shape, self.window
    x_BTD = jnp.where(mask_BT[:, :, None], x_BTD, 0).astype(self.dtype)
    before_BSD = jnp.pad(x_BTD, ((0, 0), (W - 1, 0), (0, 0)))
    # E of every event, oldest first: [B, T, W, D].
    e_BTWD = jnp.stack([before_BSD[:, w : w + T] for w in range(W)], axis=2)
    outputs = []
    for h in range(1, W + 1):
      pieces = [e_BTWD[:, :, i : i + h].reshape(B, T, h * D) for i in range(W - h + 1)]
      filters = nn.Dense(self.horizontal, dtype=self.dtype, name=f'horizontal_{h}')
      outputs.append(jnp.max(nn.relu(filters(jnp.stack(pieces, axis=2))), axis=2))
    # Without a bias. [ours]
    filters_WK = self.param('vertical', nn.initializers.lecun_normal(), (W, self.vertical))
    vertical_BTKD = jnp.einsum('btwd,wk->btkd', e_BTWD, filters_WK.astype(self.dtype))
    outputs.append(vertical_BTKD.reshape(B, T, -1))
    o_BTF = jnp.concatenate(outputs, axis=-1)
    o_BTF = nn.Dropout(self.dropout, deterministic=not train)(o_BTF)
    z_BTD = nn.relu(nn.Dense(D, dtype=self.dtype, name='together')(o_BTF))
    u_BTD = jnp.broadcast_to(u_BD[:, None].astype(self.dtype), (B, T, D))
    out = nn.Dense(D, dtype=self.dtype, name='out')
    return Vectors(out(jnp.concatenate([z_BTD, u_BTD], axis=-1)), carry)
