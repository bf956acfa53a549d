"""Search in a history: which behaviours a target finds, and attention over those that were found.

A search costs O(L) for each target, what comes after it O(K), and K is fixed: shapes are static.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from lmn_jax import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers import stop


class Found(NamedTuple):
  """place_BK: int32 positions in the history, best first. mask_BK: False where too few were there.

  K is the number asked for, or the history's length if that is less.
  """

  place_BK: Int[Array, 'B K']
  mask_BK: Bool[Array, 'B K']


def search(score_BL: Float[Array, 'B L'], mask_BL: Bool[Array, 'B L'], K: int) -> Found:
  """The K behaviours with the highest scores among those of the mask; of equal ones the newest.

  Choosing has no gradient: what scores is taught by something else, which each model names.

  Args:
    score_BL: finite. mask_BL: which behaviours may be found; False on padding. K: at least 1.
  """
  L = score_BL.shape[1]
  # Which of equal numbers wins is promised by lax.top_k, the first one, and not by memory.top_k.
  newest_first_BL = jnp.where(mask_BL, score_BL.astype(jnp.float32), -jnp.inf)[:, ::-1]
  # Left to itself XLA (CPU, JAX 0.10) brings all rows to all devices, and each finds everything.
  top_k = meshes.each_device(
    functools.partial(jax.lax.top_k, k=min(K, L)), meshes.BATCH, [meshes.BATCH] * 2
  )
  best_BK, place_BK = top_k(stop(newest_first_BL))
  return Found(L - 1 - place_BK, best_BK > -jnp.inf)


def take(x_BLI: Shaped[Array, 'B L I'], found: Found) -> Shaped[Array, 'B K I']:
  """The behaviours that were found, best first."""
  return jnp.take_along_axis(x_BLI, found.place_BK[:, :, None], axis=1)


def matches(
  target: Int[Array, 'B *M'], history: Int[Array, 'B L *M'], V: int
) -> Bool[Array, 'B L']:
  """Whether a behaviour has the target's value of a feature, or one of several.

  Args:
    target: [B] or [B, M] ids, padded with V. history: [B, L] or [B, L, M]. V: number of ids.
  """
  if target.ndim == 1:
    return (history == target[:, None]) & (history < V)
  same_BLMM = history[:, :, :, None] == target[:, None, None, :]
  return jnp.any(same_BLMM & (history < V)[..., None], axis=(2, 3))


def fingerprint(
  x: Float[Array, '*B I'], words: int, bits: int, seed: int
) -> UInt32[Array, '*B words']:
  """SimHash (Charikar 2002, section 3): `bit_j = [r_j . x >= 0]`, r_j from a normal distribution.

  Two vectors at an angle a agree in a bit with probability 1 - a / pi. The r_j follow from the
  seed, so they are no parameters: nothing trains, stores or restores them. The bits are packed as
  they are made: compared by words they cost half as much as by themselves or as +-1 in a product,
  on CPU at B 256, L 1000, I 32 and 64 bits (48, 83 and 84 ms), and where fingerprints are kept from
  target to target a hundredth and a tenth (0.4, 38 and 4.8 ms).

  Args:
    x: vectors. words: how many. bits: of a word, at most 32. seed: of the r_j.
  """
  r_Im = jax.random.normal(jax.random.key(seed), (x.shape[-1], words * bits))
  # float32 whatever the model computes in: a rounded sign is another bucket.
  bit = (x.astype(jnp.float32) @ r_Im >= 0).reshape(*x.shape[:-1], words, bits)
  place = jnp.arange(bits, dtype=jnp.uint32).reshape(*[1] * x.ndim, bits)
  return jnp.sum(bit.astype(jnp.uint32) << place, axis=-1, dtype=jnp.uint32)


def check_seed(seed: int) -> None:
  """Refuses a seed of `fingerprint` that is none.

  Raises:
    UserError: naming the field, its value and the bound.
  """
  if not 0 <= seed < 2**31:
    raise UserError(f'config.model.hash_seed={seed} must be in [0, 2147483648), such as 0')


class HeadQueries(nn.Module):
  """The target as each head sees it, so that a behaviour's score is one product with it.

      g_h = Wk_h^T Wq_h q / sqrt(d)          v . g_h = (Wk_h v) . (Wq_h q) / sqrt(d)

  What is a projection of every behaviour in the papers is one of the target here: O(I) and not
  O(I d) for each behaviour and head, and the same scores.

  Attributes:
    heads: H. width: d, of a head's queries and keys. dtype: compute type.
  """

  heads: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, q_BI: Float[Array, 'B I']) -> Float[Array, 'B H I']:
    shape = q_BI.shape[-1], self.heads, self.width
    wq_IHd = self.param('query', nn.initializers.lecun_normal(in_axis=0), shape)
    wk_IHd = self.param('key', nn.initializers.lecun_normal(in_axis=0), shape)
    q_BHd = jnp.einsum('bi,ihd->bhd', q_BI, wq_IHd.astype(self.dtype))
    g_BHI = jnp.einsum('bhd,ihd->bhi', q_BHd, wk_IHd.astype(self.dtype))
    return g_BHI * jnp.asarray(self.width**-0.5, self.dtype)


def attend(
  g_BHI: Float[Array, 'B H I'], v_BKI: Float[Array, 'B K I'], mask_BK: Bool[Array, 'B K']
) -> Float[Array, 'B H I']:
  """`sum_k softmax_k(v_k . g_h) v_k` for each head, zeros where the mask has nothing.

  Args:
    g_BHI: of HeadQueries. v_BKI: behaviours, keys and values of all heads alike. mask_BK: which
      are there.
  """
  # In bfloat16 it would mix types, which strict promotion forbids; K behaviours are few.
  g_B1HI, v_BK1I = g_BHI[:, None].astype(jnp.float32), v_BKI[:, :, None].astype(jnp.float32)
  out_B1HI = jax.nn.dot_product_attention(
    g_B1HI, v_BK1I, v_BK1I, mask=mask_BK[:, None, None], scale=1.0
  )
  # Where all is masked the softmax is even, over whatever stands there.
  found_B11 = jnp.any(mask_BK, axis=1)[:, None, None]
  return jnp.where(found_B11, out_B1HI[:, 0], 0).astype(v_BKI.dtype)


class TargetHeads(nn.Module):
  """Multi-head target attention: `[o_1 Wv_1 ; ... ; o_H Wv_H] Wo`, o_h = attend(g)_h.

  The values are projected after they are summed, which is the same and costs less by K.

  Attributes:
    width: d, of a head's values; the output is as wide as a behaviour. dtype: compute type.
  """

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    g_BHI: Float[Array, 'B H I'],
    v_BKI: Float[Array, 'B K I'],
    mask_BK: Bool[Array, 'B K'],
  ) -> Float[Array, 'B I']:
    B, heads, width = g_BHI.shape
    each = nn.initializers.lecun_normal(in_axis=1, batch_axis=0)
    wv_HId = self.param('value', each, (heads, width, self.width))
    o_BHI = attend(g_BHI, v_BKI, mask_BK)
    o_BHd = jnp.einsum('bhi,hid->bhd', o_BHI, wv_HId.astype(self.dtype))
    out = nn.Dense(width, use_bias=False, dtype=self.dtype, name='out')
    return out(o_BHd.reshape(B, heads * self.width))
