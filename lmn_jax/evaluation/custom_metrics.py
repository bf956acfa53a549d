"""Custom metrics: functions of the user that config.metrics names, beside the built-in metrics."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lmn_jax import plugins
from lmn_jax.errors import UserError

# Arrays of a split -> a number, or None if it is undefined.
Metric = Callable[..., float | None]


def load(names: Iterable[str], built_in: Iterable[str]) -> dict[str, Metric]:
  """Loads the functions of config.metrics, by the names under which they are reported.

  Args:
    names: MODULE:FUNCTION each. built_in: names of the built-in metrics.

  Raises:
    UserError: a name cannot be imported, is not a function, or exists already.
  """
  metrics: dict[str, Metric] = {}
  for name in names:
    function = plugins.load_function('config.metrics', name)
    key = name.partition(':')[2]
    if key in metrics or key in built_in:
      raise UserError(f'config.metrics={name!r}: a metric {key!r} exists; rename the function')
    metrics[key] = function
  return metrics


def measure(metrics: dict[str, Metric], *arrays: np.ndarray) -> dict[str, float | None]:
  """Returns the value of each metric for the arrays of some rows; None without rows.

  Raises:
    UserError: a metric does not return a number.
  """
  rows = len(arrays[0])
  return {name: _number(name, f(*arrays)) if rows else None for name, f in metrics.items()}


def is_number(value: Any) -> bool:
  """Whether a value is one real number, of Python, NumPy or JAX; also NaN and infinite ones."""
  if isinstance(value, numbers.Real):
    return True
  return np.ndim(value) == 0 and hasattr(value, 'dtype') and np.dtype(value.dtype).kind in 'biuf'


def _number(name: str, value: Any) -> float | None:
  if value is None:
    return None
  if not is_number(value):
    raise UserError(
      f'config.metrics: {name}() returned {value!r:.80}; it must return one number, or None if it '
      'is undefined'
    )
  number = float(value)
  return number if math.isfinite(number) else None
