"""MIMN: a small memory of each user, to which the history is written event by event.

Pi et al., Practice on Long Sequential User Behavior Modeling for Click-Through Rate Prediction, KDD
2019.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import history_weight
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.layers.recurrent import gru_cell, product, time_major
from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Weights(NamedTuple):
  """The weights of every step, matrices in the compute type; G and J are the gates of a GRU.

  name_SI: names of the slots, part of their addresses. read_IG, state_EG: the controller's weights
  of the last read and of its state. heads_EH, bias_H: the controller's heads
  [k ; k' ; erase ; add ; sharp, sharp'], H = 4 I + 2. utilise_SS: W_g, or None without balance.
  slot_IJ, channel_IJ: induction weights of a slot and of the channel's state, or None.
  """

  name_SI: Array
  read_IG: Array
  state_EG: Array
  heads_EH: Array
  bias_H: Array
  utilise_SS: Array | None = None
  slot_IJ: Array | None = None
  channel_IJ: Array | None = None


class UserState(NamedTuple):
  """The state after a history, float32; S slots, each as wide as a behaviour.

  h_BE: the controller. r_BI: the last read. M_BSI: the memory. w_BS: the sum of write weights.
  channel_BSI: the induced memory, which the paper calls S; width 0 without induction.
  """

  h_BE: Float[Array, 'B E']
  r_BI: Float[Array, 'B I']
  M_BSI: Float[Array, 'B S I']
  w_BS: Float[Array, 'B S']
  channel_BSI: Float[Array, 'B S J']


def address(
  key_BI: Float[Array, 'B I'],
  sharp_B: Float[Array, 'B'],
  name_SI: Float[Array, 'S I'],
  M_BSI: Float[Array, 'B S I'],
) -> Float[Array, 'B S']:
  """`w(s) = softmax_s(sharp * (cosine(key, name(s)) + cosine(key, M(s))) / 2)`: [B, S].

  Equations 1 and 2 have neither `sharp`, without which no weight could exceed e^2 times another,
  nor the names of the slots (`key_M` in the code), which distinguish empty slots. [code]
  """
  cosine_BS = (cosine(key_BI, name_SI[None]) + cosine(key_BI, M_BSI)) / 2
  return nn.softmax(sharp_B[:, None] * cosine_BS, axis=-1)


def cosine(key_BI: Float[Array, 'B I'], x_BSI: Float[Array, '#B S I']) -> Float[Array, 'B S']:
  """The cosine of a key and each slot."""
  # The norm has no gradient at zero, so a small number is added.
  norm_BS = jnp.sqrt(jnp.sum(jnp.square(x_BSI), axis=-1) + 1e-12)
  norm_B1 = jnp.sqrt(jnp.sum(jnp.square(key_BI), axis=-1, keepdims=True) + 1e-12)
  return jnp.sum(key_BI[:, None] * x_BSI, axis=-1) / (norm_BS * norm_B1)


def write(
  M_BSI: Float[Array, 'B S I'],
  w_BS: Float[Array, 'B S'],
  erase_BI: Float[Array, 'B I'],
  add_BI: Float[Array, 'B I'],
) -> Float[Array, 'B S I']:
  """Computes `M' = (1 - w (x) erase) * M + w (x) add` (equation 4)."""
  w_BS1 = w_BS[:, :, None]
  return (1 - w_BS1 * erase_BI[:, None]) * M_BSI + w_BS1 * add_BI[:, None]


def unevenness(w_BS: Float[Array, 'B S']) -> Float[Array, 'B']:
  """Computes `sum_s (w(s) - mean_s w(s))^2` of each example (equation 8, without its lambda)."""
  return jnp.sum(jnp.square(w_BS - jnp.mean(w_BS, axis=1, keepdims=True)), axis=1)


def attend(weights: Weights, state: UserState, x_BG: Float[Array, 'B G']) -> tuple:
  """Runs a step of the controller (equations 1 to 3).

  Args:
    weights: of all steps. state: before the step. x_BG: the input's part of the gates.

  Returns:
    The controller's state [B, E], its read [B, I], the read weights [B, S], and the write heads:
    key [B, I], sharpness [B], erase and add [B, 2 I] before their activations.
  """
  B, width = state.r_BI.shape
  x_BG = x_BG.astype(jnp.float32) + product(state.r_BI, weights.read_IG)
  h_BE = gru_cell(x_BG, state.h_BE, weights.state_EG)
  heads_BH = product(h_BE, weights.heads_EH) + weights.bias_H[None, :]
  keys_B2I = jnp.tanh(heads_BH[:, : 2 * width]).reshape(B, 2, width)
  sharp_B2 = 2 * (nn.softplus(heads_BH[:, 4 * width :]) + 1)
  w_BS = address(keys_B2I[:, 0], sharp_B2[:, 0], weights.name_SI, state.M_BSI)
  writing = keys_B2I[:, 1], sharp_B2[:, 1], heads_BH[:, 2 * width : 4 * width]
  return h_BE, jnp.einsum('bs,bsi->bi', w_BS, state.M_BSI), w_BS, writing


def remember(weights: Weights, M_SI: Float[Array, 'S I'], inputs: tuple, top_k: int) -> UserState:
  """Returns the state after a history.

  Args:
    weights: of all steps. M_SI: the initial memory of all users.
    inputs: the events' part of the gates of the controller [B, L, G] and of the channels [B, L, J]
      (or None), and the mask of real events, bool [B, L]. top_k: channels that an event updates.
  """
  B, (S, width), E = inputs[0].shape[0], M_SI.shape, len(weights.state_EG)

  def step(state, inputs):
    x_BG, x_BJ, real_B = inputs
    h_BE, r_BI, read_BS, (key_BI, sharp_B, change_B2I) = attend(weights, state, x_BG)
    write_BS = address(key_BI, sharp_B, weights.name_SI, state.M_BSI)
    if weights.utilise_SS is not None:
      write_BS = write_BS * nn.softmax(state.w_BS @ weights.utilise_SS, axis=-1)
    erase_BI, add_BI = jnp.split(change_B2I, 2, axis=-1)
    M_BSI = write(state.M_BSI, write_BS, nn.sigmoid(erase_BI), jnp.tanh(add_BI))
    channel_BSI = state.channel_BSI
    if x_BJ is not None:
      x_BSJ = x_BJ[:, None].astype(jnp.float32) + product(M_BSI, weights.slot_IJ)
      new_BSI = gru_cell(x_BSJ, channel_BSI, weights.channel_IJ)
      chosen_BK = jax.lax.top_k(read_BS, top_k)[1]
      chosen_BS = jnp.any(chosen_BK[:, :, None] == jnp.arange(S)[None, None, :], axis=1)
      channel_BSI = jnp.where(chosen_BS[:, :, None], new_BSI, channel_BSI)
    new = UserState(h_BE, r_BI, M_BSI, state.w_BS + write_BS, channel_BSI)

    def select(new, old):
      """The new state on real events, the old state on padding."""
      return jnp.where(real_B.reshape(B, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(select, new, state), None

  state = UserState(
    jnp.zeros((B, E)),
    jnp.zeros((B, width)),
    jnp.broadcast_to(M_SI[None], (B, S, width)),
    jnp.zeros((B, S)),
    jnp.zeros((B, S, 0 if inputs[1] is None else width)),
  )
  # The gradient recomputes each step: storing the steps needs three times the memory and is not
  # faster.
  return jax.lax.scan(jax.checkpoint(step), state, jax.tree.map(time_major, inputs))[0]


class MIMN(CTRModel):
  """A neural Turing machine with balanced writes and induction channels (section 4, equations 1-9).

      h_t      = GRU([s_t ; r_{t-1}], h_{t-1})                          the controller [code]
      k, sharp, k', sharp', erase, add = heads(h_t)
      w^r, w^w = address(k, M_{t-1}), address(k', M_{t-1})              1, 2 [code: names]
      r_t      = sum_s w^r(s) M_{t-1}(s)                                3
      w~       = w^w * softmax(W_g sum_{c<t} w~_c)                      5, 6: utilisation
      M_t      = write(M_{t-1}, w~, erase, add)                         4
      S_t(s)   = GRU([M_t(s) ; s_t], S_{t-1}(s)) for the top k of w^r   9: induction
      encode   = [h' ; r' ; a(e_i, S_T)]          h', r' of one more step that reads for e_i [code]
      L        = BCE + lambda L_reg                                     8
      L_reg    = mean_b unevenness(sum_t w~_t) / (S^2 B)                [code: the divisor]

  lambda is config.loss.balance_weight, .001 in the code. The code divides the mean over B examples
  and S slots by S B, so the effective weight falls with the batch size.

  The sum of equation 5 includes w~_t, which it defines; here it ends before t. [ours] The initial
  memory is a parameter; in the paper it is random, in the code a fixed draw of scale 1e-5. [ours]
  The read for the target is from the released code, because the paper shows it in a figure only;
  `a` is DIN's unit over the S channels. [code]

  Where paper and code differ, we follow the paper [paper]:
  w~ is that of equations 5 and 6; the code shifts and sharpens w^w and gives the sum of weights to
  the heads. L_reg trains everything that w~ depends on; in the code, only shift and sharpening. A
  channel reads the slot after the write, with a gradient; in the code, before it and without one.

  Parts of the code that are left out [ours]: the bound of 20 on the heads, a learned first r, a
  dense layer over [h' ; r'], the auxiliary loss, and the sums of the behaviours and of the added
  vectors as features.

  Attributes:
    slots: S, of the memory and of the channels; 4 to 8 in the paper.
    controller: E, width of the controller's state.
    balance: whether write weights are rescaled by the utilisation of the slots, with L_reg.
    induction: whether there are channels beside the memory.
    top_k: channels that an event updates; 1 in the released code.
    attention: hidden width of the unit over the channels.
  """

  slots: int = 4
  controller: int = 32
  balance: bool = True
  induction: bool = True
  top_k: int = 1
  attention: int = 32
  positive_fields = ('slots', 'controller', 'top_k', 'attention')
  loss_weights = {'balance': 1e-3}  # lambda; as in the released code L_reg is divided by S^2 B

  def check(self):
    super().check()
    if self.top_k > self.slots:
      raise UserError(
        f'config.model.top_k={self.top_k} is larger than slots={self.slots}, the number of '
        f'channels; use at most {self.slots}'
      )

  def _weight(self, name, *shape):
    return self.param(name, nn.initializers.lecun_normal(), shape).astype(self.dtype)

  def encode(self, x, batch, read, train):
    width, E, S = x.i_BQI.shape[-1], self.controller, self.slots
    M_SI = self.param('memory', nn.initializers.normal(0.5), (S, width))
    weights = Weights(
      name_SI=jnp.tanh(self.param('names', nn.initializers.normal(0.5), (S, width))),
      read_IG=self._weight('controller_read', width, 3 * E),
      state_EG=self._weight('controller_recurrent', E, 3 * E),
      heads_EH=self._weight('heads', E, 4 * width + 2),
      bias_H=self.param('heads_bias', nn.initializers.zeros, (4 * width + 2,)),
    )
    if self.balance:
      utilise_SS = self.param('utilise', nn.initializers.lecun_normal(), (S, S))
      weights = weights._replace(utilise_SS=utilise_SS)
    if self.induction:
      weights = weights._replace(
        slot_IJ=self._weight('channel_memory', width, 3 * width),
        channel_IJ=self._weight('channel_recurrent', width, 3 * width),
      )
    # The inputs of all steps are known before the first step: one product for all.
    feed = nn.Dense(3 * E, dtype=self.dtype, name='controller_input')
    induce = nn.Dense(3 * width, dtype=self.dtype, name='channel_input')
    inputs = feed(x.s_BLI), induce(x.s_BLI) if self.induction else None, x.mask_BL
    # On each device separately: XLA would sum gradients and gather channels over all devices at
    # every step.
    run = meshes.each_device(
      functools.partial(remember, top_k=self.top_k),
      (meshes.REPLICATED, meshes.REPLICATED, meshes.BATCH), meshes.BATCH,
    )  # fmt: skip
    state = run(weights, M_SI, inputs)

    h_BQE, r_BQI, *_ = jax.vmap(attend, (None, None, 1), 1)(weights, state, feed(x.i_BQI))
    features = [h_BQE.astype(self.dtype), r_BQI.astype(self.dtype)]
    if self.induction:
      unit = TargetAttention(self.attention, dtype=self.dtype, name='attention')
      every_BS = jnp.ones(state.w_BS.shape, bool)
      features.append(unit(x.i_BQI, state.channel_BSI.astype(self.dtype), every_BS)[0])

    def losses(logit):
      if not self.balance:
        return {}
      uneven = weighted_mean(unevenness(state.w_BS), history_weight(batch))
      return {'balance': uneven / (S * S * len(state.w_BS))}

    return Encoded(jnp.concatenate(features, axis=-1), losses)
