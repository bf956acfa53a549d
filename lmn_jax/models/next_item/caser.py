"""Caser: convolutions over the last few events (Tang & Wang, WSDM 2018)."""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.models.next_item.base import NextItemModel, Vectors


class Caser(NextItemModel):
  """Tang & Wang 2018, section 3; E [L, D] the last L events, zeros where there were none.

      o  = [max_i relu(F_k . E_{i : i + h})] for every height h = 1..L and filter k     3-5
      o~ = [sum_l F~_k,l E_l] for every filter k                                        6, 7
      z  = relu(W [o ; o~] + b)                                                         8
      v  = W' [z ; P_u]                   9, where W' is the items' rows and twice as wide

  v is mapped to the width of the rows that are read. [ours] In the code vertical filters have a
  bias, and so has each item in 9. [ours: neither] The rows are dropped as well as o. [ours]

  Attributes:
    window: L. horizontal, vertical: filters of each height, and of all together.
  """

  window: int = 5
  horizontal: int = 16
  vertical: int = 4
  positive_fields = ('negatives', 'window', 'horizontal', 'vertical')
  reads_user = True

  def encode(self, events, carry, train):
    x_BTD, mask_BT, u_BD, *_ = events
    (B, T, D), W = x_BTD.shape, self.window
    x_BTD = jnp.where(mask_BT[:, :, None], x_BTD, 0)
    before_BSD = jnp.pad(x_BTD, ((0, 0), (W - 1, 0), (0, 0)))
    # E of every event, oldest first: [B, T, W, D].
    e_BTWD = jnp.stack([before_BSD[:, w : w + T] for w in range(W)], axis=2)
    found = []
    for h in range(1, W + 1):
      pieces = [e_BTWD[:, :, i : i + h].reshape(B, T, h * D) for i in range(W - h + 1)]
      filters = nn.Dense(self.horizontal, name=f'horizontal_{h}')
      found.append(jnp.max(nn.relu(filters(jnp.stack(pieces, axis=2))), axis=2))
    # Without a bias. [ours]
    filters_WK = self.param('vertical', nn.initializers.lecun_normal(), (W, self.vertical))
    found.append(jnp.einsum('btwd,wk->btkd', e_BTWD, filters_WK).reshape(B, T, -1))
    o_BTF = jnp.concatenate(found, axis=-1)
    o_BTF = nn.Dropout(self.dropout, deterministic=not train)(o_BTF)
    z_BTD = nn.relu(nn.Dense(D, name='together')(o_BTF))
    u_BTD = jnp.broadcast_to(u_BD[:, None], (B, T, D))
    return Vectors(nn.Dense(D, name='out')(jnp.concatenate([z_BTD, u_BTD], axis=-1)), carry)
