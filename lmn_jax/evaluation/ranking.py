"""Exact ranks among all items, computed on the devices a block of items at a time.

The rank of a target is 1 plus the number of other candidates whose scores are not below its score:
ties and NaN count against the model. Candidates are all items of the vocabulary except row 0 (the
unknown item) and, with config.exclude_seen, the items that the user has seen. The target itself is
ranked even if the user has seen it.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.stats
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lmn_jax.data.histories import users_of
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.store import Store
from lmn_jax.data.targets import Targets
from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import custom_metrics
from lmn_jax.evaluation.click_metrics import bucket_names


def device_blocks(
  rows_RD: Float[Array, 'R D'],
  query_QD: Float[Array, 'Q D'],
  mesh: Mesh,
  V: int,
  block: int | None,
) -> tuple[int, int, Callable]:
  """The blocks in which a device scores its rows of the table, for all queries.

  Args:
    rows_RD: of this device. query_QD: queries; a score is the product with a row. mesh, V, block:
      as for `ranks`.

  Returns:
    S, the rows of a block; the number of blocks; and a function of the index of a block that
    returns its scores [Q, S], the ids of its rows [S], ascending, and which of them are candidates
    not in earlier blocks.
  """
  R, Q = rows_RD.shape[0], query_QD.shape[0]
  begin = 0
  for axis in ('data', 'model') if mesh.size > 1 else ():
    begin = begin * mesh.shape[axis] + jax.lax.axis_index(axis)
  begin = begin * R
  size = min(R, max(1, (block or block_sizes.sizes().ranking_scores) // Q))

  def scores(k):
    at = jnp.minimum(k * size, R - size)
    rows_SD = jax.lax.dynamic_slice_in_dim(rows_RD, at, size).astype(jnp.float32)
    new_S = at + jnp.arange(size) >= k * size
    ids_S = begin + at + jnp.arange(size)
    return query_QD @ rows_SD.T, ids_S, new_S & (ids_S > 0) & (ids_S < V)

  return size, -(-R // size), scores


@functools.partial(jax.jit, static_argnames=('mesh', 'V', 'block'))
def ranks(
  rows_RD: Float[Array, 'R D'],
  query_QD: Float[Array, 'Q D'],
  target_Q: Int[Array, 'Q'],
  seen_QS: Int[Array, 'Q S'],
  mesh: Mesh,
  V: int,
  block: int | None = None,
) -> Int[Array, 'Q']:
  """Computes the ranks of the targets of queries.

  Args:
    rows_RD: of the items, sharded over the mesh. query_QD: queries; a score is the product with a
      row. target_Q: rows of the targets; 0, or from V on, ranks after all candidates.
    seen_QS: rows that are not candidates, padded with V. mesh: of the table.
    V: ids of the table. block: scores in memory at a time on each device; None for
      `ranking_scores` of BlockSizes.
  """

  def device_ranks(rows_RD, query_QD, target_Q, seen_QS):
    size, blocks, scores = device_blocks(rows_RD, query_QD, mesh, V, block)
    target_score_Q = _target_scores(blocks, scores, target_Q, mesh)
    valid_Q = (target_Q > 0) & (target_Q < V)
    target_score_Q = jnp.where(valid_Q, target_score_Q, jnp.nan)
    count_Q = _count_not_below(size, blocks, scores, target_Q, target_score_Q, seen_QS)
    return 1 + (jax.lax.psum(count_Q, ('data', 'model')) if mesh.size > 1 else count_Q)

  in_specs = (meshes.ROWS, meshes.REPLICATED, meshes.REPLICATED, meshes.REPLICATED)
  with meshes.use_mesh(mesh):
    run = meshes.each_device(device_ranks, in_specs, meshes.REPLICATED)
    return run(rows_RD, query_QD, target_Q, seen_QS)


def _target_scores(blocks, scores, target_Q, mesh):
  """The scores of the targets, which are in the blocks of one device."""

  def add_block(k, sum_Q):
    score_QS, ids_S, candidate_S = scores(k)
    target_QS = (ids_S[None, :] == target_Q[:, None]) & candidate_S[None, :]
    return sum_Q + jnp.sum(jnp.where(target_QS, score_QS, 0), axis=1)

  score_Q = jax.lax.fori_loop(0, blocks, add_block, jnp.zeros(len(target_Q)))
  return jax.lax.psum(score_Q, ('data', 'model')) if mesh.size > 1 else score_Q


def _count_not_below(size, blocks, scores, target_Q, target_score_Q, seen_QS):
  """The number of this device's candidates whose scores are not below that of the target."""
  Q = len(target_Q)

  def add_block(k, count_Q):
    score_QS, ids_S, candidate_S = scores(k)
    # The places of seen items in this block; those outside are dropped.
    at_QS = seen_QS - ids_S[:1, None]
    inside_QS = (at_QS >= 0) & (at_QS < size)
    at_QS = jnp.where(inside_QS, at_QS, size)
    is_seen_QS = jnp.zeros((Q, size), bool).at[jnp.arange(Q)[:, None], at_QS].set(True, mode='drop')
    rival_QS = candidate_S[None, :] & ~is_seen_QS & (ids_S[None, :] != target_Q[:, None])
    below_QS = score_QS < target_score_Q[:, None]  # False for NaN
    return count_Q + jnp.sum(rival_QS & ~below_QS, axis=1, dtype=jnp.int32)

  return jax.lax.fori_loop(0, blocks, add_block, jnp.zeros(Q, jnp.int32))


