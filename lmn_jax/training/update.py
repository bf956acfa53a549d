"""`update(program, state, batch) -> state, metrics`: the one place where weights change.

A step computes gradients, sums those of each row that was read, finds the factor that clips them
all, moves the dense parameters and the rows, and keeps the old state if anything is not finite.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lmn_jax.layers.losses import total_loss
from lmn_jax.models.base import Outputs
from lmn_jax.tables import embedding_bag, optimizers, reader, table
from lmn_jax.tables.embedding_bag import Reads
from lmn_jax.tables.reader import Use
from lmn_jax.tables.table import RowGrads, Table
from lmn_jax.training.program import Batch, Program, State

# What may be not finite, in the order in which one makes the next not finite.
PARTS = ('weights', 'optimizer', 'statistics', 'carry', 'losses', 'gradients')
MOST_READS = 2**30  # counted of a row in a window; one step adds less than is left to 2^31


class Gradients(NamedTuple):
  """What a step computes before anything moves.

  loss: that is minimised. outputs: of the model. stats: its moved statistics. used: the reads of
  each table. dense: gradients of the parameters. taps: of what each read gave, by table; frozen
  tables have none.
  """

  loss: Float[Array, '']
  outputs: Outputs
  stats: Any
  used: dict[str, list[Use]]
  dense: Any
  taps: dict[str, list[Array]]


def update(
  program: Program, state: State, batch: Batch, skipped: Array | float = 0.0
) -> tuple[State, dict[str, Array]]:
  """One step of training.

  Where the loss or a gradient is not finite nothing moves but `step`. Where `skipped` is above
  program.skip_not_finite training has ended, and nothing moves either: but for its step, the state
  is the one that the first step too many began with.

  Args:
    program: what is computed. state: to begin with. batch: global, on the mesh.
    skipped: float32 scalar, metrics['skipped'] of the step before, 0 for the first.

  Returns:
    The state after the step, and metrics, scalars by name: 'loss', 'loss/NAME', 'grad_norm' before
    clipping, the model's monitors, and 'skipped', how many steps in a row were not finite.
  """
  # XLA groups sums over devices by the order of these lines: another order rounds them differently,
  # and a run of an earlier version would not be continued bit for bit.
  step = loss_and_gradients(program, state, batch)
  here, on_shards = row_gradients(program, state.tables, step)
  squares = jnp.square(optax.tree.norm((step.dense, {k: g.grads_ND for k, g in here.items()})))
  ok = may_move(program, step, squares, on_shards, skipped)
  factor, squares = clip(program, state.tables, squares, on_shards)
  updates, opt = dense_updates(program, state, step.dense, factor)
  tables = move_rows(program, state.tables, here, factor, ok)
  tables, squares = move_rows_on_shards(program, tables, on_shards, factor, ok, squares)
  tables = count_uses(program, tables, step.used, ok)
  metrics = {
    'skipped': jnp.where(ok, 0.0, skipped + 1.0),
    'loss': step.loss,
    'grad_norm': jnp.sqrt(squares),
    **{f'loss/{name}': loss for name, loss in step.outputs.losses.items()},
    **step.outputs.monitors,
  }
  params = optax.apply_updates(state.params, updates)
  moved = State(state.step + 1, params, opt, tables, step.stats, step.outputs.carry, state.rng)
  return keep_if_finite(ok, moved, state), metrics


def loss_and_gradients(program: Program, state: State, batch: Batch) -> Gradients:
  """The loss of a batch and its gradients; dropout is drawn from the state's key and step."""
  model, specs = program.model, program.specs
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

  def forward(params, taps=None):
    """(outputs, moved statistics), ids read."""
    read = reader.Reader(state.tables, specs, program.mesh, taps)
    dropout, positions = jax.random.split(rng)
    found = model.apply(
      {'params': params, **state.stats}, batch, read, state.carry, train=True,
      rngs={'dropout': dropout, 'positions': positions}, mutable=list(state.stats),
    )  # fmt: skip
    return found, read.used

  def loss_fn(params, taps):
    (outputs, stats), used = forward(params, taps)
    return total_loss(outputs.losses, model.objective, program.loss), (outputs, stats, used)

  _, used = jax.eval_shape(forward, state.params)
  taps = reader.zero_taps(used, specs)
  value = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(state.params, taps)
  (loss, (outputs, stats, used)), (dense, taps) = value
  return Gradients(loss, outputs, stats, used, dense, taps)


def row_gradients(
  program: Program, tables: dict[str, Table], step: Gradients
) -> tuple[dict[str, RowGrads], dict[str, list[Reads]]]:
  """What the gradients of rows are, by table: summed on one device, or what they are made of.

  On a mesh they are made where the rows lie (tables/embedding_bag.py). One of the two is empty.
  """
  here, on_shards = {}, {}
  for name, taps in step.taps.items():
    reads = reader.reads_of(step.used[name], taps)
    if program.mesh.size > 1:
      on_shards[name] = reads
    else:
      R = tables[name].rows_RD.shape[0]
      here[name] = reader.row_grads(reads, program.specs[name].rows, R)
  return here, on_shards


def may_move(
  program: Program,
  step: Gradients,
  squares: Float[Array, ''],
  on_shards: dict[str, list[Reads]],
  skipped: Array | float,
) -> Bool[Array, '']:
  """Whether loss and gradients are finite, and training has not ended.

  What is not finite would be in every weight after a step or two, and no checkpoint could be
  continued or diagnosed. On shards the rows' gradients are made while the rows move, so here the
  taps that they are made of are tested.
  """
  ok = jnp.isfinite(step.loss) & jnp.isfinite(squares) & (skipped <= program.skip_not_finite)
  for name in on_shards:
    ok &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in step.taps[name]]))
  return ok


