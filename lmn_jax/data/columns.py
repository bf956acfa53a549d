"""Columns of a raw log as ids, time, behaviour, split and features, cast and checked.

A `Log` has the raw rows as text. Each function here returns SQL of one column over the view
`valid_rows`, the rows with a user and an item, or refuses the first invalid value.
"""

import logging
from collections.abc import Sequence
from typing import Any

import ml_collections

from lmn_jax.data import labels, named_histories, texts, times
from lmn_jax.data.numeric import expected, invalid_sql
from lmn_jax.data.raw_log import Log
from lmn_jax.data.readers import table as tables
from lmn_jax.data.readers.cells import identifier, literal
from lmn_jax.data.times import Clock
from lmn_jax.data.vocabulary import Feature, event_column
from lmn_jax.errors import UserError, one_of

logger = logging.getLogger(__name__)
MAX_LOGGED = 10  # values that a log line lists
PARTS = {'train': 0, 'valid': 1, 'validation': 1, 'val': 1, 'test': 2}
MAX_BEHAVIOURS = 100  # a column with more types than this is not a behaviour
UNIT_SHARE = 0.95  # share of the positive times that must have one unit for the unit to be inferred


def feature_sql(data: ml_collections.ConfigDict, name: str, column: str) -> str:
  """Returns SQL of the value of a feature; a list stays one text, to be split later."""
  sql = texts.list_sql if name in data.multi else texts.value_sql
  return sql(column, data.missing)


def create_valid_rows(log: Log) -> dict[str, Any]:
  """Creates the view `valid_rows` of the rows with a user and an item; returns counts of others.

  The view has row, user, item, rank and the raw columns. `row` is the position in the log; `rank`
  is the order of rows with equal times, here the same as `row`.

  Raises:
    UserError: if a column has a null byte, or no row has a user and an item.
  """
  db, data, missing = log.db, log.data, log.data.missing
  for name, column in log.columns.items():
    (row,) = db.execute(f'SELECT min(rowid) FROM raw WHERE contains({column}, chr(0))').fetchone()
    if row is not None:
      raise UserError(
        f'{log.place(row)}: column {name!r} holds a null byte; the file is corrupt or has another '
        'encoding; set config.data.encoding'
      )
  user, item = (texts.value_sql(log.columns[name], missing) for name in (data.user, data.item))
  not_bad = 'AND row NOT IN (SELECT row FROM bad)' if data.bad_lines == 'skip' else ''
  db.execute(
    f"""CREATE TEMP TABLE bad (row BIGINT);
    CREATE TEMP VIEW unordered_rows AS SELECT * FROM
    (SELECT rowid AS row, {user} AS user, {item} AS item, * FROM raw)
    WHERE user IS NOT NULL AND item IS NOT NULL {not_bad};
    CREATE TEMP VIEW valid_rows AS SELECT *, row AS rank FROM unordered_rows"""
  )
  no_user, no_item, count = db.execute(
    f"""SELECT count(*) FILTER (u IS NULL), count(*) FILTER (u IS NOT NULL AND i IS NULL),
    count(*) FILTER (u IS NOT NULL AND i IS NOT NULL) FROM
    (SELECT {user} AS u, {item} AS i FROM raw)"""
  ).fetchone()
  if not count:
    raise UserError(
      f'{data.source}: no row has both a user and an item ({no_user} rows without a user, '
      f'{no_item} without an item); check config.data.user, config.data.item, config.data.missing'
    )
  return {
    'rows_without_user': no_user,
    'rows_without_item': no_item,
    'missing_words': {
      'user': _missing_words(log, data.user) if no_user else {},
      'item': _missing_words(log, data.item) if no_item else {},
    },
  }


def _missing_words(log, name):
  """Counts the texts in a column of ids that are read as missing, and logs them."""
  column = log.columns[name]
  counts = log.db.execute(
    f"""SELECT {texts.strip_sql(column)} AS text, count(*) FROM raw
    WHERE {texts.value_sql(column, log.data.missing)} IS NULL AND text <> ''
    GROUP BY 1 ORDER BY 2 DESC, 1"""
  ).fetchall()
  if counts:
    words = ', '.join(f'{text!r} in {count:,} rows' for text, count in counts[:MAX_LOGGED])
    logger.info('column %r: read as a missing id: %s (config.data.missing)', name, words)
  return dict(counts)


