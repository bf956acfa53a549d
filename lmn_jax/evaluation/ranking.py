"""Ranking of all items: exact ranks, made on the devices a block of items at a time.

The rank of a target is 1 and the candidates that its score does not beat; ties count against the
model, and so does a score that is no number. Candidates are all items of the vocabulary but row
0 (the unknown), the target, which is ranked even if the user has met it, and, where
config.exclude_seen says so, what the user has met.
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

from lmn_jax.data.batches import loader
from lmn_jax.data.histories import users_of
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.store import Store
from lmn_jax.data.targets import Targets
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import own_metrics
from lmn_jax.evaluation.click_metrics import bucket_names

BLOCK = 2**22  # scores held at a time on each device


def own_blocks(
  rows_RD: Float[Array, 'R D'], query_QD: Float[Array, 'Q D'], mesh: Mesh, V: int, block: int
) -> tuple[int, int, Callable]:
  """What a device scores a block at a time: its own rows of the table, for all queries.

  Args:
    rows_RD: the device's. query_QD: whose product with a row is its score. mesh, V, block: as for
      `ranks`.

  Returns:
    S, the rows of a block; the number of blocks; and a function of a block's number, that gives the
    scores [Q, S], the rows' ids [S], ascending, and which of them are candidates that earlier
    blocks have not had.
  """
  R, Q = rows_RD.shape[0], query_QD.shape[0]
  begin = 0
  for axis in ('data', 'model') if mesh.size > 1 else ():
    begin = begin * mesh.shape[axis] + jax.lax.axis_index(axis)
  begin = begin * R
  size = min(R, max(1, block // Q))

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
  block: int = BLOCK,
) -> Int[Array, 'Q']:
  """The ranks of the targets of queries.

  Args:
    rows_RD: of the items, over the mesh. query_QD: whose product with a row is its score.
    target_Q: rows of the targets; 0, or from V on, has all candidates before it.
    seen_QS: rows that are no candidates, padded with V. mesh: on which the table lies.
    V: ids of the table. block: scores held at a time on each device.
  """

  def own_rows(rows_RD, query_QD, target_Q, seen_QS):
    Q = len(query_QD)
    size, blocks, scores = own_blocks(rows_RD, query_QD, mesh, V, block)

    def of_target(k, found_Q):
      score_QS, ids_S, counts_S = scores(k)
      own_QS = (ids_S[None, :] == target_Q[:, None]) & counts_S[None, :]
      return found_Q + jnp.sum(jnp.where(own_QS, score_QS, 0), axis=1)

    target_score_Q = jax.lax.fori_loop(0, blocks, of_target, jnp.zeros(Q))
    if mesh.size > 1:
      target_score_Q = jax.lax.psum(target_score_Q, ('data', 'model'))
    known_Q = (target_Q > 0) & (target_Q < V)
    target_score_Q = jnp.where(known_Q, target_score_Q, jnp.nan)

    def not_beaten(k, count_Q):
      score_QS, ids_S, counts_S = scores(k)
      # Where the items a user has met lie in this block; others fall out of it.
      at_QS = seen_QS - ids_S[:1, None]
      inside_QS = (at_QS >= 0) & (at_QS < size)
      at_QS = jnp.where(inside_QS, at_QS, size)
      met_QS = jnp.zeros((Q, size), bool).at[jnp.arange(Q)[:, None], at_QS].set(True, mode='drop')
      rival_QS = counts_S[None, :] & ~met_QS & (ids_S[None, :] != target_Q[:, None])
      beaten_QS = score_QS < target_score_Q[:, None]  # what is not a number is not beaten
      return count_Q + jnp.sum(rival_QS & ~beaten_QS, axis=1, dtype=jnp.int32)

    count_Q = jax.lax.fori_loop(0, blocks, not_beaten, jnp.zeros(Q, jnp.int32))
    return 1 + (jax.lax.psum(count_Q, ('data', 'model')) if mesh.size > 1 else count_Q)

  over = (meshes.ROWS, meshes.REPLICATED, meshes.REPLICATED, meshes.REPLICATED)
  with meshes.use_mesh(mesh):
    own = meshes.each_device(own_rows, over, meshes.REPLICATED)
    return own(rows_RD, query_QD, target_Q, seen_QS)


def measure(rank: Int[np.ndarray, 'N'], ks: Sequence[int]) -> dict[str, float | int | None]:
  """Metrics of ranks, each the mean over N targets.

      HR@K   = mean [rank <= K]                  with one target the same as Recall@K
      NDCG@K = mean [rank <= K] / log2(1 + rank)
      MRR    = mean 1 / rank

  Args:
    rank: from 1 on. ks: cut-offs.

  Returns:
    'rows', 'hr@K', 'ndcg@K' for each K, 'mrr'; None where there is no target.
  """
  gain = 1 / np.log2(1 + rank.astype(np.float64))
  found: dict[str, float | int | None] = {'rows': len(rank)}
  for k in ks:
    inside = rank <= k
    found[f'hr@{k}'] = float(inside.mean()) if len(rank) else None
    found[f'ndcg@{k}'] = float((gain * inside).mean()) if len(rank) else None
  return found | {'mrr': float((1 / rank).mean()) if len(rank) else None}


def measure_sampled(
  rank: Int[np.ndarray, 'N'], rivals: Int[np.ndarray, 'N'], negatives: int, ks: Sequence[int]
) -> dict[str, float | int | None]:
  """What `measure` would give among sampled negatives: its mean over all samples, without one.

  Of a target's C rivals r - 1 stand before it; of n that are drawn, each set with the same chance,
  j do by the hypergeometric law, and its rank among them is then 1 + j. Such metrics are far above
  those of all items, may order models otherwise (Krichene & Rendle 2020), and compare with none but
  those of as many negatives, drawn alike.

  Args:
    rank: r, among all candidates. rivals: C, candidates beside each target.
    negatives: n; a target that has fewer rivals is ranked among all of them. ks: cut-offs.
  """
  drawn_N = np.minimum(negatives, rivals)
  before_N = np.minimum(rank - 1, rivals)
  j_J = np.arange(negatives + 1)
  chance_NJ = scipy.stats.hypergeom.pmf(
    j_J[None], rivals[:, None], before_N[:, None], drawn_N[:, None]
  )
  found: dict[str, float | int | None] = {'rows': len(rank), 'negatives': negatives}
  gains = {f'hr@{k}': j_J < k for k in ks}
  gains |= {f'ndcg@{k}': (j_J < k) / np.log2(2 + j_J) for k in ks} | {'mrr': 1 / (1 + j_J)}
  for name, gain_J in gains.items():
    found[name] = float((chance_NJ @ gain_J).mean()) if len(rank) else None
  return found


QUERIES = 256  # ranked together


def rank_split(
  stream: Callable[..., tuple[Array, Any]],
  rows_RD: Float[Array, 'R D'],
  carry: Any,
  source: LaneSource,
  mesh: Mesh,
  V: int,
) -> Int[np.ndarray, 'E']:
  """The rank of every target of a split, in the order of `source.numbers`, on every host.

  A target before which its user has no event has nothing to be ranked by: all candidates tie, and
  stand before it.

  Args:
    stream: (carry, batch) -> (vectors [B, P, D] of what the batch asks, carry of the next batch).
    rows_RD: of the items, over the mesh. carry: of the lanes before anything.
    source: of the split, unshuffled. mesh: of the devices. V: ids of items.
  """
  row_of = np.full(len(source.targets.user), -1)
  row_of[source.numbers] = np.arange(len(source.numbers))
  found, waiting, held = np.full(len(source.numbers), V, np.int32), [], 0

  def settle():
    numbers = np.concatenate([number for number, _, _ in waiting])
    vectors = np.concatenate([np.asarray(jax.device_get(x))[at] for _, x, at in waiting])
    for begin in range(0, len(numbers), QUERIES):
      number, vector = numbers[begin : begin + QUERIES], vectors[begin : begin + QUERIES]
      seen_QS, filler = padded(source.excluded(number), V), QUERIES - len(number)
      query_QD = np.pad(vector, ((0, filler), (0, 0)))
      target_Q = np.pad(source.targets.item[number].astype(np.int32), (0, filler))
      seen_QS = np.pad(seen_QS, ((0, filler), (0, 0)), constant_values=V)
      with jax.transfer_guard('allow'):
        rank_Q = np.asarray(ranks(rows_RD, query_QD, target_Q, seen_QS, mesh, V))
      found[row_of[number]] = rank_Q[: len(number)]

  for batch in loader(source):
    number_BP = meshes.gather(mesh, batch.pop('number'))
    vector_BPD, carry = stream(carry, meshes.place(mesh, batch))
    at = np.nonzero(number_BP >= 0)
    if len(at[0]):
      # Not waited for here: the devices go on while the next batch is made.
      waiting.append((number_BP[at], vector_BPD, at))
      held += len(at[0])
    if held >= 8 * QUERIES:
      settle()
      waiting, held = [], 0
  if waiting:
    settle()
  return found


def rows_of(store: Store, source: LaneSource, rank: Int[np.ndarray, 'E']) -> dict[str, np.ndarray]:
  """The targets of a split with their ranks, columns for `scored_rows.write`.

  Args:
    store: of the targets. source: of the split. rank: of `rank_split`.
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
  """Arrays of ids side by side, padded with V to a power of two, so that few shapes compile."""
  longest = max([16, *map(len, rows)])
  found = np.full((len(rows), 1 << (longest - 1).bit_length()), V, np.int32)
  for row, ids in zip(found, rows, strict=True):
    row[: len(ids)] = ids
  return found


