"""Metrics of users beside the built-in ones, by the names that config.metrics gives."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lmn_jax import plugins
from lmn_jax.errors import UserError

# Arrays of a split -> a number, or None where the data leave it undefined.
Metric = Callable[..., float | None]


def load(names: Iterable[str], built_in: Iterable[str]) -> dict[str, Metric]:
  """The functions of config.metrics, by the names under which they are reported.

  Args:
    names: MODULE:FUNCTION each. built_in: names of metrics that are taken.

  Raises:
    UserError: a name that cannot be imported, is no function, or is taken.
  """
  found: dict[str, Metric] = {}
  for name in names:
    metric = plugins.load_function('config.metrics', name)
    key = name.partition(':')[2]
    if key in found or key in built_in:
      raise UserError(f'config.metrics={name!r}: a metric {key!r} exists; rename the function')
    found[key] = metric
  return found


def measure(metrics: dict[str, Metric], *arrays: np.ndarray) -> dict[str, float | None]:
  """What each metric gives for the arrays of some rows, None where there is none.

  Raises:
    UserError: a metric gives no number.
  """
  rows = len(arrays[0])
  return {name: _number(name, f(*arrays)) if rows else None for name, f in metrics.items()}


def _number(name: str, value: Any) -> float | None:
  if value is None:
    return None
  if isinstance(value, str) or np.ndim(value) or not np.isrealobj(value):
    raise UserError(
      f'config.metrics: {name}() gave {value!r:.80}; it must give one number, or None where it '
      'is undefined'
    )
  number = float(value)
  return number if math.isfinite(number) else None