def measure(rank: Int[np.ndarray, 'N'], ks: Sequence[int]) -> dict[str, float | int | None]:
  """The metrics of ranks, means over N targets.

      HR@K   = mean [rank <= K]                  for one target equal to Recall@K
      NDCG@K = mean [rank <= K] / log2(1 + rank)
      MRR    = mean 1 / rank

  Args:
    rank: from 1 on. ks: cut-offs.

  Returns:
    'rows', 'hr@K', 'ndcg@K' for each K, 'mrr'; None without targets.
  """
  gain = 1 / np.log2(1 + rank.astype(np.float64))
  metrics: dict[str, float | int | None] = {'rows': len(rank)}
  for k in ks:
    inside = rank <= k
    metrics[f'hr@{k}'] = float(inside.mean()) if len(rank) else None
    metrics[f'ndcg@{k}'] = float((gain * inside).mean()) if len(rank) else None
  return metrics | {'mrr': float((1 / rank).mean()) if len(rank) else None}


def measure_sampled(
  rank: Int[np.ndarray, 'N'], rivals: Int[np.ndarray, 'N'], negatives: int, ks: Sequence[int]
) -> dict[str, float | int | None]:
  """The expected metrics among sampled negatives, computed exactly, without sampling.

  r - 1 of a target's C rivals rank before it. Of n uniformly drawn rivals, the number j that rank
  before it has a hypergeometric distribution, and its rank among them is 1 + j. Such metrics are
  far above those of all items and may order models differently (Krichene & Rendle 2020). They can
  be compared only for the same number of negatives and the same sampling.

  Args:
    rank: r, among all candidates. rivals: C, candidates other than each target.
    negatives: n; a target with fewer rivals is ranked among all of them. ks: cut-offs.
  """
  drawn_N = np.minimum(negatives, rivals)
  before_N = np.minimum(rank - 1, rivals)
  j_J = np.arange(negatives + 1)
  chance_NJ = scipy.stats.hypergeom.pmf(
    j_J[None], rivals[:, None], before_N[:, None], drawn_N[:, None]
  )
  metrics: dict[str, float | int | None] = {'rows': len(rank), 'negatives': negatives}
  gains = {f'hr@{k}': j_J < k for k in ks}
  gains |= {f'ndcg@{k}': (j_J < k) / np.log2(2 + j_J) for k in ks} | {'mrr': 1 / (1 + j_J)}
  for name, gain_J in gains.items():
    metrics[name] = float((chance_NJ @ gain_J).mean()) if len(rank) else None
  return metrics


