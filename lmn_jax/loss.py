"""Losses: pure functions of (outputs, batch)."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmn_jax.layers import stop
from lmn_jax.models.ctr import Outputs, Recall


def click_loss(
  logit_B: Float[Array, 'B'], label_B: Float[Array, 'B'], weight_B: Float[Array, 'B']
) -> Float[Array, '']:
  """Binary cross-entropy, `-sum_b w_b (y_b log p_b + (1 - y_b) log(1 - p_b)) / sum_b w_b`.

  Args:
    logit_B: log-odds of p. label_B: y in {0, 1}. weight_B: w, 0 on filler rows.

  Returns:
    float32 scalar, in nats.
  """
  loss_B = optax.sigmoid_binary_cross_entropy(logit_B, label_B)
  return jnp.sum(weight_B * loss_B) / jnp.maximum(jnp.sum(weight_B), 1)


def smooth_l1(x: Float[Array, '...']) -> Float[Array, '...']:
  """`x^2 / 2` for |x| < 1, `|x| - 1/2` beyond (Girshick 2015, equation 3)."""
  return optax.huber_loss(x)


def memory_loss(recall: Recall) -> tuple[Float[Array, ''], Float[Array, '']]:
  """What the memory gave back against what it should have (LMN, memory injection).

      L_mem = sum_t w_t mean_d SmoothL1(M(q(u, s_t)) - z_t)_d / sum_t w_t

  z_t is under a stop-gradient (models/lmn.py). The mean over d is ours: it makes lambda
  independent of the width. [ours]

  Args:
    recall: recalled and target [B, P, Dv], weight [B, P], 0 where there is no event.

  Returns:
    L_mem, and the same loss for predicting the batch's mean target: a memory that has learnt
    something is below it.
  """
  weight_BP = recall.weight_BP.astype(jnp.float32)
  target_BPV = recall.target_BPV.astype(jnp.float32)
  total = jnp.maximum(jnp.sum(weight_BP), 1e-6)

  def mean_loss(predicted_BPV):
    loss_BP = jnp.mean(smooth_l1(predicted_BPV - target_BPV), axis=-1)
    return jnp.sum(weight_BP * loss_BP) / total

  mean_V = jnp.einsum('bp,bpv->v', weight_BP, target_BPV) / total
  return mean_loss(recall.recalled_BPV.astype(jnp.float32)), mean_loss(mean_V[None, None, :])


def search_loss(outputs: Outputs, batch: dict[str, Array]) -> Float[Array, '']:
  """What teaches the search of a model that searches, by what the model hands over.

      SIM       BCE of the search's own logit                     (Pi et al. 2020, section 3.2)
      UBR4CTR   -sum_b w_b log pi_b sg[R_b] / sum_b w_b,
                R_b = max(-1, 1 - BCE_b / log 2)                  (Qin et al. 2020, section 3)

  pi_b is the policy's probability of the whole query, of the features left out too, as REINFORCE
  has it; the authors' code counts those chosen only. [ours]

  Args:
    outputs: with `search`. batch: its 'label' and 'weight' are read.

  Returns:
    float32 scalar.
  """
  label_B, weight_B = batch['label'], batch['weight']
  if outputs.search.logit_B is not None:
    return click_loss(outputs.search.logit_B, label_B, weight_B)
  nats_B = stop(optax.sigmoid_binary_cross_entropy(outputs.logit_B, label_B))
  reward_B = jnp.maximum(1 - nats_B / jnp.log(2.0), -1)
  return -jnp.sum(weight_B * outputs.search.log_prob_B * reward_B) / jnp.maximum(
    jnp.sum(weight_B), 1
  )


class Losses(NamedTuple):
  """total is what is minimised; parts are its terms, for the log."""

  total: Float[Array, '']
  parts: dict[str, Float[Array, '']]


def total_loss(
  outputs: Outputs, batch: dict[str, Array], memory_weight: float, auxiliary_weight: float
) -> Losses:
  """`L = BCE + lambda * L_mem + alpha * L_aux`, each where the model has it.

  Args:
    outputs: of the model. batch: label, weight.
    memory_weight: lambda (LMN, joint training).
    auxiliary_weight: alpha, of the encoder's own loss (DIEN, equation 7; MIMN, equation 8).
  """
  click = click_loss(outputs.logit_B, batch['label'], batch['weight'])
  parts = {'click': click}
  total = click
  if outputs.recall is not None:
    memory, mean = memory_loss(outputs.recall)
    total = total + memory_weight * memory
    parts |= {'memory': memory, 'memory_of_mean': mean}
  if outputs.auxiliary is not None:
    total = total + auxiliary_weight * outputs.auxiliary
    parts['auxiliary'] = outputs.auxiliary
  if outputs.search is not None:
    parts['search'] = search_loss(outputs, batch)
    total = total + parts['search']
  return Losses(total, parts)