def ranks_of(
  score_QV: Float[np.ndarray, 'Q V'], target_Q: Int[np.ndarray, 'Q'], seen: Sequence[np.ndarray]
) -> Int[np.ndarray, 'Q']:
  """Ranks by scores that are there, as `ranks` defines them, on the host."""
  rival_QV, every = np.ones(score_QV.shape, bool), np.arange(len(target_Q))
  rival_QV[:, 0] = False
  for row, ids in zip(rival_QV, seen, strict=True):
    row[ids] = False
  rival_QV[every, target_Q] = False
  beaten_QV = score_QV < score_QV[every, target_Q][:, None]
  return 1 + np.where(target_Q > 0, (rival_QV & ~beaten_QV).sum(1), rival_QV.sum(1))


def rank_baselines(
  training: Iterable[np.ndarray], source: LaneSource, V: int
) -> dict[str, Int[np.ndarray, 'E']]:
  """Ranks without a model, of every target of a split.

      popularity  score(j) = n_j                              events of training
      markov      score(j) = n_ij + n_j / (1 + max n)         i the event before; popularity between
                                                              items that never followed i

  Args:
    training: item rows of each user's training events, of `lanes.training_items`.
    source: of the split. V: ids of items.
  """
  pairs, count_V = [], np.zeros(V)
  for items in training:
    np.add.at(count_V, items, 1)
    pairs.append(items[:-1].astype(np.int64) * V + items[1:])
  pair, times = np.unique(np.concatenate(pairs), return_counts=True)
  follows = scipy.sparse.csr_array((times, np.divmod(pair, V)), shape=(V, V))
  between_V = count_V / (1 + count_V.max())
  found = {name: np.full(len(source.numbers), V) for name in ('popularity', 'markov')}
  block = max(1, BLOCK // V)
  placed = np.flatnonzero(source.targets.place[source.numbers] > 0)
  for begin in range(0, len(placed), block):
    at = placed[begin : begin + block]
    number = source.numbers[at]
    target_Q, seen = source.targets.item[number], source.excluded(number)
    last_Q = np.array([items[-1] for items in source.before(number)])
    markov_QV = follows[last_Q].toarray() + between_V[None, :]
    found['popularity'][at] = ranks_of(np.broadcast_to(count_V, markov_QV.shape), target_Q, seen)
    found['markov'][at] = ranks_of(markov_QV, target_Q, seen)
  return found


def report(
  rank: Int[np.ndarray, 'E'],
  source: LaneSource,
  ks: Sequence[int],
  buckets: Sequence[int],
  V: int,
  negatives: int = 0,
  metrics: dict[str, own_metrics.Metric] | None = None,
) -> dict:
  """Every metric, overall and by the events before the target.

  Args:
    rank: of the targets of a split, in the order of `source.numbers`. source: of the split. ks:
      cut-offs. buckets: ascending edges, as of click_metrics.report. V: ids of items.
    negatives: of `measure_sampled`; 0 for none. metrics: further ones by name, of ranks.

  Returns:
    {'overall': metrics, 'by_history': {'0-9': metrics, ..., '500+': metrics}}, ready for JSON; with
    negatives also 'sampled'.
  """
  edges, names = bucket_names(buckets)
  bucket = np.searchsorted(edges, source.targets.place[source.numbers], side='right') - 1

  def of(rank):
    return measure(rank, ks) | own_metrics.measure(metrics or {}, rank)

  found = {
    'overall': of(rank),
    'by_history': {name: of(rank[bucket == k]) for k, name in enumerate(names)},
  }
  if negatives:
    target, out = source.targets.item[source.numbers], source.excluded(source.numbers)
    # All items but the unknown, the target, and what is excluded beside these two.
    left = [len(set(x.tolist()) - {0, int(own)}) for x, own in zip(out, target, strict=True)]
    found['sampled'] = measure_sampled(rank, V - 2 - np.array(left, np.int64), negatives, ks)
  return found
