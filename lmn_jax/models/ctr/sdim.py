"""SDIM: the sum of the behaviours whose hash equals that of the target.

Cao et al., Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction, CIKM
2022.
"""

import jax
import jax.numpy as jnp

from lmn_jax.errors import UserError
from lmn_jax.layers.history_search import check_seed, fingerprint
from lmn_jax.models.ctr.base import CTRModel, Encoded


class SDIM(CTRModel):
  """A sum over hash collisions, in expectation an attention (section 4).

      f(e)    = [r_1 . e >= 0 ; ... ; r_m . e >= 0]      m bits, R random and never trained
      p_g,j   = [f(e_j) = f(e_a) in all tau bits of group g]
      encode  = mean_g l2(sum_j p_g,j e_j)               m / tau groups, l2(x) = x / |x|

  e_j is the whole event, with its event features and its time if there are any. A behaviour at an
  angle a to the target collides with probability (1 - a / pi)^tau, which is its attention weight in
  expectation. A group without a collision gives zeros.

  Attributes:
    bits: m, of a fingerprint; a multiple of tau.
    tau: bits of a group.
    hash_seed: of the random projections.
  """

  bits: int = 48
  tau: int = 3
  hash_seed: int = 0
  positive_fields = ('bits', 'tau')

  def check(self):
    super().check()
    check_seed(self.hash_seed)
    if self.tau > 32:
      raise UserError(
        f'config.model.tau={self.tau} must be at most 32, the bits of a word; use for example 3'
      )
    if self.bits % self.tau:
      raise UserError(
        f'config.model.bits={self.bits} must be a multiple of tau={self.tau}, such as '
        f'{-(-self.bits // self.tau) * self.tau}'
      )

  def encode(self, x, batch, read, train):
    groups = self.bits // self.tau
    a_BQG = fingerprint(x.i_BQI, groups, self.tau, self.hash_seed)
    f_BLG = fingerprint(x.s_BLI, groups, self.tau, self.hash_seed)
    hit_BQLG = (f_BLG[:, None] == a_BQG[:, :, None]) & x.mask_BL[:, None, :, None]
    sum_BQGI = jnp.einsum('bqlg,bli->bqgi', hit_BQLG.astype(x.s_BLI.dtype), x.s_BLI)
    # The bound keeps an empty group and its gradient at zero.
    square_BQG1 = jnp.sum(jnp.square(sum_BQGI.astype(jnp.float32)), axis=-1, keepdims=True)
    scale_BQG1 = jax.lax.rsqrt(jnp.maximum(square_BQG1, 1e-12))
    return Encoded(jnp.mean(sum_BQGI * scale_BQG1.astype(sum_BQGI.dtype), axis=2))
