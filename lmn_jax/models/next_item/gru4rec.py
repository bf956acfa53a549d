"""GRU4Rec: a recurrent state of everything that happened (Hidasi et al. 2016)."""

import jax.numpy as jnp

from lmn_jax.layers.basic import stop
from lmn_jax.layers.recurrent import GRU
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class GRU4Rec(NextItemModel):
  """Hidasi et al. 2016, section 3.

      h_t = GRU(x_t, h_{t-1})
      v_t = h_t                      the score of item i is h_t . e_i

  The state is as wide as a row, so that the rows that are read are also what is scored; the paper
  has weights of their own for the output. [ours] The state goes on from segment to segment and its
  gradient does not, as the paper's parallel mini-batches truncate it.
  """

  whole = True
  in_bfloat16 = True

  def carry(self, batch):
    return jnp.zeros((batch['item'].shape[0], self.width))

  def encode(self, events, carry, train):
    del train
    x_BTD, mask_BT, *_ = events
    h_BTQD, last_BQD = GRU(self.width, self.dtype, name='gru')(x_BTD, mask_BT, None, carry)
    return Vectors(h_BTQD[:, :, 0], stop(last_BQD[:, 0]))
