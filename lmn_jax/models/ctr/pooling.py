"""Pooling: the mean of the embeddings of the history.

Covington et al., Deep Neural Networks for YouTube Recommendations, RecSys 2016.
"""

from lmn_jax.layers.basic import masked_mean, repeat
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Pooling(CTRModel):
  """The mean of the behaviours (section 3), zeros for an empty history.

  encode = sum_l mask_l s_l / sum_l mask_l
  """

  def encode(self, x, batch, read, train):
    return Encoded(repeat(masked_mean(x.s_BLI, x.mask_BL), x.i_BQI.shape[1]))
