"""Columns of text -> roles: ids, time, label, behaviour, split and features, cast and checked.

A `Log` is the raw rows as they were read; each function here gives one role as SQL over the view
`kept`, the rows that have a user and an item, or refuses the first value that has no meaning.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import duckdb
import ml_collections

from lmn_jax.data import texts, times
from lmn_jax.data.readers import table as tables
from lmn_jax.data.readers.cells import identifier, literal
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError, one_of

logger = logging.getLogger(__name__)
SHOWN = 10  # words named in a line
PARTS = {'train': 0, 'valid': 1, 'validation': 1, 'val': 1, 'test': 2}
MOST_BEHAVIOURS = 100  # a column with more types than this is no behaviour
SURE = 0.95  # share of the positive times that must be of one size for the unit to be known


logger = logging.getLogger(__name__)


def place(files: Sequence[tuple[str, int]], row: int) -> str:
  """Names the file and the row within it, from 1, of a position in all of them.

  Args:
    files: names and numbers of rows, in the order of the rows. row: from 0.
  """
  for name, count in files:
    if row < count:
      return f'{name}: row {row + 1}'
    row -= count
  raise IndexError(f'row {row} is past the end of the log')


class Log(NamedTuple):
  """The raw rows, in the table `raw` as text, and what is known of them."""

  db: duckdb.DuckDBPyConnection
  data: ml_collections.ConfigDict
  files: tuple[tuple[str, int], ...]  # names and numbers of rows, in the order of the rows
  columns: dict[str, str]  # name in the log -> column of `raw`

  def place(self, row: int) -> str:
    """Names the file and the row within it, from 1, of a position in the whole log."""
    return place(self.files, row)

  def refuse(self, field: str, condition: str, remedy: str | Callable[[str], str]) -> None:
    """Refuses the kept rows of which the SQL condition holds, or leaves them out if told so.

    Args:
      field: of config.data, the column. condition: over `kept`. remedy: what the user can do, or
        what says it of the row's value.

    Raises:
      UserError: naming the first of them, with `config.data.bad_lines='refuse'`.
    """
    column = self.data[field]
    found = self.db.execute(
      f'SELECT row, {self.columns[column]} FROM kept WHERE {condition} ORDER BY row LIMIT 1'
    ).fetchone()
    if not found:
      return
    row, value = found
    if callable(remedy):
      remedy = remedy(value)
    message = f'{self.place(row)}: the {field} column {column!r} holds {value!r}; {remedy}'
    if self.data.bad_lines != 'skip':
      raise UserError(message)
    self.db.execute(f'INSERT INTO bad SELECT row FROM kept WHERE {condition}')
    logger.warning('rows are left out for their %s: %s', field, message)


def feature_sql(data: ml_collections.ConfigDict, name: str, column: str) -> str:
  """SQL of the value of a feature; a list is cut later, and then its tokens are read."""
  read = texts.given_sql if name in data.multi else texts.value_sql
  return read(column, data.missing)


def keep(log: Log) -> dict[str, Any]:
  """Makes the view `kept`: row, user, item and the raw columns of rows that have both ids.

  `row` is the position in the log, `rank` the place among rows of one time; here it is the row.
  """
  db, data, missing = log.db, log.data, log.data.missing
  for name, column in log.columns.items():
    found = db.execute(f'SELECT min(rowid) FROM raw WHERE contains({column}, chr(0))').fetchone()[0]
    if found is not None:
      raise UserError(
        f'{log.place(found)}: column {name!r} holds a null byte; the file is damaged or of '
        'another encoding (config.data.encoding)'
      )
  user, item = (texts.value_sql(log.columns[name], missing) for name in (data.user, data.item))
  skipped = 'AND row NOT IN (SELECT row FROM bad)' if data.bad_lines == 'skip' else ''
  db.execute(
    f"""CREATE TEMP TABLE bad (row BIGINT);
    CREATE TEMP VIEW listed AS SELECT * FROM
    (SELECT rowid AS row, {user} AS user, {item} AS item, * FROM raw)
    WHERE user IS NOT NULL AND item IS NOT NULL {skipped};
    CREATE TEMP VIEW kept AS SELECT *, row AS rank FROM listed"""
  )
  no_user, no_item, kept = db.execute(
    f"""SELECT count(*) FILTER (u IS NULL), count(*) FILTER (u IS NOT NULL AND i IS NULL),
    count(*) FILTER (u IS NOT NULL AND i IS NOT NULL) FROM
    (SELECT {user} AS u, {item} AS i FROM raw)"""
  ).fetchone()
  if not kept:
    raise UserError(
      f'{data.source}: no row has both a user and an item ({no_user} without a user, {no_item} '
      'without an item); see config.data.user, config.data.item, config.data.missing'
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
  """The texts that stood for nothing in a column of ids, and how many rows had each."""
  column = log.columns[name]
  found = log.db.execute(
    f"""SELECT {texts.strip_sql(column)} AS text, count(*) FROM raw
    WHERE {texts.value_sql(column, log.data.missing)} IS NULL AND text <> ''
    GROUP BY 1 ORDER BY 2 DESC, 1"""
  ).fetchall()
  if found:
    named = ', '.join(f'{text!r} in {count:,} rows' for text, count in found[:SHOWN])
    logger.info('column %r: no id is meant by %s (config.data.missing)', name, named)
  return dict(found)


def time_of(log: Log, positions: bool, known: Clock | None) -> tuple[str, Clock]:
  """The times of the log as the store has them.

  Args:
    log: the log. positions: its times are positions in a sequence. known: of the store that the
      rows are to go with; None decides the unit and the form here.

  Returns:
    SQL of the time as BIGINT over `kept`, and the log's clock.
  """
  if not log.data.time:
    return 'rank', Clock('position')
  text = texts.strip_sql(log.columns[log.data.time])
  if positions:
    return times.whole_sql(text), Clock('position')
  if known is None:
    return _clock(log, text)
  time = known.sql(text)
  log.refuse('time', f'{time} IS NULL', known.reason)
  return time, known


def _clock(log, text):
  """The unit and the form of all times of the log; what has another is refused."""
  data = log.data
  if data.time_format:
    time = times.format_sql(text, data.time_format)
    remedy = f'config.data.time_format={data.time_format!r} does not read it'
    with tables.reading(f'config.data.time_format={data.time_format!r}'):
      log.refuse('time', f'{time} IS NULL', remedy)
    return time, Clock('format', 'microsecond', 1, data.time_format, *_range(log, time))
  whole, number, stamp = (
    times.number_sql(text, 1), times.number_sql(text, times.FRACTIONS), times.stamp_sql(text)
  )  # fmt: skip
  wholes, numbers, stamps, total = log.db.execute(
    f'SELECT count({whole}), count({number}), count({stamp}), count(*) FROM kept'
  ).fetchone()
  if wholes != total and max(wholes, numbers) < stamps:
    log.refuse(
      'time',
      f'{stamp} IS NULL',
      'a time such as 2024-05-31 23:59:01 is expected; set config.data.time_format for another '
      'form',
    )
    return stamp, Clock('text', 'microsecond', 1, '', *_range(log, stamp))
  time, per_unit = (whole, 1) if wholes >= numbers else (number, times.FRACTIONS)
  log.refuse(
    'time',
    f'{time} IS NULL',
    'a number is expected (fractions are seconds, below 9e12); mend the row, or set '
    "config.data.time_format for times written as text, or config.data.time='' for the "
    'order of the rows',
  )
  return time, Clock('number', _unit(log, time, per_unit), per_unit, '', *_range(log, time))


def _range(log, time):
  return log.db.execute(f'SELECT min({time}), max({time}) FROM kept').fetchone()


def _unit(log, time, per_unit):
  """The unit of the log's numbers by their size; a row in another one is refused."""
  within = {
    unit: f'({time}) BETWEEN {times.FIRST * scale * per_unit} AND {times.LAST * scale * per_unit}'
    for unit, scale in times.UNITS.items()
    if times.LAST * scale * per_unit < times.INT64
  }
  counts = ', '.join(f'count(*) FILTER ({condition})' for condition in within.values())
  positive, *found = log.db.execute(
    f'SELECT count(*) FILTER (({time}) > 0), {counts} FROM kept'
  ).fetchone()
  if not positive or sum(found) < SURE * positive:
    return ''
  unit = list(within)[found.index(max(found))]
  for other, condition in within.items():
    if other != unit:
      log.refuse(
        'time',
        condition,
        f'by its size a number of {other}s since 1970, where most rows have {unit}s; give all '
        'rows of the log in one unit',
      )
  return unit


