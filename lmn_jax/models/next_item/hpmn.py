"""HPMN: a memory whose slots are updated at periods of 1, 2, 4, ... events.

Ren et al., Lifelong Sequential Modeling with Personalized Memorization for User Response
Prediction, SIGIR 2019.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.basic import stop
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.layers.recurrent import gru_cell, product, time_major
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class Slots(NamedTuple):
  """count_B: number of events. slots_BJD: the memory, slot j of the j-th layer."""

  count_B: Int[Array, 'B']
  slots_BJD: Float[Array, 'B J D']


def covariance(slots_BJD: Float[Array, 'B J D']) -> Float[Array, 'B']:
  """`1/2 (|C|^2 - |diag C|^2)`, C the covariance of the slots over their D numbers (equation 8).

  Squared norms as in the paper [paper]; the code has `|C - diag C|`.
  """
  centred_BJD = slots_BJD - jnp.mean(slots_BJD, axis=2, keepdims=True)
  c_BJJ = jnp.einsum('bid,bjd->bij', centred_BJD, centred_BJD) / slots_BJD.shape[2]
  variance_BJ = jnp.einsum('bjj->bj', c_BJJ)
  return 0.5 * (jnp.sum(jnp.square(c_BJJ), axis=(1, 2)) - jnp.sum(jnp.square(variance_BJ), axis=1))


class HPMN(NextItemModel):
  """A hierarchy of GRUs with growing periods, read by attention (section 3); x_t is layer 0.

      m^j_t = GRU_j(m^{j-1}_t, m^j_{t-1})   if period^(j-1) divides t, else m^j_{t-1}    4, 5
      w_j   = softmax_j(E(m^j_t, q)),  E an MLP of [m ; q ; m * q]                    2
      r_t   = sum_j w_j m^j_t                                                   3
      v_t   = W [r_t ; q] + b
      L     = L_next + lambda L_covariance                                            7, 8

  In the paper the query q is the candidate. Here it is the newest event, because all items are
  candidates. [ours] There is one hop; the authors use three, each adding its result to the query.
  [ours] The slots are carried from segment to segment without their gradient. lambda is
  config.loss.covariance_weight.

  Attributes:
    slots: J.
    period: ratio of the periods of successive layers; 2 in the paper.
  """

  slots: int = 6
  period: int = 2
  positive_fields = ('negatives', 'slots', 'period')
  loss_weights = {'covariance': 1e-3}  # lambda
  whole = True

  def carry(self, batch):
    B = batch['item'].shape[0]
    return Slots(jnp.zeros(B, jnp.int32), jnp.zeros((B, self.slots, self.width)))

  def encode(self, events, carry, train):
    x_BTD, mask_BT, *_ = events
    D, J = x_BTD.shape[2], self.slots
    init = nn.initializers.lecun_normal(batch_axis=0)
    # Matrices in the compute type; the slots, which hundreds of steps update, are float32.
    weights = (
      self.param('input', init, (J, D, 3 * D)).astype(self.dtype),
      self.param('recurrent', init, (J, D, 3 * D)).astype(self.dtype),
      self.param('bias', nn.initializers.zeros, (J, 3 * D)),
    )

    def run(weights, carry, x_BTD, mask_BT):
      input_JDG, recurrent_JDG, bias_JG = weights

      def step(carry, inputs):
        x_BD, real_B = inputs
        count_B = carry.count_B + 1
        below_BD, slots = x_BD, []
        for j in range(J):
          x_BG = product(below_BD, input_JDG[j]) + bias_JG[j][None]
          new_BD = gru_cell(x_BG, carry.slots_BJD[:, j], recurrent_JDG[j])
          due_B = real_B & (count_B % self.period**j == 0)
          below_BD = jnp.where(due_B[:, None], new_BD, carry.slots_BJD[:, j])
          slots.append(below_BD)
        carry = Slots(jnp.where(real_B, count_B, carry.count_B), jnp.stack(slots, axis=1))
        return carry, carry.slots_BJD

      carry, slots_TBJD = jax.lax.scan(step, carry, (time_major(x_BTD), time_major(mask_BT)))
      return carry, time_major(slots_TBJD)

    # On each device separately: XLA would sum the weights' gradient over all devices at every step.
    in_specs = (meshes.REPLICATED, meshes.BATCH, meshes.BATCH, meshes.BATCH)
    run = meshes.each_device(run, in_specs, meshes.BATCH)
    carry, m_BTJD = run(weights, carry, x_BTD, mask_BT)

    # One hop, and an MLP with one hidden layer; in the code it has two, and m - q as input. [ours]
    x_BTD, k_BTJD = x_BTD.astype(self.dtype), m_BTJD.astype(self.dtype)
    q_BTJD = jnp.broadcast_to(x_BTD[:, :, None], k_BTJD.shape)
    pair_BTJE = jnp.concatenate([k_BTJD, q_BTJD, k_BTJD * q_BTJD], axis=-1)
    hidden_BTJD = nn.relu(nn.Dense(D, dtype=self.dtype, name='asked')(pair_BTJE))
    energy_BTJ1 = nn.Dense(1, dtype=jnp.float32, name='energy')(hidden_BTJD)  # for the softmax
    weight_BTJ = nn.softmax(energy_BTJ1[..., 0], axis=-1).astype(self.dtype)
    r_BTD = jnp.einsum('btj,btjd->btd', weight_BTJ, k_BTJD)
    out = nn.Dense(D, dtype=self.dtype, name='out')
    v_BTD = out(jnp.concatenate([r_BTD, x_BTD], axis=-1))
    losses = {}
    if train:
      weight_B = jnp.any(mask_BT, axis=1).astype(jnp.float32)
      losses = {'covariance': weighted_mean(covariance(m_BTJD[:, -1]), weight_B)}
    return Vectors(v_BTD, jax.tree.map(stop, carry), losses)
