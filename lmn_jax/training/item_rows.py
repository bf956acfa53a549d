"""The rows of items with their features, computed once for an evaluation, a prediction, an export.

Then the model is one of ids alone: what scores and ranks reads these rows as those of the ids, and
costs no more.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.fields import CONSTANTS
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.tables.reader import Reader
from lmn_jax.tables.table import Table
from lmn_jax.training.program import Program, State
from lmn_jax.training.setup import Setup
from lmn_jax.training.trainer import CACHED, compile_program


def fold_item_fields(setup: Setup, state: State) -> tuple[Setup, State]:
  """Returns a model of ids alone whose rows are those of the items with their features.

  Args:
    setup: of an experiment. state: its weights.

  Returns:
    The setup and the state, to score and not to train; the same objects if the model reads no
    features of items.
  """
  model = setup.model
  if not (isinstance(model, NextItemModel) and model.item_fields):
    return setup, state
  folded = model.without_item_fields()
  program = dataclasses.replace(setup.program, model=folded)
  rows_RD = compile_item_rows(setup.program)(state)
  tables = {name: state.tables[name] for name in program.specs}
  tables['item'] = Table(rows_RD, None, (), None, None)
  state = state._replace(
    params={name: x for name, x in state.params.items() if name != 'item_fields'},
    stats={name: x for name, x in state.stats.items() if name != CONSTANTS},
    tables=tables,
  )
  trainer = compile_program(program)
  return setup._replace(model=folded, program=program, trainer=trainer), state


@functools.lru_cache(maxsize=CACHED)
def compile_item_rows(program: Program) -> Callable[[State], Float[Array, 'R D']]:
  """Returns a compiled function of a state: the rows of all items, float32, sharded as the table.

  The rows from V on, which pad the table in memory, are those of the table.
  """
  mesh, model = program.mesh, program.model
  shape = compile_program(program).abstract.tables['item'].rows_RD.shape
  of_items = ('item', *(key for key, _ in model.schema.vectors))

  def traced(state):
    lookup = Reader(state.tables, program.specs, mesh)

    def read(name, ids):
      # All items in the order of the table: no row moves between devices.
      if name in of_items:
        return state.tables[name].rows_RD.astype(jnp.float32)
      return lookup(name, ids)

    with meshes.use_mesh(mesh):
      ids_R = jnp.arange(shape[0], dtype=jnp.int32)
      ids_R = jax.lax.with_sharding_constraint(ids_R, NamedSharding(mesh, meshes.ROWS))
      return model.item_rows({'params': state.params, **state.stats}, ids_R, read)

  return jax.jit(traced, out_shardings=meshes.rows_format(mesh, shape))
