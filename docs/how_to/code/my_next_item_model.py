"""A next-item model: a moving average of the events."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmn_jax.layers.basic import stop
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class MovingAverage(NextItemModel):
  """`v_t = v_{t-1} + a (x_t - v_{t-1})`, with a trained rate a in (0, 1) for each dimension."""

  whole = True  # the state of a user is carried from segment to segment

  def carry(self, batch):
    return jnp.zeros((batch['item'].shape[0], self.width))

  def encode(self, events, carry, train):
    rate_D = nn.sigmoid(self.param('rate', nn.initializers.zeros, (self.width,)))

    def step(v_BD, event):
      x_BD, mask_B = event
      next_BD = v_BD + rate_D[None] * (x_BD - v_BD)
      v_BD = jnp.where(mask_B[:, None], next_BD, v_BD)
      return v_BD, v_BD

    by_time = events.x_BTD.swapaxes(0, 1), events.mask_BT.T
    last_BD, v_TBD = jax.lax.scan(step, carry, by_time)
    return Vectors(v_TBD.swapaxes(0, 1), stop(last_BD))
