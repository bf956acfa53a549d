"""ETA: history search by the Hamming distance of fingerprints, then multi-head attention.

Chen et al., End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model, 2021.
"""

import jax
import jax.numpy as jnp

from lmn_jax.errors import UserError
from lmn_jax.layers.history_search import (
  HeadQueries,
  TargetHeads,
  check_seed,
  fingerprint,
  search,
  take,
  take_bias,
)
from lmn_jax.models.ctr.base import CTRModel, Encoded

WORD = 32  # bits


class ETA(CTRModel):
  """A search by the Hamming distance of SimHash fingerprints, then attention (section 3).

      f(e)    = [r_1 . e >= 0 ; ... ; r_m . e >= 0]              m bits, R random and never trained
      J       = the top_k behaviours with the least Hamming distance |f(e_j) xor f(e_a)|
      encode  = MultiHead(e_a, {e_j : j in J})                   history_search.TargetHeads

  The fingerprints are computed from the embeddings, so the search needs no training of its own.
  e_j is the whole event, with its event features and its time if there are any. Of behaviours with
  equal distances the search returns the newest. A bias by time is of the attention alone. [ours]

  Attributes:
    bits: m, of a fingerprint; a multiple of 32.
    hash_seed: of the random projections.
    top_k: K, the number of behaviours that the search returns.
    heads: H of the attention.
    attention: d, width of a head.
  """

  bits: int = 64
  hash_seed: int = 0
  top_k: int = 32
  heads: int = 4
  attention: int = 16
  positive_fields = ('bits', 'top_k', 'heads', 'attention')
  has_time_bias = True

  def check(self):
    super().check()
    check_seed(self.hash_seed)
    if self.bits % WORD:
      raise UserError(
        f'config.model.bits={self.bits} must be a multiple of {WORD}, such as '
        f'{-(-self.bits // WORD) * WORD}'
      )

  def encode(self, x, batch, read, train):
    a_BQW = fingerprint(x.i_BQI, self.bits // WORD, WORD, self.hash_seed)
    f_BLW = fingerprint(x.s_BLI, self.bits // WORD, WORD, self.hash_seed)
    distance_BQLW = jax.lax.population_count(f_BLW[:, None] ^ a_BQW[:, :, None])
    distance_BQL = jnp.sum(distance_BQLW.astype(jnp.float32), axis=-1)
    hits = search(-distance_BQL, x.mask_BL[:, None], self.top_k)
    g_BQHI = HeadQueries(self.heads, self.attention, self.dtype, name='queries')(x.i_BQI)
    attention = TargetHeads(self.attention, self.dtype, name='attention')
    s_BQKI, bias_BQK = take(x.s_BLI, hits), take_bias(self.time_bias(batch), hits)
    return Encoded(attention(g_BQHI, s_BQKI, hits.mask_BQK, bias_BQK))