QUERIES = 256  # ranked together


def rank_split(
  stream: Callable[..., tuple[Array, Any]],
  rows_RD: Float[Array, 'R D'],
  carry: Any,
  batches: Iterable[tuple[np.ndarray, dict]],
  source: LaneSource,
  mesh: Mesh,
  V: int,
) -> Int[np.ndarray, 'E']:
  """The rank of every target of a split, in the order of `source.numbers`, on every host.

  A target without events before it ties with all candidates, so it ranks after them.

  Args:
    stream: (carry, batch) -> (vectors [B, P, D] at the batch's positions, carry of the next batch).
    rows_RD: of the items, sharded over the mesh. carry: initial state of the lanes.
    batches: (number [B, P] on the host, batch) of the split, see `feed.held_out`.
    source: of the split, unshuffled. mesh: of the devices. V: ids of items.
  """
  row_of = np.full(len(source.targets.user), -1)
  row_of[source.numbers] = np.arange(len(source.numbers))
  ranks_E, pending, count = np.full(len(source.numbers), V, np.int32), [], 0

  def rank_pending():
    numbers = np.concatenate([number for number, _, _ in pending])
    vectors = np.concatenate([np.asarray(jax.device_get(x))[at] for _, x, at in pending])
    for begin in range(0, len(numbers), QUERIES):
      number, vector = numbers[begin : begin + QUERIES], vectors[begin : begin + QUERIES]
      seen_QS, filler = padded(source.excluded(number), V), QUERIES - len(number)
      query_QD = np.pad(vector, ((0, filler), (0, 0)))
      target_Q = np.pad(source.targets.item[number].astype(np.int32), (0, filler))
      seen_QS = np.pad(seen_QS, ((0, filler), (0, 0)), constant_values=V)
      with jax.transfer_guard('allow'):
        rank_Q = np.asarray(ranks(rows_RD, query_QD, target_Q, seen_QS, mesh, V))
      ranks_E[row_of[number]] = rank_Q[: len(number)]

  for number_BP, batch in batches:
    vector_BPD, carry = stream(carry, batch)
    at = np.nonzero(number_BP >= 0)
    if len(at[0]):
      # The vectors are not transferred here, so that the devices compute while the host prepares
      # the next batch.
      pending.append((number_BP[at], vector_BPD, at))
      count += len(at[0])
    if count >= 8 * QUERIES:
      rank_pending()
      pending, count = [], 0
  if pending:
    rank_pending()
  return ranks_E


def rows_of(store: Store, source: LaneSource, rank: Int[np.ndarray, 'E']) -> dict[str, np.ndarray]:
  """Returns the targets of a split with their ranks, as columns for `scored_rows.write`.

  Args:
    store: of the targets. source: of the split. rank: from `rank_split`.
  """
  targets = Targets(*(column[source.numbers] for column in source.targets))
  users = users_of(store)
  part, event = users.part[targets.user], users.offset[targets.user] + targets.place
  time = np.empty(len(rank), np.int64)
  for number in np.unique(part):
    time[part == number] = store.parts[number].history['time'][event[part == number]]
  return {
    'user': targets.user, 'item': targets.item, 'time': time, 'rank': rank,
    'events': targets.place,
  }  # fmt: skip


def padded(rows: Sequence[np.ndarray], V: int) -> Int[np.ndarray, 'Q S']:
  """Stacks lists of ids, padded with V to a power of two, so that few shapes are compiled."""
  longest = max([16, *map(len, rows)])
  ids_QS = np.full((len(rows), 1 << (longest - 1).bit_length()), V, np.int32)
  for row, ids in zip(ids_QS, rows, strict=True):
    row[: len(ids)] = ids
  return ids_QS


