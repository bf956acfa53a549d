"""Optimizers: optax for the dense parameters, and rules for the touched rows of tables only."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from lmn_jax.errors import UserError, one_of
from lmn_jax.tables.table import RowGrads, Table, by_row

SCHEDULES = ('constant', 'cosine', 'linear')


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


class LazyAdamState(NamedTuple):
  """touches_R: in how many steps each row was touched. moments_RM: [m, v], M = 2 D.

  Side by side, both moments of a row come with one access to far memory.
  """

  touches_R: Int[Array, 'R']
  moments_RM: Float[Array, 'R M']


def scale_by_lazy_adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam on rows, each with a clock of its own.

      n <- n + 1                  m <- b1 m + (1 - b1) g       v <- b2 v + (1 - b2) g^2
      row moves against           m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps)

  n counts the steps that touched the row, because its moments decay in those steps only: a row
  moves exactly as under dense Adam (Kingma & Ba 2015, algorithm 1) that saw the row's own
  gradients and no others, and its first touch moves it by the rate, however late it comes.
  Deviation: torch.optim.SparseAdam and FBGEMM's Adam put the step of the training for n, so that a
  first touch at a late step moves a row by (1 - b1) / sqrt(1 - b2) = 3.2 times the rate.
  """

  def init(rows_RD):
    R, D = rows_RD.shape
    return LazyAdamState(jnp.zeros(R, jnp.int32), jnp.zeros((R, 2 * D)))

  def update(grads_ND, state, rows_ND=None):
    touches_N = state.touches_R + 1
    m_ND, v_ND = jnp.split(state.moments_RM, 2, axis=1)
    m_ND = b1 * m_ND + (1 - b1) * grads_ND
    v_ND = b2 * v_ND + (1 - b2) * jnp.square(grads_ND)
    n_N1 = touches_N.astype(jnp.float32)[:, None]
    scale_ND = jnp.sqrt(v_ND / (1 - b2**n_N1)) + eps
    moments_NM = jnp.concatenate([m_ND, v_ND], axis=1)
    return m_ND / (1 - b1**n_N1) / scale_ND, LazyAdamState(touches_N, moments_NM)

  return optax.GradientTransformation(init, update)


class RowwiseAdagradState(NamedTuple):
  """sum_R: of each row's mean squared gradients."""

  sum_R: Float[Array, 'R']


