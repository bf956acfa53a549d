"""A step of training, `update(program, state, batch) -> state, metrics`, and several in a loop.

Weights change only here. A step computes gradients, sums those of each row that was read, computes
the factor that clips them, updates the dense parameters and the rows, and keeps the old state if
anything is not finite.
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

# The parts that may be not finite, in order of cause and effect.
PARTS = ('weights', 'optimizer', 'statistics', 'carry', 'losses', 'gradients')
MOST_READS = 2**30  # bound of a row's counter; one step adds less than 2^30, so int32 suffices


class Gradients(NamedTuple):
  """The loss and gradients of a step, before any weight changes.

  loss: total loss. outputs: of the model. stats: its updated moving statistics. used: the reads of
  each table. dense: gradients of the parameters. taps: gradients of the rows that each read
  returned, by table; frozen tables have none.
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
  """Returns the state after one step of training, and the metrics of the step.

  If the loss or a gradient is not finite, nothing changes but `step`. If `skipped` exceeds
  program.skip_not_finite, training has ended, and again nothing changes but `step`: so the state is
  the one before the first step beyond the bound.

  Args:
    program: of the experiment. state: before the step. batch: global, on the mesh.
    skipped: float32 scalar, metrics['skipped'] of the step before, 0 for the first.

  Returns:
    The state after the step, and metrics, scalars by name: 'loss', 'loss/NAME', 'grad_norm' before
    clipping, the model's monitors, and 'skipped', the number of consecutive steps that were not
    finite.
  """
  # Do not reorder these lines: XLA groups sums over devices by their order, another order rounds
  # differently, and runs of earlier versions would not continue bit for bit.
  step = loss_and_gradients(program, state, batch)
  summed, on_shards = row_gradients(program, state.tables, step)
  squares = jnp.square(optax.tree.norm((step.dense, {k: g.grads_ND for k, g in summed.items()})))
  ok = may_move(program, step, squares, on_shards, skipped)
  factor, squares = clip(program, state.tables, squares, on_shards)
  updates, opt = dense_updates(program, state, step.dense, factor)
  tables = move_rows(program, state.tables, summed, factor, ok)
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


def steps(
  program: Program,
  state: State,
  columns: dict[str, Array],
  plans: Batch,
  count: Int[Array, ''] | None,
  skipped: Array | float,
) -> tuple[State, Array, dict[str, Array]]:
  """Returns the state after `count` steps of training, and the metrics of every step.

  It is one compiled loop over `update`, whatever the count, so the host sends several steps at
  once. The result is that of as many single steps, up to the rounding of XLA: to the bit for most
  models on CPU.

  Args:
    program: of the experiment. state: before the first step. columns: of the store, for
      `program.cut`; {} without it.
    plans: S plans, or without `program.cut` S batches, stacked on a first axis. count: of the steps
      to take, at most S; None for all S, so that a GPU need not ask the host before each step
      whether it is the last. skipped: as for `update`.

  Returns:
    The state, `skipped` after the last step, and metrics [S, ...]; those from `count` on are 0.
  """

  def batch_of(k):
    plan = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), plans)
    return plan if program.cut is None else program.cut(columns, plan)

  def step(k, carry):
    state, skipped, metrics = carry
    state, new = update(program, state, batch_of(k), skipped)
    return state, new['skipped'], jax.tree.map(lambda x_S, x: x_S.at[k].set(x), metrics, new)

  shapes = jax.eval_shape(lambda: update(program, state, batch_of(0), skipped)[1])
  S = len(jax.tree.leaves(plans)[0])
  metrics = {name: jnp.zeros((S, *x.shape), x.dtype) for name, x in shapes.items()}
  return jax.lax.fori_loop(0, S if count is None else count, step, (state, skipped, metrics))


def loss_and_gradients(program: Program, state: State, batch: Batch) -> Gradients:
  """Returns the loss of a batch and its gradients; the state's key and step determine dropout."""
  model, specs = program.model, program.specs
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

  def forward(params, taps=None):
    """Returns (outputs, updated statistics), reads by table."""
    read = reader.Reader(state.tables, specs, program.mesh, taps)
    dropout, positions = jax.random.split(rng)
    result = model.apply(
      {'params': params, **state.stats}, batch, read, state.carry, train=True,
      rngs={'dropout': dropout, 'positions': positions}, mutable=list(state.stats),
    )  # fmt: skip
    return result, read.used

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
  """Returns (gradients of rows, reads), both by table; one of them is empty.

  On one device the gradients of each row are summed here. On a mesh each device sums those of its
  rows (tables/embedding_bag.py), from the reads that are returned here.
  """
  summed, on_shards = {}, {}
  for name, taps in step.taps.items():
    reads = reader.reads_of(step.used[name], taps)
    if program.mesh.size > 1:
      on_shards[name] = reads
    else:
      R = tables[name].rows_RD.shape[0]
      summed[name] = reader.row_grads(reads, program.specs[name].rows, R)
  return summed, on_shards


