"""`read(name, ids[, weights])`: how a model reads tables, and how rows get their gradients.

A read adds a zero "tap" to its result. The gradient of the tap is the gradient of the rows, or of
their weighted sum, so the cost of a step depends on the rows that it reads and not on the table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from lmn_jax.tables import embedding_bag
from lmn_jax.tables.embedding_bag import Reads
from lmn_jax.tables.spec import TableSpec
from lmn_jax.tables.table import RowGrads, Table, gather, sum_duplicates


class Use(NamedTuple):
  """One read: ids [..., K] with weights [..., K], or ids [...] without weights."""

  ids: Array
  weights: Array | None


class Reader:
  """`read(name, ids[, weights])` over tables; it records what was read.

  Attributes:
    used: the reads of each table, in the order of the calls.
  """

  def __init__(
    self,
    tables: dict[str, Table],
    specs: dict[str, TableSpec],
    mesh: Mesh,
    taps: dict[str, list[Array]] | None = None,
  ):
    self.used: dict[str, list[Use]] = {name: [] for name in tables}
    self._tables, self._specs, self._mesh, self._taps = tables, specs, mesh, taps

  def __call__(self, name: str, ids: Array, weights: Array | None = None) -> Array:
    """Returns rows [..., D] of ids [...]; with weights [..., K] and ids [..., K], sums [..., D].

    float32 for rows of any type. The sums are computed on the shards of the rows
    (tables/embedding_bag.py).
    """
    rows_RD, V = jax.lax.stop_gradient(self._tables[name].rows_RD), self._specs[name].rows
    if weights is None:
      result = gather(rows_RD, ids, V)
    else:
      K = ids.shape[-1]
      sums = embedding_bag.read(self._mesh, V, rows_RD, ids.reshape(-1, K), weights.reshape(-1, K))
      result = sums.reshape(*ids.shape[:-1], -1)
    if self._taps is not None and name in self._taps:  # frozen tables have no taps
      result = result + self._taps[name][len(self.used[name])]
    self.used[name].append(Use(ids, weights))
    return result


def zero_taps(used: dict[str, list[Use]], specs: dict[str, TableSpec]) -> dict[str, list[Array]]:
  """Returns zero taps for the reads of a forward pass, each of the shape of its result.

  Args:
    used: the reads, arrays or shapes. specs: of the tables.
  """

  def shape(use):
    return use.ids.shape if use.weights is None else use.ids.shape[:-1]

  return {
    name: [jnp.zeros((*shape(use), specs[name].width)) for use in uses]
    for name, uses in used.items()
    if specs[name].group != 'frozen'
  }


def reads_of(uses: list[Use], taps: list[Array]) -> list[Reads]:
  """Returns flat reads with the gradients of their taps; without weights every weight is 1."""

  def flat(use, g):
    K = 1 if use.weights is None else use.ids.shape[-1]
    ids_TK = use.ids.reshape(-1, K)
    weights_TK = jnp.ones(ids_TK.shape) if use.weights is None else use.weights.reshape(-1, K)
    return Reads(ids_TK, jax.lax.stop_gradient(weights_TK), g.reshape(-1, g.shape[-1]))

  return [flat(use, g) for use, g in zip(uses, taps, strict=True)]


def row_grads(reads: list[Reads], V: int, R: int) -> RowGrads:
  """Returns the summed gradient of each distinct row, `sum_{t,k} w_tk g_t`.

  Args:
    reads: from `reads_of`. V: ids of the table. R: its rows in memory.
  """
  D = reads[0].g_TD.shape[-1]
  grads = [(r.weights_TK[:, :, None] * r.g_TD[:, None, :]).reshape(-1, D) for r in reads]
  ids_N = jnp.concatenate([r.ids_TK.reshape(-1) for r in reads])
  return sum_duplicates(ids_N, jnp.concatenate(grads), V, R)