def label_of(log: Log) -> str:
  """Returns SQL of the label, 0 or 1, over `kept`."""
  data = log.data
  if not data.label:
    if not data.positive_behaviours:
      return '1'
    behaviour = texts.value_sql(log.columns[data.behaviour], data.missing)
    return f'CAST({_among(behaviour, data.positive_behaviours)} AS INTEGER)'
  text = f'lower({texts.strip_sql(log.columns[data.label])})'
  value = f"CASE {text} WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE try_cast({text} AS DOUBLE) END"
  if data.label_threshold is None:
    remedy = (
      '0 or 1 is expected; set config.data.label_threshold (a label at or above it is a click), or '
      "config.data.label='' if every row is one"
    )
    log.refuse('label', f'coalesce(({value}) NOT IN (0, 1), true)', remedy)
    return value
  remedy = (
    f'a number is expected, to compare with config.data.label_threshold={data.label_threshold}'
  )
  log.refuse('label', f'coalesce(isnan({value}), true)', remedy)
  return f'CAST(({value}) >= {float(data.label_threshold)!r} AS INTEGER)'


def _among(expression: str, names: Sequence[str]) -> str:
  names = [texts.value(name, frozenset()) for name in names]
  return f'coalesce({expression} IN ({", ".join(map(literal, names))}), false)'


