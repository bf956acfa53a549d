"""The criterion of the best checkpoint: a validation metric, or a function of the metrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation import custom_metrics

# Metrics of errors: the lowest value is the best, and the highest makes no sense.
ERRORS = ('rmse', 'mae')


class Criterion(NamedTuple):
  """The validation with the highest score is the best. score: metrics -> score."""

  name: str
  score: Callable[[dict[str, Any]], float]


def criterion_of(config: ml_collections.ConfigDict, columns: Sequence[str]) -> Criterion:
  """Returns the criterion of config.criterion.

  '' is the first of the columns, of an error its lowest value. The name of a metric is its highest
  value; with '-' before it, its lowest value, such as '-log_loss'. MODULE:FUNCTION is a function of
  the validation metrics.

  Args:
    config: the whole experiment. columns: names of its metrics.

  Raises:
    UserError: there is no such metric or function, or it would choose the highest error.
  """
  name = config.criterion or _first(columns)
  if plugins.is_plugin(name):
    function = plugins.load_function('config.criterion', name)
    return Criterion(name.partition(':')[2], lambda metrics: _checked(name, function(metrics)))
  sign = -1 if name.startswith('-') else 1
  metric = one_of('config.criterion', name.removeprefix('-'), columns)
  if sign > 0 and _is_error(metric):
    raise UserError(
      f'config.criterion={name!r} would choose the checkpoint with the highest error; use '
      f"'-{name}', its lowest value"
    )
  return Criterion(name, lambda metrics: sign * _checked(name, metrics[metric]))


def _first(columns):
  return f'-{columns[0]}' if _is_error(columns[0]) else columns[0]


def _is_error(metric):
  return metric.rpartition('/')[2] in ERRORS


def _checked(name, value):
  if not (custom_metrics.is_number(value) and np.isfinite(float(value))):
    raise UserError(
      f'config.criterion: {name} of the validation is {value!r:.80}, so it cannot choose the best '
      'checkpoint; it must be one finite number'
    )
  return float(value)
