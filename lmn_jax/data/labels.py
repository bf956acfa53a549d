"""Labels and sample weights of a raw log as SQL, cast and checked.

A log has one label, or several in config.data.labels. The first is the main one: it decides which
rows are history events, which examples get negatives, and it is never missing. The others may be
missing, NaN in the store. config.data.label_kind says whether labels are clicks, 0 or 1, or numbers
to be predicted, such as a dwell time.
"""

from collections.abc import Sequence

import ml_collections

from lmn_jax.data import texts
from lmn_jax.data.raw_log import Log
from lmn_jax.data.readers.cells import literal
from lmn_jax.errors import UserError, one_of

WEIGHT = '@weight'  # the column of weights in the table `interactions`
LARGEST = 3.4028234663852886e38  # of float32, the type of labels and weights in a store
MAIN = 'label'  # the name of a label that is the only one
KINDS = ('click', 'number')


def names(data: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the names of the labels, the main one first; ('label',) if there is only one."""
  return tuple(data.labels) if len(data.labels) > 1 else (MAIN,)


def column_of(name: str) -> str:
  """Returns the column of a label beside the main one in the table `interactions`."""
  return f'@label.{name}'


def with_main_label(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns config.data with the first of config.data.labels as `label`.

  Raises:
    UserError: fields contradict each other, or two labels have one name.
  """
  given = tuple(data.labels)
  if one_of('config.data.label_kind', data.label_kind, KINDS) == 'number':
    _check_numbers(data)
  if not given:
    return data
  others = {
    f'config.data.label={data.label!r}': data.label not in ('', MAIN),
    f'config.data.positive_behaviours={tuple(data.positive_behaviours)!r}':
      data.positive_behaviours,
    f'config.data.candidates={data.candidates!r} with labels':
      data.candidates and data.candidates_label_separator,
  }  # fmt: skip
  for field, contradicts in others.items():
    if contradicts:
      raise UserError(f'config.data.labels={given!r} and {field} both give the label; remove one')
  lowered = [name.lower() for name in given]
  for name in given:
    if not name or '/' in name or lowered.count(name.lower()) > 1:
      raise UserError(
        f'config.data.labels={given!r}: the name {name!r} is empty, has a slash or is there twice '
        '(case is ignored); rename the column'
      )
  data = ml_collections.ConfigDict(data)
  data.label = given[0]
  return data


def _check_numbers(data: ml_collections.ConfigDict) -> None:
  """Refuses fields that need clicks, if labels are numbers."""
  kind = "config.data.label_kind='number'"
  # Field, whether it needs clicks, and the remedy.
  rules = (
    ('label', not data.label and not data.labels, 'name the column of the numbers'),
    ('history', data.history != 'all' and not data.row_history,
     "no row is a positive; set config.data.history='all'"),
    ('label_threshold', data.label_threshold is not None,
     "remove it, or set config.data.label_kind='click'"),
    ('negatives', data.negatives, 'a drawn item has no number; set it to 0'),
  )  # fmt: skip
  for field, needs_clicks, remedy in rules:
    if needs_clicks:
      raise UserError(f'config.data.{field}={data[field]!r} with {kind}: {remedy}')
  if data.split.protocol == 'leave_one_out':
    raise UserError(
      f"config.data.split.protocol='leave_one_out' with {kind}: it holds out positives; use "
      'user_ratio'
    )


def label_of(log: Log) -> str:
  """Returns SQL of the main label over `valid_rows`: 0 or 1, or any number."""
  data = log.data
  if not data.label:
    if not data.positive_behaviours:
      return '1'
    behaviour = texts.value_sql(log.columns[data.behaviour], data.missing)
    return f'CAST({is_among_sql(behaviour, data.positive_behaviours)} AS INTEGER)'
  return _checked(log, 'labels' if data.labels else 'label', data.label, 'true')


def columns_of(log: Log) -> dict[str, str]:
  """Returns the further columns of the table `interactions` with their SQL over `valid_rows`.

  `@label.<name>` is each label beside the main one, FLOAT, NULL where it is missing. `@weight` is
  the sample weight, FLOAT, if config.data.weight names a column.

  Raises:
    UserError: a label is no number or not 0 or 1; a weight is missing, no number, or negative.
  """
  data, columns = log.data, {}
  for name in data.labels[1:]:
    present = f'{texts.value_sql(log.columns[name], data.missing)} IS NOT NULL'
    value = _checked(log, 'labels', name, present)
    columns[column_of(name)] = f'CASE WHEN {present} THEN CAST({value} AS FLOAT) END'
  if data.weight:
    value = f'try_cast({texts.strip_sql(log.columns[data.weight])} AS DOUBLE)'
    log.reject(
      'weight',
      f'NOT coalesce({value} BETWEEN 0 AND {LARGEST!r}, false)',
      'a sample weight must be a number of at least 0; correct the row, or set '
      "config.data.weight='' if all rows count the same",
    )
    columns[WEIGHT] = f'CAST({value} AS FLOAT)'
  return columns


def _checked(log: Log, field: str, column: str, present: str) -> str:
  """Returns SQL of a label and rejects its invalid values.

  Args:
    log: the log. field: of config.data, 'label' or 'labels'. column: of the log.
    present: SQL of whether the label must be valid; 'true' of the main label.
  """
  data = log.data
  text = f'lower({texts.strip_sql(log.columns[column])})'
  if data.label_kind == 'number':
    value = f'try_cast({text} AS DOUBLE)'
    valid = f'coalesce({value} BETWEEN {-LARGEST!r} AND {LARGEST!r}, false)'
    remedy = "a number is expected (config.data.label_kind='number'); correct the row"
    log.reject(field, f'{present} AND NOT {valid}', remedy, column)
    return value
  value = f"CASE {text} WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE try_cast({text} AS DOUBLE) END"
  if data.label_threshold is None:
    remedy = (
      '0 or 1 is expected; set config.data.label_threshold (a label at or above it is a click)'
    )
    if field == 'label':
      remedy += ", or config.data.label='' if every row is a click"
    log.reject(field, f'{present} AND coalesce(({value}) NOT IN (0, 1), true)', remedy, column)
    return value
  remedy = (
    'a number is expected, to compare with '
    f'config.data.label_threshold={data.label_threshold}; correct the row'
  )
  log.reject(field, f'{present} AND coalesce(isnan({value}), true)', remedy, column)
  return f'CAST(({value}) >= {float(data.label_threshold)!r} AS INTEGER)'


def is_among_sql(expression: str, names: Sequence[str]) -> str:
  """Returns SQL of whether a text is one of some names; false for NULL."""
  names = [texts.value(name, frozenset()) for name in names]
  return f'coalesce({expression} IN ({", ".join(map(literal, names))}), false)'
