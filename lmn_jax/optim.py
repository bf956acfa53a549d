"""Optimizers: optax for the dense parameters, and the same rules on touched rows only."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from lmn_jax.errors import UserError, one_of
from lmn_jax.table import RowGrads, Table, by_row

SCHEDULES = ('constant', 'cosine', 'linear')
OPTIMIZERS = ('adam', 'adagrad', 'sgd')


def schedule(config: ml_collections.ConfigDict, rate: float, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0, then constant, cosine or linear to 0.

  Args:
    config: section `optimizer`, of which `schedule` and `warmup_steps` are read.
    rate: the peak rate. steps: length of the whole training.

  Raises:
    UserError: for an unknown schedule or a warm-up longer than the training.
  """
  kind = one_of('config.optimizer.schedule', config.schedule, SCHEDULES)
  warmup = config.warmup_steps
  if not 0 <= warmup <= steps:
    raise UserError(f'config.optimizer.warmup_steps={warmup} must be in [0, {steps}], the steps')
  rest = max(steps - warmup, 1)
  main = {
    'constant': lambda: optax.constant_schedule(rate),
    'cosine': lambda: optax.cosine_decay_schedule(rate, rest),
    'linear': lambda: optax.linear_schedule(rate, 0.0, rest),
  }[kind]()
  if not warmup:
    return main
  return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])


def make(config: ml_collections.ConfigDict, group: str, steps: int) -> optax.GradientTransformation:
  """The optimizer of a group: 'dense', 'embedding', 'memory' or 'frozen'.

  On rows, `adagrad` and `sgd` are exact: a row that is not touched would not have moved.
  `adam` on rows is the lazy variant: moments of untouched rows do not decay, and the bias
  correction counts steps, not touches; it is another algorithm than dense Adam.

  Args:
    config: section `optimizer`. group: which part of the state. steps: of the whole training.

  Raises:
    UserError: for an unknown optimizer.
  """
  if group == 'frozen':
    return optax.set_to_zero()
  own = config[group]
  name = one_of(f'config.optimizer.{group}.name', own.name, OPTIMIZERS)
  if not own.rate > 0 or not own.decay >= 0:  # NaN is neither
    raise UserError(
      f'config.optimizer.{group}: rate={own.rate} must be positive, decay={own.decay} not negative'
    )
  rule = {
    'adam': lambda: optax.scale_by_adam(),
    'adagrad': lambda: optax.scale_by_rss(initial_accumulator_value=0.0),
    'sgd': lambda: optax.identity(),
  }[name]()
  decay = [optax.add_decayed_weights(own.decay)] if own.decay else []
  rate = optax.scale_by_learning_rate(schedule(config, own.rate, steps))
  tx = optax.chain(rule, *decay, rate)

  def update(grads, state, params=None):
    # optax raises a float to an integer's power, which strict dtype promotion refuses.
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(grads, state, params)

  return optax.GradientTransformation(tx.init, update)


def update_rows(tx: optax.GradientTransformation, table: Table, grads: RowGrads) -> Table:
  """Applies an element-wise optimizer to the touched rows of a table.

  The leaves of the optimizer's state that have one entry for each row are gathered, updated as
  [N, ...] arrays and scattered back; scalars such as step counts pass through.

  Args:
    tx: an element-wise optax transformation. table: rows [R, D] and state. grads: summed
      gradients [N, D] of distinct ids [N]; id R writes nothing.

  Returns:
    The table with rows and state moved.
  """
  R = table.rows_RD.shape[0]

  def take(leaf):
    return leaf.at[grads.ids_N].get(mode='fill', fill_value=0) if by_row(leaf, R) else leaf

  def put(leaf, touched):
    return leaf.at[grads.ids_N].set(touched, mode='drop') if by_row(leaf, R) else touched

  rows_ND = take(table.rows_RD)
  updates_ND, opt = tx.update(grads.grads_ND, jax.tree.map(take, table.opt), rows_ND)
  return table._replace(
    rows_RD=put(table.rows_RD, rows_ND + updates_ND), opt=jax.tree.map(put, table.opt, opt)
  )


def clip_factor(max_norm: float, norm: jax.Array) -> jax.Array:
  """The factor in (0, 1] that brings gradients of a global norm to at most `max_norm`."""
  return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
