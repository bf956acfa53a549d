"""Losses: pure functions of arrays. Models compute their losses, `total_loss` adds them up."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lmn_jax import plugins
from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError


def weighted_mean(x: Float[Array, '...'], weight: Float[Array, '...']) -> Float[Array, '']:
  """The weighted mean `sum w x / sum w` over all devices, float32; 0 if all weights are 0."""
  weight = weight.astype(jnp.float32)
  # The scale of sample weights is free, so the bound is the smallest normal float32.
  total = jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
  return jnp.sum(weight * x.astype(jnp.float32)) / total


def click_loss(
  logit: Float[Array, '*B'], label: Float[Array, '*B'], weight: Float[Array, '*B']
) -> Float[Array, '']:
  """Binary cross-entropy, `-sum_b w_b (y_b log p_b + (1 - y_b) log(1 - p_b)) / sum_b w_b`.

  Args:
    logit: [B], or [B, Q] of requests, log-odds of p. label: y in {0, 1}. weight: w, 0 on filler
      rows and on the padding of requests.

  Returns:
    float32 scalar, in nats.
  """
  return weighted_mean(optax.sigmoid_binary_cross_entropy(logit, label), weight)


def custom_loss(name: str, *arguments: jax.Array) -> Float[Array, '']:
  """The loss of the user that config.model.loss names.

  Args:
    name: MODULE:FUNCTION. arguments: given by position.

  Raises:
    UserError: the function cannot be loaded, raises an exception, or does not return one float32.
  """
  value = plugins.load_function('config.model.loss', name)(*arguments)
  if isinstance(value, jax.Array) and value.shape == () and value.dtype == jnp.float32:
    return value
  if isinstance(value, jax.Array):
    found = f'an array of {value.dtype} with the shape {value.shape}'
  else:
    found = f'{value!r:.80} of the type {type(value).__name__}'
  raise UserError(
    f'config.model.loss={name!r} returned {found}; it must return a float32 scalar of jax.numpy, '
    'such as lmn_jax.layers.losses.weighted_mean(loss, weight)'
  )


def smooth_l1(x: Float[Array, '...']) -> Float[Array, '...']:
  """Computes `x^2 / 2` for |x| < 1 and `|x| - 1/2` otherwise (Girshick 2015, equation 3)."""
  return optax.huber_loss(x)


class Recall(NamedTuple):
  """Reads of the memory for sampled history positions, and their targets.

  recalled_BPV, target_BPV: float [B, P, Dv]. weight_BP: float [B, P], 0 on padded positions.
  """

  recalled_BPV: Float[Array, 'B P V']
  target_BPV: Float[Array, 'B P V']
  weight_BP: Float[Array, 'B P']


def memory_loss(recall: Recall) -> tuple[Float[Array, ''], Float[Array, '']]:
  """The loss of reads of the memory against their targets (LMN, memory injection).

      L_mem = sum_t w_t mean_d SmoothL1(M(q(u, s_t)) - z_t)_d / sum_t w_t

  z_t is under a stop-gradient (models/ctr/lmn.py). The mean over d makes lambda independent of the
  width. [ours]

  Args:
    recall: recalled and target [B, P, Dv], weight [B, P], 0 where there is no event.

  Returns:
    L_mem, and for comparison the same loss of a constant prediction, the mean target of the batch.
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
    losses: by name. objective: name of the loss with weight 1. weights: config.loss, `NAME_weight`
      for each other loss.

  Raises:
    UserError: a loss has no weight.
  """
  total = losses[objective]
  for name, loss in losses.items():
    if name != objective:
      if f'{name}_weight' not in weights:
        raise UserError(
          f'the model returns a loss {name!r}, but config.loss has no {name}_weight; add it to '
          f'loss_weights of the model, such as loss_weights = {{{name!r}: 1.0}}'
        )
      total = total + weights[f'{name}_weight'] * loss
  return total


def softmax_loss(
  v_BTD: Float[Array, 'B T D'],
  target_BT: Int[Array, 'B T'],
  weight_BT: Float[Array, 'B T'],
  rows_VD: Float[Array, 'V D'],
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, '']:
  """The weighted mean of `-log softmax_i(v . e_i)` of the target among all items (DMAN, eq. 9).

  Scores are computed once, for a block of positions at a time (`loss_scores`), together with the
  gradients.

  Args:
    v_BTD: vectors after each event. target_BT: the next item. weight_BT: 0 without a target.
    rows_VD: of all items; row 0, the unknown item, is not a candidate. dtype: compute type of the
      products on GPU and TPU, with float32 sums; on CPU, where bfloat16 is slow, it is float32.
  """
  dtype = jnp.dtype(jnp.float32 if meshes.platform() == 'cpu' else dtype)

  def device_sum(v_BTD, target_BT, weight_BT, rows_VD):
    v_ND = v_BTD.reshape(-1, v_BTD.shape[-1])
    return _nats(dtype, v_ND, target_BT.reshape(-1), weight_BT.reshape(-1), rows_VD)[None]

  # Each device sums its own lanes: XLA would gather all lanes for the loop.
  in_specs = (meshes.BATCH, meshes.BATCH, meshes.BATCH, meshes.REPLICATED)
  device_sums = meshes.each_device(device_sum, in_specs, meshes.BATCH)
  sums = device_sums(v_BTD, target_BT, weight_BT, rows_VD)
  return jnp.sum(sums) / jnp.maximum(jnp.sum(weight_BT), 1e-6)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(dtype, v_ND, target_N, weight_N, rows_VD):
  """Computes `sum_n w_n (logsumexp_i s_ni - s_n,target)`, s_ni = v_n . e_i, float32 scalar.

  Its gradients, up to the cotangent of the loss, are `w_n (p_n - onehot(target_n))` times rows or
  vectors. They are computed together with the loss, so that no score is computed twice or stored.
  """
  return _nats_forward(dtype, v_ND, target_N, weight_N, rows_VD)[0]


def _nats_forward(dtype, v_ND, target_N, weight_N, rows_VD):
  N, D = v_ND.shape
  v_ND, rows_VD = v_ND.astype(dtype), rows_VD.astype(dtype)
  product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  sizes = block_sizes.sizes()
  size = min(N, sizes.loss_positions, max(1, sizes.loss_scores // len(rows_VD)))
  item_V = jnp.arange(len(rows_VD), dtype=jnp.int32)[None]
  # Positions with a weight come first, so that blocks of padding are not computed.
  order_N = jnp.pad(jnp.argsort(weight_N == 0), (0, -N % size), constant_values=N)
  blocks = (jnp.sum(weight_N != 0) + size - 1) // size

  def block(k, carry):
    total, grad_v_ND, grad_rows_VD = carry
    at_P = jax.lax.dynamic_slice_in_dim(order_N, k * size, size)
    v_PD, target_P, weight_P = (
      x.at[at_P].get(mode='fill', fill_value=0) for x in (v_ND, target_N, weight_N)
    )
    weight_P1, target_PV = weight_P[:, None], item_V == target_P[:, None]
    score_PV = jnp.where(item_V > 0, product(v_PD, rows_VD.T), -jnp.inf)
    high_P1 = jnp.max(score_PV, axis=1, keepdims=True)
    exp_PV = jnp.exp(score_PV - high_P1)
    sum_P1 = jnp.sum(exp_PV, axis=1, keepdims=True)
    target_score_P1 = jnp.sum(jnp.where(target_PV, score_PV, 0), axis=1, keepdims=True)
    nats_P1 = jnp.log(sum_P1) + high_P1 - target_score_P1
    g_PV = exp_PV * (weight_P1 / sum_P1) - jnp.where(target_PV, weight_P1, 0)
    g_PV = g_PV.astype(dtype)
    return (
      total + jnp.sum(jnp.where(weight_P1 > 0, weight_P1 * nats_P1, 0)),
      grad_v_ND.at[at_P].set(product(g_PV, rows_VD), mode='drop'),
      grad_rows_VD + product(g_PV.T, v_PD),
    )

  start = jnp.zeros(()), jnp.zeros((N, D)), jnp.zeros(rows_VD.shape)
  total, *gradients = jax.lax.fori_loop(0, blocks, block, start)
  return total, tuple(gradients)


def _nats_backward(_dtype, gradients, g):
  grad_v_ND, grad_rows_VD = gradients
  return g * grad_v_ND, None, None, g * grad_rows_VD


_nats.defvjp(_nats_forward, _nats_backward)


def sampled_softmax_loss(
  positive_BT: Float[Array, 'B T'],
  negative_BTN: Float[Array, 'B T N'],
  mask_BTN: Bool[Array, '#B #T N'],
  weight_BT: Float[Array, 'B T'],
) -> Float[Array, '']:
  """The weighted mean of `-log exp(s) / (exp(s) + sum_n exp(s_n))` of targets and sampled items.

  Args:
    positive_BT: s, scores of the targets. negative_BTN: s_n, scores of sampled items; log q is
      subtracted from both if q is not uniform (Jean et al. 2015; Yi et al. 2019, equation 4).
    mask_BTN: False on entries that are no negatives. weight_BT: 0 without a target.
  """
  negative_BTN = jnp.where(mask_BTN, negative_BTN, -jnp.inf)
  all_BTN = jnp.concatenate([positive_BT[:, :, None], negative_BTN], axis=-1)
  nats_BT = jax.nn.logsumexp(all_BTN, axis=-1) - positive_BT
  return weighted_mean(jnp.where(weight_BT > 0, nats_BT, 0), weight_BT)


def gbce_loss(
  positive_BT: Float[Array, 'B T'],
  negative_BTN: Float[Array, 'B T N'],
  mask_BTN: Bool[Array, '#B #T N'],
  weight_BT: Float[Array, 'B T'],
  alpha: float,
  t: float,
) -> Float[Array, '']:
  """Generalised binary cross-entropy (Petrov & Macdonald 2023, equations 9 and 17).

      L = -(log sigmoid(s)^beta + sum_n log(1 - sigmoid(s_n)))
      beta = alpha (t (1 - 1 / alpha) + 1 / alpha)

  t = 0 gives beta = 1, binary cross-entropy with a sum over the negatives.

  Args:
    positive_BT: s, scores of the targets. negative_BTN: s_n, scores of sampled items. mask_BTN:
      False on entries that are no negatives. weight_BT: 0 without a target. alpha: the share of the
      other items that is sampled, `N / (items - 1)`. t: calibration, in [0, 1].

  Returns:
    The weighted mean of L.
  """
  beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
  lost_BTN = jnp.where(mask_BTN, jax.nn.softplus(negative_BTN), 0)
  nats_BT = beta * jax.nn.softplus(-positive_BT) + jnp.sum(lost_BTN, axis=-1)
  return weighted_mean(nats_BT, weight_BT)
