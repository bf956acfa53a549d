"""Optimizers: those of optax for the dense parameters, and optimizers for the rows of tables."""

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
  """The learning rate by step: linear warm-up from 0, then constant, cosine or linear to 0.

  Args:
    config: section `optimizer`; `schedule` and `warmup_steps` are read.
    rate: the peak rate. steps: length of the whole training.

  Raises:
    UserError: for an unknown schedule or a warm-up longer than the training.
  """
  kind = one_of('config.optimizer.schedule', config.schedule, SCHEDULES)
  warmup = config.warmup_steps
  if not 0 <= warmup <= steps:
    raise UserError(f'config.optimizer.warmup_steps={warmup} must be in [0, config.steps={steps}]')
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
  """touches_R: number of steps that read each row. moments_RM: [m, v], M = 2 D.

  Both moments of a row are adjacent, so that one memory access reads both.
  """

  touches_R: Int[Array, 'R']
  moments_RM: Float[Array, 'R M']


def scale_by_lazy_adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam on rows, with a step count for each row.

      n <- n + 1                  m <- b1 m + (1 - b1) g       v <- b2 v + (1 - b2) g^2
      row moves against           m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps)

  n counts the steps that read the row, because its moments decay in these steps only. A row moves
  exactly as under dense Adam (Kingma & Ba 2015, algorithm 1) applied to the gradients of this row
  alone, and its first update has the size of the rate at any step. Deviation: in
  torch.optim.SparseAdam and FBGEMM's Adam n is the step of the training, so that a first update at
  a late step moves a row by (1 - b1) / sqrt(1 - b2) = 3.2 times the rate.
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
  """sum_R: the sum of the mean squared gradients of each row."""

  sum_R: Float[Array, 'R']


def scale_by_rowwise_adagrad(
  initial_accumulator: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adagrad with one accumulator for each row instead of D.

      s <- s + mean_d g_d^2       row moves against  g / (sqrt(s) + eps)

  s starts at `initial_accumulator`, see `scale_by_adagrad`.
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
  """Adagrad on arrays of any shape, for dense parameters and rows.

      s <- s + g^2                a weight moves against  g / (sqrt(s) + eps)

  s starts at `initial_accumulator`. If it starts at 0, the first update of a weight has the size of
  the rate for a gradient of any size; if it starts at a, gradients well below sqrt(a) move the
  weight in proportion to their size.
  Source: Duchi et al. 2011; eps outside the root and its default as in torch.optim.Adagrad (FBGEMM:
  outside too, 1e-8). optax has 1e-7 inside the root; for gradients below 3e-4 that is SGD with
  3,162 times the configured rate, and gradients of memory values, means over a batch, are about
  4e-8. The state has the structure of optax's, so a checkpoint of one can be restored by the other.
  """

  def init(params):
    return optax.ScaleByRssState(optax.tree.full_like(params, initial_accumulator))

  def update(grads, state, params=None):
    sums = jax.tree.map(lambda g, s: s + jnp.square(g), grads, state.sum_of_squares)
    scaled = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), grads, sums)
    return scaled, optax.ScaleByRssState(sums)

  return optax.GradientTransformation(init, update)


def scale_by_momentum(
  momentum: float | None = None, nesterov: bool = False
) -> optax.GradientTransformation:
  """SGD: unchanged gradients, or with `momentum` their trace, as in `optax.sgd`."""
  return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


Rule = Callable[..., optax.GradientTransformation]
# By name, transformations before the scaling with the rate; the config gives their arguments.
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
def optax_optimizers() -> dict[str, Rule]:
  """Returns the other optimizers of optax by name: its functions with a `learning_rate`."""
  rules = {
    name: rule
    for name, rule in vars(optax).items()
    if (inspect.isfunction(rule) or isinstance(rule, functools.partial))
    and 'learning_rate' in inspect.signature(rule).parameters
  }
  return {
    name: rule
    for name, rule in rules.items()
    if name not in ROW_RULES and not name.startswith(('_', 'scale_by_'))
  }


def make(config: ml_collections.ConfigDict, group: str, steps: int) -> optax.GradientTransformation:
  """Returns the optimizer of a group: 'dense', 'embedding', 'memory' or 'frozen'.

  The dense parameters may have any optimizer of optax. On rows, `adagrad`, `rowwise_adagrad` and
  `sgd` equal the dense optimizers, because these do not move a row without a gradient. `adam` on
  rows is `scale_by_lazy_adam`, which is not dense Adam. Each group has its own rate and its own
  decoupled weight decay. On rows, both apply only to the rows read in the step, so a row decays in
  the steps that read it.

  Args:
    config: section `optimizer`. group: which part of the state. steps: of the whole training.

  Raises:
    UserError: for an unknown optimizer, an optimizer of rows for the dense parameters or the
      reverse, or arguments that it does not accept.
  """
  if group == 'frozen':
    return optax.set_to_zero()
  settings = config[group]
  rules = DENSE_RULES if group == 'dense' else ROW_RULES
  name = _checked_name(settings.name, group, rules)
  _check_numbers(settings, group, name, rules)
  rate, arguments = schedule(config, settings.rate, steps), dict(settings.arguments)
  rule = rules[name] if name in rules else optax_optimizers()[name]
  _check_arguments(arguments, f'config.optimizer.{group}.arguments', name, rule)
  if name in ACCUMULATE:
    arguments['initial_accumulator'] = settings.initial_accumulator
  decay = [optax.add_decayed_weights(settings.decay)] if settings.decay else []
  try:
    if name in rules:
      tx = optax.chain(rule(**arguments), *decay, optax.scale_by_learning_rate(rate))
    else:
      tx = rule(rate, **arguments)
    if settings.arguments or name not in rules:
      x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
      jax.eval_shape(lambda x: _promoting(tx).update(x, tx.init(x), x), x)
  except Exception as error:  # optax may raise any exception
    raise UserError(
      f'config.optimizer.{group}: {name} cannot be used with the arguments '
      f'{dict(settings.arguments)}: {type(error).__name__}: {error}'
    ) from error
  return _promoting(tx)


