"""State, and `update(state, batch) -> state, metrics`: the one place where weights change."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.losses import total_loss
from lmn_jax.models.base import Model
from lmn_jax.tables import embedding_bag, optimizers, reader, table

Batch = dict[str, Any]  # arrays by name, or their shapes
# Of a step, in the order in which what is not finite goes on from one to the next.
PARTS = ('weights', 'optimizer', 'statistics', 'carry', 'losses', 'gradients')
MOST_READS = 2**30  # counted of a row in a window; one step adds less than is left to 2^31


class State(NamedTuple):
  """All that training carries from step to step.

  step: int32 scalar. params: dense parameters. opt: their optimizer state. tables: by name.
  stats: moving statistics (batch norm). carry: of the lanes of the batches, [B, ...], what a model
  that reads histories segment by segment takes to the next one. rng: uint32 [2], the key all
  randomness derives from.
  """

  step: Array
  params: Any
  opt: Any
  tables: dict[str, table.Table]
  stats: Any
  carry: Any
  rng: Array


class Trainer(NamedTuple):
  """The pure functions of one experiment, with the mesh they run on.

  init: seed -> State, born sharded. update: (State, batch, skipped) -> (State, metrics), the state
  donated. Where the loss or a gradient is not finite nothing moves but the step, and
  metrics['skipped'] is one more than `skipped`, that of the step before, else 0. Where `skipped` is
  above config.skip_not_finite the training is at its end, and nothing moves either: the state, but
  for its step, is the one that the first step too many began with.
  finite: (State, batch) -> what of the step's parts is finite, by name: see `first_not_finite`.
  predict: (State, batch) -> logits [B], on every host, or [B, Q] where items are candidates [B, Q].
  stream: (State, carry, batch) -> (what the model makes of the batch, carry for the next one), over
  the lanes; `model.carry` is the first. new_window: State -> State, donated: what changes
  between two windows of training. abstract: the state's shapes, dtypes and shardings.
  """

  init: Callable[[int], State]
  update: Callable[..., tuple[State, dict[str, Array]]]
  finite: Callable[[State, Batch], dict[str, Any]]
  predict: Callable[[State, Batch], Array]
  stream: Callable[[State, Any, Batch], tuple[Array, Any]]
  new_window: Callable[[State], State]
  abstract: State


def count_reads(t: table.Table, ids, V: int) -> table.Table:
  """Adds one read to the counter of each id, up to MOST_READS; padding counts nothing."""
  if t.reads_R is None:
    return t
  ids = jnp.where(ids < V, ids, t.reads_R.shape[0])
  return t._replace(
    reads_R=t.reads_R.at[ids].add(1, mode='drop').at[ids].min(MOST_READS, mode='drop'),
    ever_R=t.ever_R.at[ids].set(True, mode='drop'),
  )


def parts_of(state: State) -> dict[str, Any]:
  """What may be not finite in a state, by the names of PARTS."""
  return {
    'weights': {'dense': state.params, **state.tables},
    'optimizer': state.opt,
    'statistics': state.stats,
    'carry': state.carry,
  }


def first_not_finite(found: dict[str, Any]) -> str:
  """In words, what is not finite of what `Trainer.finite` found; '' if all of it is.

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


