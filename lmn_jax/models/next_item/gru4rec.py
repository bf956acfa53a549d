"""GRU4Rec: the state of a GRU over all events.

Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016.
"""

import jax.numpy as jnp

from lmn_jax.layers.basic import stop
from lmn_jax.layers.recurrent import GRU
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class GRU4Rec(NextItemModel):
  """A GRU over the events (section 3).

      h_t = GRU(x_t, h_{t-1})
      v_t = h_t                      the score of item i is h_t . e_i

  The state is as wide as a row, so that input and output share the rows of the items; the paper has
  separate output weights. [ours] The state is carried from segment to segment without its gradient,
  as in the paper's parallel mini-batches.
  """

  whole = True

  def carry(self, batch):
    return jnp.zeros((batch['item'].shape[0], self.width))

  def encode(self, events, carry, train):
    del train
    x_BTD, mask_BT, *_ = events
    h_BTQD, last_BQD = GRU(self.width, self.dtype, name='gru')(x_BTD, mask_BT, None, carry)
    return Vectors(h_BTQD[:, :, 0], stop(last_BQD[:, 0]))
