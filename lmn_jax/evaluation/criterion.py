"""The criterion of the best checkpoint: a validation metric, or a function of the metrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation import custom_metrics


class Criterion(NamedTuple):
  """The validation with the highest score is the best. score: metrics -> score."""

  name: str
  score: Callable[[dict[str, Any]], float]


def criterion_of(config: ml_collections.ConfigDict, columns: Sequence[str]) -> Criterion:
  """Returns the criterion of config.criterion.

  '' is the first of the columns. The name of a metric is its highest value; with '-' before it, its
  lowest value, such as '-log_loss'. MODULE:FUNCTION is a function of the validation metrics.

  Args:
    config: the whole experiment. columns: names of its metrics.

  Raises:
    UserError: there is no such metric or function.
  """
  name = config.criterion
  if plugins.is_plugin(name):
    function = plugins.load_function('config.criterion', name)
    return Criterion(name.partition(':')[2], lambda metrics: _checked(name, function(metrics)))
  if not name:
    name = columns[0]
    return Criterion(name, lambda metrics: _checked(name, metrics[name]))
  sign = -1 if name.startswith('-') else 1
  metric = one_of('config.criterion', name.removeprefix('-'), columns)
  return Criterion(name, lambda metrics: sign * _checked(name, metrics[metric]))


def _checked(name, value):
  if not (custom_metrics.is_number(value) and np.isfinite(float(value))):
    raise UserError(
      f'config.criterion: {name} of the validation is {value!r:.80}, so it cannot choose the best '
      'checkpoint; it must be one finite number'
    )
  return float(value)
