"""The state before the first step: drawn weights, and values of the store."""

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lmn_jax.data import store_columns
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.fields import CONSTANTS
from lmn_jax.tables.table import Table
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup


def initial_state(setup: Setup, store: Store, seed: int) -> State:
  """Returns the state before the first step.

  Args:
    setup: of the experiment. store: its data; a table with the name of one of its vectors has the
      vectors as rows, and constants of the model are the features of the items. seed: of the
      weights that are drawn.
  """
  state = setup.trainer.init(seed)
  tables = {
    name: _with_rows(table, store.vectors[name], setup.mesh) if name in store.vectors else table
    for name, table in state.tables.items()
  }
  stats = dict(state.stats)
  if CONSTANTS in stats:
    words = store_columns.item_features(store).read(0, slice(None))
    constants = jax.tree.map(lambda _: meshes.replicated(setup.mesh, words), stats[CONSTANTS])
    stats[CONSTANTS] = constants
  return state._replace(tables=tables, stats=stats)


def _with_rows(table: Table, rows: Float[np.ndarray, 'V1 W'], mesh: Mesh) -> Table:
  """Returns a table with other rows; each device is sent its own. rows: the last is the padding."""
  V, (R, W) = len(rows) - 1, table.rows_RD.shape

  def piece(index):
    begin, end, _ = index[0].indices(R)
    values = np.zeros((end - begin, W), np.float32)
    present = rows[begin : min(end, V)]
    values[: len(present)] = present
    return values

  # The transfer is intended; with several hosts JAX counts it as an implicit one.
  with jax.transfer_guard_host_to_device('allow'):
    sharding = jax.sharding.NamedSharding(mesh, meshes.ROWS)
    rows_RD = jax.make_array_from_callback((R, W), sharding, piece)
  # On TPU rows may have another layout.
  placed = jax.jit(
    lambda x_RD: x_RD.astype(table.rows_RD.dtype), out_shardings=meshes.rows_format(mesh, (R, W))
  )
  master_RD = rows_RD if table.master_RD is not None else None
  return table._replace(rows_RD=placed(rows_RD), master_RD=master_RD)
