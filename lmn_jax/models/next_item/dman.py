"""DMAN: a memory of each user's past, updated segment by segment.

Tan et al., Dynamic Memory based Attention Network for Sequential Recommendation, AAAI 2021.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.errors import one_of
from lmn_jax.layers.basic import MLP, rows_at, stop
from lmn_jax.layers.capsules import MAPS, Routing
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.layers.self_attention import Kernel, attend_few
from lmn_jax.models.next_item.base import NextItemModel, Vectors

VARIANTS = ('full', 'xl', 'fifo', 'nran')


class Past(NamedTuple):
  """The carried state of a user, by layer; it gets no gradient.

  hidden_BLTD: inputs of the layers in the previous segment. there_BT: True on its real events.
  memory_BLMD: M of each layer.
  """

  hidden_BLTD: Float[Array, 'B L T D']
  there_BT: Bool[Array, 'B T']
  memory_BLMD: Float[Array, 'B L M D']


class Attention(nn.Module):
  """Multi-head attention `softmax(q K^T / sqrt(D / H) + bias) V` (DMAN, equations 1 and 2).

  The paper has one head, no root, and no norm, residual or feed-forward layer around it. [ours]

  Attributes:
    heads: H.
    dtype: compute type of the products; the softmax is float32.
  """

  heads: int = 1
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    query_BTD: Float[Array, 'B T D'],
    memory_BSD: Float[Array, 'B S D'],
    mask_BTS: Bool[Array, '#B #T S'],
    bias_BHTS: Float[Array, '#B H T S'] | None = None,
    few: bool = False,
  ) -> Float[Array, 'B T D']:
    """Computes the attention; zeros for an empty mask. few: use `attend_few`, for few queries."""
    D, H = query_BTD.shape[-1], self.heads
    query, memory = query_BTD.astype(self.dtype), memory_BSD.astype(self.dtype)
    query_DHE, key_DHE, value_DHE = (
      Kernel(D, name=name)(D).astype(self.dtype).reshape(D, H, D // H)
      for name in ('query', 'key', 'value')
    )
    q = jnp.einsum('btd,dhe->bthe', query, query_DHE)
    if few:
      out = attend_few(q, memory, key_DHE, value_DHE, mask_BTS, bias_BHTS)
      return out.reshape(query_BTD.shape).astype(jnp.float32)
    k, v = (jnp.einsum('bsd,dhe->bshe', memory, x) for x in (key_DHE, value_DHE))
    score_BHTS = jnp.einsum('bthe,bshe->bhts', q, k, preferred_element_type=jnp.float32)
    score_BHTS = score_BHTS / (D // H) ** 0.5
    if bias_BHTS is not None:
      score_BHTS = score_BHTS + bias_BHTS
    score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS, -1e30)
    weight_BHTS = jnp.where(mask_BTS[:, None], nn.softmax(score_BHTS, axis=-1), 0)
    out = jnp.einsum('bhts,bshe->bthe', weight_BHTS.astype(self.dtype), v)
    return out.reshape(query_BTD.shape).astype(jnp.float32)


class DMAN(NextItemModel):
  """Short-term attention over two segments, long-term attention over the memory, and a gate.

      S^l = Atten_rec(S^{l-1}; [S^{l-1} ; SG(S_prev^{l-1})])        1: causal in the segment
      E^l = Atten(E^{l-1}; M^{l-1})                                 2
      v   = g * S^L + (1 - g) * E^L,  g = sigmoid(S^L W_s + E^L W_l)     3
      M^l <- f_abs(M^l, S_prev^l)                                   4, 6-8: capsules.py
      L_ae = sum_l | Atten_rec(S^l; [M^l ; S_prev^l]) - Atten_rec(S^l; M^l new) |^2,
             l = 0 .. L - 1                                         5

  S^0 and E^0 are the rows of the events with positions. A segment reads the memory before it is
  updated with the segment that leaves the window. The carried state was computed with parameters of
  earlier steps and gets no gradient. So the next-item loss does not train f_abs, and L_ae, whose
  inputs and attention weights have stopped gradients, trains only f_abs. Both are minimised in one
  step; the paper uses two. [ours]
  L_ae is a mean over positions and width instead of a sum, so that it does not depend on their
  size. [ours] In the paper, l is 1 .. L, so the query of an attention in L_ae is its output; here
  the query is its input, as in equation 1. [ours] L_ae has no distance bias, because slots have no
  positions. [ours]

  The two attentions are in blocks as in the transformers that the paper cites: a norm before, a
  residual around, a feed-forward layer after, and a norm after the gate. [ours] Keys have a bias by
  their distance from the query, up to 2 T - 1, because positions within a segment do not
  distinguish two segments. [ours] The initial memory of a user is a parameter, trained by the
  next-item loss; the paper does not say. [ours]

  Attributes:
    blocks: L, layers of both attentions.
    heads: of each attention.
    slots: m, of each layer's memory.
    segment: T; it is config.history_length.
    routing_map, iterations: of f_abs (capsules.Routing).
    variant: 'full'; 'xl' without the long-term part; 'fifo' with a memory of the newest m events
      instead of f_abs; 'nran' without the previous segment.
  """

  blocks: int = 2
  heads: int = 1
  slots: int = 20
  routing_map: str = 'shared'
  iterations: int = 3
  variant: str = 'full'
  positive_fields = ('negatives', 'blocks', 'heads', 'slots', 'iterations')
  loss_weights = {'reconstruction': 1.0}  # L_ae, the only loss that trains f_abs
  whole = True
  picks = True

  def check(self):
    super().check()
    one_of('config.model.variant', self.variant, VARIANTS)
    one_of('config.model.routing_map', self.routing_map, MAPS)

  def carry(self, batch):
    (B, T), L, D = batch['item'].shape, self.blocks, self.width
    past = jnp.zeros((B, L, T, D)), jnp.zeros((B, T), bool), jnp.zeros((B, L, self.slots, D))
    return Past(*past)

  def start(self, batch):
    shape = self.blocks, self.slots, self.width
    first_LMD = self.param('memory', nn.initializers.normal(1.0), shape)
    empty = self.carry(batch)
    return empty._replace(memory_BLMD=empty.memory_BLMD + first_LMD[None])

  @property
  def long_term(self) -> bool:
    """Whether the variant has a memory."""
    return self.variant != 'xl'

  def encode(self, events, carry, train):
    x_BTD, mask_BT, *_ = events
    T, D = x_BTD.shape[1:]
    past = Past(*map(stop, carry))  # `carry` keeps the gradient of the initial memory
    seen_BTS, bias_BHTS = self._window(mask_BT, past.there_BT)
    position_TD = self.param('positions', nn.initializers.normal(0.02), (T, D))
    x_BTD = x_BTD + position_TD[None]

    # The last layer is computed only at output_BP: the carried state does not need its outputs.
    output_BP = events.output_BP
    few = output_BP is not None
    short_BTD, levels = x_BTD, []
    for k in range(self.blocks):
      levels.append(short_BTD)
      window_BSD = jnp.concatenate([past.hidden_BLTD[:, k], short_BTD], axis=1)
      last = few and k == self.blocks - 1
      if last:
        short_BTD = rows_at(short_BTD, output_BP)
        seen_BTS = jnp.take_along_axis(seen_BTS, output_BP[:, :, None], axis=1)
        bias_BHTS = jnp.swapaxes(bias_BHTS[0][:, output_BP], 0, 1)
      short_BTD = self._block(f'short_{k}', short_BTD, window_BSD, seen_BTS, bias_BHTS, train, last)
    v_BTD = short_BTD
    if self.long_term:
      long_BTD = rows_at(x_BTD, output_BP) if few else x_BTD
      every_BTM = jnp.ones((1, 1, self.slots), bool)
      for k in range(self.blocks):
        memory_BMD = carry.memory_BLMD[:, k]
        long_BTD = self._block(f'long_{k}', long_BTD, memory_BMD, every_BTM, None, train, few)
      gate_short, gate_long = (
        nn.Dense(D, use_bias=False, dtype=self.dtype, name=name)(z_BTD).astype(jnp.float32)
        for name, z_BTD in (('gate_short', short_BTD), ('gate_long', long_BTD))
      )
      gate = nn.sigmoid(gate_short + gate_long)
      v_BTD = gate * short_BTD + (1 - gate) * long_BTD
    v_BTD = nn.LayerNorm(name='norm')(v_BTD)  # the paper scores with the gated sum. [ours]

    memory_BLMD, loss = self._update_memory(past, levels, mask_BT, train)
    carry = Past(stop(jnp.stack(levels, axis=1)), mask_BT, stop(memory_BLMD))
    return Vectors(v_BTD, carry, {'reconstruction': loss} if loss is not None else {})

  def _dropout(self, x, train):
    return nn.Dropout(self.dropout, deterministic=not train)(x)

  def _block(self, name, x_BTD, memory_BSD, mask_BTS, bias_BHTS, train, few=False):
    """Attention and a feed-forward layer, each with a norm and a residual connection."""
    D = x_BTD.shape[-1]
    norm = nn.LayerNorm(name=f'{name}_norm')
    attention = Attention(self.heads, self.dtype, name=name)
    attended_BTD = attention(norm(x_BTD), norm(memory_BSD), mask_BTS, bias_BHTS, few)
    x_BTD = x_BTD + self._dropout(attended_BTD, train)
    hidden_BTD = nn.LayerNorm(name=f'{name}_norm_2')(x_BTD)
    hidden_BTD = MLP((D,), D, activation='gelu', dtype=self.dtype, name=f'{name}_feed')(hidden_BTD)
    return x_BTD + self._dropout(hidden_BTD.astype(jnp.float32), train)

  def _window(self, mask_BT, there_BT):
    """Returns the mask [B, T, 2 T] of the keys of two segments, and the bias [1, H, T, 2 T]."""
    T = mask_BT.shape[1]
    before_BT = there_BT & (self.variant != 'nran')
    # Event j of the previous segment is at distance T + t - j from event t of this segment.
    distance_TS = T + jnp.arange(T)[:, None] - jnp.arange(2 * T)[None, :]
    seen_BTS = (distance_TS >= 0)[None] & jnp.concatenate([before_BT, mask_BT], axis=1)[:, None]
    bias_HN = self.param('distance', nn.initializers.zeros, (self.heads, 2 * T))
    return seen_BTS, bias_HN[None, :, jnp.maximum(distance_TS, 0)]

  def _update_memory(self, past, levels, mask_BT, train):
    """Updates the memory of each layer with the previous segment; returns it and L_ae or None."""
    if not self.long_term:
      return past.memory_BLMD, None
    has_past_B11 = jnp.any(past.there_BT, axis=1)[:, None, None]
    memories, loss = [], 0.0
    for k, level_BTD in enumerate(levels):
      memory_BMD, before_BTD = past.memory_BLMD[:, k], past.hidden_BLTD[:, k]
      if self.variant == 'fifo':
        new_BMD = jnp.concatenate([memory_BMD, before_BTD], axis=1)[:, -self.slots :]
      else:
        routing = Routing(self.routing_map, self.iterations, self.dtype, name=f'abstract_{k}')
        new_BMD = routing(memory_BMD, before_BTD, past.there_BT)
        if train:
          loss = loss + self._reconstruction(k, stop(level_BTD), past, new_BMD, mask_BT)
      memories.append(jnp.where(has_past_B11, new_BMD, memory_BMD))
    return jnp.stack(memories, axis=1), loss if train and self.variant != 'fifo' else None

  def _reconstruction(self, k, query_BTD, past, new_BMD, mask_BT):
    """Equation 5 for a layer: attention to the new memory against attention to its inputs.

    Args:
      query_BTD: the input of the layer, S^{l-1}; in the paper its output, S^l. [ours]
    """
    # The attention weights get no gradient here. Without the distance bias, because slots have no
    # positions. [ours]
    norm, attention = nn.LayerNorm(parent=None), Attention(self.heads, self.dtype, parent=None)
    weights = jax.tree.map(stop, self.variables['params'])

    def read(memory_BSD, mask_BS):
      memory_BSD, query = (
        norm.apply({'params': weights[f'short_{k}_norm']}, x) for x in (memory_BSD, query_BTD)
      )
      return attention.apply({'params': weights[f'short_{k}']}, query, memory_BSD, mask_BS[:, None])

    memory_BMD = past.memory_BLMD[:, k]
    every_BM = jnp.ones(memory_BMD.shape[:2], bool)
    old_BSD = jnp.concatenate([memory_BMD, past.hidden_BLTD[:, k]], axis=1)
    target_BTD = read(old_BSD, jnp.concatenate([every_BM, past.there_BT], axis=1))
    new_BTD = read(new_BMD, every_BM)
    # Without a previous segment there is nothing to reconstruct.
    weight_BT = mask_BT & jnp.any(past.there_BT, axis=1, keepdims=True)
    error_BT = jnp.mean(jnp.square(new_BTD - target_BTD), axis=-1)
    return weighted_mean(error_BT, weight_BT.astype(jnp.float32))
