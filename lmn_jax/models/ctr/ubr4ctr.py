"""UBR4CTR: a query of the target's features, chosen by a policy, finds behaviours (Qin et al.)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmn_jax.layers.basic import MLP, candidates, repeat, stop
from lmn_jax.layers.history_search import HeadQueries, attend, matches, search, take
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.models.ctr.base import CTRModel, Encoded


def policy_loss(
  log_prob_B: Float[Array, 'B'],
  logit_B: Float[Array, 'B'],
  label_B: Float[Array, 'B'],
  weight_B: Float[Array, 'B'],
) -> Float[Array, '']:
  """REINFORCE, rewarded by the information gained over a guess (section 3).

      L = -sum_b w_b sg[R_b] log pi_b / sum_b w_b,    R_b = max(-1, 1 - BCE_b / log 2)

  The bound of R is the authors' code's. [code] pi_b is the probability of the whole query, of the
  features left out too, as REINFORCE has it; the authors' code counts those chosen only. [ours]

  Args:
    log_prob_B: log pi. logit_B: the prediction, which the reward does not train. label_B, weight_B:
      as for `losses.click_loss`.
  """
  nats_B = stop(optax.sigmoid_binary_cross_entropy(logit_B, label_B))
  reward_B = jnp.maximum(1 - nats_B / jnp.log(2.0), -1)
  return -weighted_mean(reward_B * log_prob_B, weight_B)


class UBR4CTR(CTRModel):
  """Qin et al., User Behavior Retrieval for Click-Through Rate Prediction, 2020, section 3.

      select    p_f = sigmoid(MLP(SelfAttention(E)_f)),  f in query with probability p_f
      retrieve  score_j = sum over f in query, f of behaviour j equal to the target's, of idf_f
                idf_f = log(1 + (N - n_f + 1/2) / (n_f + 1/2))       n_f of N behaviours match
                found: the top_k scores among the behaviours that match in any f of the query
      predict   w_j = softmax_j(e_j . W e_a),  encode = sum_j w_j e_j

  E holds the rows of every field of user, target and context; the query those of the target that a
  behaviour has too, its id and its features. Choosing is taught by REINFORCE: log pi(query) times
  the information gained over a guess, `1 - BCE / log 2` (policy_loss).

  What differs, all of it [ours]:
    idf is what BM25 comes to for fields that hold a value once, in the form that is never negative,
      with N and n_f of the user's history; a field of several values matches if one of them does.
    policy and prediction are trained in the same step, and not by turns.
    without `train` the query is not drawn: it is of the features with p_f > 1/2, and of the
      likeliest, so that it is never empty.
    of behaviours with one score the newest are found.

  Attributes:
    top_k: K, behaviours found.
    heads: of the selection's self-attention.
    attention: d, width of a head there and of the prediction's attention.
  """

  top_k: int = 32
  heads: int = 2
  attention: int = 16
  positive_fields = ('top_k', 'heads', 'attention')
  loss_weights = {'search': 1.0}  # of the policy

  def encode(self, x, batch, read, train):
    fields = ('item', *self.schema.item)
    chosen_BQF, log_prob_BQ = self._query(x, len(fields), train)
    score_BQL = self._score(batch, fields, x.mask_BL, chosen_BQF)
    found = search(score_BQL, score_BQL > 0, self.top_k)
    g_BQ1I = HeadQueries(1, self.attention, self.dtype, name='queries')(x.i_BQI)
    out_BQ1I = attend(g_BQ1I, take(x.s_BLI, found), found.mask_BQK)

    def losses(logit_B):
      log_prob_B = log_prob_BQ.reshape(logit_B.shape)
      return {'search': policy_loss(log_prob_B, logit_B, batch['label'], batch['weight'])}

    return Encoded(out_BQ1I[:, :, 0], losses)

  def _query(self, x, fields, train):
    """Which of a target's first fields are in its query, bool [B, Q, F], and log pi [B, Q]."""
    # The target's fields come first, so that they are the first rows below. float32, whatever the
    # model computes in: these few numbers decide what is found.
    B, Q = x.i_BQI.shape[:2]
    rows = jnp.concatenate([x.i_BQI, repeat(x.u_BU, Q), repeat(x.c_BC, Q)], axis=-1)
    e_BQED = rows.astype(jnp.float32).reshape(B, Q, -1, self.width)
    attention = nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=self.heads * self.attention, name='select'
    )
    mixed_BQED = e_BQED + attention(nn.LayerNorm(name='select_norm')(e_BQED), e_BQED)
    # The widths of the authors' code.
    logit_BQF = MLP((20, 10), 1, name='select_head')(mixed_BQED[:, :, :fields])[..., 0]
    if train:
      chosen_BQF = jax.random.bernoulli(self.make_rng('positions'), nn.sigmoid(logit_BQF))
    else:
      chosen_BQF = (logit_BQF > 0) | (logit_BQF == jnp.max(logit_BQF, axis=2, keepdims=True))
    log_BQF = nn.log_sigmoid(jnp.where(chosen_BQF, logit_BQF, -logit_BQF))
    return chosen_BQF, jnp.sum(log_BQF, axis=2)

  def _score(self, batch, fields, mask_BL, chosen_BQF):
    """BM25 of the behaviours for the queries, float32 [B, Q, L]; 0 where nothing matches."""
    V = dict(self.schema.vocabulary)
    past = ['history', *(f.replace('item.', 'history.', 1) for f in self.schema.item)]
    total_B1 = jnp.sum(mask_BL, axis=1, keepdims=True).astype(jnp.float32)
    score_BQL = jnp.zeros((1, 1, 1))
    for k, (own, behaviours) in enumerate(zip(fields, past, strict=True)):
      same_BQL = matches(candidates(batch, own), batch[behaviours], V[own])
      same_BQL = same_BQL & mask_BL[:, None] & chosen_BQF[:, :, k, None]
      n_BQ = jnp.sum(same_BQL, axis=2).astype(jnp.float32)
      idf_BQ = jnp.log1p((total_B1 - n_BQ + 0.5) / (n_BQ + 0.5))
      score_BQL += jnp.where(same_BQL, idf_BQ[:, :, None], 0)
    return score_BQL