def reject_numbers(log: Log, features: Sequence[Feature]) -> None:
  """Rejects rows with a text in place of a number, in any column of the log with numbers.

  Args:
    log: the log. features: those of side files are not checked here.
  """
  numeric = {f.name: f.numeric for f in features if f.numeric and f.name in log.columns}
  for name, entry in numeric.items():
    raw = texts.value_sql(log.columns[name], log.data.missing)
    remedy = expected(name, log.data.numeric[name])
    log.reject('numeric', invalid_sql(raw, entry.kind), remedy, name)


def time_of(log: Log, positions: bool, clock: Clock | None) -> tuple[str, Clock]:
  """Returns SQL of the time over `valid_rows`, BIGINT as in the store, and the clock of the log.

  Args:
    log: the log.
    positions: whether the times are positions in a sequence.
    clock: of the store that the rows are read for; None infers the unit and the form here.
  """
  if not log.data.time:
    return 'rank', Clock('position')
  text = texts.strip_sql(log.columns[log.data.time])
  if positions:
    return times.whole_sql(text), Clock('position')
  if clock is None:
    return _infer_clock(log, text)
  time = clock.sql(text)
  log.reject('time', f'{time} IS NULL', clock.reason)
  return time, clock


def _infer_clock(log, text):
  """Infers the form and the unit of the log's times, and rejects rows with another one."""
  data = log.data
  if data.time_format:
    time = times.format_sql(text, data.time_format)
    remedy = (
      f'it does not match config.data.time_format={data.time_format!r}; correct the row or the '
      'format'
    )
    with tables.reading(f'config.data.time_format={data.time_format!r}'):
      log.reject('time', f'{time} IS NULL', remedy)
    return time, Clock('format', 'microsecond', 1, data.time_format, *_range(log, time))
  whole, number, stamp = (
    times.number_sql(text, 1), times.number_sql(text, times.FRACTIONS), times.stamp_sql(text)
  )  # fmt: skip
  wholes, numbers, stamps, total = log.db.execute(
    f'SELECT count({whole}), count({number}), count({stamp}), count(*) FROM valid_rows'
  ).fetchone()
  if wholes != total and max(wholes, numbers) < stamps:
    log.reject(
      'time',
      f'{stamp} IS NULL',
      'a time such as 2024-05-31 23:59:01 is expected; set config.data.time_format for another '
      'form',
    )
    return stamp, Clock('text', 'microsecond', 1, '', *_range(log, stamp))
  time, per_unit = (whole, 1) if wholes >= numbers else (number, times.FRACTIONS)
  log.reject(
    'time',
    f'{time} IS NULL',
    'a number is expected (one with a fraction below 9e12); correct the row, or set '
    "config.data.time_format for times written as text, or config.data.time='' to use the "
    'order of the rows',
  )
  return time, Clock('number', _infer_unit(log, time, per_unit), per_unit, '', *_range(log, time))


def _range(log, time):
  return log.db.execute(f'SELECT min({time}), max({time}) FROM valid_rows').fetchone()


def _infer_unit(log, time, per_unit):
  """Infers the unit of the log's numbers from their size, and rejects rows in another unit."""
  within = {
    unit: f'({time}) BETWEEN {times.FIRST * scale * per_unit} AND {times.LAST * scale * per_unit}'
    for unit, scale in times.UNITS.items()
    if times.LAST * scale * per_unit < times.INT64
  }
  selected = ', '.join(f'count(*) FILTER ({condition})' for condition in within.values())
  positive, *counts = log.db.execute(
    f'SELECT count(*) FILTER (({time}) > 0), {selected} FROM valid_rows'
  ).fetchone()
  if not positive or sum(counts) < UNIT_SHARE * positive:
    return ''
  unit = list(within)[counts.index(max(counts))]
  for other, condition in within.items():
    if other != unit:
      log.reject(
        'time',
        condition,
        f'by its size this is a number of {other}s since 1970, but most rows have {unit}s; write '
        'all rows of the log in one unit',
      )
  return unit


