"""Pooling: the mean of the history's embeddings (YouTube DNN, Covington et al. 2016, section 3)."""

from lmn_jax.layers.basic import masked_mean, repeat
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Pooling(CTRModel):
  """`encode = sum_l mask_l s_l / sum_l mask_l`, zero for an empty history."""

  def encode(self, x, batch, read, train):
    return Encoded(repeat(masked_mean(x.s_BLI, x.mask_BL), x.i_BQI.shape[1]))
