"""Product keys: the search for slots in the shared memory of LMN.

The key of slot (x, y) is [R_x ; C_y], so n = N * N slots are searched with 2 N scores.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.basic import draw_positions, stop
from lmn_jax.tables.blocks import in_blocks


class Lookup(NamedTuple):
  """The best slots. slots_QHK: int32 ids, best first. scores_QHK: their scores `a_x + b_y`."""

  slots_QHK: Int[Array, 'Q H K']
  scores_QHK: Float[Array, 'Q H K']


def winning_ranks(K: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pairs of ranks (p, r) that can be among the K largest sums of two sorted lists.

  A pair with (p+1)(r+1) > K has at least K pairs at or above it, so it is never needed:
  119 pairs instead of 1,024 at K = 32.

  Args:
    K: number of sums.

  Returns:
    Two int32 arrays, the ranks p and r, ordered by the number of pairs above them.
  """
  p, r = np.divmod(np.arange(K * K, dtype=np.int32), np.int32(K))
  above = (p + 1) * (r + 1)
  order = np.argsort(above, kind='stable')[: np.sum(above <= K)]
  return p[order], r[order]


# `top_k` compares all pairs of groups in an unrolled loop, so their number is bounded.
MOST_GROUPS = 128


def top_k(x_AQN: Float[Array, 'A Q N'], K: int) -> tuple[Array, Array]:
  """`lax.top_k` of finite numbers, exact, in half to two thirds of its time on CPU.

  The time of a heap of size K is spent on numbers that enter it. So the columns are divided into
  4 K groups. The K largest numbers are in the K groups with the largest maxima, and only these are
  searched. The sorted maxima come first, so that few numbers enter the heap after them. Times:
  experiments/search_speed.py.

  Args:
    x_AQN: float [A, Q, N]. K: 1 <= K <= N.

  Returns:
    The K largest along the last axis, descending, and their places, int32, both [A, Q, K]. The
    order of equal numbers is not defined.
  """
  A, Q, N = x_AQN.shape
  groups = 4 * K
  if N < 2 * groups or groups > MOST_GROUPS:
    return _lax_top_k(x_AQN, K)
  g = -(-N // groups)
  # Group k is column k of g rows, so that all maxima are computed in one reduction.
  padded = jnp.pad(x_AQN, ((0, 0), (0, 0), (0, g * groups - N)), constant_values=-jnp.inf)
  x_AQgG = padded.reshape(A, Q, g, groups)
  best_AQK = _first(jnp.max(x_AQgG, axis=2), K)
  x_AQgK = jnp.take_along_axis(x_AQgG, best_AQK[:, :, None], axis=3)
  at_AQK = jnp.argmax(x_AQgK, axis=2).astype(jnp.int32)
  row_11g1 = jnp.arange(g, dtype=jnp.int32)[None, None, :, None]
  rest_AQgK = jnp.where(row_11g1 == at_AQK[:, :, None], -jnp.inf, x_AQgK)
  place_AQgK = row_11g1 * groups + best_AQK[:, :, None]

  def with_maxima(maxima_AQK, rest_AQgK):
    return jnp.concatenate([maxima_AQK, rest_AQgK.reshape(A, Q, g * K)], axis=2)

  values_AQK, top_AQK = _lax_top_k(with_maxima(jnp.max(x_AQgK, axis=2), rest_AQgK), K)
  places = with_maxima(at_AQK * groups + best_AQK, place_AQgK)
  return values_AQK, jnp.take_along_axis(places, top_AQK, axis=2)


def _lax_top_k(x_AQN, K):
  """`lax.top_k` of each matrix of a [A, Q, N] array.

  For three dimensions XLA on CPU may change the layout and sort the whole array, 20 times slower;
  with A and Q merged it would gather the scores of all devices.
  """
  values, places = zip(*(jax.lax.top_k(x_QN, K) for x_QN in x_AQN), strict=True)
  return jnp.stack(values), jnp.stack(places)


def _first(x_AQG: Float[Array, 'A Q G'], K: int) -> Int[Array, 'A Q K']:
  """Returns the places of the K largest of a few numbers, in order, by counting larger numbers."""
  A, Q, G = x_AQG.shape
  place_11G = jnp.arange(G, dtype=jnp.int32)[None, None]
  rank_11K = place_11G[:, :, :K]
  # Both loops are unrolled, so that the counts of a row stay in registers.
  rank_AQG = jnp.zeros((A, Q, G), jnp.int32)
  for k in range(G):
    x_AQ1 = x_AQG[:, :, k : k + 1]
    ahead = (x_AQ1 > x_AQG) | ((x_AQ1 == x_AQG) & (k < place_11G))
    rank_AQG += ahead.astype(jnp.int32)
  first_AQK = jnp.zeros((A, Q, K), jnp.int32)
  for k in range(G):
    first_AQK = jnp.where(rank_AQG[:, :, k : k + 1] == rank_11K, k, first_AQK)
  return first_AQK


@jax.custom_vjp
def scores_at(
  query_H2QE: Float[Array, 'H 2 Q E'],
  keys_H2NE: Float[Array, 'H 2 N E'],
  axis_H2QN: Float[Array, 'H 2 Q N'],
  place_H2QK: Int[Array, 'H 2 Q K'],
) -> Float[Array, 'H 2 Q K']:
  """Returns the scores at `place` of all scores `axis = query . key`, with gradients of cost K.

      d query_q = sum_k g_qk key[place_qk]        d key_x = sum_{q,k: place_qk = x} g_qk query_q

  Autodiff would multiply by an array [Q, N] of which all but K of N entries are zero. `axis` gets
  no gradient. Times: experiments/search_speed.py.
  """
  return jnp.take_along_axis(axis_H2QN, place_H2QK, axis=-1)


def _scores_at_forward(query_H2QE, keys_H2NE, axis_H2QN, place_H2QK):
  scores_H2QK = scores_at(query_H2QE, keys_H2NE, axis_H2QN, place_H2QK)
  return scores_H2QK, (query_H2QE, keys_H2NE, place_H2QK)


def _scores_at_backward(residuals, g_H2QK):
  """Processes a block of the K keys at a time, without an array [Q, K, E]."""
  query_H2QE, keys_H2NE, place_H2QK = residuals
  H, sizes = keys_H2NE.shape[0], block_sizes.sizes()
  head_1H11, axis_1121 = jnp.arange(H)[None, :, None, None], jnp.arange(2)[None, None, :, None]

  def add(sums, block):
    dquery_H2QE, dkeys_H2NE = sums
    for k in range(0, len(block[0]), sizes.key_group):
      place_GH2Q, g_GH2Q = (x[k : k + sizes.key_group] for x in block)
      at, g_GH2Q1 = (head_1H11, axis_1121, place_GH2Q), g_GH2Q[..., None]
      dquery_H2QE += jnp.sum(g_GH2Q1 * keys_H2NE[at], axis=0)
      dkeys_H2NE = dkeys_H2NE.at[at].add(g_GH2Q1 * query_H2QE[None])
    return (dquery_H2QE, dkeys_H2NE), None

  zeros = jnp.zeros_like(query_H2QE), jnp.zeros_like(keys_H2NE)
  blocks = in_blocks(place_H2QK, sizes.bag_rows), in_blocks(g_H2QK, sizes.bag_rows)
  sums, _ = jax.lax.scan(add, zeros, blocks)
  return *sums, None, None


scores_at.defvjp(_scores_at_forward, _scores_at_backward)


def product_top_k(
  query_QHD: Float[Array, 'Q H D'], keys_H2NE: Float[Array, 'H 2 N E'], K: int
) -> Lookup:
  """Returns the K slots with the largest scores of all N * N, exactly (two-axis activation).

      a = R q_r,  b = C q_c                              scores on each axis
      S = { a_x + b_y : x in topK(a), y in topK(b) }     slot = x * N + y
      J = topK(S)

  Args:
    query_QHD: float [Q, H, D], D = 2 E: the halves [q_r ; q_c] of each head.
    keys_H2NE: float [H, 2, N, E]: row keys R and column keys C of each head.
    K: slots read for each query and head, 1 <= K <= N.

  Returns:
    Lookup with slots int32 [Q, H, K] in [0, N*N) and scores; gradients flow through the scores
    to the queries and to the keys.

  Source: LMN, two-axis activation; product keys: Lample et al. 2019, section 3.2.
  """
  search = meshes.each_device(
    functools.partial(_product_top_k, K=K), (meshes.BATCH, meshes.REPLICATED), meshes.BATCH
  )
  return search(jnp.asarray(query_QHD), jnp.asarray(keys_H2NE))


def _product_top_k(query_QHD, keys_H2NE, K):
  Q, H, D = query_QHD.shape
  N = keys_H2NE.shape[2]
  query_H2QE = query_QHD.reshape(Q, H, 2, D // 2).transpose(1, 2, 0, 3)
  axis_H2QN = stop(jnp.einsum('haqe,hane->haqn', query_H2QE, keys_H2NE))
  # The search has no gradient; `scores_at` reads the scores of its result again, with gradients.
  best, place = top_k(axis_H2QN.reshape(H * 2, Q, N), K)
  best_H2QK, place_H2QK = best.reshape(H, 2, Q, K), place.reshape(H, 2, Q, K)
  p, r = winning_ranks(K)
  sums_HQP = best_H2QK[:, 0][..., p] + best_H2QK[:, 1][..., r]
  pair_HQK = _lax_top_k(sums_HQP, K)[1]
  ranks_H2QK = jnp.stack([jnp.asarray(p)[pair_HQK], jnp.asarray(r)[pair_HQK]], axis=1)
  xy_H2QK = jnp.take_along_axis(place_H2QK, ranks_H2QK, axis=-1)
  scores_HQK = jnp.sum(scores_at(query_H2QE, keys_H2NE, axis_H2QN, xy_H2QK), axis=1)
  slots_HQK = xy_H2QK[:, 0] * N + xy_H2QK[:, 1]
  return Lookup(slots_HQK.transpose(1, 0, 2), scores_HQK.transpose(1, 0, 2))


def sample_positions(
  key: Array, length_B: Int[Array, 'B'], P: int
) -> tuple[Int[Array, 'B P'], Float[Array, 'B P']]:
  """Draws P positions of each history, and weights that make the memory loss unbiased.

  The mean over all real positions of a batch is `sum_b sum_t loss_bt / sum_b length_b`. With P
  uniform draws (with replacement) from each history, `sum_bp (length_b / P) loss_bp /
  sum_b length_b` has that mean as its expectation. [ours: the paper uses all positions]

  Args:
    key: PRNG key.
    length_B: int32 [B], real positions of each history; 0 for none.
    P: draws for each history.

  Returns:
    Positions int32 [B, P] in [0, max(1, length)), and weights float32 [B, P], length_b / P.
  """
  length_B1 = length_B[:, None].astype(jnp.float32)
  weight_BP = jnp.broadcast_to(length_B1 / P, (length_B.shape[0], P))
  return draw_positions(key, length_B, P), weight_BP


def usage(reads_R: Int[Array, 'R'], ever_R: Array, n: int) -> dict[str, Float[Array, '']]:
  """Measures how evenly the slots are used.

      p_x = reads_x / sum reads,   KL(p || uniform) = sum_x p_x log(n p_x) = log n - H(p)

  Args:
    reads_R: int32 [R], reads of each slot in the last window; entries from n on are padding.
    ever_R: bool [R], whether the slot was ever read. n: number of slots.

  Returns:
    Scalars: `ever`, the share of slots that were ever read; `dead`, the share of slots that were
    not read in the window; `kl` in nats, 0 for uniform use (Lample et al. 2019, section 4.4);
    `entropy`, H(p) / log n, 1 for uniform use and 0 if one slot gets all reads. A window without
    reads counts as uniform.
  """
  reads = reads_R[:n].astype(jnp.float32)
  p = reads / jnp.maximum(jnp.sum(reads), 1)
  kl = jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p * n, 1e-30)), 0))
  return {
    'ever': jnp.mean(ever_R[:n].astype(jnp.float32)),
    'dead': jnp.mean((reads == 0).astype(jnp.float32)),
    'kl': kl,
    'entropy': 1 - kl / math.log(max(n, 2)),  # kl is 0 for one slot
  }
