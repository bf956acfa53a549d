"""`Program`, all that the compiled functions of an experiment depend on, and pure functions of it.

A `Program` is hashable: equal programs compute the same, so trainer.py compiles them once.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables import optimizers, reader, table
from lmn_jax.tables.spec import TableSpec

Batch = dict[str, Any]  # arrays by name, or their shapes
Cut = Callable[[dict[str, Array], dict[str, Array]], Batch]  # hashable


class State(NamedTuple):
  """The state of training, from step to step.

  step: int32 scalar. params: dense parameters. opt: their optimizer state. tables: by name.
  stats: moving statistics (batch norm), and constants (the features of items of next-item models).
  carry: of the lanes of the batches, [B, ...], the state that a model which reads histories in
  segments passes to the next segment. rng: uint32 [2], the key from which all random numbers are
  derived.
  """

  step: Array
  params: Any
  opt: Any
  tables: dict[str, table.Table]
  stats: Any
  carry: Any
  rng: Array


@dataclasses.dataclass(frozen=True)
class Program:
  """All that the compiled functions of an experiment depend on, beside their arguments.

  Attributes:
    model: the model. mesh: the devices that it runs on.
    batch: names, shapes and dtypes of a global batch.
    optimizer, loss: these sections of the config.
    steps: end of the schedule of the rates; for a constant schedule the end of the warm-up.
    skip_not_finite: allowed number of consecutive steps that are not finite.
    cut: (columns, plan) -> batch, with the store on the devices (data/resident.py); None if the
      host cuts the batches.
  """

  model: Model
  mesh: Mesh
  batch: tuple[tuple[str, jax.ShapeDtypeStruct], ...]
  optimizer: ml_collections.FrozenConfigDict
  loss: ml_collections.FrozenConfigDict
  steps: int
  skip_not_finite: int
  cut: Cut | None = None

  @functools.cached_property
  def specs(self) -> dict[str, TableSpec]:
    """The tables of the model, by name."""
    return self.model.tables()

  @functools.cached_property
  def dense_tx(self) -> optax.GradientTransformation:
    """The optimizer of the dense parameters."""
    return optimizers.make(self.optimizer, 'dense', self.steps)

  @functools.cached_property
  def row_tx(self) -> dict[str, optax.GradientTransformation]:
    """The optimizer of the rows of each table."""
    return {
      name: optimizers.make(self.optimizer, spec.group, self.steps)
      for name, spec in self.specs.items()
    }


def make(
  config: ml_collections.ConfigDict, model: Model, batch: Batch, mesh: Mesh, cut: Cut | None = None
) -> Program:
  """Returns the program of an experiment.

  Args:
    config: the whole experiment; the sections `optimizer` and `loss`, `steps` and
      `skip_not_finite` are read.
    model: the model. batch: a global batch, or its shapes. mesh: from `distributed.mesh.make_mesh`.
    cut: of the training batches, see `Program`.
  """
  constant = config.optimizer.schedule == 'constant'
  return Program(
    model=model,
    mesh=mesh,
    batch=tuple((name, jax.ShapeDtypeStruct(x.shape, x.dtype)) for name, x in batch.items()),
    optimizer=ml_collections.FrozenConfigDict(config.optimizer),
    loss=ml_collections.FrozenConfigDict(config.loss),
    # If no rate depends on the number of steps, shorter and longer runs share a program.
    steps=config.optimizer.warmup_steps if constant else config.steps,
    skip_not_finite=config.skip_not_finite,
    cut=cut,
  )


def init(program: Program, seed: Array | int) -> State:
  """Returns the initial state; compile it with shardings, so that it is sharded from the start."""
  model, specs = program.model, program.specs
  rng, params_key, table_key = jax.random.split(jax.random.key(seed), 3)
  tables = {
    name: table.init(
      spec, jax.random.fold_in(table_key, zlib.crc32(name.encode())), program.row_tx[name],
      program.mesh.size, optimizers.row_type(program.optimizer, spec.group),
    )
    for name, spec in specs.items()
  }  # fmt: skip
  blank = {name: jnp.zeros(x.shape, x.dtype) for name, x in program.batch}
  keys = {'params': params_key, 'dropout': params_key, 'positions': params_key}
  carry = model.carry(blank)
  variables = model.init(keys, blank, reader.Reader(tables, specs, program.mesh), carry, train=True)
  params = variables.pop('params')
  return State(
    jnp.zeros((), jnp.int32), params, program.dense_tx.init(params), tables, variables, carry,
    jax.random.key_data(rng),
  )  # fmt: skip


def evaluate(program: Program, state: State, carry: Any, batch: Batch) -> Outputs:
  """Returns the model's outputs for a batch, without dropout or losses."""
  read = reader.Reader(state.tables, program.specs, program.mesh)
  return program.model.apply({'params': state.params, **state.stats}, batch, read, carry)


def predict(program: Program, state: State, batch: Batch) -> Array:
  """Returns the logits of a batch: [B], or [B, Q] for candidates [B, Q]; with K labels [..., K]."""
  return evaluate(program, state, {}, batch).value


def stream(program: Program, state: State, carry: Any, batch: Batch) -> tuple[Array, Any]:
  """Returns the model's outputs for a batch of lanes, and the carry for the next batch.

  The first carry is `model.carry`.
  """
  outputs = evaluate(program, state, carry, batch)
  return outputs.value, outputs.carry


def clear_reads(program: Program, state: State) -> State:
  """Returns the state with the counters of reads set to 0."""
  tables = dict(state.tables)
  for name in (name for name, spec in program.specs.items() if spec.count_reads):
    tables[name] = tables[name]._replace(reads_R=jnp.zeros_like(tables[name].reads_R))
  return state._replace(tables=tables)
