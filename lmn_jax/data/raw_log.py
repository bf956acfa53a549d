"""The raw rows of a log as text, the files that they come from, and the refusal of a row."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import duckdb
import ml_collections

from lmn_jax.errors import UserError

logger = logging.getLogger(__name__)


def place(files: Sequence[tuple[str, int]], row: int) -> str:
  """Returns the file, and the row in it from 1, of a row in all files.

  Args:
    files: names and numbers of rows, in the order of the rows. row: from 0.
  """
  for name, count in files:
    if row < count:
      return f'{name}: row {row + 1}'
    row -= count
  raise IndexError(f'row {row} is past the end of the log')


class Log(NamedTuple):
  """The raw rows as text in the table `raw`, with their files and columns."""

  db: duckdb.DuckDBPyConnection
  data: ml_collections.ConfigDict
  files: tuple[tuple[str, int], ...]  # names and numbers of rows, in the order of the rows
  columns: dict[str, str]  # name in the log -> column of `raw`

  def place(self, row: int) -> str:
    """Returns the file, and the row in it from 1, of a row in the whole log."""
    return place(self.files, row)

  def reject(
    self,
    field: str,
    condition: str,
    remedy: str | Callable[[str], str],
    column: str | None = None,
  ) -> None:
    """Refuses the rows of `valid_rows` for which an SQL condition is true, or skips them.

    Args:
      field: the field of config.data that names the column.
      condition: SQL over `valid_rows`.
      remedy: what the user can do, or a function that returns it for the row's value.
      column: name of the column in the log, of a field that names several; None: the field's value.

    Raises:
      UserError: naming the first such row, with `config.data.bad_lines='refuse'`.
    """
    column = self.data[field] if column is None else column
    first = self.db.execute(
      f'SELECT row, {self.columns[column]} FROM valid_rows WHERE {condition} ORDER BY row LIMIT 1'
    ).fetchone()
    if not first:
      return
    row, value = first
    if callable(remedy):
      remedy = remedy(value)
    message = f'{self.place(row)}: the {field} column {column!r} holds {value!r}; {remedy}'
    if self.data.bad_lines != 'skip':
      raise UserError(message)
    self.db.execute(f'INSERT INTO bad SELECT row FROM valid_rows WHERE {condition}')
    logger.warning('skipped rows with an invalid %s, the first: %s', field, message)
