"""Labels and sample weights of a raw log as SQL, cast and checked."""

from collections.abc import Sequence

from lmn_jax.data import texts
from lmn_jax.data.raw_log import Log
from lmn_jax.data.readers.cells import literal

WEIGHT = '@weight'  # the column of weights in the table `interactions`
LARGEST = 3.4028234663852886e38  # of float32, the type of labels and weights in a store


def label_of(log: Log) -> str:
  """Returns SQL of the label, 0 or 1, over `valid_rows`."""
  data = log.data
  if not data.label:
    if not data.positive_behaviours:
      return '1'
    behaviour = texts.value_sql(log.columns[data.behaviour], data.missing)
    return f'CAST({is_among_sql(behaviour, data.positive_behaviours)} AS INTEGER)'
  text = f'lower({texts.strip_sql(log.columns[data.label])})'
  value = f"CASE {text} WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE try_cast({text} AS DOUBLE) END"
  if data.label_threshold is None:
    remedy = (
      '0 or 1 is expected; set config.data.label_threshold (a label at or above it is a click), or '
      "config.data.label='' if every row is a click"
    )
    log.reject('label', f'coalesce(({value}) NOT IN (0, 1), true)', remedy)
    return value
  remedy = (
    'a number is expected, to compare with '
    f'config.data.label_threshold={data.label_threshold}; correct the row'
  )
  log.reject('label', f'coalesce(isnan({value}), true)', remedy)
  return f'CAST(({value}) >= {float(data.label_threshold)!r} AS INTEGER)'


def columns_of(log: Log) -> dict[str, str]:
  """Returns the further columns of the table `interactions` with their SQL over `valid_rows`.

  `@weight` is the sample weight FLOAT, if config.data.weight names a column.

  Raises:
    UserError: a weight is missing, is no number, or is negative or infinite.
  """
  data = log.data
  if not data.weight:
    return {}
  value = f'try_cast({texts.strip_sql(log.columns[data.weight])} AS DOUBLE)'
  log.reject(
    'weight',
    f'NOT coalesce({value} BETWEEN 0 AND {LARGEST!r}, false)',
    'a sample weight must be a number of at least 0; correct the row, or set '
    "config.data.weight='' if all rows count the same",
  )
  return {WEIGHT: f'CAST({value} AS FLOAT)'}


def is_among_sql(expression: str, names: Sequence[str]) -> str:
  """Returns SQL of whether a text is one of some names; false for NULL."""
  names = [texts.value(name, frozenset()) for name in names]
  return f'coalesce({expression} IN ({", ".join(map(literal, names))}), false)'