def may_move(
  program: Program,
  step: Gradients,
  squares: Float[Array, ''],
  on_shards: dict[str, list[Reads]],
  skipped: Array | float,
) -> Bool[Array, '']:
  """Whether loss and gradients are finite, and training has not ended.

  Otherwise every weight would be NaN after a step or two, and no checkpoint could be continued or
  diagnosed. On shards the rows' gradients are summed while the rows are updated, so this tests the
  taps from which they are summed.
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
  """Returns the factor that clips all gradients to clip_norm, and their squared norm.

  The norm is needed before anything is updated: with clip_norm the gradients on shards are summed
  here, and again when the rows are updated. Without it the returned norm does not include them.

  Args:
    squares: squared norm of all gradients but those on shards.
  """
  bound, mesh, no_update = program.optimizer.clip_norm, program.mesh, optax.set_to_zero()
  for name, reads in on_shards.items() if bound else ():
    V = program.specs[name].rows
    squares += embedding_bag.update(mesh, V, no_update, tables[name], reads, jnp.ones(()))[1]
  # Even without a bound the factor depends on all gradients, so every read precedes the first
  # update of a row: XLA would copy the table for a read that may run later.
  return optimizers.clip_factor(bound or jnp.inf, jnp.sqrt(squares)), squares


def dense_updates(
  program: Program, state: State, grads: Any, factor: Float[Array, '']
) -> tuple[Any, Any]:
  """Returns (updates of the parameters, optimizer state), of gradients times the factor."""
  grads = jax.tree.map(lambda g: g * factor, grads)
  return program.dense_tx.update(grads, state.opt, state.params)


def move_rows(
  program: Program,
  tables: dict[str, Table],
  grads: dict[str, RowGrads],
  factor: Float[Array, ''],
  ok: Bool[Array, ''],
) -> dict[str, Table]:
  """Returns the tables with the read rows updated; if not `ok`, the ids write nothing."""
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
  """Returns the tables of `move_rows` for sharded rows, and the squared norm of all gradients.

  Args:
    squares: from `clip`; the rows' gradients are added if it does not include them.
  """
  tables, specs = dict(tables), program.specs
  reads = {
    name: [r._replace(ids_TK=jnp.where(ok, r.ids_TK, specs[name].rows)) for r in of_table]
    for name, of_table in reads.items()
  }
  for name, of_table in reads.items():
    V, tx = specs[name].rows, program.row_tx[name]
    tables[name], more = embedding_bag.update(program.mesh, V, tx, tables[name], of_table, factor)
    if not program.optimizer.clip_norm:
      squares += more
  return tables, squares


def count_uses(
  program: Program, tables: dict[str, Table], used: dict[str, list[Use]], ok: Bool[Array, '']
) -> dict[str, Table]:
  """Returns the tables with every read added to their counters, if `ok`."""
  tables = dict(tables)
  for name, uses in used.items():
    V = program.specs[name].rows
    for use in uses:
      tables[name] = count_reads(tables[name], jnp.where(ok, use.ids, V), V)
  return tables


def count_reads(t: Table, ids: Int[Array, '...'], V: int) -> Table:
  """Returns the table with one read added to the counter of each id, up to MOST_READS.

  Padding is not counted, and a table without counters is returned unchanged.
  """
  if t.reads_R is None:
    return t
  ids = jnp.where(ids < V, ids, t.reads_R.shape[0])
  return t._replace(
    reads_R=t.reads_R.at[ids].add(1, mode='drop').at[ids].min(MOST_READS, mode='drop'),
    ever_R=t.ever_R.at[ids].set(True, mode='drop'),
  )


def keep_if_finite(ok: Bool[Array, ''], moved: State, before: State) -> State:
  """Returns the moved state if `ok`, otherwise the state before with the moved step.

  It does not select between rows: `move_rows` has written none if not `ok`, and a selection between
  whole tables would copy them.
  """

  def select(path, new, old):
    name = path[1].key if path[0].name == 'tables' else None
    by_row = name and table.by_row(new, moved.tables[name].rows_RD.shape[0])
    return new if path[0].name == 'step' or by_row else jnp.where(ok, new, old)

  return jax.tree_util.tree_map_with_path(select, moved, before)


def finite(program: Program, state: State) -> dict[str, Any]:
  """Returns which arrays of a state are finite, by part."""
  del program  # as the other compiled functions it takes a program
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state))


def diagnose(program: Program, state: State, batch: Batch) -> dict[str, Any]:
  """Returns which arrays are finite, by part, of a state and of the step that it begins."""
  step = loss_and_gradients(program, state, batch)
  computed = {
    'losses': {**step.outputs.losses, 'sum': step.loss},
    'gradients': {'dense': step.dense, **step.taps},
  }
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state) | computed)


def parts_of(state: State) -> dict[str, Any]:
  """Returns the parts of a state that may be not finite, by the names of PARTS."""
  return {
    'weights': {'dense': state.params, **state.tables},
    'optimizer': state.opt,
    'statistics': state.stats,
    'carry': state.carry,
  }


def first_not_finite(parts: dict[str, Any]) -> str:
  """Returns the name of the first array that is not finite and the number of others; '' for none.

  Args:
    parts: result of `finite` or `diagnose`; they are examined in the order of PARTS.
  """
  names = []
  for part in (x for x in PARTS if x in parts):
    for path, is_finite in jax.tree_util.tree_leaves_with_path(parts[part]):
      if not is_finite:
        where = jax.tree_util.keystr(path, simple=True, separator='/')
        names.append(f'{part}/{where}')
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return f'{names[0]}{more}' if names else ''
