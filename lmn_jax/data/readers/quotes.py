"""Line breaks within quoted cells: multi-line text is read, rows lost to a stray quote are refused.

With quoting on, a cell that begins with a quote extends to the next quote, across line ends. If the
closing quote is missing, the lines up to the next quote become part of the cell and their rows are
lost. Such a cell is recognized by its lines: each of them is a row with all columns.
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
    trusted: refuse nothing; the user set the quote explicitly.

  Raises:
    UserError: if the lines of a cell are complete rows.
  """
  counts = [f"coalesce(len({c}) - len(replace({c}, chr(10), '')), 0)" for c in columns]
  rows = [_lines_are_rows(c, k, len(columns), delimiter) for k, c in enumerate(columns)]
  # All line breaks of the row are in this cell, and its lines are rows.
  swallowed = [f'({n} = breaks AND {row})' for n, row in zip(counts, rows, strict=True)]
  is_lost = ' OR '.join(swallowed) if len(columns) > 1 else 'false'
  ((total, lost, row),) = db.execute(
    f"""SELECT coalesce(sum(breaks), 0), sum(breaks) FILTER (lost), min(number) FILTER (lost) FROM (
      SELECT number, breaks, {is_lost} AS lost FROM (
        SELECT *, {' + '.join(counts)} AS breaks, row_number() OVER () AS number FROM {relation}
      ) WHERE breaks > 0)"""
  ).fetchall()  # A result that is not read to its end would keep the connection busy.
  if lost and not trusted:
    raise UserError(
      f'{name}: row {row}: a quoted cell contains whole rows ({lost} in all such cells); a '
      "quote is probably not closed; set config.data.quote='' to read quotes as plain characters, "
      "or config.data.quote='\"' to accept the cells"
    )
  return int(total)


def _lines_are_rows(column: str, place: int, columns: int, delimiter: str) -> str:
  """Returns SQL of whether the lines of a cell, joined to its neighbours, are complete rows."""
  mark = "'" + delimiter.replace("'", "''") + "'"
  marks = f"""list_transform(string_split({column}, chr(10)),
    lambda line: (len(line) - len(replace(line, {mark}, ''))) // {len(delimiter)})"""
  between = f'list_bool_and(list_transform({marks}[2:-2], lambda n: n = {columns - 1}))'
  return (
    f'{marks}[1] = {columns - 1 - place} AND {marks}[-1] = {place} AND coalesce({between}, true)'
  )
