"""MIMN: a history written event by event into a small memory of its user (Pi et al. 2019)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.layers.recurrent import gru_cell, time_major
from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Weights(NamedTuple):
  """What every step multiplies by, products in the compute type; G and J are the gates of a GRU.

  name_SI: of the slots, what they are addressed by beside their content. read_IG, state_EG: the
  controller, of what was read and of its state. heads_EH, bias_H: its heads
  [k ; k' ; erase ; add ; sharp, sharp'], H = 4 I + 2. utilise_SS: W_g, or None without balance.
  slot_IJ, channel_IJ: induction, of a slot and of the channel's state, or None.
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
  """What is kept of a history, float32; S slots, each as wide as a behaviour.

  h_BE: the controller. r_BI: what was read last. M_BSI: the memory. w_BS: weights written so far.
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

  Equations 1 and 2 have neither `sharp`, without which no weight could be e^2 times another, nor
  the names of the slots, the code's `key_M`, by which they are told apart before they hold
  anything. [code]
  """
  cosine_BS = (cosine(key_BI, name_SI[None]) + cosine(key_BI, M_BSI)) / 2
  return nn.softmax(sharp_B[:, None] * cosine_BS, axis=-1)


def cosine(key_BI: Float[Array, 'B I'], x_BSI: Float[Array, '#B S I']) -> Float[Array, 'B S']:
  """Of a key with each slot."""
  # The root of a zero vector's square has no gradient: the sum is kept off zero.
  norm_BS = jnp.sqrt(jnp.sum(jnp.square(x_BSI), axis=-1) + 1e-12)
  norm_B1 = jnp.sqrt(jnp.sum(jnp.square(key_BI), axis=-1, keepdims=True) + 1e-12)
  return jnp.sum(key_BI[:, None] * x_BSI, axis=-1) / (norm_BS * norm_B1)


def write(
  M_BSI: Float[Array, 'B S I'],
  w_BS: Float[Array, 'B S'],
  erase_BI: Float[Array, 'B I'],
  add_BI: Float[Array, 'B I'],
) -> Float[Array, 'B S I']:
  """`M' = (1 - w (x) erase) * M + w (x) add` (equation 4)."""
  w_BS1 = w_BS[:, :, None]
  return (1 - w_BS1 * erase_BI[:, None]) * M_BSI + w_BS1 * add_BI[:, None]


def unevenness(w_BS: Float[Array, 'B S']) -> Float[Array, 'B']:
  """`sum_s (w(s) - mean_s w(s))^2` of each example (equation 8, without its lambda)."""
  return jnp.sum(jnp.square(w_BS - jnp.mean(w_BS, axis=1, keepdims=True)), axis=1)


def product(x: Array, weight: Array) -> Array:
  """`x weight` in the weight's type, as float32."""
  return jnp.matmul(x.astype(weight.dtype), weight).astype(jnp.float32)


def attend(weights: Weights, state: UserState, x_BG: Float[Array, 'B G']) -> tuple:
  """The controller's step (equations 1 to 3).

  Args:
    weights: of all steps. state: before the step. x_BG: the input's part of the gates.

  Returns:
    The controller's state [B, E], what it read [B, I] with which weights [B, S], and the heads of
    writing: key [B, I], sharpness [B], erase and add [B, 2 I] before their activations.
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
  """The state after a history, from the memory that all users begin with.

  Args:
    weights: of all steps. M_SI: the memory at the start.
    inputs: the events' part of the gates of controller [B, L, G] and channels [B, L, J] (or None),
      and where there is an event, bool [B, L]. top_k: channels that an event moves.
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
      moved_BSI = gru_cell(x_BSJ, channel_BSI, weights.channel_IJ)
      chosen_BK = jax.lax.top_k(read_BS, top_k)[1]
      chosen_BS = jnp.any(chosen_BK[:, :, None] == jnp.arange(S)[None, None, :], axis=1)
      channel_BSI = jnp.where(chosen_BS[:, :, None], moved_BSI, channel_BSI)
    new = UserState(h_BE, r_BI, M_BSI, state.w_BS + write_BS, channel_BSI)

    def keep(new, old):
      """A padded step leaves everything as it was."""
      return jnp.where(real_B.reshape(B, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(keep, new, state), None

  state = UserState(
    jnp.zeros((B, E)),
    jnp.zeros((B, width)),
    jnp.broadcast_to(M_SI[None], (B, S, width)),
    jnp.zeros((B, S)),
    jnp.zeros((B, S, 0 if inputs[1] is None else width)),
  )
  # The gradient makes each step anew: kept whole, steps are three times the memory and no faster.
  return jax.lax.scan(jax.checkpoint(step), state, jax.tree.map(time_major, inputs))[0]


class MIMN(CTRModel):
  """Pi et al. 2019, section 4, equations 1-9.

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

  lambda is config.loss.balance_weight, .001 in the code, which takes the mean over B examples and S
  slots and divides it by S B once more: so the weight falls as batches grow.

  Equation 5's sum takes in w~_t, which it makes: here it ends before. [ours] The memory begins as a
  parameter, where the paper has it random, and the code a fixed draw of 1e-5. [ours] What the
  target reads is from the released code, the paper has it in a figure only; `a` is DIN's unit over
  the S channels. [code]
  Where paper and code differ, the paper is followed [paper]: w~ of equations 5 and 6, where the
  code shifts and sharpens w^w and hands the sum of weights to the heads; L_reg moves all that makes
  w~, in the code the shift and the sharpening alone; a channel reads the slot after the write and
  moves it, in the code the slot before and no gradient. Left out of the code [ours]: the bound of
  20 on the heads, a learned first r, a dense layer over [h' ; r'], the auxiliary loss, and as
  features the sums of the behaviours and of what was added.

  Attributes:
    slots: S, of the memory and of the channels; the paper has 4 to 8.
    controller: E, width of the controller's state.
    balance: utilisation: weights that are written again by what was written, and L_reg.
    induction: channels beside the memory.
    top_k: channels moved by an event; 1 in the released code.
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
        f'config.model.top_k={self.top_k} is larger than slots={self.slots}; no more channels than '
        'there are can be moved'
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
    # The inputs of every step are known before the first: one product for all of them.
    feed = nn.Dense(3 * E, dtype=self.dtype, name='controller_input')
    induce = nn.Dense(3 * width, dtype=self.dtype, name='channel_input')
    inputs = feed(x.s_BLI), induce(x.s_BLI) if self.induction else None, x.mask_BL
    # Each device by itself: XLA would sum gradients, and choose channels, over all in every step.
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

    def losses(logit_B):
      if not self.balance:
        return {}
      uneven = weighted_mean(unevenness(state.w_BS), batch['weight'])
      return {'balance': uneven / (S * S * len(state.w_BS))}

    return Encoded(jnp.concatenate(features, axis=-1), losses)