def _behaviours(log: Log) -> tuple[dict[str, Any], str, str, dict[str, str]]:
  """Counts the behaviours.

  Returns:
    Notes; SQL of which rows may be history and examples; the columns of named histories with SQL of
    which rows have their behaviours.
  """
  data, named = log.data, named_histories.behaviours_of(log.data)
  fields = ('positive_behaviours', 'history_behaviours', 'example_behaviours')
  if not data.behaviour:
    for field in fields:
      if data[field]:
        raise UserError(
          f'config.data.{field}={data[field]!r} needs config.data.behaviour, the column of types'
        )
    return {'behaviours': {}}, 'true', 'true', {}
  behaviour = texts.value_sql(log.columns[data.behaviour], data.missing)
  counts = log.db.execute(
    f"""SELECT coalesce({behaviour}, ''), count(*) FROM valid_rows GROUP BY 1 ORDER BY 1
    LIMIT {MAX_BEHAVIOURS + 1}"""
  ).fetchall()
  if len(counts) > MAX_BEHAVIOURS:
    raise UserError(
      f'config.data.behaviour={data.behaviour!r} has more than {MAX_BEHAVIOURS} types; name a '
      "column of types such as 'click' or 'buy'"
    )
  behaviours = dict(counts)
  for field in fields:
    for name in data[field]:
      one_of(f'config.data.{field}', texts.value(name, frozenset()), behaviours)
  for history, names in named.items():
    for name in names:
      one_of(f'config.data.histories.{history}', name, behaviours)
  history, example = (
    labels.is_among_sql(behaviour, data[f]) if data[f] else 'true' for f in fields[1:]
  )
  columns = {
    named_histories.staged_column(name): labels.is_among_sql(behaviour, names)
    for name, names in named.items()
  }
  return {'behaviours': behaviours}, history, example, columns


def _split(log: Log) -> str:
  """Returns SQL of the split, NULL if the log has no column of splits."""
  data = log.data
  if not data.split_column:
    return 'NULL'
  text = f'lower({texts.strip_sql(log.columns[data.split_column])})'
  log.reject(
    'split_column',
    f'NOT {labels.is_among_sql(text, list(PARTS))}',
    f'one of {", ".join(PARTS)} is expected',
  )
  return f'CASE {text} {" ".join(f"WHEN {literal(k)} THEN {v}" for k, v in PARTS.items())} END'


def create_interactions(log: Log, time: str) -> dict[str, Any]:
  """Creates the table `interactions`; returns its counts.

  Args:
    log: the log. time: SQL of the time over `valid_rows`.

  Raises:
    UserError: if no row is a history event, or no row is an example.
  """
  db, data = log.db, log.data
  notes, may_be_history, may_be_example, of_histories = _behaviours(log)
  clicked, split = labels.label_of(log), _split(log)
  more = labels.columns_of(log) | of_histories
  notes['rows_skipped'] = db.execute('SELECT count(*) FROM bad').fetchone()[0]
  history = (
    f'({clicked}) = 1 AND {may_be_history}' if data.history == 'positive' else may_be_history
  )
  columns = {f: f for f in data.context_features} | {
    event_column(f): f for f in data.event_features
  }
  features = ''.join(
    f', {feature_sql(data, f, log.columns[f])} AS {identifier(column)}'
    for column, f in columns.items()
  )
  more = ''.join(f', {value} AS {identifier(name)}' for name, value in more.items())
  all_columns = ', '.join(log.columns.values())
  total, distinct = db.execute(
    f'SELECT sum(n), count(*) FROM (SELECT count(*) AS n FROM valid_rows GROUP BY {all_columns})'
  ).fetchone()
  notes['duplicate_rows'] = int(total) - distinct
  first_of_duplicates = ''
  if data.duplicates == 'drop' and notes['duplicate_rows']:
    first_of_duplicates = f'WHERE row IN (SELECT min(row) FROM valid_rows GROUP BY {all_columns})'
  db.execute(
    f"""CREATE TABLE interactions AS SELECT * FROM (SELECT CAST(rank AS BIGINT) AS row, user, item,
      CAST({time} AS BIGINT) AS time, CAST({clicked} AS FLOAT) AS label, {history} AS history,
      {may_be_example} AS example, CAST({split} AS TINYINT) AS split{more}{features}
    FROM valid_rows {first_of_duplicates})
    WHERE history OR example"""
  )
  rows, events, examples = db.execute(
    """SELECT count(*), count(*) FILTER (history), count(*) FILTER (example) FROM interactions"""
  ).fetchone()
  if not events:
    raise UserError(
      f'{data.source}: no row becomes a history event with config.data.history={data.history!r}, '
      f'config.data.history_behaviours={tuple(data.history_behaviours)!r} and '
      f"config.data.label_threshold={data.label_threshold}; set config.data.history='all' to use "
      'every row'
    )
  if not examples:
    raise UserError(
      f'{data.source}: no row is an example with '
      f'config.data.example_behaviours={tuple(data.example_behaviours)!r}; choose other behaviours'
    )
  considered = distinct if data.duplicates == 'drop' else int(total)
  return notes | {'rows': rows, 'rows_unused': considered - rows}
