"""A click model: a weighted mean of the history, in which old events have less weight."""

import jax.numpy as jnp

from lmn_jax.layers.basic import repeat
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Forgetting(CTRModel):
  """`encode = sum_l w_l s_l / sum_l w_l`, `w_l = mask_l exp(-age_l / horizon)`.

  Attributes:
    horizon: age, in events, at which a weight is 1 / e.
  """

  horizon: int = 10
  positive_fields = ('horizon',)

  def encode(self, x, batch, read, train):
    position_L = jnp.arange(x.s_BLI.shape[1])
    age_BL = batch['length'][:, None] - 1 - position_L[None]
    weight_BL = jnp.exp(-age_BL.astype(jnp.float32) / self.horizon)
    weight_BL = jnp.where(x.mask_BL, weight_BL, 0)
    total_B1 = jnp.maximum(jnp.sum(weight_BL, axis=1, keepdims=True), 1e-6)
    pooled_BI = jnp.einsum('bl,bli->bi', weight_BL / total_B1, x.s_BLI)
    return Encoded(repeat(pooled_BI, x.i_BQI.shape[1]))
