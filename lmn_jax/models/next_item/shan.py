"""SHAN: two user attentions, over the long-term set and over its sum with the short-term set.

Ying et al., Sequential Recommender System based on Hierarchical Attention Network, IJCAI 2018.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmn_jax.layers.basic import stop
from lmn_jax.layers.prefix_attention import Sums, last_of, mean_of, merge, no_events, prefixes
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class SHAN(NextItemModel):
  """Two attention layers with the user's row u as query (section 4).

      a_j    = u . relu(W1 v_j + b1)                        1, 2: over the long-term set
      u_long = sum_j softmax(a)_j v_j                       3
      b_j    = u . relu(W2 v_j + b2)                        4, 5: over {u_long} and the short-term
      v      = sum_j softmax(b)_j v_j                       6

  The short-term set is the segment up to the event. The long-term set is the whole history up to
  the event. Its part before the segment is carried as sums, computed with the parameters of an
  earlier step and without a gradient. In the paper the long-term set ends before the session; here
  W1 would then get no gradient. [ours]
  """

  whole = True
  reads_user = True

  def carry(self, batch):
    return no_events(batch['item'].shape[0], self.width)

  def encode(self, events, carry, train):
    x_BTD, mask_BT, u_BD, *_ = events
    B, _, D = x_BTD.shape
    del train
    first, second = (nn.Dense(D, dtype=self.dtype, name=name) for name in ('first', 'second'))

    # The layers compute in the compute type. Scores and sums are float32: they are exponents, and
    # sums over a whole history.
    def score(layer, v):
      return jnp.einsum('bd,b...d->b...', u_BD, nn.relu(layer(v)).astype(jnp.float32))

    long = prefixes(score(first, x_BTD), x_BTD, mask_BT, carry)
    long_BTD = mean_of(long)
    short = prefixes(score(second, x_BTD), x_BTD, mask_BT, no_events(B, D))
    long_event = Sums(score(second, long_BTD), jnp.ones(mask_BT.shape), long_BTD)
    return Vectors(mean_of(merge(short, long_event)), jax.tree.map(stop, last_of(long)))
