"""SIM: a general search in the whole history, then multi-head attention over its results.

Pi et al., Search-based User Interest Modeling with Lifelong Sequential Behavior Data for
Click-Through Rate Prediction, CIKM 2020.
"""

import jax.numpy as jnp

from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import MLP, candidates
from lmn_jax.layers.history_search import (
  HeadQueries,
  attend,
  matches,
  search,
  take,
  take_bias,
)
from lmn_jax.layers.losses import click_loss
from lmn_jax.models.ctr.base import CTRModel, Encoded

SEARCHES = ('soft', 'hard')


class SIM(CTRModel):
  """A general search and an exact search (sections 3.2 and 3.3).

      general search   r_j = [C_j = C_a]                      hard: the target's category
                       r_j = (W_b e_j) . (W_a e_a)            soft
                       J = the top_k largest r_j; for the hard search the newest of the category
      exact search     att_h = softmax_{j in J}((W_bh e_j) . (W_ah e_a))
                       head_h = sum_j att_h,j e_j
      encode           [head_1 ; ... ; head_H]

  The soft search is trained by an auxiliary click prediction from the whole history,
  `MLP([sum_j r_j e_j ; e_a])`, with the weight config.loss.search_weight. The hard search has no
  parameters.

  In the paper, the exact search concatenates the time from a behaviour to the target with e_j. With
  time='buckets' it is added to e_j (fields.EventFields), also in the soft search. [ours] A bias by
  time is of the exact search alone. [ours] The hard search reads the ids of the category. All
  scores are divided by sqrt(d). [ours]

  Attributes:
    search: 'soft' or 'hard'.
    category: the item feature of the hard search, as in config.data.item_features.
    top_k: K, the number of behaviours that the general search returns.
    heads: H of the exact search.
    attention: d, width of a projection, in both searches.
  """

  search: str = 'soft'
  category: str = 'category'
  top_k: int = 32
  heads: int = 4
  attention: int = 16
  positive_fields = ('top_k', 'heads', 'attention')
  loss_weights = {'search': 1.0}  # of the soft search, 1 in the paper
  has_time_bias = True

  def check(self):
    super().check()
    one_of('config.model.search', self.search, SEARCHES)
    if self.search == 'soft':
      self._check_clicks("set config.model.search='hard'")
    if self.search == 'hard' and f'item.{self.category}' not in self.schema.item:
      features = ', '.join(f.removeprefix('item.') for f in self.schema.item) or 'none'
      raise UserError(
        f'config.model.category={self.category!r} is not one of the item features with codes, '
        f"{features}; use one of them, or set config.model.search='soft'"
      )

  def encode(self, x, batch, read, train):
    if self.search == 'hard':
      name = f'item.{self.category}'
      V = dict(self.schema.vocabulary)[name]
      same_BQL = matches(candidates(batch, name), batch[name.replace('item.', 'history.', 1)], V)
      # All scores are equal, so the search returns the newest.
      r_BQL, mask_BQL = jnp.zeros(same_BQL.shape), same_BQL & x.mask_BL[:, None]
    else:
      g_BQ1I = HeadQueries(1, self.attention, self.dtype, name='general')(x.i_BQI)
      mask_BQL = x.mask_BL[:, None]
      # The scores of both searches are float32 for every compute type, so that few of them tie.
      r_BQL = jnp.einsum(
        'bqi,bli->bql', g_BQ1I[:, :, 0], x.s_BLI, preferred_element_type=jnp.float32
      )
      r_BQL = jnp.where(mask_BQL, r_BQL, 0)
    hits = search(r_BQL, mask_BQL, self.top_k)
    g_BQHI = HeadQueries(self.heads, self.attention, self.dtype, name='exact')(x.i_BQI)
    bias_BQK = take_bias(self.time_bias(batch), hits)
    search_logit_BQ1 = None
    if train and self.search == 'soft':
      search_logit_BQ1 = self._search_logit(x, r_BQL, train)
    heads_BQHI = attend(g_BQHI, take(x.s_BLI, hits), hits.mask_BQK, bias_BQK)

    def losses(logit):
      if search_logit_BQ1 is None:
        return {}
      search_logit = search_logit_BQ1.reshape(logit.shape)
      return {'search': click_loss(search_logit, batch['label'], batch['weight'])}

    return Encoded(heads_BQHI.reshape(*x.i_BQI.shape[:2], -1), losses)

  def _search_logit(self, x, r_BQL, train):
    """The auxiliary prediction from the whole history, [B, Q, 1]."""
    sum_BQI = jnp.einsum('bql,bli->bqi', r_BQL.astype(self.dtype), x.s_BLI)
    mlp = MLP(
      self.hidden, 1, dropout=self.dropout, dtype=self.dtype, final_dtype=jnp.float32,
      name='general_head',
    )  # fmt: skip
    return mlp(jnp.concatenate([sum_BQI, x.i_BQI], axis=-1), train)
