"""Self-attention over a sequence: of all pairs by JAX's own routine, the causal in pieces."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import MLP, rows_at

# Scores of all pairs of positions, [B, H, T, T], are held whole up to so many, and beyond for
# blocks of examples with so many together, which the gradient makes anew.
WHOLE = 2**22
BLOCK = 2**19


def check_heads(heads: int, D: int) -> None:
  """Refuses a number of heads that does not divide the width.

  Args:
    heads: config.model.heads. D: width of a behaviour, all its fields together.

  Raises:
    UserError: naming both, with what would do.
  """
  if D % heads:
    fits = ', '.join(str(h) for h in range(1, D + 1) if D % h == 0)
    raise UserError(
      f'config.model.heads={heads} must divide {D}, the width of a behaviour (config.model.width '
      f'for each of its fields); take one of {fits}'
    )


class Kernel(nn.Module):
  """The matrix of a linear map without bias, for products in another order than `nn.Dense` has.

  Attributes:
    width: of what it maps to.
  """

  width: int

  @nn.compact
  def __call__(self, D: int) -> Float[Array, 'D E']:
    """D: width of what is mapped."""
    return self.param('kernel', nn.initializers.lecun_normal(), (D, self.width))


class SelfAttention(nn.Module):
  """Heads side by side, without the projection after them (Vaswani et al. 2017, section 3.2).

      head_h = softmax(x Q_h (x K_h)^T / sqrt(D / H)) x V_h
      out    = [head_1 ; ... ; head_H]

  Attributes:
    heads: H, dividing the width D of the sequence.
    causal: a position sees itself and those before it, from the beginning of its own sequence.
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
    asked_BP: Int[Array, 'B P'] | None = None,
  ) -> Float[Array, 'B P D']:
    """Attends.

    Args:
      x_BTD: the sequence. length_B: positions of it that can be seen, at least 1; None for all; not
        for a causal one. begin_BT: of several sequences side by side, where that of each position
        begins, for a causal one; None for one sequence. asked_BP: positions that attend, for a
        causal one; None for all.

    Returns:
      [B, P, D] of those asked, [B, T, D] of all.
    """
    B, T, D = x_BTD.shape
    H, over = self.heads, meshes.BATCH
    w_D3D = Kernel(3 * D, name='qkv')(D).astype(self.dtype)
    x_BTD = x_BTD.astype(self.dtype)
    if asked_BP is not None:
      attend = meshes.each_device(_asked, (over, meshes.REPLICATED, over, over), over)
      w_D3HE = w_D3D.reshape(D, 3, H, D // H)
      return attend(x_BTD, w_D3HE, begin_BT, asked_BP).reshape(B, -1, D)
    q, k, v = (x.reshape(B, T, H, D // H) for x in jnp.split(x_BTD @ w_D3D, 3, axis=-1))
    if not self.causal:
      attend = meshes.each_device(functools.partial(_by_examples, _full), (over,) * 4, over)
      return attend(q, k, v, length_B).reshape(B, T, D)
    attend = meshes.each_device(functools.partial(_by_examples, _causal), (over,) * 4, over)
    return attend(q, k, v, begin_BT).reshape(B, T, D)


def _by_examples(attend, q_BTHE, k_BTHE, v_BTHE, which):
  B, T, H, _ = q_BTHE.shape
  of_export = jax.export.is_symbolic_dim(B)
  if not of_export and B * H * T * T <= WHOLE:
    return attend(q_BTHE, k_BTHE, v_BTHE, which)

  @jax.checkpoint
  def one(example):
    return attend(*jax.tree.map(lambda x: x[None], example))[0]

  each = max(1, BLOCK // (H * T * T))
  size = None if of_export else min(each, B)
  return jax.lax.map(one, (q_BTHE, k_BTHE, v_BTHE, which), batch_size=size)


def _full(q_BTHE, k_BTHE, v_BTHE, length_B):
  return jax.nn.dot_product_attention(q_BTHE, k_BTHE, v_BTHE, key_value_seq_lengths=length_B)


# Of all pairs of positions a causal sequence has half; in four pieces five eighths are made. JAX's
# routine with is_causal makes all of them on CPU.
PIECES = 4


def _causal(q_BTHE, k_BTHE, v_BTHE, begin_BT):
  T = q_BTHE.shape[1]
  found, size = [], -(-T // PIECES)
  # Heads before positions: XLA on CPU would turn the scores instead.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTHE, k_BTHE, v_BTHE))
  for low in range(0, T, size):
    high = min(low + size, T)
    begin = None if begin_BT is None else begin_BT[:, low:high]
    seen = causal_mask(jnp.arange(low, high)[None], begin, high)
    found.append(_read(q[:, :, low:high], k[:, :, :high], v[:, :, :high], seen))
  return jnp.concatenate(found, axis=2).transpose(0, 2, 1, 3)


def _asked(x_BTD, w_D3HE, begin_BT, asked_BP):
  begin_BP = None if begin_BT is None else jnp.take_along_axis(begin_BT, asked_BP, axis=1)
  seen_BPT = causal_mask(asked_BP, begin_BP, x_BTD.shape[1])
  query_DHE, key_DHE, value_DHE = (w_D3HE[:, k] for k in range(3))
  q_BPHE = jnp.einsum('bpd,dhe->bphe', rows_at(x_BTD, asked_BP), query_DHE)
  return attend_few(q_BPHE, x_BTD, key_DHE, value_DHE, seen_BPT)


def attend_few(
  q_BPHE: Float[Array, 'B P H E'],
  x_BSD: Float[Array, 'B S D'],
  key_DHE: Float[Array, 'D H E'],
  value_DHE: Float[Array, 'D H E'],
  seen_BPS: Bool[Array, '#B #P S'],
  bias_BHPS: Float[Array, '#B H P S'] | None = None,
) -> Float[Array, 'B P H E']:
  """`softmax(q . (x K) / sqrt(E) + bias) x V` of few queries, without the keys and values.

      q_p . (x_s K) = (K q_p) . x_s           sum_s w_ps (x_s V) = (sum_s w_ps x_s) V

  So the maps cost P H D E in place of S D^2, and what is read P H S D in place of P S D: less where
  P H is below D. A query that sees nothing finds zeros.

  Args:
    q_BPHE: queries by head. x_BSD: what is attended to. key_DHE, value_DHE: K and V.
    seen_BPS: which of x each query sees. bias_BHPS: added to the scores.
  """
  mapped_BPHD = jnp.einsum('bphe,dhe->bphd', q_BPHE, key_DHE)
  score_BHPS = jnp.einsum('bphd,bsd->bhps', mapped_BPHD, x_BSD, preferred_element_type=jnp.float32)
  score_BHPS = score_BHPS / q_BPHE.shape[-1] ** 0.5
  if bias_BHPS is not None:
    score_BHPS = score_BHPS + bias_BHPS
  seen_BHPS = seen_BPS[:, None]
  weight_BHPS = nn.softmax(jnp.where(seen_BHPS, score_BHPS, -1e30), axis=-1)
  weight_BHPS = jnp.where(seen_BHPS, weight_BHPS, 0).astype(x_BSD.dtype)
  found_BPHD = jnp.einsum('bhps,bsd->bphd', weight_BHPS, x_BSD)
  return jnp.einsum('bphd,dhe->bphe', found_BPHD, value_DHE)


def _read(q_BHPE, k_BHSE, v_BHSE, seen_BPS):
  q_BHPE = q_BHPE / q_BHPE.shape[-1] ** 0.5
  score_BHPS = jnp.einsum('bhpe,bhse->bhps', q_BHPE, k_BHSE, preferred_element_type=jnp.float32)
  weight_BHPS = nn.softmax(jnp.where(seen_BPS[:, None], score_BHPS, -1e30), axis=-1)
  return jnp.einsum('bhps,bhse->bhpe', weight_BHPS.astype(v_BHSE.dtype), v_BHSE)


def causal_mask(
  at_BP: Int[Array, '#B P'], begin_BP: Int[Array, 'B P'] | None, S: int
) -> Bool[Array, '#B P S']:
  """Which of the first S positions each of P sees: those of its own sequence up to itself.

  Args:
    at_BP: positions. begin_BP: where the sequence of each begins; None for one sequence. S: keys.
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
  asked_BP: Int[Array, 'B P'] | None = None,
) -> Float[Array, 'B P D']:
  """The blocks of Kang & McAuley 2018, section III, in a module's compact method.

      x <- x + Dropout(SA(LayerNorm(x)))                            causal
      x <- x + Dropout(W2 relu(W1 LayerNorm(x) + b1) + b2)          W1, W2: D x D
      F  = LayerNorm(x)                                             the last norm [code]

  x comes dropped, by who calls. As the paper has it; in the released code queries alone are normed,
  and x is then the normed one. It also has biases of q, k and v, and drops attention's weights and
  the units behind relu. [ours: without]

  Padding stands behind the events: no event sees it, for attention is causal. The sum that the
  blocks add to is float32, whatever they compute in. begin_BL: of several histories side by side,
  where that of each event begins. asked_BP: positions of which the last block, and so the
  result, is made; None for all.
  """

  def drop(x_BLD):
    return nn.Dropout(dropout, deterministic=not train)(x_BLD.astype(jnp.float32))

  D = x_BLD.shape[-1]
  for k in range(blocks):
    asked = asked_BP if k == blocks - 1 else None
    # Without biases of q, k, v, and without dropout of its weights. [ours]
    attention = SelfAttention(heads, causal=True, dtype=dtype)
    found = attention(nn.LayerNorm()(x_BLD), begin_BT=begin_BL, asked_BP=asked)
    x_BLD = (x_BLD if asked is None else rows_at(x_BLD, asked)) + drop(found)
    x_BLD = x_BLD + drop(MLP((D,), D, dtype=dtype)(nn.LayerNorm()(x_BLD)))
  return nn.LayerNorm()(x_BLD)