def scale_by_rowwise_adagrad(
  initial_accumulator: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adagrad with one accumulator a row in place of D.

      s <- s + mean_d g_d^2       row moves against  g / (sqrt(s) + eps)

  s begins at `initial_accumulator`, see `scale_by_adagrad`.
  Source: Mudigere et al. 2022, "Software-hardware co-design for fast and scalable training of
  deep learning recommendation models"; eps as in FBGEMM's rowwise_adagrad.
  """

  def init(rows_RD):
    return RowwiseAdagradState(jnp.full(rows_RD.shape[0], initial_accumulator))

  def update(grads_ND, state, rows_ND=None):
    sum_N = state.sum_R + jnp.mean(jnp.square(grads_ND), axis=-1)
    return grads_ND / (jnp.sqrt(sum_N)[:, None] + eps), RowwiseAdagradState(sum_N)

  return optax.GradientTransformation(init, update)


def scale_by_adagrad(
  initial_accumulator: float = 0.0, eps: float = 1e-10
) -> optax.GradientTransformation:
  """Adagrad on arrays of any shape, rows among them.

      s <- s + g^2                a weight moves against  g / (sqrt(s) + eps)

  s begins at `initial_accumulator`. At 0 a weight's first move is the rate, however small its
  gradient; where s begins at a, gradients well below sqrt(a) move it in proportion to their size.
  Source: Duchi et al. 2011; eps outside the root and its default as in torch.optim.Adagrad (FBGEMM:
  outside too, 1e-8). optax has 1e-7 inside the root, and so is SGD with a rate of 3,162 times the
  asked one wherever gradients are below 3e-4: a value of a memory gets some 4e-8, the mean over a
  batch. The state is optax's, so checkpoints of either fit the other.
  """

  def init(params):
    return optax.ScaleByRssState(optax.tree.full_like(params, initial_accumulator))

  def update(grads, state, params=None):
    sums = jax.tree.map(lambda g, s: s + jnp.square(g), grads, state.sum_of_squares)
    moved = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), grads, sums)
    return moved, optax.ScaleByRssState(sums)

  return optax.GradientTransformation(init, update)


def scale_by_momentum(
  momentum: float | None = None, nesterov: bool = False
) -> optax.GradientTransformation:
  """Of SGD: gradients as they are, or with `momentum` their trace, as in `optax.sgd`."""
  return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


Rule = Callable[..., optax.GradientTransformation]
# By name, what is scaled by the rate afterwards; keyword arguments are those of the config.
DENSE_RULES: dict[str, Rule] = {
  'adam': optax.scale_by_adam,
  'adagrad': scale_by_adagrad,
  'sgd': scale_by_momentum,
}
ROW_RULES: dict[str, Rule] = {
  'adam': scale_by_lazy_adam,
  'adagrad': scale_by_adagrad,
  'sgd': optax.identity,
  'rowwise_adagrad': scale_by_rowwise_adagrad,
}
ACCUMULATE = ('adagrad', 'rowwise_adagrad')


@functools.cache
def of_optax() -> dict[str, Rule]:
  """By name, the other optimizers of optax: its functions of a learning rate."""
  found = {
    name: rule
    for name, rule in vars(optax).items()
    if (inspect.isfunction(rule) or isinstance(rule, functools.partial))
    and 'learning_rate' in inspect.signature(rule).parameters
  }
  return {
    name: rule
    for name, rule in found.items()
    if name not in ROW_RULES and not name.startswith(('_', 'scale_by_'))
  }


def make(config: ml_collections.ConfigDict, group: str, steps: int) -> optax.GradientTransformation:
  """The optimizer of a group: 'dense', 'embedding', 'memory' or 'frozen'.

  The dense parameters may have any optimizer of optax. On rows, `adagrad`, `rowwise_adagrad` and
  `sgd` are exact: without a gradient a row would not have moved. `adam` on rows is
  `scale_by_lazy_adam`, another algorithm than dense Adam. Each group has its own rate and its own
  decoupled weight decay; on rows both act on those touched in the step and on no others, so a row
  decays in the steps that read it.

  Args:
    config: section `optimizer`. group: which part of the state. steps: of the whole training.

  Raises:
    UserError: for an unknown optimizer, one of rows for the dense parameters or the reverse, or
      arguments that it does not take.
  """
  if group == 'frozen':
    return optax.set_to_zero()
  own = config[group]
  rules = DENSE_RULES if group == 'dense' else ROW_RULES
  name = _checked_name(own.name, group, rules)
  _check_numbers(own, group, name, rules)
  rate, arguments = schedule(config, own.rate, steps), dict(own.arguments)
  rule = rules[name] if name in rules else of_optax()[name]
  _check_arguments(arguments, f'config.optimizer.{group}.arguments', name, rule)
  if name in ACCUMULATE:
    arguments['initial_accumulator'] = own.initial_accumulator
  decay = [optax.add_decayed_weights(own.decay)] if own.decay else []
  try:
    if name in rules:
      tx = optax.chain(rule(**arguments), *decay, optax.scale_by_learning_rate(rate))
    else:
      tx = rule(rate, **arguments)
    if own.arguments or name not in rules:
      one = jax.ShapeDtypeStruct((2, 2), jnp.float32)
      jax.eval_shape(lambda x: _promoting(tx).update(x, tx.init(x), x), one)
  except Exception as error:  # code of optax: it may raise anything
    raise UserError(
      f'config.optimizer.{group}: {name} cannot be used with the arguments {dict(own.arguments)}: '
      f'{type(error).__name__}: {error}'
    ) from error
  return _promoting(tx)


def _promoting(tx):
  """The transformation where strict dtype promotion refuses what optax does."""

  def update(grads, state, params=None):
    # optax raises a float to an integer's power.
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(grads, state, params)

  return optax.GradientTransformation(tx.init, update)


def _checked_name(name: str, group: str, rules: Mapping[str, Rule]) -> str:
  field = f'config.optimizer.{group}.name'
  if group == 'dense' and name in ROW_RULES and name not in rules:
    raise UserError(
      f'{field}={name!r} is for rows of tables, embedding and memory; use {" or ".join(rules)}, or '
      'another optimizer of optax'
    )
  if group != 'dense' and name in of_optax():
    raise UserError(
      f'{field}={name!r} is for the dense parameters; rows of tables have {" or ".join(rules)}'
    )
  return one_of(field, name, [*rules, *(of_optax() if group == 'dense' else ())])


def _check_numbers(
  own: ml_collections.ConfigDict, group: str, name: str, rules: Mapping[str, Rule]
) -> None:
  if not own.rate > 0 or not own.decay >= 0:  # NaN is neither
    raise UserError(
      f'config.optimizer.{group}: rate={own.rate} must be positive, decay={own.decay} not negative'
    )
  if own.decay and name not in rules:
    raise UserError(
      f'config.optimizer.{group}.decay={own.decay} is of {", ".join(rules)}; {name} has the decay '
      "that its arguments say, such as arguments={'weight_decay': 0.01}"
    )
  begin = own.initial_accumulator
  if not 0 <= begin < float('inf') or begin and name not in ACCUMULATE:
    raise UserError(
      f'config.optimizer.{group}.initial_accumulator={begin} must be 0 or more, and is of '
      f'{" and ".join(ACCUMULATE)} alone; {group} has {name}'
    )


def _check_arguments(arguments: Mapping[str, Any], field: str, name: str, rule: Rule) -> None:
  known = set(inspect.signature(rule).parameters) - {'learning_rate', 'initial_accumulator'}
  for key, value in arguments.items():
    if not known:
      raise UserError(f'{field}={dict(arguments)}: {name} takes none')
    one_of(f'{field} of {name}: field', key, sorted(known))
    if not isinstance(value, bool | int | float | str | None):
      raise UserError(f'{field}.{key}={value!r} must be a number, a text, true or false')


def row_type(config: ml_collections.ConfigDict, group: str) -> type:
  """The type in which the rows of a group's tables are kept; frozen ones are of the memory.

  Args:
    config: section `optimizer`. group: 'embedding', 'memory' or 'frozen'.

  Raises:
    UserError: for a type that is neither float32 nor bfloat16.
  """
  group = 'memory' if group == 'frozen' else group
  types = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
  return types[one_of(f'config.optimizer.{group}.rows', config[group].rows, types)]


def update_rows(tx: optax.GradientTransformation, table: Table, grads: RowGrads) -> Table:
  """Applies an optimizer to the touched rows of a table.

  The leaves of the optimizer's state that have one entry for each row are gathered, updated as
  [N, ...] arrays and scattered back; scalars such as step counts pass through. bfloat16 rows are
  the rounded master, which moves in their place: steps smaller than their precision add up.

  Args:
    tx: a transformation in which no row sees another. table: rows [R, D] and state. grads:
      summed gradients [N, D] of distinct ids [N]; id R writes nothing.

  Returns:
    The table with rows and state moved.
  """
  R = table.rows_RD.shape[0]

  def take(leaf):
    return leaf.at[grads.ids_N].get(mode='fill', fill_value=0) if by_row(leaf, R) else leaf

  def put(leaf, touched):
    return leaf.at[grads.ids_N].set(touched, mode='drop') if by_row(leaf, R) else touched

  rows_ND = take(table.rows_RD if table.master_RD is None else table.master_RD)
  updates_ND, opt = tx.update(grads.grads_ND, jax.tree.map(take, table.opt), rows_ND)
  table = table._replace(opt=jax.tree.map(put, table.opt, opt))
  if table.master_RD is None:
    # Added in place: a rule that does not ask for the rows does not read them.
    return table._replace(rows_RD=table.rows_RD.at[grads.ids_N].add(updates_ND, mode='drop'))
  moved_ND = rows_ND + updates_ND
  rounded_ND = moved_ND.astype(table.rows_RD.dtype)
  return table._replace(
    rows_RD=put(table.rows_RD, rounded_ND), master_RD=put(table.master_RD, moved_ND)
  )


def clip_factor(max_norm: float, norm: jax.Array) -> jax.Array:
  """The factor in (0, 1] that brings gradients of a global norm to at most `max_norm`."""
  # A norm too large for float32 is infinite; by itself, with no bound, that would give NaN.
  return jnp.minimum(1.0, max_norm / jnp.clip(norm, 1e-12, jnp.finfo(jnp.float32).max))
