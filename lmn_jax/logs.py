"""Any raw log -> interactions, users and items as three tables of DuckDB, out of core.

`readers.py` gives every format as columns of text; here the columns are mapped to their roles,
cast with their checks, and counted. Whatever the user can mend ends in a `UserError` that names
the file, the row and the value.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import ml_collections

from lmn_jax import longctr, readers, roles, sequences, synthetic, tfds_logs
from lmn_jax.errors import UserError, one_of
from lmn_jax.times import Clock

log = logging.getLogger(__name__)
SHOWN = 10  # files named in the line that says their order
OWN_COLUMNS = ('row', 'user', 'item', 'time', 'label', 'history', 'example', 'split')


def connect(path: Path, memory_limit: str, scratch: Path) -> duckdb.DuckDBPyConnection:
  """Opens a database that stays within `memory_limit`, keeps the order of rows, and is offline.

  Args:
    path: the database's file.
    memory_limit: such as '2GB'; what does not fit goes to `scratch`.
    scratch: folder for what does not fit.

  Raises:
    UserError: if the limit is no size.
  """
  scratch.mkdir(parents=True, exist_ok=True)
  try:
    db = duckdb.connect(
      str(path),
      config={
        'memory_limit': memory_limit,
        'temp_directory': str(scratch),
        'preserve_insertion_order': True,
        'autoinstall_known_extensions': False,
        'autoload_known_extensions': False,
      },
    )
  except (duckdb.ParserException, duckdb.InvalidInputException) as error:
    raise UserError(
      f'config.data.memory_limit={memory_limit!r} is no size; give one such as 2GB ({error})'
    ) from None
  # Times without a zone are UTC, wherever this runs; and no bar between the lines of the log.
  db.execute("SET TimeZone = 'UTC'")
  db.execute('SET enable_progress_bar = false')
  return db


def stage(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
  clock: Clock | None = None,
) -> dict[str, Any]:
  """Reads a raw log into the tables `interactions`, `users` and `items` of `db`.

  interactions(row BIGINT, user VARCHAR, item VARCHAR, time BIGINT, label FLOAT, history BOOLEAN,
  example BOOLEAN, split TINYINT, <context features> VARCHAR): `row` is the position in the log
  over all files, from 0, and breaks ties of time; `history` marks the events of histories and
  `example` the labelled impressions; `split` is 0 train, 1 valid, 2 test, or NULL if the log does
  not say. users(user, <features>) and items(item, <features>) have a row for each id that has
  features, and only that. A feature taken from the log has the value of the earliest event.

  Args:
    data: `config.data(...)`.
    db: from `connect`.
    scratch: folder for copies; the caller removes it.
    clock: of the store that the rows are to go with; a time that does not fit is refused. None
      decides the unit and the form of the times here.

  Returns:
    Notes: files and counts (rows_read, rows_without_user, rows_without_item, rows_unused,
    duplicate_rows, rows, duplicate_users, duplicate_items, behaviours) and 'time': the log's
    `times.Clock` as a dict.

  Raises:
    UserError: if the log cannot be read, misses a column, is empty, or has a value out of bounds.
  """
  try:
    return _stage(data, db, scratch, clock)
  except duckdb.OutOfMemoryException as error:
    reason = ' '.join(str(error).split())[:160]
    raise UserError(
      f'config.data.memory_limit={data.memory_limit!r} is too little; raise it ({reason})'
    ) from error


def _stage(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
  clock: Clock | None,
) -> dict[str, Any]:
  one_of('config.data.history', data.history, ('positive', 'all'))
  one_of('config.data.duplicates', data.duplicates, ('keep', 'drop'))
  if data.split.protocol == 'column' and not data.split_column and data.format != 'longctr':
    raise UserError(
      "config.data.split.protocol='column' needs config.data.split_column, the column's name"
    )
  opened = _open(data, db, scratch)
  data = opened.data
  wanted = _wanted(data, opened)
  files = readers.load(db, 'raw', opened.log, wanted)
  notes = _read(data, files)
  rows = roles.Log(
    db,
    data,
    tuple((file.name, file.rows) for file in files),
    {name: f'c{k}' for k, name in enumerate(wanted)},
  )
  notes |= roles.keep(rows)
  time, found = roles.time_of(rows, opened.positions, clock)
  notes['time'] = found._asdict()
  notes |= roles.interactions(rows, time)
  notes |= roles.features(rows, 'user', data.user_features, opened.users, time)
  notes |= roles.features(rows, 'item', data.item_features, opened.items, time)
  db.execute('DROP VIEW kept')
  db.execute('DROP TABLE raw')
  return notes


def _read(data: ml_collections.ConfigDict, files: list[readers.Read]) -> dict[str, Any]:
  """Notes of what was read; what may surprise is logged.

  Raises:
    UserError: if no file has a row.
  """
  rows = sum(file.rows for file in files)
  empty = [file.name for file in files if not file.rows]
  breaks = sum(file.breaks for file in files)
  if not rows:
    raise UserError(f'{data.source}: the log is empty; at least one row is expected')
  if empty:
    log.info('%d of %d files have no row, the first is %s', len(empty), len(files), empty[0])
  if not data.time and len(files) > 1:
    order = ', '.join(Path(file.name).name for file in files[:SHOWN])
    more = f' and {len(files) - SHOWN} more' if len(files) > SHOWN else ''
    log.info(
      "config.data.time='': the order of the files is that of their events: %s%s", order, more
    )
  if breaks:
    log.warning(
      '%s: %d line breaks lie within quoted cells; config.data.quote=%r reads every line as a row',
      data.source, breaks, '',
    )  # fmt: skip
  return {
    'files': [file.name for file in files],
    'rows_read': rows,
    'empty_files': len(empty),
    'line_breaks_in_cells': breaks,
  }


class _Opened(NamedTuple):
  """The log and its side files, opened but not read."""

  data: ml_collections.ConfigDict  # with the column names of formats that bring their own
  log: Iterable[readers.Table]
  users: list[readers.Table]
  items: list[readers.Table]
  positions: bool  # the times are positions in a sequence


def _open(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, scratch: Path) -> _Opened:
  log_format = readers.format_of(data.source, data.format, 'config.data.source')
  source = readers.Source(
    pattern=data.source,
    field='config.data.source',
    format=log_format,
    delimiter=data.delimiter,
    quote=data.quote,
    header=data.header,
    fields=tuple(data.fields),
    encoding=data.encoding,
    multi=dict(data.multi),
  )
  if log_format == 'movielens' and not source.fields:
    source = source._replace(fields=('user', 'item', 'rating', 'time'))
  users, items = (_side(data, source, kind, db, scratch) for kind in ('users', 'items'))
  if log_format == 'longctr':
    log, user_info, item_info = longctr.tables(source, db)
    return _Opened(longctr.mapped(data), log, users or [user_info], items or [item_info], True)
  if log_format == 'synthetic':
    generate = synthetic.LOGS[one_of('config.data.source', data.source, synthetic.LOGS)]
    made = generate(**{'seed': data.seed, **data.synthetic})
    tables = []
    for name, table in made.items():
      db.register(f'synthetic_{name}', table)
      tables.append(readers.typed(source, f'synthetic {name}', f'synthetic_{name}', db))
    by_name = dict(zip(made, tables, strict=True))
    return _Opened(data, [by_name['log']], [by_name['users']], [by_name['items']], False)
  if log_format == 'tfds':
    return _Opened(
      data, [tfds_logs.table(source, data.tfds_data_dir, scratch)], users, items, False
    )
  if log_format == 'sequences':
    data = ml_collections.ConfigDict(data)
    data.time = data.time or 'time'
    if not data.times_source:
      data.time_format = ''
    columns = (data.user, data.item, data.time)
    log = sequences.tables(source, columns, data.items_separator, data.times_source, scratch)
    return _Opened(data, log, users, items, not data.times_source)
  return _Opened(data, readers.tables(source, db, scratch), users, items, False)


def _side(
  data: ml_collections.ConfigDict,
  source: readers.Source,
  kind: str,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
) -> list[readers.Table]:
  """Opens the files of `users_source` or `items_source`; none if there are none."""
  pattern, fields = data[f'{kind}_source'], tuple(data[f'{kind}_fields'])
  own = {name: data[f'{kind}_{name}'] for name in ('format', 'delimiter', 'encoding')}
  if not pattern:
    for name, value in (own | {'fields': fields}).items():
      if value:
        raise UserError(
          f'config.data.{kind}_{name}={value!r} needs config.data.{kind}_source, the file it is of'
        )
    return []
  field = f'config.data.{kind}_source'
  settings = readers.Settings(
    format=f'config.data.{kind}_format',
    delimiter=f'config.data.{kind}_delimiter',
    header=f'config.data.{kind}_fields',
    fields=f'config.data.{kind}_fields',
    encoding=f'config.data.{kind}_encoding (config.data.side_encoding is for both side files)',
  )
  named = own['format'] or data.side_format
  if not named and readers.ENDINGS.get(readers.ending(pattern)) not in ('parquet', 'jsonl'):
    named = source.format if source.format in readers.DELIMITERS else ''
  as_log = not (own['format'] or data.side_format)
  side = source._replace(
    pattern=pattern,
    field=field,
    format=readers.format_of(pattern, named, field, settings),
    delimiter=own['delimiter'] or (source.delimiter if as_log else ''),
    header=not fields,
    fields=fields,
    encoding=own['encoding'] or data.side_encoding,
    settings=settings,
  )
  tables = list(readers.tables(side, db, scratch))
  if all(table.empty for table in tables):
    raise UserError(f'{field}={pattern!r}: no file has a row; at least one is expected')
  return tables


def _wanted(data: ml_collections.ConfigDict, opened: _Opened) -> dict[str, str]:
  """The columns to read from the log, each with the field that asks for it."""
  wanted = {data.user: 'config.data.user', data.item: 'config.data.item'}
  for field in ('time', 'label', 'behaviour'):
    if data[field]:
      wanted.setdefault(data[field], f"config.data.{field} ('' if the log has none)")
  if data.split_column:
    wanted.setdefault(data.split_column, 'config.data.split_column')
  for kind, tables in (('user', opened.users), ('item', opened.items), ('context', [])):
    own = [*OWN_COLUMNS] if kind == 'context' else [kind]
    for feature in data[f'{kind}_features']:
      if feature.lower() in own:
        raise UserError(
          f'config.data.{kind}_features: {feature!r} is named twice or like one of the own columns '
          f'{", ".join(own)} (case does not count); rename the column'
        )
      own.append(feature.lower())
      if not any(feature in table.columns for table in tables):
        wanted.setdefault(feature, f'config.data.{kind}_features')
  return wanted
