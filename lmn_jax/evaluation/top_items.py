"""The best items for each query, computed on the devices a block of items at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking

Ints = Int[np.ndarray, '_']


def seen_pairs(seen: list[np.ndarray]) -> tuple[Ints, Ints]:
  """Returns the seen items of each query as distinct pairs (query, item), ordered by item."""
  lists = [np.unique(items) for items in seen]
  query = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
  item = np.concatenate([*lists, np.zeros(0, np.int64)]).astype(np.int64)
  order = np.argsort(item, kind='stable')
  return query[order], item[order]


@jax.jit
def better(
  top_UK: Float[Array, 'U K'],
  id_UK: Int[Array, 'U K'],
  score_UQ: Float[Array, 'U Q'],
  item_Q: Int[Array, 'Q'],
  open_UQ: Array,
) -> tuple[Array, Array]:
  """Merges the K best items with a block of candidates; of equal scores, the earlier is first."""
  score = jnp.concatenate([top_UK, jnp.where(open_UQ, score_UQ, -jnp.inf)], axis=1)
  ids = jnp.concatenate([id_UK, jnp.broadcast_to(item_Q[None], score_UQ.shape)], axis=1)
  top_UK, at_UK = jax.lax.top_k(score, top_UK.shape[1])
  return top_UK, jnp.take_along_axis(ids, at_UK, axis=1)


@functools.partial(jax.jit, static_argnames=('mesh', 'V', 'K', 'block'))
def top_items(
  rows_RD: Float[Array, 'R D'],
  query_QD: Float[Array, 'Q D'],
  query_P: Int[Array, 'P'],
  seen_P: Int[Array, 'P'],
  mesh: Mesh,
  V: int,
  K: int,
  block: int | None = None,
) -> tuple[Float[Array, 'Q K'], Int[Array, 'Q K']]:
  """Scores and ids of the K best rows for each query, a block of rows at a time on each device.

  Args:
    rows_RD: of the items, sharded over the mesh. query_QD: queries; a score is the product with a
      row. query_P, seen_P: pairs of a query and a row that is not a candidate of it; padded with
      row V. mesh: of the table. V: ids of the table. block: scores in memory at a time.

  Returns:
    Best first, of equal scores the lower id first; -inf where there are fewer candidates.
  """

  def device_top(rows_RD, query_QD, query_P, seen_P):
    _, blocks, scores = ranking.device_blocks(rows_RD, query_QD, mesh, V, block)
    Q = len(query_QD)

    def step(k, top):
      score_QS, ids_S, candidate_S = scores(k)
      # The places of seen items in this block; those outside are dropped.
      at_P = jnp.where(seen_P >= ids_S[0], seen_P - ids_S[0], len(ids_S))
      open_QS = jnp.broadcast_to(candidate_S[None], score_QS.shape)
      open_QS = open_QS.at[query_P, at_P].set(False, mode='drop')
      return better(*top, score_QS, ids_S.astype(jnp.int32), open_QS)

    top = jnp.full((Q, K), -jnp.inf), jnp.zeros((Q, K), jnp.int32)
    top = jax.lax.fori_loop(0, blocks, step, top)
    if mesh.size == 1:
      return top
    gathered = [jax.lax.all_gather(x, ('data', 'model'), axis=1, tiled=True) for x in top]
    score, at = jax.lax.top_k(gathered[0], K)
    return score, jnp.take_along_axis(gathered[1], at, axis=1)

  in_specs = (meshes.ROWS, *[meshes.REPLICATED] * 3)
  with meshes.use_mesh(mesh):
    run = meshes.each_device(device_top, in_specs, (meshes.REPLICATED, meshes.REPLICATED))
    return run(rows_RD, query_QD, query_P, seen_P)
