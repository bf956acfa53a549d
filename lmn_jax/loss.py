"""Losses: pure functions of arrays. A model makes its own of them, `total_loss` adds them up."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float


def weighted_mean(x: Float[Array, '...'], weight: Float[Array, '...']) -> Float[Array, '']:
  """`sum w x / sum w`, float32, over all examples of all devices; 0 where nothing weighs."""
  weight = weight.astype(jnp.float32)
  return jnp.sum(weight * x.astype(jnp.float32)) / jnp.maximum(jnp.sum(weight), 1e-6)


def click_loss(
  logit_B: Float[Array, 'B'], label_B: Float[Array, 'B'], weight_B: Float[Array, 'B']
) -> Float[Array, '']:
  """Binary cross-entropy, `-sum_b w_b (y_b log p_b + (1 - y_b) log(1 - p_b)) / sum_b w_b`.

  Args:
    logit_B: log-odds of p. label_B: y in {0, 1}. weight_B: w, 0 on filler rows.

  Returns:
    float32 scalar, in nats.
  """
  return weighted_mean(optax.sigmoid_binary_cross_entropy(logit_B, label_B), weight_B)


def smooth_l1(x: Float[Array, '...']) -> Float[Array, '...']:
  """`x^2 / 2` for |x| < 1, `|x| - 1/2` beyond (Girshick 2015, equation 3)."""
  return optax.huber_loss(x)


class Recall(NamedTuple):
  """What the memory gave back for sampled history positions, and what it should have.

  recalled_BPV, target_BPV: float [B, P, Dv]. weight_BP: float [B, P], 0 on padded positions.
  """

  recalled_BPV: Float[Array, 'B P V']
  target_BPV: Float[Array, 'B P V']
  weight_BP: Float[Array, 'B P']


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

  def mean_loss(predicted_BPV):
    return weighted_mean(jnp.mean(smooth_l1(predicted_BPV - target_BPV), axis=-1), weight_BP)

  total = jnp.maximum(jnp.sum(weight_BP), 1e-6)
  mean_V = jnp.einsum('bp,bpv->v', weight_BP, target_BPV) / total
  return mean_loss(recall.recalled_BPV.astype(jnp.float32)), mean_loss(mean_V[None, None, :])


class Losses(NamedTuple):
  """total is what is minimised; parts are its terms, for the log."""

  total: Float[Array, '']
  parts: dict[str, Float[Array, '']]


def total_loss(
  logit_B: Float[Array, 'B'],
  own: dict[str, Float[Array, '']],
  batch: dict[str, Array],
  weights: ml_collections.ConfigDict,
) -> Losses:
  """`L = BCE + sum_k weight_k L_k`, with a model's own losses L_k, such as LMN's `lambda L_mem`.

  Args:
    logit_B: log-odds of a click. own: L_k by name (models.ctr.Outputs.losses).
    batch: its `label` and `weight` are read.
    weights: config.loss, with `NAME_weight` for each.
  """
  click = click_loss(logit_B, batch['label'], batch['weight'])
  total = click
  for name, loss in own.items():
    total = total + weights[f'{name}_weight'] * loss
  return Losses(total, {'click': click, **own})
