"""A file of a log as a `Table`: names of columns and the SQL that reads them.

A reader opens a file no further than its header; DuckDB reads the rest, out of core, when the
SQL of `Table.select` runs. Every value arrives as VARCHAR: casts with their checks are
`data/interactions.py`'s.
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

log = logging.getLogger(__name__)


class Settings(NamedTuple):
  """What the fields that say how a file is read are called, for messages."""

  format: str
  delimiter: str
  header: str
  fields: str
  encoding: str


SETTINGS = Settings(*(f'config.data.{field}' for field in Settings._fields))


class Skipped(NamedTuple):
  """Lines of a file that could not be read and were left out."""

  count: int = 0
  first: str = ''  # where the first of them is, and what is wrong with it


class Table(NamedTuple):
  """One file: its columns and the relation that holds them."""

  name: str  # for messages
  columns: dict[str, str]  # column's name -> SQL expression that gives it as VARCHAR
  relation: Callable[[list[str]], str]  # the columns wanted -> SQL of the FROM clause
  values: dict[str, str] = {}  # column's name -> SQL expression of what the file has there
  scratch: Path | None = None  # a copy made for reading, to be removed when read
  empty: bool = False  # no line at all, so no columns either: there is nothing to select
  lists: dict[str, str] = {}  # column that may hold lists -> SQL of VARCHAR[]; NULL: it holds none
  # Text with quotes: database, rows read -> line breaks within cells.
  breaks: Callable[[duckdb.DuckDBPyConnection, int], int] = lambda db, rows: 0
  settings: Settings = SETTINGS
  # Asked once, after the rows are read.
  skipped: Callable[[duckdb.DuckDBPyConnection], Skipped] = lambda db: Skipped()

  def select(self, names: Sequence[str]) -> str:
    """Returns SQL that gives the named columns as c0, c1, ... in the order of the file."""
    wanted = ', '.join(f'{self.columns[name]} AS c{k}' for k, name in enumerate(names))
    return f'SELECT {wanted} FROM {self.relation(list(names))}'


def nothing(path: Path, local: Path | None = None) -> Table:
  """The Table of a file without a line, such as tools leave for a part without rows."""
  return Table(str(path), {}, lambda _: '', {}, None if local == path else local, empty=True)


def typed(
  name: str,
  relation: str,
  db: duckdb.DuckDBPyConnection,
  multi: Mapping[str, str] | None = None,
  settings: Settings = SETTINGS,
) -> Table:
  """Returns the Table of a relation whose columns have types of their own.

  Args:
    name: for messages. relation: SQL of the FROM clause, such as the name of a table. db: has it.
    multi: config.data.multi, separators of columns of lists. settings: for messages.
  """
  with reading(name, settings):
    described = db.sql(f'DESCRIBE SELECT * FROM {relation}').fetchall()
  columns = {
    column: cells.as_text(column, identifier(column), kind, multi or {})
    for column, kind, *_ in described
  }
  values = {column: identifier(column) for column in columns}
  lists = {
    column: f'coalesce({cells.texts(identifier(column), kind)}, [])'
    for column, kind, *_ in described
    if kind.endswith(']') and not cells.is_nested(kind)
  }
  return Table(name, columns, lambda _: relation, values, lists=lists, settings=settings)


def holds_lists(table: Table, column: str, db: duckdb.DuckDBPyConnection) -> bool:
  """Whether a column holds a list in any row."""
  with reading(table.name, table.settings):
    found = db.execute(
      f'SELECT 1 FROM {table.relation([column])} WHERE {table.lists[column]} IS NOT NULL LIMIT 1'
    ).fetchone()
  return found is not None


class Read(NamedTuple):
  """A file that was read: how many rows it gave, and line breaks within its cells."""

  name: str
  rows: int
  breaks: int = 0
  skipped: Skipped = Skipped()


def say(files: Sequence[Read]) -> dict[str, int]:
  """Counts what was not read as a row a line, and logs it: nothing of it is seen in the rows."""
  skipped, breaks = sum(file.skipped.count for file in files), sum(file.breaks for file in files)
  if skipped:
    first = next(file.skipped.first for file in files if file.skipped.count)
    log.warning('%d lines cannot be read and are left out, the first is %s', skipped, first)
  if breaks:
    name = next(file.name for file in files if file.breaks)
    log.warning(
      "%d line breaks lie within quoted cells, the first in %s; config.data.quote='' reads every "
      'line as a row', breaks, name,
    )  # fmt: skip
  return {'line_breaks_in_cells': breaks, 'lines_skipped': skipped}


def load(
  db: duckdb.DuckDBPyConnection, into: str, opened: Iterable[Table], wanted: Mapping[str, str]
) -> list[Read]:
  """Creates the table `into` with columns c0, c1, ... (VARCHAR) from all files, rows in order.

  Args:
    db: the database.
    into: name of the new table; its rowid is the position over all files.
    opened: the files, read one after the other.
    wanted: the columns to read, in the order c0, c1, ..., each with the field that asks for it.

  Returns:
    What was read of each file.

  Raises:
    UserError: if a column is missing, or a file cannot be parsed.
  """
  db.execute(f'CREATE TABLE {into} ({", ".join(f"c{k} VARCHAR" for k in range(len(wanted)))})')
  counts = []
  for table in opened:
    if table.empty:
      counts.append(Read(table.name, 0, skipped=table.skipped(db)))
    else:
      for name, field in wanted.items():
        one_of(f'{table.name}: column {field}', name, table.columns)
      with reading(table.name, table.settings):
        (rows,) = db.execute(f'INSERT INTO {into} {table.select(list(wanted))}').fetchone()
        counts.append(Read(table.name, rows, table.breaks(db, rows), table.skipped(db)))
    if table.scratch is not None:
      table.scratch.unlink()
  return counts


@contextlib.contextmanager
def reading(name: str, settings: Settings = SETTINGS) -> Iterator[None]:
  """Turns what DuckDB says of a file it cannot read into one line of a UserError."""
  try:
    yield
  except (duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException) as error:
    text = str(error).partition('Possible fixes')[0].partition('Possible Solution')[0]
    line = ' '.join(text.partition(':')[2].split())[:300]
    line = line.removeprefix(f'{name}: ')
    raise UserError(
      f'{name}: {line} (mend the file, or check {settings.format}, {settings.delimiter}, '
      f'config.data.quote, {settings.header} and {settings.encoding})'
    ) from error
