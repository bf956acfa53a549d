"""Any raw log -> interactions, users and items as three tables of DuckDB, out of core.

`data/readers/` gives every format as columns of text; here the columns are mapped to
their roles, cast with their checks, and counted. Whatever the user can mend ends in a `UserError`
that names the file, the row and the value.
"""

import logging
from pathlib import Path
from typing import Any

import duckdb
import ml_collections

from lmn_jax.data import columns, log_files, row_lists, row_order
from lmn_jax.data.readers import sequences
from lmn_jax.data.readers import table as tables
from lmn_jax.data.times import Clock
from lmn_jax.distributed import interrupts
from lmn_jax.errors import UserError, one_of

log = logging.getLogger(__name__)
SHOWN = 10  # files named in the line that says their order


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
  interrupts.stops(db)
  db.execute("SET TimeZone = 'UTC'")
  hide_progress(db)
  return db


def hide_progress(db: duckdb.DuckDBPyConnection) -> None:
  """Turns off the progress bar of a connection.

  In Jupyter without ipywidgets DuckDB has none, and refuses every statement about it.
  """
  ((shown,),) = db.execute("SELECT current_setting('enable_progress_bar')").fetchall()
  if shown:
    db.execute('SET enable_progress_bar = false')


def stage(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
  clock: Clock | None = None,
) -> dict[str, Any]:
  """Reads a raw log into the tables `interactions`, `users` and `items` of `db`.

  interactions(row BIGINT, user VARCHAR, item VARCHAR, time BIGINT, label FLOAT, history BOOLEAN,
  example BOOLEAN, split TINYINT, <context features> VARCHAR): `row` is the position in the log
  over all files, from 0, or in the order of `config.data.order`, and breaks ties of time;
  `history` marks the events of histories and `example` the labelled impressions; `split` is 0
  train, 1 valid, 2 test, or NULL if the log does not say. users(user, <features>) and
  items(item, <features>) have a row for each id that has features, and only that. A feature taken
  from the log has the value of the earliest event.

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
  opened = log_files.open_log(data, db, scratch)
  data = opened.data
  wanted = log_files.wanted(data, opened)
  files = tables.load(db, 'raw', opened.log, wanted)
  notes = _read(data, files)
  rows = columns.Log(
    db,
    data,
    tuple((file.name, file.rows) for file in files),
    {name: f'c{k}' for k, name in enumerate(wanted)},
  )
  if sequences.POSITION in wanted:
    notes |= row_order.join_lines(rows, sequences.POSITION)
  notes |= columns.keep(rows)
  row_lists.refuse_lists(rows)
  row_order.order(rows)
  time, found = columns.time_of(rows, opened.positions, clock)
  notes['time'] = found._asdict()
  notes |= columns.interactions(rows, time)
  if data.row_history:
    notes |= row_lists.own_histories(rows, time)
  notes |= columns.features(rows, 'user', data.user_features, opened.users, time)
  notes |= columns.features(rows, 'item', data.item_features, opened.items, time)
  db.execute(
    'DROP VIEW kept; DROP VIEW listed; DROP TABLE IF EXISTS ranks; DROP TABLE bad; DROP TABLE raw'
  )
  return notes


def _read(data: ml_collections.ConfigDict, files: list[tables.Read]) -> dict[str, Any]:
  """Notes of what was read; what may surprise is logged.

  Raises:
    UserError: if no file has a row.
  """
  rows = sum(file.rows for file in files)
  empty = [file.name for file in files if not file.rows]
  said = tables.say(files)
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
  return {
    'files': [file.name for file in files],
    'rows_read': rows,
    'empty_files': len(empty),
  } | said
