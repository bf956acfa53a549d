"""UBR4CTR: a policy selects features of the target as a query for behaviours of the history.

Qin et al., User Behavior Retrieval for Click-Through Rate Prediction, SIGIR 2020.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmn_jax.errors import UserError
from lmn_jax.layers.basic import MLP, candidates, repeat, stop
from lmn_jax.layers.history_search import (
  HeadQueries,
  attend,
  matches,
  search,
  take,
  take_bias,
)
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.models.ctr.base import CTRModel, Encoded


def policy_loss(
  log_prob: Float[Array, '*B'],
  logit: Float[Array, '*B'],
  label: Float[Array, '*B'],
  weight: Float[Array, '*B'],
) -> Float[Array, '']:
  """The REINFORCE loss; the reward is the information gain over a guess (section 3).

      L = -sum_b w_b sg[R_b] log pi_b / sum_b w_b,    R_b = max(-1, 1 - BCE_b / log 2)

  The bound of R is from the authors' code. [code] pi_b is the probability of the whole query,
  including the features that were not selected, as in REINFORCE; the authors' code includes only
  the selected features. [ours]

  Args:
    log_prob: log pi. logit: the prediction, which gets no gradient. label, weight: as for
      `losses.click_loss`.
  """
  nats = stop(optax.sigmoid_binary_cross_entropy(logit, label))
  reward = jnp.maximum(1 - nats / jnp.log(2.0), -1)
  return -weighted_mean(reward * log_prob, weight)


class UBR4CTR(CTRModel):
  """A policy selects the query, BM25 retrieves behaviours, attention reads them (section 3).

      select    p_f = sigmoid(MLP(SelfAttention(E)_f)),  f in query with probability p_f
      retrieve  score_j = sum over f in query, f of behaviour j equal to the target's, of idf_f
                idf_f = log(1 + (N - n_f + 1/2) / (n_f + 1/2))       n_f of N behaviours match
                J = the top_k scores among the behaviours that match in any f of the query
      predict   w_j = softmax_{j in J}(e_j . W e_a),  encode = sum_j w_j e_j

  E has the rows of every field of user, target and context. The query is selected from the fields
  that targets and behaviours share: the id of the item and its coded features; numbers and event
  features are part of e_j alone. REINFORCE trains the
  selection: log pi(query) times the information gain over a guess, `1 - BCE / log 2` (policy_loss).

  Deviations from the paper, all of them [ours]:
    idf is BM25 for fields that have a value once, in the form that is never negative, with N and
      n_f of the user's history; a field with several values matches if one of them does.
    policy and prediction are trained in the same step and not alternately.
    without `train` the query is not drawn: it has the features with p_f > 1/2 and the feature with
      the largest p_f, so that it is never empty.
    of behaviours with equal scores the search returns the newest.

  Attributes:
    top_k: K, the number of behaviours that the search returns.
    heads: of the self-attention of the selection.
    attention: d, width of a head of the selection and of the attention of the prediction.
  """

  top_k: int = 32
  heads: int = 2
  attention: int = 16
  positive_fields = ('top_k', 'heads', 'attention')
  loss_weights = {'search': 1.0}  # of the policy
  has_time_bias = True

  def check(self):
    super().check()
    if self.event_width:
      raise UserError(
        f'config.model.event_width={self.event_width} must be 0 for UBR4CTR, which selects among '
        'the fields of the target'
      )
    self._check_clicks('use another model')

  def encode(self, x, batch, read, train):
    fields = ('item', *self.schema.item)
    chosen_BQF, log_prob_BQ = self._query(x, len(fields), train)
    score_BQL = self._score(batch, fields, x.mask_BL, chosen_BQF)
    hits = search(score_BQL, score_BQL > 0, self.top_k)
    g_BQ1I = HeadQueries(1, self.attention, self.dtype, name='queries')(x.i_BQI)
    bias_BQK = take_bias(self.time_bias(batch), hits)
    out_BQ1I = attend(g_BQ1I, take(x.s_BLI, hits), hits.mask_BQK, bias_BQK)

    def losses(logit):
      log_prob = log_prob_BQ.reshape(logit.shape)
      return {'search': policy_loss(log_prob, logit, batch['label'], batch['weight'])}

    return Encoded(out_BQ1I[:, :, 0], losses)

  def _query(self, x, fields, train):
    """Selects among the target's F fields: bool [B, Q, F]; returns also log pi [B, Q]."""
    # The target's fields come first, so their F rows are the first below. float32 for every compute
    # type, because these few numbers determine the search.
    B, Q = x.i_BQI.shape[:2]
    rows = jnp.concatenate([x.i_BQI, repeat(x.u_BU, Q), x.c_BQC], axis=-1)
    e_BQED = rows.astype(jnp.float32).reshape(B, Q, -1, self.width)
    attention = nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=self.heads * self.attention, name='select'
    )
    mixed_BQED = e_BQED + attention(nn.LayerNorm(name='select_norm')(e_BQED), e_BQED)
    # The widths of the authors' code. [code]
    logit_BQF = MLP((20, 10), 1, name='select_head')(mixed_BQED[:, :, :fields])[..., 0]
    if train:
      chosen_BQF = jax.random.bernoulli(self.make_rng('positions'), nn.sigmoid(logit_BQF))
    else:
      chosen_BQF = (logit_BQF > 0) | (logit_BQF == jnp.max(logit_BQF, axis=2, keepdims=True))
    log_BQF = nn.log_sigmoid(jnp.where(chosen_BQF, logit_BQF, -logit_BQF))
    return chosen_BQF, jnp.sum(log_BQF, axis=2)

  def _score(self, batch, fields, mask_BL, chosen_BQF):
    """The BM25 scores of the behaviours for the queries, float32 [B, Q, L]; 0 without a match."""
    V = dict(self.schema.vocabulary)
    history = ['history', *(f.replace('item.', 'history.', 1) for f in self.schema.item)]
    total_B1 = jnp.sum(mask_BL, axis=1, keepdims=True).astype(jnp.float32)
    score_BQL = jnp.zeros((1, 1, 1))
    for k, (field, behaviours) in enumerate(zip(fields, history, strict=True)):
      same_BQL = matches(candidates(batch, field), batch[behaviours], V[field])
      same_BQL = same_BQL & mask_BL[:, None] & chosen_BQF[:, :, k, None]
      n_BQ = jnp.sum(same_BQL, axis=2).astype(jnp.float32)
      idf_BQ = jnp.log1p((total_B1 - n_BQ + 0.5) / (n_BQ + 0.5))
      score_BQL += jnp.where(same_BQL, idf_BQ[:, :, None], 0)
    return score_BQL
