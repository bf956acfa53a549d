"""Numbers among the features: config.data.numeric, the texts that are numbers, shift and scale.

  standard     (x - shift) / scale
  log          (sign(x) log(1 + |x|) - shift) / scale
  autodis:N    as standard, then N meta-embeddings (Guo et al., KDD 2021)
  bins:N       the code of the quantile bin of x, a feature of codes like a token

Shift and scale are mean and standard deviation over the training rows, those of a missing value
left out. A store has the raw values as float32, NaN where a value is missing; a model does the
rest, so that nothing else can do it differently.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import duckdb
import numpy as np

from lmn_jax.data.times import NUMBER
from lmn_jax.errors import UserError, one_of

# Kinds with a number N -> its least and its largest value; others have none.
KINDS = {'standard': None, 'log': None, 'bins': (2, 2**20), 'autodis': (2, 1024)}
LARGEST = float(np.finfo(np.float32).max)
LEAST_SCALE = float(np.finfo(np.float32).tiny)  # devices flush smaller numbers to 0


class Numeric(NamedTuple):
  """How a number enters a model. kind: a key of KINDS. count: N, 0 for kinds without."""

  kind: str
  count: int = 0


def numeric_of(name: str, text: Any) -> Numeric:
  """Returns the value of config.data.numeric of a feature, such as 'log' or 'bins:8', as a Numeric.

  Raises:
    UserError: an unknown kind, or N is missing, superfluous or out of its bounds.
  """
  field = f'config.data.numeric.{name}'
  if not isinstance(text, str):
    raise UserError(f"{field}={text!r} must be a text such as 'standard' or 'bins:8'")
  kind, colon, count = text.partition(':')
  one_of(field, kind, KINDS)
  bounds = KINDS[kind]
  if bounds is None:
    if colon:
      raise UserError(f'{field}={text!r}: {kind} has no number; write {kind!r}')
    return Numeric(kind)
  least, most = bounds
  if not (count.isascii() and count.isdigit() and least <= int(count) <= most):
    raise UserError(
      f"{field}={text!r} must be '{kind}:N' with a whole N of at least {least} and at most {most}"
    )
  return Numeric(kind, int(count))


def value_sql(raw: str) -> str:
  """Returns SQL of a text as FLOAT; NULL where it is NULL, no number, or beyond float32."""
  number = f'try_cast({raw} AS DOUBLE)'
  return f"""CASE WHEN regexp_full_match({raw}, '{NUMBER}') AND abs({number}) <= {LARGEST!r}
    THEN CAST({number} AS FLOAT) END"""


def invalid_sql(raw: str, kind: str) -> str:
  """Returns SQL of whether a text is not missing, and no number of a kind of KINDS.

  A bin may be of any number of 64 bits, and of an infinite one.
  """
  value = f'try_cast({raw} AS DOUBLE)' if kind == 'bins' else value_sql(raw)
  return f'({raw} IS NOT NULL AND ({value}) IS NULL)'


def expected(name: str, text: str) -> str:
  """Describes what is expected in place of an invalid value, and what a user can do."""
  return (
    f'a number of float32 is expected (config.data.numeric.{name}={text!r}); correct the row, add '
    'the text to config.data.missing, or remove the feature from config.data.numeric'
  )


def fit(
  db: duckdb.DuckDBPyConnection, feature: str, numeric: Numeric, counted: str
) -> dict[str, Any]:
  """Fits the shift and the scale of a number.

  The sums are exact (math.fsum), so they do not depend on the order of rows, and both results are
  rounded to float32, with which models compute.

  Args:
    db: the database. feature: its key, for messages. numeric: how it enters.
    counted: SQL of raw texts `raw` and the number `n` of their training rows.

  Returns:
    kind, shift, scale (1 if all values are equal) and count, for the manifest.

  Raises:
    UserError: no training row has a value.
  """
  db.execute(
    f"""CREATE TEMP TABLE training_values AS
    SELECT value::DOUBLE AS value, sum(n)::DOUBLE AS n
    FROM (SELECT {value_sql('raw')} AS value, n FROM ({counted}))
    WHERE value IS NOT NULL AND n > 0 GROUP BY value"""
  )

  def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in db.sql('SELECT value, n FROM training_values').to_arrow_reader():
      value, n = (column.to_numpy() for column in batch.columns)
      yield (np.sign(value) * np.log1p(np.abs(value)) if numeric.kind == 'log' else value), n

  distinct, rows = db.execute('SELECT count(*), sum(n) FROM training_values').fetchall()[0]
  if not distinct:
    raise UserError(
      f'feature {feature!r}: no training row has a value, so it cannot be fitted; remove it from '
      'config.data.numeric and from the features'
    )
  mean = _sum(value * n for value, n in batches()) / rows
  variance = _sum((value - mean) ** 2 * n for value, n in batches()) / rows
  db.execute('DROP TABLE training_values')
  scale = float(np.float32(math.sqrt(variance))) if distinct > 1 else 1.0
  return dict(
    kind=numeric.kind,
    shift=float(np.float32(mean)),
    scale=scale if scale >= LEAST_SCALE else 1.0,
    count=numeric.count,
  )


def _sum(pieces: Iterator[np.ndarray]) -> float:
  """The exact sum of all elements of arrays, rounded once."""
  return math.fsum(itertools.chain.from_iterable(x.tolist() for x in pieces))
