"""What chooses the best checkpoint: a metric of the validation, or a function of its metrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of


class Criterion(NamedTuple):
  """The validation with the highest score is the best. name: for messages. of: metrics -> score."""

  name: str
  of: Callable[[dict[str, Any]], float]


def criterion_of(config: ml_collections.ConfigDict, columns: Sequence[str]) -> Criterion:
  """The criterion that config.criterion names.

  '' is the first of the columns; the name of a metric takes the highest, with '-' before it the
  lowest, such as '-log_loss'; MODULE:FUNCTION calls a function with the metrics of the validation.

  Args:
    config: the whole experiment. columns: names of its metrics.

  Raises:
    UserError: no such metric, no such function.
  """
  name = config.criterion
  if plugins.is_plugin(name):
    function = plugins.load_function('config.criterion', name)
    return Criterion(name.partition(':')[2], lambda found: _score(name, function(found)))
  if not name:
    return Criterion(columns[0], lambda found: _score(columns[0], found[columns[0]]))
  sign = -1 if name.startswith('-') else 1
  metric = one_of('config.criterion', name.removeprefix('-'), columns)
  return Criterion(name, lambda found: sign * _score(name, found[metric]))


def _score(name, value):
  if isinstance(value, str) or value is None or np.ndim(value) or not np.isfinite(value):
    raise UserError(
      f'config.criterion: {name} of the validation is {value!r:.80}, so it cannot choose the best '
      'checkpoint; it must be one finite number'
    )
  return float(value)
