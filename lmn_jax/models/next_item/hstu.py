"""HSTU: gated attention without softmax.

Zhai et al., Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations, ICML 2024.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lmn_jax.layers.self_attention import causal_mask, check_heads
from lmn_jax.layers.time_gaps import TimeBias, pair_buckets
from lmn_jax.models.next_item.base import NextItemModel, Vectors


class Layer(nn.Module):
  """A layer of HSTU (section 3, equations 1-3).

      U, V, Q, K = split(silu(W1 LayerNorm(x)))                     1
      A          = silu(Q K^T + rab) / T, causal                    2, T positions
      y          = x + W2 (LayerNorm(A V) * U)                      3

      rab_ts     = p_(t - s) + w_b                                  b: the bucket of the time

  With time='bias', b is the bucket of the time from event s to the request at t, which is the next
  event, or for the newest event the target itself (time_gaps.bucket); [code: the buckets] without
  it, w is absent. In the released code, the norms have no scale and bias, all heads share p as they
  share w here, and dropout is before W2. [ours: as above]

  Attributes:
    heads: of A. dropout: after W2. dtype: compute type of the products; x, the norms and A before
      its product with V are float32.
  """

  heads: int
  dropout: float
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    begin_BT: Int[Array, 'B T'] | None,
    bucket_BTT: Int[Array, 'B T T'] | None,
    train: bool,
  ) -> Float[Array, 'B T D']:
    """Returns y. begin_BT: as in Events. bucket_BTT: b of each pair, or None. train: dropout."""
    B, T, D = x_BTD.shape
    H = self.heads
    mix = nn.Dense(4 * D, use_bias=False, dtype=self.dtype, name='mix')
    u, v, q, k = jnp.split(nn.silu(mix(nn.LayerNorm()(x_BTD))), 4, axis=-1)
    v, q, k = (y.reshape(B, T, H, D // H) for y in (v, q, k))
    distance_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    # One for each head; the code has one for all heads. [ours]
    bias_HN = self.param('distance', nn.initializers.normal(0.02), (H, T))
    # No exponential function enlarges the rounding of these scores.
    score_BHTT = jnp.einsum('bthe,bshe->bhts', q, k).astype(jnp.float32)
    score_BHTT = score_BHTT + bias_HN[:, jnp.maximum(distance_TT, 0)][None]
    if bucket_BTT is not None:
      score_BHTT = score_BHTT + TimeBias(name='bias_by_time')()[bucket_BTT][:, None]
    # Padding comes after the events, so the causal mask excludes it.
    seen_BTT = causal_mask(jnp.arange(T)[None], begin_BT, T)
    weight_BHTT = jnp.where(seen_BTT[:, None], nn.silu(score_BHTT) / T, 0)
    read_BTHE = jnp.einsum('bhts,bshe->bthe', weight_BHTT.astype(self.dtype), v)
    read_BTD = read_BTHE.reshape(B, T, D).astype(jnp.float32)
    # Norms with scale and bias, and dropout after W2 instead of before. [ours]
    gated_BTD = nn.LayerNorm()(read_BTD).astype(self.dtype) * u
    out_BTD = nn.Dense(D, dtype=self.dtype, name='out')(gated_BTD).astype(jnp.float32)
    return x_BTD + nn.Dropout(self.dropout, deterministic=not train)(out_BTD)


class HSTU(NextItemModel):
  """A stack of gated attention layers.

      x_t = sqrt(D) Dropout(e_t) + P_t
      v   = LayerNorm(Layer_L(... Layer_1(x)))

  In the code, dropout is applied to the positions too, as in SASRec. [ours: to the rows only]
  The vectors are normalised at the end as in the code [code]; the code also normalises the rows of
  the candidates. [ours: not the rows]

  Attributes:
    blocks: L, number of layers.
    heads: of each layer; must divide D.
  """

  blocks: int = 2
  heads: int = 1
  positive_fields = ('negatives', 'blocks', 'heads')
  has_time_bias = True
  packs = True

  def check(self):
    super().check()
    check_heads(self.heads, self.width)

  def encode(self, events, carry, train):
    shape = events.x_BTD.shape[1:]
    x_BTD = events.with_positions(self.param('positions', nn.initializers.normal(0.02), shape))
    bucket_BTT = None
    if events.times is not None:
      bucket_BTT = pair_buckets(*events.times, events.times.time_BT)
    for k in range(self.blocks):
      layer = Layer(self.heads, self.dropout, self.dtype, name=f'layer_{k}')
      x_BTD = layer(x_BTD, events.begin_BT, bucket_BTT, train)
    return Vectors(nn.LayerNorm(name='norm')(x_BTD), carry)
