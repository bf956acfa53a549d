"""DIEN: a GRU extracts interests from the history, an AUGRU evolves them towards the target.

Zhou et al., Deep Interest Evolution Network for Click-Through Rate Prediction, AAAI 2019.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.layers.basic import draw_positions, history_weight
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.layers.recurrent import GRU
from lmn_jax.models.ctr.base import CTRModel, Encoded


def sample_negatives(
  key: Array, s_BLI: Float[Array, 'B L I'], history_BL: Array, length_B: Int[Array, 'B']
) -> tuple[Float[Array, 'B L I'], Bool[Array, 'B L']]:
  """Draws a negative for each event from the history of another example.

  The paper draws from all items. Here the draw is from the events of another example in the batch,
  so in proportion to their frequency, because their rows and features are already read. [ours]
  On a mesh this gathers the embedded histories of the batch, in training only.

  Args:
    key: PRNG key.
    s_BLI: behaviours. history_BL: their items. length_B: events of each history.

  Returns:
    The negatives, and a mask: False where the other history is empty or the draw has the item of
    the event.
  """
  B, L = history_BL.shape
  shift_key, position_key = jax.random.split(key)
  # A random shift, because neighbours in a batch often have the same user (batches.py sorts them).
  shift = jax.random.randint(shift_key, (), 1, max(2, B))
  other_B1 = ((jnp.arange(B) + shift) % B)[:, None]
  length_B1 = length_B[other_B1]
  position_BL = draw_positions(position_key, length_B1[:, 0], L)
  differs_BL = history_BL[other_B1, position_BL] != history_BL
  return s_BLI[other_B1, position_BL], differs_BL & (length_B1 > 0)


def auxiliary_loss(
  h_BLI: Float[Array, 'B L I'],
  s_BLI: Float[Array, 'B L I'],
  negative_BLI: Float[Array, 'B L I'],
  weight_BL: Array,
) -> Float[Array, '']:
  """The loss of distinguishing the next behaviour from a sampled one (equation 6).

      L_aux = -sum_{b,t} w_bt [log sigmoid(h_t . e_{t+1}) + log(1 - sigmoid(h_t . e'_{t+1}))]
              / sum_{b,t} w_bt

  The mean is over events and not over examples, so that alpha does not depend on the length of the
  histories. [ours]

  Args:
    h_BLI: states. s_BLI: behaviours e. negative_BLI: e'. weight_BL: w of each e, the example's
      weight where there are e and e', 0 elsewhere.

  Returns:
    float32 scalar, in nats.
  """
  h_BMI, weight_BM = h_BLI[:, :-1], weight_BL[:, 1:]

  def binary(e_BLI, label):
    logit_BM = jnp.sum(h_BMI * e_BLI[:, 1:].astype(jnp.float32), axis=-1)
    return optax.sigmoid_binary_cross_entropy(logit_BM, jnp.full_like(logit_BM, label))

  return weighted_mean(binary(s_BLI, 1) + binary(negative_BLI, 0), weight_BM)


class DIEN(CTRModel):
  """Two recurrent layers, the second with attention to the target (equations 2-12).

      h_t    = GRU(s_t, h_{t-1})                 the extractor, as wide as a behaviour
      a_t    = softmax_t(h_t W e_i)              over the real events
      h'_t   = AUGRU(h_t, h'_{t-1}, a_t)         update gate a_t u_t
      encode = h'_T
      L      = BCE + alpha L_aux                 alpha = config.loss.auxiliary_weight

  The gates are those of recurrent.gru_cell.

  Attributes:
    evolution: width of the state h'.
    auxiliary: whether to train the extractor with L_aux.
  """

  evolution: int = 32
  auxiliary: bool = True
  positive_fields = ('evolution',)
  has_time_bias = True
  loss_weights = {'auxiliary': 1.0}  # alpha, 1 in the released code

  def encode(self, x, batch, read, train):
    width = x.i_BQI.shape[-1]
    h_BL1I, _ = GRU(width, dtype=self.dtype, name='extractor')(x.s_BLI, x.mask_BL)
    h_BLI = h_BL1I[:, :, 0]
    # Attention scales the update gate: float32 for every compute type.
    q_BQI = nn.Dense(width, use_bias=False, dtype=self.dtype, name='attention')(x.i_BQI)
    score_BLQ = jnp.einsum('bli,bqi->blq', h_BLI, q_BQI.astype(jnp.float32))
    bias_BL = self.time_bias(batch)
    if bias_BL is not None:
      score_BLQ = score_BLQ + bias_BL[:, :, None]
    # For an empty history the weights are uniform, and masked steps keep the state.
    a_BLQ = nn.softmax(jnp.where(x.mask_BL[:, :, None], score_BLQ, -1e30), axis=1)
    evolution = GRU(self.evolution, dtype=self.dtype, name='evolution')
    _, interest_BQE = evolution(h_BLI, x.mask_BL, a_BLQ)

    def losses(logit):
      if not self.auxiliary:
        return {}
      negative_BLI, drawn_BL = sample_negatives(
        self.make_rng('positions'), x.s_BLI, batch['history'], batch['length']
      )
      weight_BL = jnp.where(drawn_BL & x.mask_BL, history_weight(batch)[:, None], 0)
      return {'auxiliary': auxiliary_loss(h_BLI, x.s_BLI, negative_BLI, weight_BL)}

    return Encoded(interest_BQE.astype(self.dtype), losses)