def clip(
  program: Program,
  tables: dict[str, Table],
  squares: Float[Array, ''],
  on_shards: dict[str, list[Reads]],
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """The factor that clips all gradients to clip_norm, and their squared norm.

  The norm is needed before anything moves: with clip_norm the gradients on shards are made here,
  and once more when the rows move. Without it they are not part of the norm that is returned.

  Args:
    squares: squared norm of all gradients but those on shards.
  """
  bound, mesh, still = program.optimizer.clip_norm, program.mesh, optax.set_to_zero()
  for name, reads in on_shards.items() if bound else ():
    V = program.specs[name].rows
    squares += embedding_bag.update(mesh, V, still, tables[name], reads, jnp.ones(()))[1]
  # Even without a bound the factor depends on all gradients, so every read comes before the first
  # row moves: XLA would copy the table for a read that may run later.
  return optimizers.clip_factor(bound or jnp.inf, jnp.sqrt(squares)), squares


def dense_updates(
  program: Program, state: State, grads: Any, factor: Float[Array, '']
) -> tuple[Any, Any]:
  """(what is added to the parameters, their optimizer state), of gradients times the factor."""
  grads = jax.tree.map(lambda g: g * factor, grads)
  return program.dense_tx.update(grads, state.opt, state.params)


def move_rows(
  program: Program,
  tables: dict[str, Table],
  grads: dict[str, RowGrads],
  factor: Float[Array, ''],
  ok: Bool[Array, ''],
) -> dict[str, Table]:
  """The tables with the rows that were read moved; none if not `ok`, by ids that write nothing."""
  tables = dict(tables)
  for name, (ids_N, grads_ND) in grads.items():
    ids_N = jnp.where(ok, ids_N, tables[name].rows_RD.shape[0])
    tables[name] = optimizers.update_rows(
      program.row_tx[name], tables[name], RowGrads(ids_N, grads_ND * factor)
    )
  return tables


def move_rows_on_shards(
  program: Program,
  tables: dict[str, Table],
  reads: dict[str, list[Reads]],
  factor: Float[Array, ''],
  ok: Bool[Array, ''],
  squares: Float[Array, ''],
) -> tuple[dict[str, Table], Float[Array, '']]:
  """`move_rows` where the rows lie on shards, and the squared norm of all gradients.

  Args:
    squares: of `clip`, to which the rows' gradients are added if they are not part of it.
  """
  tables, specs = dict(tables), program.specs
  kept = {
    name: [r._replace(ids_TK=jnp.where(ok, r.ids_TK, specs[name].rows)) for r in of_table]
    for name, of_table in reads.items()
  }
  for name, of_table in kept.items():
    V, tx = specs[name].rows, program.row_tx[name]
    tables[name], more = embedding_bag.update(program.mesh, V, tx, tables[name], of_table, factor)
    if not program.optimizer.clip_norm:
      squares += more
  return tables, squares


def count_uses(
  program: Program, tables: dict[str, Table], used: dict[str, list[Use]], ok: Bool[Array, '']
) -> dict[str, Table]:
  """The tables with every read counted, where they count; none if not `ok`."""
  tables = dict(tables)
  for name, uses in used.items():
    V = program.specs[name].rows
    for use in uses:
      tables[name] = count_reads(tables[name], jnp.where(ok, use.ids, V), V)
  return tables


def count_reads(t: Table, ids: Int[Array, '...'], V: int) -> Table:
  """Adds one read to the counter of each id, up to MOST_READS; padding counts nothing."""
  if t.reads_R is None:
    return t
  ids = jnp.where(ids < V, ids, t.reads_R.shape[0])
  return t._replace(
    reads_R=t.reads_R.at[ids].add(1, mode='drop').at[ids].min(MOST_READS, mode='drop'),
    ever_R=t.ever_R.at[ids].set(True, mode='drop'),
  )


def keep_if_finite(ok: Bool[Array, ''], moved: State, before: State) -> State:
  """The moved state if `ok`, else the one before, but for the step.

  Rows are kept by the ids that `move_rows` was given: a choice between whole tables would copy
  them.
  """

  def kept(path, new, old):
    name = path[1].key if path[0].name == 'tables' else None
    by_row = name and table.by_row(new, moved.tables[name].rows_RD.shape[0])
    return new if path[0].name == 'step' or by_row else jnp.where(ok, new, old)

  return jax.tree_util.tree_map_with_path(kept, moved, before)


def finite(program: Program, state: State) -> dict[str, Any]:
  """Which parts of a state are finite, by name; one that is not all so is not worth keeping."""
  del program  # what a state holds does not depend on it
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state))


def diagnose(program: Program, state: State, batch: Batch) -> dict[str, Any]:
  """Which parts are finite of a state and of what the step that begins with it computes."""
  step = loss_and_gradients(program, state, batch)
  made = {
    'losses': {**step.outputs.losses, 'sum': step.loss},
    'gradients': {'dense': step.dense, **step.taps},
  }
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state) | made)


def parts_of(state: State) -> dict[str, Any]:
  """What may be not finite in a state, by the names of PARTS."""
  return {
    'weights': {'dense': state.params, **state.tables},
    'optimizer': state.opt,
    'statistics': state.stats,
    'carry': state.carry,
  }


def first_not_finite(found: dict[str, Any]) -> str:
  """Names what is not finite of what `finite` or `diagnose` found; '' if all of it is.

  Weights come before the losses that they make, and these before the gradients.
  """
  names = []
  for kind in (x for x in PARTS if x in found):
    for path, fine in jax.tree_util.tree_leaves_with_path(found[kind]):
      if not fine:
        where = jax.tree_util.keystr(path, simple=True, separator='/')
        names.append(f'{kind}/{where}')
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return f'{names[0]}{more}' if names else ''