def _promoting(tx):
  """Runs a transformation under JAX's standard dtype promotion, which optax needs."""

  def update(grads, state, params=None):
    # optax raises a float to an integer power, which strict promotion rejects.
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(grads, state, params)

  return optax.GradientTransformation(tx.init, update)


def _checked_name(name: str, group: str, rules: Mapping[str, Rule]) -> str:
  field = f'config.optimizer.{group}.name'
  if group == 'dense' and name in ROW_RULES and name not in rules:
    raise UserError(
      f'{field}={name!r} is for the rows of tables (groups embedding and memory); use '
      f'{" or ".join(rules)}, or another optimizer of optax'
    )
  if group != 'dense' and name in optax_optimizers():
    raise UserError(
      f'{field}={name!r} is for the dense parameters; for the rows of tables use '
      f'{" or ".join(rules)}'
    )
  return one_of(field, name, [*rules, *(optax_optimizers() if group == 'dense' else ())])


def _check_numbers(
  settings: ml_collections.ConfigDict, group: str, name: str, rules: Mapping[str, Rule]
) -> None:
  section, rate, decay = f'config.optimizer.{group}', settings.rate, settings.decay
  if not rate > 0 or not decay >= 0:  # false for NaN
    raise UserError(f'{section}: rate={rate} must be positive and decay={decay} at least 0')
  if decay and name not in rules:
    raise UserError(
      f'{section}.decay={decay} applies to {", ".join(rules)} only; for {name}, set it in '
      "arguments, such as arguments={'weight_decay': 0.01}"
    )
  begin = settings.initial_accumulator
  if not 0 <= begin < float('inf'):
    raise UserError(f'{section}.initial_accumulator={begin} must be 0 or more, and finite')
  if begin and name not in ACCUMULATE:
    raise UserError(
      f'{section}.initial_accumulator={begin} applies to {" and ".join(ACCUMULATE)} only, and '
      f'{section}.name={name!r}; set it to 0'
    )


def _check_arguments(arguments: Mapping[str, Any], field: str, name: str, rule: Rule) -> None:
  parameters = set(inspect.signature(rule).parameters) - {'learning_rate', 'initial_accumulator'}
  for key, value in arguments.items():
    if not parameters:
      raise UserError(f'{field}={dict(arguments)}: {name} takes no arguments; use {{}}')
    one_of(f'{field} of {name}: field', key, sorted(parameters))
    if not isinstance(value, bool | int | float | str | None):
      raise UserError(f'{field}.{key}={value!r} must be a number, a string, True or False')


def row_type(config: ml_collections.ConfigDict, group: str) -> type:
  """The dtype of the rows of a group's tables; frozen tables have the dtype of the memory.

  Args:
    config: section `optimizer`. group: 'embedding', 'memory' or 'frozen'.

  Raises:
    UserError: for a dtype that is neither float32 nor bfloat16.
  """
  group = 'memory' if group == 'frozen' else group
  types = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
  return types[one_of(f'config.optimizer.{group}.rows', config[group].rows, types)]


def update_rows(tx: optax.GradientTransformation, table: Table, grads: RowGrads) -> Table:
  """Applies an optimizer to the rows of a table that were read.

  The leaves of the optimizer's state that have one entry for each row are gathered, updated as
  [N, ...] arrays and scattered back; scalars such as step counts pass through. For bfloat16 rows,
  the float32 master is updated and rounded, so that steps smaller than their precision add up.

  Args:
    tx: a transformation that treats rows independently. table: rows [R, D] and state. grads:
      summed gradients [N, D] of distinct ids [N]; id R writes nothing.

  Returns:
    The table with updated rows and state.
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
    # Added in place: an optimizer that does not use the rows does not read them.
    return table._replace(rows_RD=table.rows_RD.at[grads.ids_N].add(updates_ND, mode='drop'))
  master_ND = rows_ND + updates_ND
  rounded_ND = master_ND.astype(table.rows_RD.dtype)
  return table._replace(
    rows_RD=put(table.rows_RD, rounded_ND), master_RD=put(table.master_RD, master_ND)
  )


def clip_factor(max_norm: float, norm: jax.Array) -> jax.Array:
  """The factor in (0, 1] that scales gradients of a global norm to a norm of at most `max_norm`."""
  # A norm too large for float32 is infinite; without this bound, inf / inf would be NaN.
  return jnp.minimum(1.0, max_norm / jnp.clip(norm, 1e-12, jnp.finfo(jnp.float32).max))
