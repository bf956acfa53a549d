"""Losses of click models: of single examples, clicks or numbers, and within groups of examples.

A group has the examples of one request or of one user in the batch. Losses within groups sort the
examples by group once: O(N log N) time and O(N) memory for N examples, and for pairs N times the
size of the largest group; there is never an array of N x N. On a mesh, every device computes them
for the whole batch, from N numbers that are gathered.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.losses import weighted_mean

TINY = float(jnp.finfo(jnp.float32).tiny)


def focal_loss(
  logit_N: Float[Array, 'N'],
  label_N: Float[Array, 'N'],
  weight_N: Float[Array, 'N'],
  gamma: float,
) -> Float[Array, '']:
  """The weighted mean of `-(1 - p)^gamma log p`, p the probability of the label.

  Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 4. Their factor alpha of
  the positives is left out: sample weights have this purpose. [ours]

  Args:
    logit_N: log-odds. label_N: 0 or 1. weight_N: 0 on rows that do not count. gamma: at least 0; 0
      is binary cross-entropy.
  """
  nats_N = optax.sigmoid_binary_cross_entropy(logit_N, label_N)
  # log(1 - p) from log-odds: 1 - p would round to 0, whose power has no gradient.
  log_miss_N = jax.nn.log_sigmoid(jnp.where(label_N > 0, -logit_N, logit_N))
  return weighted_mean(jnp.exp(gamma * log_miss_N) * nats_N, weight_N)


def squared_loss(
  value_N: Float[Array, 'N'], label_N: Float[Array, 'N'], weight_N: Float[Array, 'N']
) -> Float[Array, '']:
  """The weighted mean of `(v - y)^2`.

  Args:
    value_N: v, predictions. label_N: y. weight_N: 0 on rows that do not count.
  """
  return weighted_mean(jnp.square(value_N - label_N), weight_N)


def huber_loss(
  value_N: Float[Array, 'N'],
  label_N: Float[Array, 'N'],
  weight_N: Float[Array, 'N'],
  delta: float,
) -> Float[Array, '']:
  """The weighted mean of `e^2 / 2` for |e| <= delta and `delta (|e| - delta / 2)` otherwise.

  Huber, Robust Estimation of a Location Parameter, 1964; e = v - y.

  Args:
    value_N: v, predictions. label_N: y. weight_N: 0 on rows that do not count. delta: above 0.
  """
  return weighted_mean(optax.huber_loss(value_N, label_N, delta=delta), weight_N)


def pairwise_loss(
  logit_N: Float[Array, 'N'],
  label_N: Float[Array, 'N'],
  weight_N: Float[Array, 'N'],
  group_N: Int[Array, 'N'],
) -> Float[Array, '']:
  """The logistic loss of pairs of a positive and a negative of one group.

      L = sum_ij w_i w_j log(1 + exp(s_j - s_i)) / sum_ij w_i w_j,   y_i = 1, y_j = 0, g_i = g_j

  Burges et al., Learning to Rank using Gradient Descent, ICML 2005, section 4, with known order.
  The product of the weights is [ours]. 0 without a pair.

  Args:
    logit_N: s. label_N: y, 0 or 1. weight_N: w, 0 on rows that do not count. group_N: g.
  """
  weight_N = weight_N / jnp.maximum(jnp.max(weight_N), TINY)  # products do not underflow
  replicated = (meshes.REPLICATED,) * 4
  pairs = meshes.each_device(_pair_nats, replicated, meshes.REPLICATED)
  nats, mass = pairs(logit_N, label_N, weight_N, group_N)
  return nats / jnp.maximum(mass, TINY)


@jax.custom_vjp
def _pair_nats(logit_N, label_N, weight_N, group_N):
  """The two sums of `pairwise_loss`, float32 scalars.

  Sorted by group, pairs are at a distance d of less than the size of the largest group. One pass
  over the examples for each d sums the loss and its gradient.
  """
  return _pair_nats_forward(logit_N, label_N, weight_N, group_N)[0]


def _pair_nats_forward(logit_N, label_N, weight_N, group_N):
  order_N = jnp.argsort(group_N)
  s_N, y_N, w_N, g_N = (x[order_N] for x in (logit_N, label_N, weight_N, group_N))
  N, at_N = s_N.shape[0], jnp.arange(s_N.shape[0], dtype=jnp.int32)

  def same_group(d):
    return (jnp.roll(g_N, -d) == g_N) & (at_N < N - d)

  def add(carry):
    d, nats, mass, slope_N = carry
    sign_N = y_N - jnp.roll(y_N, -d)  # 1: the first is the positive one; -1: the second; 0: no pair
    pair_N = jnp.where(same_group(d), w_N * jnp.roll(w_N, -d) * jnp.abs(sign_N), 0)
    margin_N = sign_N * (s_N - jnp.roll(s_N, -d))
    g_first_N = -pair_N * sign_N * jax.nn.sigmoid(-margin_N)
    nats = nats + jnp.sum(pair_N * jax.nn.softplus(-margin_N))
    return d + 1, nats, mass + jnp.sum(pair_N), slope_N + g_first_N - jnp.roll(g_first_N, d)

  zero = jnp.zeros((), jnp.float32)
  start = jnp.int32(1), zero, zero, jnp.zeros(N, jnp.float32)
  _, nats, mass, slope_N = jax.lax.while_loop(
    lambda carry: jnp.any(same_group(carry[0])), add, start
  )
  return (nats, mass), jnp.zeros(N, jnp.float32).at[order_N].set(slope_N)


def _pair_nats_backward(slope_N, cotangents):
  return cotangents[0] * slope_N, None, None, None


_pair_nats.defvjp(_pair_nats_forward, _pair_nats_backward)


def listwise_loss(
  logit_N: Float[Array, 'N'],
  label_N: Float[Array, 'N'],
  weight_N: Float[Array, 'N'],
  group_N: Int[Array, 'N'],
) -> Float[Array, '']:
  """The softmax cross-entropy of the positives within their group.

      L = -sum_i w_i y_i log(exp(s_i) / sum_{j: g_j = g_i} exp(s_j)) / sum_i w_i y_i

  Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007, with labels
  in place of probabilities. Positives of a group without a negative are left out: they have no
  order. [ours] Rows of weight 0 are in no group. 0 without a group of both labels.

  Args:
    logit_N: s. label_N: y, 0 or 1. weight_N: w, 0 on rows that do not count. group_N: g.
  """

  def mean(logit_N, label_N, weight_N, group_N):
    in_group_N, used_N = _ids(group_N), weight_N > 0
    positive_N = used_N & (label_N > 0) & _both(label_N, used_N, in_group_N)
    nats_N = -_log_softmax(logit_N, used_N, in_group_N)
    return weighted_mean(jnp.where(positive_N, nats_N, 0), jnp.where(positive_N, weight_N, 0))

  replicated = (meshes.REPLICATED,) * 4
  return meshes.each_device(mean, replicated, meshes.REPLICATED)(
    logit_N, label_N, weight_N, group_N
  )


def jrc_loss(
  z_N2: Float[Array, 'N 2'],
  label_N: Float[Array, 'N'],
  weight_N: Float[Array, 'N'],
  group_N: Int[Array, 'N'],
) -> Float[Array, '']:
  """The generative part of JRC: how well the logit of an example's label stands out in its group.

      L = -sum_i w_i log(exp(z_i[y_i]) / sum_{j: g_j = g_i} exp(z_j[y_i])) / sum_i w_i

  Sheng et al., Joint Optimization of Ranking and Calibration with Contextualized Hybrid Model, KDD
  2023, section 3. The log-odds are z[1] - z[0]; the calibrating part is their cross-entropy.

  Args:
    z_N2: logits of no click and of a click. label_N: y, 0 or 1. weight_N: w, 0 on rows that do not
      count. group_N: g, the context of an example.
  """

  def mean(z_N2, label_N, weight_N, group_N):
    in_group_N, used_N = _ids(group_N), weight_N > 0
    no_click_N, click_N = (_log_softmax(z_N2[:, y], used_N, in_group_N) for y in range(2))
    nats_N = -jnp.where(label_N > 0, click_N, no_click_N)
    return weighted_mean(jnp.where(used_N, nats_N, 0), weight_N)

  replicated = (meshes.REPLICATED,) * 4
  return meshes.each_device(mean, replicated, meshes.REPLICATED)(z_N2, label_N, weight_N, group_N)


def grouped_share(
  label_N: Float[Array, 'N'], weight_N: Float[Array, 'N'], group_N: Int[Array, 'N']
) -> Float[Array, '']:
  """The share of the weight in groups with both labels, from which a loss within groups learns."""

  def mean(label_N, weight_N, group_N):
    both_N = _both(label_N, weight_N > 0, _ids(group_N))
    return weighted_mean(both_N.astype(jnp.float32), weight_N)

  replicated = (meshes.REPLICATED,) * 3
  return meshes.each_device(mean, replicated, meshes.REPLICATED)(label_N, weight_N, group_N)


def _ids(group_N: Int[Array, 'N']) -> Int[Array, 'N']:
  """Numbers of the groups from 0 on, below N."""
  order_N = jnp.argsort(group_N)
  new_N = jnp.diff(group_N[order_N], prepend=group_N[order_N[:1]]) != 0
  return jnp.zeros_like(group_N).at[order_N].set(jnp.cumsum(new_N, dtype=group_N.dtype))


def _both(
  label_N: Float[Array, 'N'], used_N: Bool[Array, 'N'], in_group_N: Int[Array, 'N']
) -> Bool[Array, 'N']:
  """Whether the group of each example has a used example of each label."""
  N = label_N.shape[0]
  has = (
    jax.ops.segment_max((used_N & is_label_N).astype(jnp.int32), in_group_N, N)
    for is_label_N in (label_N > 0, label_N == 0)
  )
  positive_G, negative_G = has
  return (positive_G[in_group_N] > 0) & (negative_G[in_group_N] > 0)


def _log_softmax(
  s_N: Float[Array, 'N'], used_N: Bool[Array, 'N'], in_group_N: Int[Array, 'N']
) -> Float[Array, 'N']:
  """The log-softmax of each example within its group of used examples; 0 for others."""
  N = s_N.shape[0]
  high_G = jax.ops.segment_max(
    jnp.where(used_N, jax.lax.stop_gradient(s_N), -jnp.inf), in_group_N, N
  )
  shifted_N = jnp.where(used_N, s_N - high_G[in_group_N], 0)
  sum_G = jax.ops.segment_sum(jnp.where(used_N, jnp.exp(shifted_N), 0), in_group_N, N)
  # A group without a used example has the sum 0, whose logarithm would make gradients NaN.
  return jnp.where(used_N, shifted_N - jnp.log(jnp.where(used_N, sum_G[in_group_N], 1)), 0)
