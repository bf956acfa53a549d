"""Self-attention over a sequence: full attention by `jax.nn`, causal attention in pieces."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import MLP, rows_at
from lmn_jax.layers.fused_attention import splash
from lmn_jax.layers.time_gaps import TimeBias, Times, pair_buckets


def check_heads(heads: int, D: int) -> None:
  """Checks that the number of heads divides the width.

  Args:
    heads: config.model.heads. D: width of a behaviour.

  Raises:
    UserError: it does not; the message lists the divisors.
  """
  if D % heads:
    divisors = ', '.join(str(h) for h in range(1, D + 1) if D % h == 0)
    raise UserError(
      f'config.model.heads={heads} must divide {D}, the width of a behaviour (config.model.width '
      f'for each field of the item, or config.model.event_width); use one of {divisors}'
    )


class Kernel(nn.Module):
  """The matrix of a linear map without bias, for products in an order that `nn.Dense` has not.

  Attributes:
    width: of the output.
  """

  width: int

  @nn.compact
  def __call__(self, D: int) -> Float[Array, 'D E']:
    """Returns the matrix. D: width of the input."""
    return self.param('kernel', nn.initializers.lecun_normal(), (D, self.width))


class SelfAttention(nn.Module):
  """Multi-head self-attention without an output projection (Vaswani et al. 2017, section 3.2).

      head_h = softmax(x Q_h (x K_h)^T / sqrt(D / H) + B) x V_h
      out    = [head_1 ; ... ; head_H]

  B is 0 or, with the times of the sequence, a learned scalar for each bucket of the time from the
  event s to the request at t (Zhai et al. 2024, section 3.2: the bias by time of HSTU).

  Attributes:
    heads: H, dividing the width D of the sequence.
    causal: whether a position attends only to itself and earlier positions of its sequence.
    dtype: compute type; the softmax is float32.
  """

  heads: int
  causal: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    length_B: Int[Array, 'B'] | None = None,
    begin_BT: Int[Array, 'B T'] | None = None,
    output_BP: Int[Array, 'B P'] | None = None,
    times: Times | None = None,
  ) -> Float[Array, 'B P D']:
    """Computes the attention.

    Args:
      x_BTD: the sequence. length_B: number of real positions, at least 1; None for all; only if not
        causal. begin_BT: the position at which the sequence of each position begins, for several
        sequences in one lane; None for one sequence; only if causal. output_BP: positions whose
        outputs are computed; None for all; only if causal. times: of the sequence, for B; None
        for no bias.

    Returns:
      [B, P, D] at output_BP, or [B, T, D].
    """
    B, T, D = x_BTD.shape
    H, batch = self.heads, meshes.BATCH
    w_D3D = Kernel(3 * D, name='qkv')(D).astype(self.dtype)
    x_BTD = x_BTD.astype(self.dtype)
    bias_N = None if times is None else TimeBias(name='bias_by_time')()
    if output_BP is not None:
      over = batch, meshes.REPLICATED, batch, batch, batch, meshes.REPLICATED
      attend = meshes.each_device(_at_positions, over, batch)
      w_D3HE = w_D3D.reshape(D, 3, H, D // H)
      return attend(x_BTD, w_D3HE, begin_BT, output_BP, times, bias_N).reshape(B, -1, D)
    q, k, v = (x.reshape(B, T, H, D // H) for x in jnp.split(x_BTD @ w_D3D, 3, axis=-1))
    attend = causal_attention if self.causal else functools.partial(_by_examples, _full)
    attend = meshes.each_device(attend, (*(batch,) * 5, meshes.REPLICATED), batch)
    bounds = begin_BT if self.causal else length_B
    return attend(q, k, v, bounds, times, bias_N).reshape(B, T, D)


def causal_attention(
  q_BTHE: Float[Array, 'B T H E'],
  k_BTHE: Float[Array, 'B T H E'],
  v_BTHE: Float[Array, 'B T H E'],
  begin_BT: Int[Array, 'B T'] | None,
  times: Times | None = None,
  bias_N: Float[Array, 'N'] | None = None,
) -> Float[Array, 'B T H E']:
  """Computes `softmax(q_t . k_s / sqrt(E) + B_ts) v_s` over begin_t <= s <= t.

  Args:
    q_BTHE, k_BTHE, v_BTHE: queries, keys and values. begin_BT: None for begin_t = 0.
    times, bias_N: of B, which is `bias_N` at the bucket of the time from event s to the request at
      t; None for 0. The fused kernel has no such bias, so it is not used then.
  """
  least = block_sizes.sizes().fused_positions
  fused = least and q_BTHE.shape[1] >= least and times is None
  if fused and not jax.export.is_symbolic_dim(q_BTHE.shape[0]):
    return splash(q_BTHE, k_BTHE, v_BTHE, begin_BT)
  return _by_examples(_causal, q_BTHE, k_BTHE, v_BTHE, begin_BT, times, bias_N)


def _by_examples(attend, q_BTHE, k_BTHE, v_BTHE, bounds, times, bias_N):
  """Applies `attend` to all examples together, or to blocks of examples (`attention_whole`).

  The bias by time is computed within a block, so that it takes no more memory than the scores.

  bounds: its mask. times, bias_N: as in causal_attention.
  """
  B, T, H, _ = q_BTHE.shape
  symbolic = jax.export.is_symbolic_dim(B)
  sizes = block_sizes.sizes()
  if not symbolic and B * H * T * T <= sizes.attention_whole:
    return attend(q_BTHE, k_BTHE, v_BTHE, bounds, times, bias_N)

  @jax.checkpoint
  def attend_example(example):
    return attend(*jax.tree.map(lambda x: x[None], example), bias_N)[0]

  size = None if symbolic else min(max(1, sizes.attention_block // (H * T * T)), B)
  return jax.lax.map(attend_example, (q_BTHE, k_BTHE, v_BTHE, bounds, times), batch_size=size)


def _bias(times, bias_N, queries=slice(None), keys=slice(None)):
  """The bias by time of some queries and keys, float32 [B, 1, P, S]; None without times."""
  if times is None:
    return None
  query = jax.tree.map(lambda x_BT: x_BT[:, queries], times)
  return bias_N[pair_buckets(*query, times.time_BT[:, keys])][:, None]


def _full(q_BTHE, k_BTHE, v_BTHE, length_B, times, bias_N):
  return jax.nn.dot_product_attention(
    q_BTHE, k_BTHE, v_BTHE, _bias(times, bias_N), key_value_seq_lengths=length_B
  )


def _causal(q_BTHE, k_BTHE, v_BTHE, begin_BT, times, bias_N):
  # Causal attention needs half of all pairs of positions; in four pieces, five eighths are
  # computed. `jax.nn.dot_product_attention(is_causal=True)` computes all of them on CPU.
  T = q_BTHE.shape[1]
  pieces, size = [], -(-T // block_sizes.sizes().causal_pieces)
  # Heads before positions: otherwise XLA on CPU transposes the scores.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTHE, k_BTHE, v_BTHE))
  for low in range(0, T, size):
    high = min(low + size, T)
    begin = None if begin_BT is None else begin_BT[:, low:high]
    seen = causal_mask(jnp.arange(low, high)[None], begin, high)
    bias = _bias(times, bias_N, slice(low, high), slice(high))
    pieces.append(_attend(q[:, :, low:high], k[:, :, :high], v[:, :, :high], seen, bias))
  return jnp.concatenate(pieces, axis=2).transpose(0, 2, 1, 3)


def _at_positions(x_BTD, w_D3HE, begin_BT, output_BP, times, bias_N):
  """Causal attention at the positions output_BP."""
  begin_BP = None if begin_BT is None else jnp.take_along_axis(begin_BT, output_BP, axis=1)
  seen_BPT = causal_mask(output_BP, begin_BP, x_BTD.shape[1])
  query_DHE, key_DHE, value_DHE = (w_D3HE[:, k] for k in range(3))
  q_BPHE = jnp.einsum('bpd,dhe->bphe', rows_at(x_BTD, output_BP), query_DHE)
  bias_B1PT = None
  if times is not None:
    query = jax.tree.map(lambda x_BT: jnp.take_along_axis(x_BT, output_BP, axis=1), times)
    bias_B1PT = bias_N[pair_buckets(*query, times.time_BT)][:, None]
  return attend_few(q_BPHE, x_BTD, key_DHE, value_DHE, seen_BPT, bias_B1PT)


def attend_few(
  q_BPHE: Float[Array, 'B P H E'],
  x_BSD: Float[Array, 'B S D'],
  key_DHE: Float[Array, 'D H E'],
  value_DHE: Float[Array, 'D H E'],
  seen_BPS: Bool[Array, '#B #P S'],
  bias_BHPS: Float[Array, '#B #H P S'] | None = None,
) -> Float[Array, 'B P H E']:
  """Computes `softmax(q . (x K) / sqrt(E) + bias) x V` for few queries, without keys and values.

      q_p . (x_s K) = (K q_p) . x_s           sum_s w_ps (x_s V) = (sum_s w_ps x_s) V

  The maps cost P H D E instead of S D^2 operations, and the products with x P H S D instead of
  P S D: less in total if P H is below D. A query with an empty mask returns zeros.

  Args:
    q_BPHE: queries by head. x_BSD: the vectors attended to. key_DHE, value_DHE: K and V.
    seen_BPS: which of x each query attends to. bias_BHPS: added to the scores.
  """
  mapped_BPHD = jnp.einsum('bphe,dhe->bphd', q_BPHE, key_DHE)
  score_BHPS = jnp.einsum('bphd,bsd->bhps', mapped_BPHD, x_BSD, preferred_element_type=jnp.float32)
  score_BHPS = score_BHPS / q_BPHE.shape[-1] ** 0.5
  if bias_BHPS is not None:
    score_BHPS = score_BHPS + bias_BHPS
  seen_BHPS = seen_BPS[:, None]
  weight_BHPS = nn.softmax(jnp.where(seen_BHPS, score_BHPS, -1e30), axis=-1)
  weight_BHPS = jnp.where(seen_BHPS, weight_BHPS, 0).astype(x_BSD.dtype)
  sum_BPHD = jnp.einsum('bhps,bsd->bphd', weight_BHPS, x_BSD)
  return jnp.einsum('bphd,dhe->bphe', sum_BPHD, value_DHE)


def _attend(q_BHPE, k_BHSE, v_BHSE, seen_BPS, bias_B1PS):
  q_BHPE = q_BHPE / q_BHPE.shape[-1] ** 0.5
  score_BHPS = jnp.einsum('bhpe,bhse->bhps', q_BHPE, k_BHSE, preferred_element_type=jnp.float32)
  if bias_B1PS is not None:
    score_BHPS = score_BHPS + bias_B1PS
  weight_BHPS = nn.softmax(jnp.where(seen_BPS[:, None], score_BHPS, -1e30), axis=-1)
  return jnp.einsum('bhps,bhse->bhpe', weight_BHPS.astype(v_BHSE.dtype), v_BHSE)


def causal_mask(
  at_BP: Int[Array, '#B P'], begin_BP: Int[Array, 'B P'] | None, S: int
) -> Bool[Array, '#B P S']:
  """The causal mask: each position attends to positions of its sequence up to itself.

  Args:
    at_BP: positions of the queries. begin_BP: the position at which the sequence of each query
      begins; None for one sequence. S: number of keys.
  """
  seen_BPS = jnp.arange(S)[None, None] <= at_BP[:, :, None]
  if begin_BP is None:
    return seen_BPS
  return seen_BPS & (jnp.arange(S)[None, None] >= begin_BP[:, :, None])


def causal_blocks(
  x_BLD: Float[Array, 'B L D'],
  blocks: int,
  heads: int,
  dropout: float,
  train: bool,
  dtype: DTypeLike,
  begin_BL: Int[Array, 'B L'] | None = None,
  output_BP: Int[Array, 'B P'] | None = None,
  times: Times | None = None,
) -> Float[Array, 'B P D']:
  """The blocks of Kang & McAuley 2018, section III; called in the compact method of a module.

      x <- x + Dropout(SA(LayerNorm(x)))                            causal
      x <- x + Dropout(W2 relu(W1 LayerNorm(x) + b1) + b2)          W1, W2: D x D
      F  = LayerNorm(x)                                             the last norm [code]

  The caller applies dropout to x. The norms are those of the paper. In the released code only the
  queries are normalised, and x is replaced by its normalised value; it also has biases of q, k and
  v, and dropout of the attention weights and after relu. [ours: without these]

  Padding comes after the events, so causal attention does not see it. The residual stream is
  float32 for every compute type.

  Args:
    x_BLD: events with dropout applied. begin_BL: the position at which the history of each event
      begins, for several histories in one lane; None for one. output_BP: positions whose outputs
      are computed; None for all. times: of the events, for a bias of each attention by time; None
      for no bias, as in the paper.
  """

  def drop(x_BLD):
    return nn.Dropout(dropout, deterministic=not train)(x_BLD.astype(jnp.float32))

  D = x_BLD.shape[-1]
  for k in range(blocks):
    at_BP = output_BP if k == blocks - 1 else None
    # Without biases of q, k, v, and without dropout of the attention weights. [ours]
    attention = SelfAttention(heads, causal=True, dtype=dtype)
    attended = attention(nn.LayerNorm()(x_BLD), begin_BT=begin_BL, output_BP=at_BP, times=times)
    x_BLD = (x_BLD if at_BP is None else rows_at(x_BLD, at_BP)) + drop(attended)
    x_BLD = x_BLD + drop(MLP((D,), D, dtype=dtype)(nn.LayerNorm()(x_BLD)))
  return nn.LayerNorm()(x_BLD)
