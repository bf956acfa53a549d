"""The shared memory of LMN: two-axis product keys and what is read with them.

The key of slot (x, y) is [R_x ; C_y], so n = N * N slots are searched with 2 N scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Lookup(NamedTuple):
  """slots_QHK: int32 slot ids, best first. scores_QHK: their scores `a_x + b_y`."""

  slots_QHK: Int[Array, 'Q H K']
  scores_QHK: Float[Array, 'Q H K']


def winning_ranks(K: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of ranks (p, r) that can be among the K largest sums of two sorted lists.

  A pair with (p+1)(r+1) > K has at least K pairs at or above it, so it is never needed:
  119 pairs instead of 1,024 at K = 32.

  Args:
    K: how many sums are wanted.

  Returns:
    Two int32 arrays, the ranks p and r, in the order of p * K + r.
  """
  p, r = np.divmod(np.arange(K * K, dtype=np.int32), np.int32(K))
  keep = (p + 1) * (r + 1) <= K
  return p[keep], r[keep]


def _top_k(x: Float[Array, '... N'], K: int) -> tuple[Array, Array]:
  """`lax.top_k` over the last axis, as a matrix: in more dimensions XLA's CPU compiler may lay
  the array out anew and then sorts all of it, 20 times slower."""
  values, places = jax.lax.top_k(x.reshape(-1, x.shape[-1]), K)
  return values.reshape(*x.shape[:-1], K), places.reshape(*x.shape[:-1], K)


def product_top_k(
  query_QHD: Float[Array, 'Q H D'], keys_H2NE: Float[Array, 'H 2 N E'], K: int
) -> Lookup:
  """The K slots with the largest scores over all N * N, exactly (two-axis activation).

      a = R q_r,  b = C q_c                              scores on each axis
      S = { a_x + b_y : x in topK(a), y in topK(b) }     slot = x * N + y
      J = topK(S)

  Args:
    query_QHD: float [Q, H, D], D = 2 E: for each head the halves [q_r ; q_c].
    keys_H2NE: float [H, 2, N, E]: for each head row keys R and column keys C.
    K: slots read for each query and head, 1 <= K <= N.

  Returns:
    Lookup with slots int32 [Q, H, K] in [0, N*N) and scores; gradients flow through the scores
    to the queries and to the keys.

  Source: LMN, two-axis activation; product keys: Lample et al. 2019, section 3.2.
  """
  Q, H, D = query_QHD.shape
  N = keys_H2NE.shape[2]
  axis_QH2N = jnp.einsum('qhae,hane->qhan', query_QHD.reshape(Q, H, 2, D // 2), keys_H2NE)
  best_QH2K, place_QH2K = _top_k(axis_QH2N, K)
  p, r = winning_ranks(K)
  scores_QHK, pair_QHK = _top_k(best_QH2K[:, :, 0, p] + best_QH2K[:, :, 1, r], K)
  x_QHK = jnp.take_along_axis(place_QH2K[:, :, 0], jnp.asarray(p)[pair_QHK], axis=-1)
  y_QHK = jnp.take_along_axis(place_QH2K[:, :, 1], jnp.asarray(r)[pair_QHK], axis=-1)
  return Lookup(x_QHK * N + y_QHK, scores_QHK)


def sample_positions(
  key: Array, length_B: Int[Array, 'B'], P: int
) -> tuple[Int[Array, 'B P'], Float[Array, 'B P']]:
  """Draws P positions of each history, with the weights that keep the memory loss unbiased.

  The mean over all real positions of a batch is `sum_b sum_t loss_bt / sum_b length_b`. With P
  uniform draws (with replacement) from each history, `sum_bp (length_b / P) loss_bp /
  sum_b length_b` has that mean as its expectation. [ours: the paper asks at all positions]

  Args:
    key: PRNG key.
    length_B: int32 [B], real positions of each history; 0 for none.
    P: draws for each history.

  Returns:
    Positions int32 [B, P] in [0, max(1, length)), and weights float32 [B, P], length_b / P.
  """
  B = length_B.shape[0]
  uniform_BP = jax.random.uniform(key, (B, P))
  length_B1 = length_B[:, None].astype(jnp.float32)
  # A uniform draw of 1 - 2^-24 times a long length may round up to the length itself.
  last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
  position_BP = jnp.minimum((uniform_BP * length_B1).astype(jnp.int32), last_B1)
  return position_BP, jnp.broadcast_to(length_B1 / P, (B, P))


def usage(reads_R: Int[Array, 'R'], ever_R: Array, n: int) -> dict[str, Float[Array, '']]:
  """How evenly the slots are used.

      p_x = reads_x / sum reads,   KL(p || uniform) = sum_x p_x log(n p_x)

  Args:
    reads_R: int32 [R], reads of each slot in the last window; entries from n on are padding.
    ever_R: bool [R], whether the slot was ever read. n: slots.

  Returns:
    Scalars: `ever` and `dead`, the shares of slots ever read and not read in the window; `kl` in
    nats, 0 when all slots are used alike (Lample et al. 2019, section 4.4).
  """
  reads = reads_R[:n].astype(jnp.float32)
  p = reads / jnp.maximum(jnp.sum(reads), 1)
  return {
    'ever': jnp.mean(ever_R[:n].astype(jnp.float32)),
    'dead': jnp.mean((reads == 0).astype(jnp.float32)),
    'kl': jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p * n, 1e-30)), 0)),
  }