def make_trainer(
  config: ml_collections.ConfigDict, model: Model, batch: Batch, mesh: Mesh
) -> Trainer:
  """Builds the functions of an experiment.

  Args:
    config: the whole experiment; sections `optimizer`, `loss` and `steps` are read.
    model: the model. batch: shapes and dtypes of a global batch. mesh: from `mesh.make_mesh`.
  """
  specs = model.tables()
  devices = mesh.size
  dense_tx = optimizers.make(config.optimizer, 'dense', config.steps)
  row_tx = {
    name: optimizers.make(config.optimizer, spec.group, config.steps)
    for name, spec in specs.items()
  }
  replicated = NamedSharding(mesh, meshes.REPLICATED)

  def forward(params, state, carry, batch, rng, train, taps=None):
    """The model over the tables: (outputs, moved statistics), ids read."""
    read = reader.Reader(state.tables, specs, mesh, taps)
    variables = {'params': params, **state.stats}
    if not train:
      return (model.apply(variables, batch, read, carry), state.stats), read.used
    dropout, positions = jax.random.split(rng)
    outputs = model.apply(
      variables, batch, read, carry, train=True,
      rngs={'dropout': dropout, 'positions': positions}, mutable=list(state.stats),
    )  # fmt: skip
    return outputs, read.used

  def init(seed) -> State:
    rng, params_key, table_key = jax.random.split(jax.random.key(seed), 3)
    tables = {
      name: table.init(
        spec, jax.random.fold_in(table_key, zlib.crc32(name.encode())), row_tx[name], devices,
        optimizers.row_type(config.optimizer, spec.group),
      )
      for name, spec in specs.items()
    }  # fmt: skip
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    keys = {'params': params_key, 'dropout': params_key, 'positions': params_key}
    carry = model.carry(blank)
    variables = model.init(keys, blank, reader.Reader(tables, specs, mesh), carry, train=True)
    params = variables.pop('params')
    return State(
      jnp.zeros((), jnp.int32), params, dense_tx.init(params), tables, variables, carry,
      jax.random.key_data(rng),
    )  # fmt: skip

  def gradients(state: State, batch: Batch):
    """(loss, (outputs, moved statistics, ids read)), (gradients of params, of the taps)."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def loss_fn(params, taps):
      (outputs, stats), used = forward(params, state, state.carry, batch, rng, True, taps)
      loss = total_loss(outputs.losses, model.objective, config.loss)
      return loss, (outputs, stats, used)

    _, used = jax.eval_shape(
      lambda p: forward(p, state, state.carry, batch, rng, True), state.params
    )
    taps = reader.zero_taps(used, specs)
    return jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(state.params, taps)

  def finite(state: State, batch: Batch):
    (loss, (outputs, _, _)), (grads, tap_grads) = gradients(state, batch)
    made = {
      'losses': {**outputs.losses, 'sum': loss},
      'gradients': {'dense': grads, **tap_grads},
    }
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), parts_of(state) | made)

  def update(state: State, batch: Batch, skipped: Array | float = 0.0):
    (loss, (outputs, stats, used)), (grads, tap_grads) = gradients(state, batch)

    # On a mesh the gradients of rows are made where the rows lie (tables/embedding_bag.py).
    row_grads, on_shards = {}, {}
    for name, g in tap_grads.items():
      found = reader.reads_of(used[name], g)
      if mesh.size > 1:
        on_shards[name] = found
      else:
        R = state.tables[name].rows_RD.shape[0]
        row_grads[name] = reader.row_grads(found, specs[name].rows, R)

    def move_on_shards(name, tx, factor):
      return embedding_bag.update(mesh, specs[name].rows, tx, tables[name], on_shards[name], factor)

    tables, clip = dict(state.tables), config.optimizer.clip_norm
    squares = jnp.square(optax.tree.norm((grads, {k: g.grads_ND for k, g in row_grads.items()})))
    # What is not finite moves nothing: it would be in every weight after a step or two, and what
    # the run could go on from, or be asked for the reason, would be gone. On shards the rows'
    # gradients are made while they move; what they are made of is looked at.
    ok = jnp.isfinite(loss) & jnp.isfinite(squares) & (skipped <= config.skip_not_finite)
    for name in on_shards:
      ok &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in tap_grads[name]]))

    if clip:
      # The norm is needed before anything moves: the shards' gradients are made twice.
      for name in on_shards:
        squares += move_on_shards(name, optax.set_to_zero(), jnp.ones(()))[1]
    # Even where nothing is clipped the factor hangs on all gradients, so that every read comes
    # before the first row moves: XLA would copy the table for a read that may run later.
    factor = optimizers.clip_factor(clip or jnp.inf, jnp.sqrt(squares))
    grads = jax.tree.map(lambda g: g * factor, grads)
    updates, opt = dense_tx.update(grads, state.opt, state.params)
    for name, (ids_N, grads_ND) in row_grads.items():
      ids_N = jnp.where(ok, ids_N, tables[name].rows_RD.shape[0])
      tables[name] = optimizers.update_rows(
        row_tx[name], tables[name], table.RowGrads(ids_N, grads_ND * factor)
      )
    for name, found in on_shards.items():
      V = specs[name].rows
      on_shards[name] = [r._replace(ids_TK=jnp.where(ok, r.ids_TK, V)) for r in found]
    for name in on_shards:
      tables[name], found = move_on_shards(name, row_tx[name], factor)
      squares = squares if clip else squares + found
    for name, uses in used.items():
      for use in uses:
        ids = jnp.where(ok, use.ids, specs[name].rows)
        tables[name] = count_reads(tables[name], ids, specs[name].rows)
    skipped = jnp.where(ok, 0.0, skipped + 1.0)
    metrics = {'loss': loss, 'grad_norm': jnp.sqrt(squares), 'skipped': skipped}
    metrics |= {f'loss/{k}': v for k, v in outputs.losses.items()} | outputs.monitors
    params = optax.apply_updates(state.params, updates)
    moved = State(state.step + 1, params, opt, tables, stats, outputs.carry, state.rng)

    def kept(path, new, old):
      """Rows have been kept by their ids; a choice between whole tables would copy them."""
      name = path[1].key if path[0].name == 'tables' else None
      if path[0].name == 'step' or (name and table.by_row(new, tables[name].rows_RD.shape[0])):
        return new
      return jnp.where(ok, new, old)

    return jax.tree_util.tree_map_with_path(kept, moved, state), metrics

  def stream(state: State, carry: Any, batch: Batch):
    (outputs, _), _ = forward(state.params, state, carry, batch, None, False)
    return outputs.value, outputs.carry

  def predict(state: State, batch: Batch):
    return stream(state, {}, batch)[0]

  def new_window(state: State) -> State:
    """Lets the model change parameters by what was read in the window, and counts reads anew."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # Another key than those that the update of this step splits from the same one.
    key = jax.random.fold_in(rng, zlib.crc32(b'new_window'))
    reads = {name: t.reads_R for name, t in state.tables.items() if t.reads_R is not None}
    params = model.new_window(key, state.params, reads)
    # A weight that was put elsewhere begins as a new one: its moments are of where it was. Adam's
    # count of steps is of all weights, so its next step is (1 - b1) / sqrt(1 - b2) = 3.2 rates.
    opt = optax.tree.map_params(
      dense_tx, lambda x, new, old: jnp.where(new == old, x, 0), state.opt, params, state.params
    )
    cleared = {
      name: state.tables[name]._replace(reads_R=jnp.zeros_like(x)) for name, x in reads.items()
    }
    return state._replace(params=params, opt=opt, tables=state.tables | cleared)

  shapes = jax.eval_shape(init, jnp.zeros((), jnp.uint32))

  def shard(leaf, name=None):
    """Leaves of a table with one entry a row lie over the mesh, everything else everywhere."""
    by_row = name and table.by_row(leaf, shapes.tables[name].rows_RD.shape[0])
    return meshes.rows_format(mesh, leaf.shape) if by_row else replicated

  lanes = NamedSharding(mesh, meshes.BATCH)
  shardings = jax.tree.map(shard, shapes)._replace(
    carry=jax.tree.map(lambda _: lanes, shapes.carry),
    tables={k: jax.tree.map(lambda x, k=k: shard(x, k), t) for k, t in shapes.tables.items()},
  )
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )

  def on_mesh(fn):
    @functools.wraps(fn)
    def traced(*arguments):
      with meshes.known(mesh):
        return fn(*arguments)

    return traced

  return Trainer(
    init=jax.jit(on_mesh(init), out_shardings=shardings),
    update=jax.jit(on_mesh(update), donate_argnums=0, out_shardings=(shardings, replicated)),
    finite=jax.jit(on_mesh(finite), out_shardings=replicated),
    predict=jax.jit(on_mesh(predict), out_shardings=replicated),
    stream=jax.jit(on_mesh(stream), out_shardings=(replicated, lanes)),
    new_window=jax.jit(new_window, donate_argnums=0, out_shardings=shardings),
    abstract=abstract,
  )
