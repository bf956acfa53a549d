"""Line breaks within quotes: a text of several lines is read, lines lost to a stray quote are not.

With quoting on, a cell that begins with a quote goes on to the next quote, over line ends. Where
the closing quote is missing, the lines up to the next quote become part of the cell, and their rows
are lost. Such a cell is known by its lines: each one is a row by itself, with all its columns.
"""

from collections.abc import Sequence

import duckdb

from lmn_jax.errors import UserError


def line_breaks(
  db: duckdb.DuckDBPyConnection,
  name: str,
  relation: str,
  columns: Sequence[str],
  delimiter: str,
  trusted: bool,
) -> int:
  """Counts the line breaks within the cells of a file that is read with quoting on.

  Args:
    db: reads the file once more.
    name: of the file, for messages.
    relation: SQL of the FROM clause that reads it.
    columns: SQL of all its columns, in order.
    delimiter: between columns.
    trusted: nothing is refused; the user set the quote themselves.

  Raises:
    UserError: a cell holds lines that are rows by themselves.
  """
  counts = [f"coalesce(len({c}) - len(replace({c}, chr(10), '')), 0)" for c in columns]
  rows = [_are_rows(c, k, len(columns), delimiter) for k, c in enumerate(columns)]
  alone = [f'({n} = breaks AND {row})' for n, row in zip(counts, rows, strict=True)]
  ((total, lost, row),) = db.execute(
    f"""SELECT coalesce(sum(breaks), 0), sum(breaks) FILTER (lost), min(number) FILTER (lost) FROM (
      SELECT number, breaks, {' OR '.join(alone) if len(columns) > 1 else 'false'} AS lost FROM (
        SELECT *, {' + '.join(counts)} AS breaks, row_number() OVER () AS number FROM {relation}
      ) WHERE breaks > 0)"""
  ).fetchall()  # to the end: a result that is not holds the connection
  if lost and not trusted:
    raise UserError(
      f'{name}: row {row}: a quoted cell holds whole rows ({lost} in all such cells), as if a '
      "quote were not closed; config.data.quote='' reads quotes as plain characters, "
      "config.data.quote='\"' takes the cells as they are"
    )
  return int(total)


def _are_rows(column: str, place: int, columns: int, delimiter: str) -> str:
  """SQL: the lines of a cell, with the cells before and after it, are rows of all columns."""
  mark = "'" + delimiter.replace("'", "''") + "'"
  marks = f"""list_transform(string_split({column}, chr(10)),
    lambda line: (len(line) - len(replace(line, {mark}, ''))) // {len(delimiter)})"""
  between = f'list_bool_and(list_transform({marks}[2:-2], lambda n: n = {columns - 1}))'
  return (
    f'{marks}[1] = {columns - 1 - place} AND {marks}[-1] = {place} AND coalesce({between}, true)'
  )