def _behaviours(log: Log) -> tuple[dict[str, Any], str, str]:
  """Counts the behaviours; returns notes and SQL of which rows may be history and examples."""
  data = log.data
  fields = ('positive_behaviours', 'history_behaviours', 'example_behaviours')
  if not data.behaviour:
    for field in fields:
      if data[field]:
        raise UserError(
          f'config.data.{field}={data[field]!r} needs config.data.behaviour, the column of types'
        )
    return {'behaviours': {}}, 'true', 'true'
  behaviour = texts.value_sql(log.columns[data.behaviour], data.missing)
  found = log.db.execute(
    f"""SELECT coalesce({behaviour}, ''), count(*) FROM kept GROUP BY 1 ORDER BY 1
    LIMIT {MOST_BEHAVIOURS + 1}"""
  ).fetchall()
  if len(found) > MOST_BEHAVIOURS:
    raise UserError(
      f'config.data.behaviour={data.behaviour!r} has more than {MOST_BEHAVIOURS} types; name a '
      "column of types such as 'click' or 'buy'"
    )
  types = dict(found)
  for field in fields:
    for name in data[field]:
      one_of(f'config.data.{field}', texts.value(name, frozenset()), types)
  history, example = (_among(behaviour, data[f]) if data[f] else 'true' for f in fields[1:])
  return {'behaviours': types}, history, example


def _split(log: Log) -> str:
  """Returns SQL of the split, NULL if the log does not say."""
  data = log.data
  if not data.split_column:
    return 'NULL'
  text = f'lower({texts.strip_sql(log.columns[data.split_column])})'
  log.refuse(
    'split_column', f'NOT {_among(text, list(PARTS))}', f'one of {", ".join(PARTS)} is expected'
  )
  return f'CASE {text} {" ".join(f"WHEN {literal(k)} THEN {v}" for k, v in PARTS.items())} END'


