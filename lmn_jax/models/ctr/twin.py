"""TWIN: the search scores behaviours as the attention after it will (Chang et al. 2023)."""

import jax.numpy as jnp

from lmn_jax.layers.history_search import HeadQueries, TargetHeads, search, take
from lmn_jax.models.ctr.base import CTRModel, Encoded


class TWIN(CTRModel):
  """Chang et al., TWIN: TWo-stage Interest Network, 2023, section 4.

      alpha_h = (K Wk_h) (q Wq_h)^T / sqrt(d) + (C Wc_h) beta_h      K inherent, C cross features
      found   = the top_k behaviours with the largest sum_h alpha_h  over the whole history
      encode  = [softmax(alpha_1) K Wv_1 ; ... ; softmax(alpha_H) K Wv_H] Wo       over those found

  Both stages have one and the same alpha and the same weights, so what the first finds is what the
  second would weigh most, and the click loss teaches both.

  The cross features of a user and an item (how long it was watched, whether it was liked) enter as
  the bias C Wc beta. Our batches hold inherent features only, so the term is left out. [ours]
  The paper does not say how the heads' scores become one in the search: they are summed. [ours]
  In serving K Wk is computed once for a behaviour and kept. Here the few targets of a history are
  projected to the behaviours' side, which is the same at less cost (history_search.HeadQueries).

  Attributes:
    top_k: K, behaviours found.
    heads: H, of both stages.
    attention: d, width of a head.
  """

  top_k: int = 32
  heads: int = 4
  attention: int = 16
  positive_fields = ('top_k', 'heads', 'attention')

  def encode(self, x, batch, read, train):
    g_BQHI = HeadQueries(self.heads, self.attention, self.dtype, name='queries')(x.i_BQI)
    score_BQL = jnp.einsum('bqi,bli->bql', jnp.sum(g_BQHI, axis=2), x.s_BLI)
    found = search(score_BQL, x.mask_BL[:, None], self.top_k)
    attention = TargetHeads(self.attention, self.dtype, name='attention')
    return Encoded(attention(g_BQHI, take(x.s_BLI, found), found.mask_BQK))
