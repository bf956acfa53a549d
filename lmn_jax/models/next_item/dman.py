"""DMAN: a memory of each user's past, updated segment by segment (Tan et al., AAAI 2021)."""

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
  """What a lane carries of its user, layer by layer; what reads it does not train it.

  hidden_BLTD: inputs of the layers in the segment before. there_BT: where there was an event.
  memory_BLMD: M of each layer.
  """

  hidden_BLTD: Float[Array, 'B L T D']
  there_BT: Bool[Array, 'B T']
  memory_BLMD: Float[Array, 'B L M D']


class Attention(nn.Module):
  """`softmax(q K^T / sqrt(D / H) + bias) V`, H heads side by side (DMAN, equations 1 and 2).

  The paper has one head and no root; and neither a norm, a residual nor a feed-forward layer, which
  stand around it in DMAN. [ours]

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
    """Attends; a query that sees nothing finds zeros. few: queries, so `attend_few` is cheaper."""
    D, H = query_BTD.shape[-1], self.heads
    query, memory = query_BTD.astype(self.dtype), memory_BSD.astype(self.dtype)
    query_DHE, key_DHE, value_DHE = (
      Kernel(D, name=name)(D).astype(self.dtype).reshape(D, H, D // H)
      for name in ('query', 'key', 'value')
    )
    q = jnp.einsum('btd,dhe->bthe', query, query_DHE)
    if few:
      found = attend_few(q, memory, key_DHE, value_DHE, mask_BTS, bias_BHTS)
      return found.reshape(query_BTD.shape).astype(jnp.float32)
    k, v = (jnp.einsum('bsd,dhe->bshe', memory, x) for x in (key_DHE, value_DHE))
    score_BHTS = jnp.einsum('bthe,bshe->bhts', q, k, preferred_element_type=jnp.float32)
    score_BHTS = score_BHTS / (D // H) ** 0.5
    if bias_BHTS is not None:
      score_BHTS = score_BHTS + bias_BHTS
    score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS, -1e30)
    weight_BHTS = jnp.where(mask_BTS[:, None], nn.softmax(score_BHTS, axis=-1), 0)
    found = jnp.einsum('bhts,bshe->bthe', weight_BHTS.astype(self.dtype), v)
    return found.reshape(query_BTD.shape).astype(jnp.float32)


class DMAN(NextItemModel):
  """Tan et al. 2021: short-term attention over two segments, long-term attention over the memory.

      S^l = Atten_rec(S^{l-1}; [S^{l-1} ; SG(S_prev^{l-1})])        1: causal in the segment
      E^l = Atten(E^{l-1}; M^{l-1})                                 2
      v   = g * S^L + (1 - g) * E^L,  g = sigmoid(S^L W_s + E^L W_l)     3
      M^l <- f_abs(M^l, S_prev^l)                                   4, 6-8: capsules.py
      L_ae = sum_l | Atten_rec(S^l; [M^l ; S_prev^l]) - Atten_rec(S^l; M^l new) |^2,
             l = 0 .. L - 1                                         5

  S^0 and E^0 are the events' rows with positions. A segment reads the memory before it is updated,
  with the segment that leaves the window. What is carried is of other weights than those that read
  it, and is not differentiated: so L_like never reaches f_abs, and L_ae, of stopped inputs and
  weights, reaches nothing else. Both are minimised in one step, where the paper takes two. [ours]
  L_ae is a mean over positions and width, not a sum: independent of both. [ours] The paper's l goes
  from 1 to L, so that an attention is asked with what it made; here it is asked with what it is
  asked with in 1, on the level that it reads. [ours] L_ae knows no distances, for a slot has none.
  [ours]

  The two attentions stand in blocks as in the transformers that the paper cites: norm before, a
  residual around, a feed-forward layer behind, and a norm behind the gate. [ours] The positions of
  keys are told by their distance from the query, up to 2 T - 1, for a segment's own places do not
  tell two segments apart. [ours] A user's first memory is learned; L_like trains it, where the
  paper is silent. [ours]

  Attributes:
    blocks: L, layers of both attentions.
    heads: of each attention.
    slots: m, of each layer's memory.
    segment: T; it is config.history_length.
    routing_map, iterations: of f_abs (capsules.Routing).
    variant: 'full'; 'xl' without the long-term part; 'fifo' keeps the newest m events in the memory
      instead of f_abs; 'nran' without the segment before.
  """

  blocks: int = 2
  heads: int = 1
  slots: int = 20
  routing_map: str = 'shared'
  iterations: int = 3
  variant: str = 'full'
  positive_fields = ('negatives', 'blocks', 'heads', 'slots', 'iterations')
  loss_weights = {'reconstruction': 1.0}  # of the memory; it trains what nothing else does
  whole = True
  in_bfloat16 = True
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
    """Whether there is a memory."""
    return self.variant != 'xl'

  def encode(self, events, carry, train):
    x_BTD, mask_BT, *_ = events
    T, D = x_BTD.shape[1:]
    past = Past(*map(stop, carry))  # but where a user begins: see `begin` of the base class
    seen_BTS, bias_BHTS = self._window(mask_BT, past.there_BT)
    position_TD = self.param('positions', nn.initializers.normal(0.02), (T, D))
    x_BTD = x_BTD + position_TD[None]

    # Of the segment's vectors those that are asked: what is carried needs none of the last layer.
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
      gate = nn.Dense(D, use_bias=False, name='gate_short')(short_BTD)
      gate = nn.sigmoid(gate + nn.Dense(D, use_bias=False, name='gate_long')(long_BTD))
      v_BTD = gate * short_BTD + (1 - gate) * long_BTD
    v_BTD = nn.LayerNorm(name='norm')(v_BTD)  # the paper scores with the gated sum. [ours]

    memory_BLMD, lost = self._remember(past, levels, mask_BT, train)
    carry = Past(stop(jnp.stack(levels, axis=1)), mask_BT, stop(memory_BLMD))
    return Vectors(v_BTD, carry, {'reconstruction': lost} if lost is not None else {})

  def _dropout(self, x, train):
    return nn.Dropout(self.dropout, deterministic=not train)(x)

  def _block(self, name, x_BTD, memory_BSD, mask_BTS, bias_BHTS, train, few=False):
    """Attention and a feed-forward layer, each with a norm before and a residual around."""
    D = x_BTD.shape[-1]
    norm = nn.LayerNorm(name=f'{name}_norm')
    attention = Attention(self.heads, self.dtype, name=name)
    found_BTD = attention(norm(x_BTD), norm(memory_BSD), mask_BTS, bias_BHTS, few)
    x_BTD = x_BTD + self._dropout(found_BTD, train)
    hidden_BTD = nn.LayerNorm(name=f'{name}_norm_2')(x_BTD)
    hidden_BTD = MLP((D,), D, activation='gelu', dtype=self.dtype, name=f'{name}_feed')(hidden_BTD)
    return x_BTD + self._dropout(hidden_BTD.astype(jnp.float32), train)

  def _window(self, mask_BT, there_BT):
    """Which of the 2 T keys each position sees, [B, T, 2 T], and the bias, [1, H, T, 2 T]."""
    T = mask_BT.shape[1]
    before_BT = there_BT & (self.variant != 'nran')
    # Event j of the segment before is T + t - j away from event t of this one.
    distance_TS = T + jnp.arange(T)[:, None] - jnp.arange(2 * T)[None, :]
    here_BTS = (distance_TS >= 0)[None] & jnp.concatenate([before_BT, mask_BT], axis=1)[:, None]
    bias_HN = self.param('distance', nn.initializers.zeros, (self.heads, 2 * T))
    return here_BTS, bias_HN[None, :, jnp.maximum(distance_TS, 0)]

  def _remember(self, past, levels, mask_BT, train):
    """The memory of each layer after what leaves the window, and L_ae (None if not trained)."""
    if not self.long_term:
      return past.memory_BLMD, None
    full_B = jnp.any(past.there_BT, axis=1)[:, None, None]
    kept, lost = [], 0.0
    for k, level_BTD in enumerate(levels):
      memory_BMD, before_BTD = past.memory_BLMD[:, k], past.hidden_BLTD[:, k]
      if self.variant == 'fifo':
        new_BMD = jnp.concatenate([memory_BMD, before_BTD], axis=1)[:, -self.slots :]
      else:
        routing = Routing(self.routing_map, self.iterations, self.dtype, name=f'abstract_{k}')
        new_BMD = routing(memory_BMD, before_BTD, past.there_BT)
        if train:
          lost = lost + self._reconstruction(k, stop(level_BTD), past, new_BMD, mask_BT)
      kept.append(jnp.where(full_B, new_BMD, memory_BMD))
    own = train and self.variant != 'fifo'
    return jnp.stack(kept, axis=1), lost if own else None

  def _reconstruction(self, k, query_BTD, past, new_BMD, mask_BT):
    """Equation 5 of a layer: what the new memory answers, against what it was made of.

    Args:
      query_BTD: what the layer reads, S^{l-1}; the paper asks with what it makes, S^l. [ours]
    """
    # The weights as they are, not to be trained by this; without the bias by distance, for a slot
    # is no distance away. [ours]
    norm, attention = nn.LayerNorm(parent=None), Attention(self.heads, self.dtype, parent=None)
    weights = jax.tree.map(stop, self.variables['params'])

    def answer(memory_BSD, mask_BS):
      memory_BSD, query = (
        norm.apply({'params': weights[f'short_{k}_norm']}, x) for x in (memory_BSD, query_BTD)
      )
      return attention.apply({'params': weights[f'short_{k}']}, query, memory_BSD, mask_BS[:, None])

    memory_BMD = past.memory_BLMD[:, k]
    every_BM = jnp.ones(memory_BMD.shape[:2], bool)
    old_BSD = jnp.concatenate([memory_BMD, past.hidden_BLTD[:, k]], axis=1)
    wanted_BTD = answer(old_BSD, jnp.concatenate([every_BM, past.there_BT], axis=1))
    found_BTD = answer(new_BMD, every_BM)
    # Where nothing has left the window there is nothing to be kept.
    weight_BT = mask_BT & jnp.any(past.there_BT, axis=1, keepdims=True)
    lost_BT = jnp.mean(jnp.square(found_BTD - wanted_BTD), axis=-1)
    return weighted_mean(lost_BT, weight_BT.astype(jnp.float32))
