"""Losses: pure functions of arrays. A model makes its own of them, `total_loss` adds them up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError


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

  z_t is under a stop-gradient (models/ctr/lmn.py). The mean over d is ours: it makes lambda
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


def total_loss(
  losses: dict[str, Float[Array, '']], objective: str, weights: ml_collections.ConfigDict
) -> Float[Array, '']:
  """`L = L_objective + sum_k weight_k L_k`, such as LMN's `BCE + lambda L_mem`.

  Args:
    losses: by name. objective: the one that weighs 1. weights: config.loss, `NAME_weight` for each
      of the others.

  Raises:
    UserError: a loss that has no weight.
  """
  total = losses[objective]
  for name, loss in losses.items():
    if name != objective:
      if f'{name}_weight' not in weights:
        raise UserError(
          f'the model returns a loss {name!r} and config.loss has no {name}_weight; name it in '
          f'loss_weights of the model, such as loss_weights = {{{name!r}: 1.0}}'
        )
      total = total + weights[f'{name}_weight'] * loss
  return total


POSITIONS = 256  # whose scores of all items are held at a time


def softmax_loss(
  v_BTD: Float[Array, 'B T D'],
  target_BT: Int[Array, 'B T'],
  weight_BT: Float[Array, 'B T'],
  rows_VD: Float[Array, 'V D'],
) -> Float[Array, '']:
  """`-log softmax_i(v . e_i)` of the target among all items, the weighted mean (DMAN, equation 9).

  Scores are made for POSITIONS at a time, once, and the gradients with them.

  Args:
    v_BTD: after each event. target_BT: the item that follows. weight_BT: 0 where there is none.
    rows_VD: of all items; row 0, the unknown, is no candidate.
  """

  def own_lanes(v_BTD, target_BT, weight_BT, rows_VD):
    v_ND = v_BTD.reshape(-1, v_BTD.shape[-1])
    return _nats(v_ND, target_BT.reshape(-1), weight_BT.reshape(-1), rows_VD)[None]

  # Each device by itself: XLA would bring all lanes together for the loop.
  over = (meshes.BATCH, meshes.BATCH, meshes.BATCH, meshes.REPLICATED)
  each = meshes.each_device(own_lanes, over, meshes.BATCH)
  sums = each(v_BTD, target_BT, weight_BT, rows_VD)
  return jnp.sum(sums) / jnp.maximum(jnp.sum(weight_BT), 1e-6)


@jax.custom_vjp
def _nats(v_ND, target_N, weight_N, rows_VD):
  """`sum_n w_n (logsumexp_i s_ni - s_n,target)`, s_ni = v_n . e_i, float32 scalar.

  Its gradients, up to the factor that comes from behind, are `w_n (p_n - onehot(target_n))` times
  rows or vectors: made beside the loss they need no score twice, and none is kept.
  """
  return _nats_forward(v_ND, target_N, weight_N, rows_VD)[0]


def _nats_forward(v_ND, target_N, weight_N, rows_VD):
  N, D = v_ND.shape
  size = min(POSITIONS, N)
  item_V = jnp.arange(len(rows_VD), dtype=jnp.int32)[None]
  # Those that weigh come first: blocks of padding are not made.
  order_N = jnp.pad(jnp.argsort(weight_N == 0), (0, -N % size), constant_values=N)
  blocks = (jnp.sum(weight_N != 0) + size - 1) // size

  def block(k, found):
    total, to_v_ND, to_rows_VD = found
    at_P = jax.lax.dynamic_slice_in_dim(order_N, k * size, size)
    v_PD, target_P, weight_P = (
      x.at[at_P].get(mode='fill', fill_value=0) for x in (v_ND, target_N, weight_N)
    )
    weight_P1, own_PV = weight_P[:, None], item_V == target_P[:, None]
    score_PV = jnp.where(item_V > 0, v_PD @ rows_VD.T, -jnp.inf)
    high_P1 = jnp.max(score_PV, axis=1, keepdims=True)
    exp_PV = jnp.exp(score_PV - high_P1)
    sum_P1 = jnp.sum(exp_PV, axis=1, keepdims=True)
    own_P1 = jnp.sum(jnp.where(own_PV, score_PV, 0), axis=1, keepdims=True)
    nats_P1 = jnp.log(sum_P1) + high_P1 - own_P1
    g_PV = exp_PV * (weight_P1 / sum_P1) - jnp.where(own_PV, weight_P1, 0)
    return (
      total + jnp.sum(jnp.where(weight_P1 > 0, weight_P1 * nats_P1, 0)),
      to_v_ND.at[at_P].set(g_PV @ rows_VD, mode='drop'),
      to_rows_VD + g_PV.T @ v_PD,
    )

  start = jnp.zeros(()), jnp.zeros((N, D)), jnp.zeros(rows_VD.shape)
  total, *gradients = jax.lax.fori_loop(0, blocks, block, start)
  return total, tuple(gradients)


def _nats_backward(gradients, g):
  to_v_ND, to_rows_VD = gradients
  return g * to_v_ND, None, None, g * to_rows_VD


_nats.defvjp(_nats_forward, _nats_backward)


def sampled_softmax_loss(
  own_BT: Float[Array, 'B T'],
  other_BTN: Float[Array, 'B T N'],
  there_BTN: Bool[Array, '#B #T N'],
  weight_BT: Float[Array, 'B T'],
) -> Float[Array, '']:
  """`-log exp(s) / (exp(s) + sum_n exp(s_n))` of targets among sampled items, the weighted mean.

  Args:
    own_BT: s, scores of the targets. other_BTN: s_n; both less log q where items are not drawn
      alike (Jean et al. 2015; Yi et al. 2019, equation 4). there_BTN: False for no item.
    weight_BT: 0 where there is no target.
  """
  other_BTN = jnp.where(there_BTN, other_BTN, -jnp.inf)
  all_BTN = jnp.concatenate([own_BT[:, :, None], other_BTN], axis=-1)
  nats_BT = jax.nn.logsumexp(all_BTN, axis=-1) - own_BT
  return weighted_mean(jnp.where(weight_BT > 0, nats_BT, 0), weight_BT)


def gbce_loss(
  own_BT: Float[Array, 'B T'],
  other_BTN: Float[Array, 'B T N'],
  there_BTN: Bool[Array, '#B #T N'],
  weight_BT: Float[Array, 'B T'],
  alpha: float,
  t: float,
) -> Float[Array, '']:
  """Generalised binary cross-entropy (Petrov & Macdonald 2023, equations 9 and 17).

      L = -(log sigmoid(s)^beta + sum_n log(1 - sigmoid(s_n)))
      beta = alpha (t (1 - 1 / alpha) + 1 / alpha)

  With t = 0, beta = 1: binary cross-entropy, a sum over the negatives. The weighted mean.

  Args:
    own_BT: s, scores of the targets. other_BTN: s_n. there_BTN: False for what does not count.
    weight_BT: 0 where there is no target. alpha: share of the other items
      that is sampled, `N / (items - 1)`. t: calibration, in [0, 1].
  """
  beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
  lost_BTN = jnp.where(there_BTN, jax.nn.softplus(other_BTN), 0)
  nats_BT = beta * jax.nn.softplus(-own_BT) + jnp.sum(lost_BTN, axis=-1)
  return weighted_mean(nats_BT, weight_BT)