def interactions(log: Log, time: str) -> dict[str, Any]:
  """Makes the table `interactions`; returns its counts."""
  db, data = log.db, log.data
  notes, may_history, may_example = _behaviours(log)
  clicked, split = label_of(log), _split(log)
  notes['rows_skipped'] = db.execute('SELECT count(*) FROM bad').fetchone()[0]
  history = f'({clicked}) = 1 AND {may_history}' if data.history == 'positive' else may_history
  context = ''.join(
    f', {feature_sql(data, f, log.columns[f])} AS {identifier(f)}' for f in data.context_features
  )
  alike = ', '.join(log.columns.values())
  dropped = f'WHERE row IN (SELECT min(row) FROM kept GROUP BY {alike})'
  total, distinct = db.execute(
    f'SELECT sum(n), count(*) FROM (SELECT count(*) AS n FROM kept GROUP BY {alike})'
  ).fetchone()
  notes['duplicate_rows'] = int(total) - distinct
  db.execute(
    f"""CREATE TABLE interactions AS SELECT * FROM (SELECT CAST(rank AS BIGINT) AS row, user, item,
      CAST({time} AS BIGINT) AS time, CAST({clicked} AS FLOAT) AS label, {history} AS history,
      {may_example} AS example, CAST({split} AS TINYINT) AS split{context}
    FROM kept {dropped if data.duplicates == 'drop' and notes['duplicate_rows'] else ''})
    WHERE history OR example"""
  )
  rows, events, examples = db.execute(
    """SELECT count(*), count(*) FILTER (history), count(*) FILTER (example) FROM interactions"""
  ).fetchone()
  if not events:
    raise UserError(
      f'{data.source}: no row becomes a history event with config.data.history={data.history!r}, '
      f'config.data.history_behaviours={tuple(data.history_behaviours)!r} and '
      f'config.data.label_threshold={data.label_threshold}; '
      "config.data.history='all' takes every row"
    )
  if not examples:
    raise UserError(
      f'{data.source}: no row is an example with '
      f'config.data.example_behaviours={tuple(data.example_behaviours)!r}'
    )
  left = distinct if data.duplicates == 'drop' else int(total)
  return notes | {'rows': rows, 'rows_unused': left - rows}


def features(
  log: Log, kind: str, names: Sequence[str], side: list[tables.Table], time: str
) -> dict[str, Any]:
  """Makes the table `users` or `items`: features of the side files, and of the log's own columns.

  Args:
    log: the log.
    kind: 'user' or 'item'.
    names: the features.
    side: the side files; a feature that they have is read there.
    time: SQL of the time, so that the log's own columns give the value seen first.
  """
  db, data = log.db, log.data
  aside = [f for f in names if any(f in table.columns for table in side)]
  own = [f for f in names if f not in aside]
  parts, doubles, said = [], 0, {}
  if aside:
    wanted = {data[kind]: f'config.data.{kind}'} | {
      f: f'config.data.{kind}_features' for f in aside
    }
    found = tables.say(tables.load(db, f'side_{kind}', side, wanted))
    said = {f'{name}_of_{kind}s': count for name, count in found.items()}
    values = ''.join(
      f', arg_min({feature_sql(data, f, f"c{k}")}, rowid) AS {identifier(f)}'
      for k, f in enumerate(aside, 1)
    )
    own_id = texts.value_sql('c0', data.missing)
    db.execute(
      f"""CREATE TABLE aside_{kind} AS SELECT {own_id} AS {kind}{values}
      FROM side_{kind} GROUP BY 1 HAVING {kind} IS NOT NULL"""
    )
    doubles = db.execute(
      f"""SELECT count({own_id}) - (SELECT count(*) FROM aside_{kind})
      FROM side_{kind}"""
    ).fetchone()[0]
    parts.append(f'aside_{kind}')
  if own:
    values = ''.join(
      f', arg_min({feature_sql(data, f, log.columns[f])}, ({time}, rank)) AS {identifier(f)}'
      for f in own
    )
    parts.append(f'(SELECT {kind}{values} FROM kept GROUP BY {kind})')
  selected = ''.join(f', {identifier(f)}' for f in names)
  joined = ' FULL JOIN '.join(parts) + (f' USING ({kind})' if len(parts) == 2 else '')
  joined = joined or '(SELECT user, item FROM interactions LIMIT 0)'
  db.execute(f'CREATE TABLE {kind}s AS SELECT {kind}{selected} FROM {joined}')
  if aside:
    db.execute(f'DROP TABLE side_{kind}')
    db.execute(f'DROP TABLE aside_{kind}')
  return {f'duplicate_{kind}s': doubles} | said
