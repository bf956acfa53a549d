"""TWIN: the search has the scores of the attention that follows it.

Chang et al., TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction
at Kuaishou, KDD 2023.
"""

import jax.numpy as jnp

from lmn_jax.layers.history_search import HeadQueries, TargetHeads, search, take, take_bias
from lmn_jax.models.ctr.base import CTRModel, Encoded


class TWIN(CTRModel):
  """A search and an attention with the same scores and weights (section 4).

      alpha_h = (K Wk_h) (q Wq_h)^T / sqrt(d) + (C Wc_h) beta_h      K inherent, C cross features
      J       = the top_k behaviours with the largest sum_h alpha_h  over the whole history
      encode  = [softmax(alpha_1) K Wv_1 ; ... ; softmax(alpha_H) K Wv_H] Wo            over J

  Both stages share alpha and its weights, so the search returns the behaviours with the largest
  attention weights, and the click loss trains both stages.

  In the paper, cross features of a user and an item (watch time, likes) give the bias C Wc beta.
  Here event features are part of K, and with time='bias' the gap of an event gives the bias, one
  scalar for all heads. [ours] The paper does not say how the search combines the scores of the
  heads; here they are summed. [ours]
  In the paper, serving computes K Wk once for each behaviour and stores it. Here the few targets
  are projected instead, with equal results at less cost (history_search.HeadQueries).

  Attributes:
    top_k: K, the number of behaviours that the search returns.
    heads: H, of both stages.
    attention: d, width of a head.
  """

  top_k: int = 32
  heads: int = 4
  attention: int = 16
  positive_fields = ('top_k', 'heads', 'attention')
  has_time_bias = True

  def encode(self, x, batch, read, train):
    g_BQHI = HeadQueries(self.heads, self.attention, self.dtype, name='queries')(x.i_BQI)
    # float32 for every compute type, so that few scores tie.
    score_BQL = jnp.einsum(
      'bqi,bli->bql', jnp.sum(g_BQHI, axis=2), x.s_BLI, preferred_element_type=jnp.float32
    )
    bias_BL = self.time_bias(batch)
    if bias_BL is not None:  # of each head
      score_BQL = score_BQL + self.heads * bias_BL[:, None]
    hits = search(score_BQL, x.mask_BL[:, None], self.top_k)
    attention = TargetHeads(self.attention, self.dtype, name='attention')
    s_BQKI, bias_BQK = take(x.s_BLI, hits), take_bias(bias_BL, hits)
    return Encoded(attention(g_BQHI, s_BQKI, hits.mask_BQK, bias_BQK))
