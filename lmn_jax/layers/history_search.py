"""History search: the K behaviours with the best scores for a target, and attention over them.

The search costs O(L) for each target and the attention O(K). K is fixed, so shapes are static.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import stop


class Hits(NamedTuple):
  """The behaviours that a search returns.

  place_BQK: int32 positions in the history, best first. mask_BQK: False on entries without a
  behaviour. K is the requested number, or the length of the history if that is less.
  """

  place_BQK: Int[Array, 'B Q K']
  mask_BQK: Bool[Array, 'B Q K']


def search(score_BQL: Float[Array, 'B Q L'], mask_BQL: Bool[Array, 'B #Q L'], K: int) -> Hits:
  """Returns the K behaviours of the mask with the highest scores; of equal scores, the newest.

  The search has no gradient. Each model says what trains its scores.

  Args:
    score_BQL: finite, for each of Q targets. mask_BQL: behaviours to search; False on padding.
      K: at least 1.
  """
  L = score_BQL.shape[2]
  # Of equal numbers lax.top_k returns the first ones; product_keys.top_k does not promise that.
  newest_first_BQL = jnp.where(mask_BQL, score_BQL.astype(jnp.float32), -jnp.inf)[..., ::-1]
  # Otherwise XLA (CPU, JAX 0.10) gathers all rows on all devices, and each searches all of them.
  top_k = meshes.each_device(
    functools.partial(jax.lax.top_k, k=min(K, L)), meshes.BATCH, [meshes.BATCH] * 2
  )
  best_BQK, place_BQK = top_k(stop(newest_first_BQL))
  return Hits(L - 1 - place_BQK, best_BQK > -jnp.inf)


def take_bias(bias_BL: Float[Array, 'B L'] | None, hits: Hits) -> Float[Array, 'B Q K'] | None:
  """Returns the biases of the behaviours of a search, best first; None for None."""
  return None if bias_BL is None else take(bias_BL[:, :, None], hits)[..., 0]


def take(x_BLI: Shaped[Array, 'B L I'], hits: Hits) -> Shaped[Array, 'B Q K I']:
  """Returns the behaviours of a search, best first."""
  B, Q, K = hits.place_BQK.shape
  x_BMI = jnp.take_along_axis(x_BLI, hits.place_BQK.reshape(B, Q * K, 1), axis=1)
  return x_BMI.reshape(B, Q, K, -1)


def matches(
  target: Int[Array, 'B Q *M'], history: Int[Array, 'B L *M'], V: int
) -> Bool[Array, 'B Q L']:
  """Whether a behaviour has the target's value of a feature, or one of its values.

  Args:
    target: [B, Q] or [B, Q, M] ids, padded with V. history: [B, L] or [B, L, M]. V: number of ids.
  """
  if target.ndim == 2:
    return (history[:, None] == target[:, :, None]) & (history < V)[:, None]
  same_BQLMM = history[:, None, :, :, None] == target[:, :, None, None, :]
  return jnp.any(same_BQLMM & (history < V)[:, None, :, :, None], axis=(3, 4))


def fingerprint(
  x: Float[Array, '*B I'], words: int, bits: int, seed: int
) -> UInt32[Array, '*B words']:
  """SimHash (Charikar 2002, section 3): `bit_j = [r_j . x >= 0]`, r_j from a normal distribution.

  Two vectors at an angle a agree in a bit with probability 1 - a / pi. The r_j are computed from
  the seed; they are not parameters and are not stored. The bits are packed into words, which makes
  comparisons faster than single bits or products of +-1: 48, 83 and 84 ms on CPU at B 256, L 1000,
  I 32 and 64 bits, and 0.4, 38 and 4.8 ms if the fingerprints of the history are reused.

  Args:
    x: vectors. words: number of words. bits: of a word, at most 32. seed: of the r_j.
  """
  r_Im = jax.random.normal(jax.random.key(seed), (x.shape[-1], words * bits))
  # float32 for every compute type: a rounded sign would change the bucket.
  bit = (x.astype(jnp.float32) @ r_Im >= 0).reshape(*x.shape[:-1], words, bits)
  place = jnp.arange(bits, dtype=jnp.uint32).reshape(*[1] * x.ndim, bits)
  return jnp.sum(bit.astype(jnp.uint32) << place, axis=-1, dtype=jnp.uint32)


def check_seed(seed: int) -> None:
  """Checks the seed of `fingerprint`.

  Raises:
    UserError: the seed is out of bounds.
  """
  if not 0 <= seed < 2**31:
    raise UserError(f'config.model.hash_seed={seed} must be in [0, 2147483648), such as 0')


class HeadQueries(nn.Module):
  """The query of each head, mapped by its key matrix: a score is one product with a behaviour.

      g_h = Wk_h^T Wq_h q / sqrt(d)          v . g_h = (Wk_h v) . (Wq_h q) / sqrt(d)

  The papers project every behaviour. Projecting the target instead gives the same scores for O(I)
  instead of O(I d) operations for each behaviour and head.

  Attributes:
    heads: H. width: d, of a head's queries and keys. dtype: compute type.
  """

  heads: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, q_BQI: Float[Array, 'B Q I']) -> Float[Array, 'B Q H I']:
    shape = q_BQI.shape[-1], self.heads, self.width
    wq_IHd = self.param('query', nn.initializers.lecun_normal(in_axis=0), shape)
    wk_IHd = self.param('key', nn.initializers.lecun_normal(in_axis=0), shape)
    q_BQHd = jnp.einsum('bqi,ihd->bqhd', q_BQI, wq_IHd.astype(self.dtype))
    g_BQHI = jnp.einsum('bqhd,ihd->bqhi', q_BQHd, wk_IHd.astype(self.dtype))
    return g_BQHI * jnp.asarray(self.width**-0.5, self.dtype)


def attend(
  g_BQHI: Float[Array, 'B Q H I'],
  v_BQKI: Float[Array, 'B Q K I'],
  mask_BQK: Bool[Array, 'B Q K'],
  bias_BQK: Float[Array, 'B Q K'] | None = None,
) -> Float[Array, 'B Q H I']:
  """Computes `sum_k softmax_k(v_k . g_h + t_k) v_k` for each head; zeros for an empty mask.

  Args:
    g_BQHI: from HeadQueries. v_BQKI: behaviours, which are keys and values of all heads. mask_BQK:
      True on real behaviours. bias_BQK: t, a bias by time (time_gaps.py), float32; None for 0.
  """
  # float32 for every compute type: the K behaviours are few.
  g_BQHI, v_BQKI, dtype = g_BQHI.astype(jnp.float32), v_BQKI.astype(jnp.float32), v_BQKI.dtype
  score_BQHK = jnp.einsum('bqhi,bqki->bqhk', g_BQHI, v_BQKI)
  if bias_BQK is not None:
    score_BQHK = score_BQHK + bias_BQK[:, :, None]
  w_BQHK = nn.softmax(jnp.where(mask_BQK[:, :, None], score_BQHK, -1e30), axis=-1)
  # Where everything is masked, the softmax is uniform.
  w_BQHK = jnp.where(mask_BQK[:, :, None], w_BQHK, 0)
  return jnp.einsum('bqhk,bqki->bqhi', w_BQHK, v_BQKI).astype(dtype)


class TargetHeads(nn.Module):
  """Multi-head target attention: `[o_1 Wv_1 ; ... ; o_H Wv_H] Wo`, o_h = attend(g)_h.

  The values are projected after they are summed, which is equivalent and K times cheaper.

  Attributes:
    width: d, of a head's values; the output is as wide as a behaviour. dtype: compute type.
  """

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    g_BQHI: Float[Array, 'B Q H I'],
    v_BQKI: Float[Array, 'B Q K I'],
    mask_BQK: Bool[Array, 'B Q K'],
    bias_BQK: Float[Array, 'B Q K'] | None = None,
  ) -> Float[Array, 'B Q I']:
    B, Q, heads, width = g_BQHI.shape
    init = nn.initializers.lecun_normal(in_axis=1, batch_axis=0)
    wv_HId = self.param('value', init, (heads, width, self.width))
    o_BQHI = attend(g_BQHI, v_BQKI, mask_BQK, bias_BQK)
    o_BQHd = jnp.einsum('bqhi,hid->bqhd', o_BQHI, wv_HId.astype(self.dtype))
    out = nn.Dense(width, use_bias=False, dtype=self.dtype, name='out')
    return out(o_BQHd.reshape(B, Q, heads * self.width))
