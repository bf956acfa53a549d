"""Any raw log -> interactions, users and items as three tables of DuckDB, out of core.

`data/readers/` reads every format as columns of text. This module casts, checks and counts them. A
mistake that the user can correct raises a `UserError` with the file, the row and the value.
"""

import logging
from pathlib import Path
from typing import Any

import duckdb
import ml_collections

from lmn_jax.data import columns, features, labels, log_files, raw_log, row_lists, row_order
from lmn_jax.data.readers import sequences
from lmn_jax.data.readers import table as tables
from lmn_jax.data.times import Clock
from lmn_jax.data.vocabulary import features_of
from lmn_jax.distributed import interrupts
from lmn_jax.errors import UserError, one_of

logger = logging.getLogger(__name__)
MAX_LOGGED = 10  # files that a log line lists


def connect(path: Path, memory_limit: str, scratch: Path) -> duckdb.DuckDBPyConnection:
  """Opens a database that stays within `memory_limit`, keeps the order of rows, and is offline.

  Args:
    path: the database's file.
    memory_limit: such as '2GB'; data that exceed it are spilled to `scratch`.
    scratch: folder for spilled data.

  Raises:
    UserError: if the limit is not a size.
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
      f'config.data.memory_limit={memory_limit!r} is not a size; set one such as 2GB ({error})'
    ) from None
  interrupts.stops(db)
  # Times without a zone are UTC on every machine.
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
  example BOOLEAN, split TINYINT, <further labels and the weight, see labels.py> FLOAT, <one for
  each named history, see named_histories.py> BOOLEAN, <context features> VARCHAR, event.<event
  features> VARCHAR): `row` is the position in the log over all files, from 0, or in the order of
  `config.data.order`, and breaks ties of time; `history` marks the events of histories and
  `example` the labelled impressions; `split` is 0 train, 1 valid, 2 test, or NULL if the log has no
  splits. users(user, <features>) and items(item, <features>) have one row for each id with
  features. A feature of the log has the value of the earliest event.

  Args:
    data: `config.data(...)`.
    db: from `connect`.
    scratch: folder for copies; the caller removes it.
    clock: of the store that the rows are read for; a time that does not fit it is refused. None
      infers the unit and the form of the times.

  Returns:
    Notes: files and counts (rows_read, rows_without_user, rows_without_item, rows_unused,
    duplicate_rows, rows, duplicate_users, duplicate_items, behaviours) and 'time': the log's
    `times.Clock` as a dict.

  Raises:
    UserError: if the log cannot be read, is empty, or has a missing column or an invalid value.
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
  named = features_of(data)
  opened = log_files.open_log(labels.with_main_label(data), db, scratch)
  data = opened.data
  names = log_files.columns_to_read(data, opened)
  files = tables.load(db, 'raw', opened.log, names)
  notes = _file_notes(data, files)
  log = raw_log.Log(
    db,
    data,
    tuple((file.name, file.rows) for file in files),
    {name: f'c{k}' for k, name in enumerate(names)},
  )
  if sequences.POSITION in names:
    notes |= row_order.join_lines(log, sequences.POSITION)
  notes |= columns.create_valid_rows(log)
  row_lists.refuse_lists(log)
  row_order.set_rank(log)
  columns.reject_numbers(log, named)
  time, log_clock = columns.time_of(log, opened.positions, clock)
  notes['time'] = log_clock._asdict()
  notes |= columns.create_interactions(log, time)
  if data.row_history:
    notes |= row_lists.add_row_histories(log)
  notes |= features.create_features(log, 'user', data.user_features, opened.users, time)
  notes |= features.create_features(log, 'item', data.item_features, opened.items, time)
  db.execute(
    'DROP VIEW valid_rows; DROP VIEW unordered_rows; DROP TABLE IF EXISTS ranks; DROP TABLE bad; '
    'DROP TABLE raw'
  )
  return notes


def _file_notes(data: ml_collections.ConfigDict, files: list[tables.FileCounts]) -> dict[str, Any]:
  """Returns notes of the files that were read, and logs empty files and the order of files.

  Raises:
    UserError: if no file has a row.
  """
  rows = sum(file.rows for file in files)
  empty = [file.name for file in files if not file.rows]
  lines = tables.count_irregular_lines(files)
  if not rows:
    raise UserError(f'{data.source}: the log is empty; at least one row is expected')
  if empty:
    logger.info('%d of %d files have no row, the first is %s', len(empty), len(files), empty[0])
  if not data.time and len(files) > 1:
    order = ', '.join(Path(file.name).name for file in files[:MAX_LOGGED])
    more = f' and {len(files) - MAX_LOGGED} more' if len(files) > MAX_LOGGED else ''
    logger.info("config.data.time='': events are in the order of the files: %s%s", order, more)
  return {
    'files': [file.name for file in files],
    'rows_read': rows,
    'empty_files': len(empty),
  } | lines
