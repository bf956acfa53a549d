"""Compiles the functions of a program, and shards its state over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from lmn_jax.distributed import mesh as meshes
from lmn_jax.tables import table
from lmn_jax.training import program as programs
from lmn_jax.training import update as updates
from lmn_jax.training.program import Batch, Cut, Program, State

# Programs whose functions a process keeps compiled, those used last. A training has about a
# thousand pieces of code in memory, and Linux allows a process 65,530 pieces (vm.max_map_count).
CACHED = 8


class Trainer(NamedTuple):
  """The compiled functions of an experiment.

  init: seed -> State, sharded from the start.
  update: (State, batch, skipped) -> (State, metrics), see `update.update`; the state is donated.
  steps: (State, columns, plans, count, skipped) -> (State, skipped, metrics of each step), see
  `update.steps`; the state is donated.
  finite: State -> which of its parts are finite. diagnose: (State, batch) -> the same for the state
  and for the step that it begins. `update.first_not_finite` reads both results.
  predict: (State, batch) -> logits, on every host, see `program.predict`.
  stream: (State, carry, batch) -> (outputs, carry of the next batch), see `program.stream`.
  clear_reads: State -> State with the counters of reads at 0; the state is donated.
  abstract: the state's shapes, dtypes and shardings.
  """

  init: Callable[[int], State]
  update: Callable[..., tuple[State, dict[str, Array]]]
  steps: Callable[..., tuple[State, Array, dict[str, Array]]]
  finite: Callable[[State], dict[str, Any]]
  diagnose: Callable[[State, Batch], dict[str, Any]]
  predict: Callable[[State, Batch], Array]
  stream: Callable[[State, Any, Batch], tuple[Array, Any]]
  clear_reads: Callable[[State], State]
  abstract: State


def shardings_of(program: Program, shapes: State) -> State:
  """Returns shardings: table rows over the mesh, lanes like a batch, the rest replicated.

  Args:
    program: of the state. shapes: of its arrays.
  """
  mesh = program.mesh
  lanes, replicated = (NamedSharding(mesh, x) for x in (meshes.BATCH, meshes.REPLICATED))

  def table_shardings(t):
    R = t.rows_RD.shape[0]
    return jax.tree.map(
      lambda x: meshes.rows_format(mesh, x.shape) if table.by_row(x, R) else replicated, t
    )

  return jax.tree.map(lambda _: replicated, shapes)._replace(
    carry=jax.tree.map(lambda _: lanes, shapes.carry),
    tables={name: table_shardings(t) for name, t in shapes.tables.items()},
  )


@functools.lru_cache(maxsize=CACHED)
def compile_cut(cut: Cut, mesh: Mesh) -> Callable[..., Batch]:
  """Returns a function that cuts one batch out of the columns of a store on the devices."""

  def traced(columns, plan):
    with meshes.use_mesh(mesh):
      return cut(columns, plan)

  return jax.jit(traced, out_shardings=NamedSharding(mesh, meshes.BATCH))


@functools.lru_cache(maxsize=CACHED)
def compile_program(program: Program) -> Trainer:
  """Returns the functions of a program, compiled at first calls; equal programs share them."""

  def on_mesh(fn):
    @functools.wraps(fn)
    def traced(*arguments):
      with meshes.use_mesh(program.mesh):
        return fn(program, *arguments)

    return traced

  lanes, replicated = (NamedSharding(program.mesh, x) for x in (meshes.BATCH, meshes.REPLICATED))
  init = on_mesh(programs.init)
  shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))  # no array is sent
  state = shardings_of(program, shapes)
  return Trainer(
    init=jax.jit(init, out_shardings=state),
    update=jax.jit(on_mesh(updates.update), donate_argnums=0, out_shardings=(state, replicated)),
    steps=jax.jit(
      on_mesh(updates.steps), donate_argnums=0, out_shardings=(state, replicated, replicated)
    ),
    finite=jax.jit(on_mesh(updates.finite), out_shardings=replicated),
    diagnose=jax.jit(on_mesh(updates.diagnose), out_shardings=replicated),
    predict=jax.jit(on_mesh(programs.predict), out_shardings=replicated),
    stream=jax.jit(on_mesh(programs.stream), out_shardings=(replicated, lanes)),
    clear_reads=jax.jit(on_mesh(programs.clear_reads), donate_argnums=0, out_shardings=state),
    abstract=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state
    ),
  )