def ranks_of(
  score_QV: Float[np.ndarray, 'Q V'], target_Q: Int[np.ndarray, 'Q'], seen: Sequence[np.ndarray]
) -> Int[np.ndarray, 'Q']:
  """The ranks of `ranks`, computed on the host from scores."""
  rival_QV, every = np.ones(score_QV.shape, bool), np.arange(len(target_Q))
  rival_QV[:, 0] = False
  for row, ids in zip(rival_QV, seen, strict=True):
    row[ids] = False
  rival_QV[every, target_Q] = False
  below_QV = score_QV < score_QV[every, target_Q][:, None]
  return 1 + np.where(target_Q > 0, (rival_QV & ~below_QV).sum(1), rival_QV.sum(1))


def rank_baselines(
  training: Iterable[np.ndarray], source: LaneSource, V: int
) -> dict[str, Int[np.ndarray, 'E']]:
  """The ranks of the baselines without a model, of every target of a split.

      popularity  score(j) = n_j                              events of training
      markov      score(j) = n_ij + n_j / (1 + max n)         i the previous event; n_j orders
                                                              items that never followed i

  Args:
    training: item rows of each user's training events, from `lanes.training_items`.
    source: of the split. V: ids of items.
  """
  pairs, count_V = [], np.zeros(V)
  for items in training:
    np.add.at(count_V, items, 1)
    pairs.append(items[:-1].astype(np.int64) * V + items[1:])
  pair, times = np.unique(np.concatenate(pairs), return_counts=True)
  follows = scipy.sparse.csr_array((times, np.divmod(pair, V)), shape=(V, V))
  between_V = count_V / (1 + count_V.max())
  baseline_ranks = {name: np.full(len(source.numbers), V) for name in ('popularity', 'markov')}
  block = max(1, block_sizes.SIZES['cpu'].ranking_scores // V)  # on the host
  placed = np.flatnonzero(source.targets.place[source.numbers] > 0)
  for begin in range(0, len(placed), block):
    at = placed[begin : begin + block]
    number = source.numbers[at]
    target_Q, seen = source.targets.item[number], source.excluded(number)
    last_Q = np.array([items[-1] for items in source.before(number)])
    markov_QV = follows[last_Q].toarray() + between_V[None, :]
    count_QV = np.broadcast_to(count_V, markov_QV.shape)
    baseline_ranks['popularity'][at] = ranks_of(count_QV, target_Q, seen)
    baseline_ranks['markov'][at] = ranks_of(markov_QV, target_Q, seen)
  return baseline_ranks


def report(
  rank: Int[np.ndarray, 'E'],
  source: LaneSource,
  ks: Sequence[int],
  buckets: Sequence[int],
  V: int,
  negatives: int = 0,
  metrics: dict[str, custom_metrics.Metric] | None = None,
) -> dict:
  """All metrics, overall and by the number of events before the target.

  Args:
    rank: of the targets of a split, in the order of `source.numbers`. source: of the split. ks:
      cut-offs. buckets: ascending edges, as for click_metrics.report. V: ids of items.
    negatives: of `measure_sampled`; 0 for none. metrics: custom metrics by name, of ranks.

  Returns:
    {'overall': metrics, 'by_history': {'0-9': metrics, ..., '500+': metrics}}, ready for JSON; with
    negatives also 'sampled'.
  """
  edges, names = bucket_names(buckets)
  bucket = np.searchsorted(edges, source.targets.place[source.numbers], side='right') - 1

  def measure_all(rank):
    return measure(rank, ks) | custom_metrics.measure(metrics or {}, rank)

  results = {
    'overall': measure_all(rank),
    'by_history': {name: measure_all(rank[bucket == k]) for k, name in enumerate(names)},
  }
  if negatives:
    targets, excluded = source.targets.item[source.numbers], source.excluded(source.numbers)
    # The rivals are all items except the unknown item, the target, and the excluded items.
    others = [
      len(set(items.tolist()) - {0, int(target)})
      for items, target in zip(excluded, targets, strict=True)
    ]
    results['sampled'] = measure_sampled(rank, V - 2 - np.array(others, np.int64), negatives, ks)
  return results
