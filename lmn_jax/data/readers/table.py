"""A file of a log as a `Table`: the names of its columns and the SQL that reads them.

A reader opens a file without reading more than its header. DuckDB reads the rest, out of core, when
the SQL of `Table.select` runs. Every value arrives as VARCHAR; data/columns.py casts and checks it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from lmn_jax.data.readers import cells
from lmn_jax.data.readers.cells import identifier
from lmn_jax.errors import UserError, one_of

logger = logging.getLogger(__name__)


class Settings(NamedTuple):
  """The names of the config fields that set how a file is read, for messages."""

  format: str
  delimiter: str
  header: str
  fields: str
  encoding: str


DELIMITERS = '\t;|,'  # in the name of an only column: a header that was not split
SETTINGS = Settings(*(f'config.data.{field}' for field in Settings._fields))


class Skipped(NamedTuple):
  """Unreadable lines of a file that were skipped."""

  count: int = 0
  first: str = ''  # the file, line and problem of the first of them


class Table(NamedTuple):
  """One file: its columns and the SQL relation that has them."""

  name: str  # for messages
  columns: dict[str, str]  # column name -> SQL of its text, VARCHAR
  relation: Callable[[list[str]], str]  # names of columns -> SQL of a FROM clause that has them
  values: dict[str, str] = {}  # column name -> SQL of its value, with the type that the file has
  copy: Path | None = None  # a copy to be removed after reading
  empty: bool = False  # the file has no line, and so no columns
  lists: dict[str, str] = {}  # column that may hold lists -> SQL, VARCHAR[]; NULL where it does not
  # Text with quotes: (database, number of rows read) -> number of line breaks within cells.
  breaks: Callable[[duckdb.DuckDBPyConnection, int], int] = lambda db, rows: 0
  settings: Settings = SETTINGS
  # Called once, after the rows are read.
  skipped: Callable[[duckdb.DuckDBPyConnection], Skipped] = lambda db: Skipped()

  def select(self, names: Sequence[str]) -> str:
    """Returns SQL of the named columns as c0, c1, ..., in the order of the file."""
    columns = ', '.join(f'{self.columns[name]} AS c{k}' for k, name in enumerate(names))
    return f'SELECT {columns} FROM {self.relation(list(names))}'

  def require(self, name: str, field: str) -> None:
    """Refuses a column that the file does not have.

    Args:
      name: of the column. field: the config field that requires it.

    Raises:
      UserError: with the columns of the file, or that another delimiter separates them.
    """
    only = next(iter(self.columns)) if len(self.columns) == 1 else ''
    if name != only and any(x in only for x in DELIMITERS):
      raise UserError(
        f'{self.name}: the header is one column, {only!r:.80}, and has no column {field}={name!r}; '
        f'set {self.settings.delimiter} or {self.settings.format} (tsv is separated by tabs)'
      )
    one_of(f'{self.name}: column {field}', name, self.columns)


def empty_table(path: Path, local: Path | None = None) -> Table:
  """Returns the Table of a file without a line, which some tools write for a part without rows."""
  return Table(str(path), {}, lambda _: '', {}, None if local == path else local, empty=True)


def typed(
  name: str,
  relation: str,
  db: duckdb.DuckDBPyConnection,
  multi: Mapping[str, str] | None = None,
  settings: Settings = SETTINGS,
) -> Table:
  """Returns the Table of a relation whose columns have types.

  Args:
    name: for messages.
    relation: SQL of the FROM clause, such as the name of a table in `db`.
    db: the database.
    multi: config.data.multi, the separators of columns of lists.
    settings: names of config fields, for messages.
  """
  with reading(name, settings):
    described = db.sql(f'DESCRIBE SELECT * FROM {relation}').fetchall()
  columns = {
    column: cells.typed_text(column, identifier(column), kind, multi or {})
    for column, kind, *_ in described
  }
  values = {column: identifier(column) for column in columns}
  lists = {
    column: f'coalesce({cells.text_list(identifier(column), kind)}, [])'
    for column, kind, *_ in described
    if kind.endswith(']') and not cells.is_nested(kind)
  }
  return Table(name, columns, lambda _: relation, values, lists=lists, settings=settings)


def holds_lists(table: Table, column: str, db: duckdb.DuckDBPyConnection) -> bool:
  """Whether a column holds a list in any row."""
  with reading(table.name, table.settings):
    row = db.execute(
      f'SELECT 1 FROM {table.relation([column])} WHERE {table.lists[column]} IS NOT NULL LIMIT 1'
    ).fetchone()
  return row is not None


class FileCounts(NamedTuple):
  """Counts of a file that was read: its rows, line breaks within cells, skipped lines."""

  name: str
  rows: int
  breaks: int = 0
  skipped: Skipped = Skipped()


def count_irregular_lines(files: Sequence[FileCounts]) -> dict[str, int]:
  """Counts and logs the lines that are not one row each, as the rows read do not show them."""
  skipped, breaks = sum(file.skipped.count for file in files), sum(file.breaks for file in files)
  if skipped:
    first = next(file.skipped.first for file in files if file.skipped.count)
    logger.warning('skipped %d unreadable lines, the first: %s', skipped, first)
  if breaks:
    name = next(file.name for file in files if file.breaks)
    logger.warning(
      "%d line breaks are within quoted cells, the first in %s; set config.data.quote='' to read "
      'each line as a row', breaks, name,
    )  # fmt: skip
  return {'line_breaks_in_cells': breaks, 'lines_skipped': skipped}


def load(
  db: duckdb.DuckDBPyConnection, into: str, opened: Iterable[Table], columns: Mapping[str, str]
) -> list[FileCounts]:
  """Creates the table `into` with columns c0, c1, ... (VARCHAR) from all files, rows in order.

  Args:
    db: the database.
    into: name of the new table; its rowid is the position over all files.
    opened: the files, read one after the other.
    columns: the columns to read as c0, c1, ..., each with the config field that requires it.

  Returns:
    The counts of each file.

  Raises:
    UserError: if a column is missing, or a file cannot be parsed.
  """
  db.execute(f'CREATE TABLE {into} ({", ".join(f"c{k} VARCHAR" for k in range(len(columns)))})')
  counts = []
  for table in opened:
    if table.empty:
      counts.append(FileCounts(table.name, 0, skipped=table.skipped(db)))
    else:
      for name, field in columns.items():
        table.require(name, field)
      with reading(table.name, table.settings):
        (rows,) = db.execute(f'INSERT INTO {into} {table.select(list(columns))}').fetchone()
        counts.append(FileCounts(table.name, rows, table.breaks(db, rows), table.skipped(db)))
    if table.copy is not None:
      table.copy.unlink()
  return counts


@contextlib.contextmanager
def reading(name: str, settings: Settings = SETTINGS) -> Iterator[None]:
  """Converts DuckDB's errors about a file it cannot read into a UserError of one line."""
  try:
    yield
  except (duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException) as error:
    # DuckDB appends its own options, which are not fields of the config.
    text = str(error).partition('Possible fixes')[0].partition('Possible Solution')[0]
    line = ' '.join(text.partition(':')[2].split())[:300]
    line = line.removeprefix(f'{name}: ')
    raise UserError(
      f'{name}: {line} (correct the file, or check {settings.format}, {settings.delimiter}, '
      f'config.data.quote, {settings.header} and {settings.encoding})'
    ) from error
