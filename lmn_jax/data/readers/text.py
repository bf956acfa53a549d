"""Delimited text: CSV, TSV, RecBole's atomic files, MovieLens' `::` files."""

import functools
import zlib
from pathlib import Path

import duckdb
import ml_collections

from lmn_jax.data.readers import cells, quotes, text_files
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import AUTO, Reader, Source
from lmn_jax.data.readers.table import Skipped, Table, empty_table
from lmn_jax.errors import UserError


class Text(Reader):
  """Delimited text."""

  encoded = True

  def table(self, source, path, db, scratch):
    return text_table(source, path, scratch)


class Csv(Text):
  """Values separated by commas, with a header."""

  name, endings, delimiter = 'csv', ('.csv',), ','


class Tsv(Text):
  """Values separated by tabs, with a header."""

  name, endings, delimiter = 'tsv', ('.tsv',), '\t'


class RecBole(Text):
  """RecBole's atomic files: the header has names with types, `user_id:token`."""

  name, endings, delimiter = 'recbole', ('.inter', '.user', '.item'), '\t'
  plain_quotes = True

  def column_name(self, name):
    return name.partition(':')[0]


class MovieLens(Text):
  """GroupLens' files without a header, `user::item::rating::time`."""

  name, endings, delimiter = 'movielens', ('.dat',), '::'
  headless = plain_quotes = True

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    fields = source.fields or ('user', 'item', 'rating', 'time')
    return super().open(source._replace(fields=fields), data, db, scratch)


def quote_of(source: Source) -> str:
  """Returns the quote of a text source, '' for none.

  Raises:
    UserError: if the configured quote has several characters.
  """
  if source.quote == AUTO:
    # In these formats quotes are plain characters: a movie may be called `"Great" Gatsby`.
    delimiter = source.delimiter or source.reader.delimiter
    return '' if source.reader.plain_quotes or delimiter == '\t' or len(delimiter) > 1 else '"'
  if len(source.quote) > 1:
    raise UserError(
      f"config.data.quote={source.quote!r} must be one character, '' for none, or {AUTO!r}"
    )
  return source.quote


def text_table(source: Source, path: Path, scratch: Path) -> Table:
  """Returns the Table of a file of delimited text. scratch: folder for copies.

  Raises:
    UserError: if the header cannot be read, or there is none and the columns have no names.
  """
  delimiter, quote = source.delimiter or source.reader.delimiter, quote_of(source)
  local = text_files.as_utf8(
    path, source.encoding, source.settings.encoding, scratch, delimiter, quote, source.skip
  )
  if text_files.is_blank(local):
    return empty_table(path, local)
  header = source.header and not source.reader.headless
  names = list(source.fields)
  if header:
    names = text_files.header(local, path, delimiter, quote, source.settings.encoding)
    names = [source.reader.column_name(name) for name in names]
  elif not names:
    raise UserError(
      f'{path}: there is no header to name the columns; set {source.settings.fields} to their '
      'names, in order'
    )
  types = ', '.join(f"'s{k}': 'VARCHAR'" for k in range(len(names)))
  longest = source.reader.longest_line
  relation = (
    f'read_csv({literal(local)}, auto_detect=false, header={header}, delim={literal(delimiter)}, '
    f'quote={literal(quote)}, escape={literal(quote)}, '
    f'max_line_size={longest}, buffer_size={4 * longest}, columns={{{types}}}'
    f'{reject_options(source, path)})'
  )
  values = {name: f's{k}' for k, name in enumerate(text_files.unique_names(names))}
  columns = {name: cells.cell_text(name, sql, source.multi) for name, sql in values.items()}

  def breaks(db: duckdb.DuckDBPyConnection, rows: int) -> int:
    if not quote or text_files.count_lines(local) <= rows + header:
      return 0
    trusted = source.quote != AUTO
    return quotes.line_breaks(db, str(path), relation, list(values.values()), delimiter, trusted)

  copy = None if local == path else local
  return Table(
    str(path), columns, lambda _: relation, values, copy, breaks=breaks, settings=source.settings,
    skipped=functools.partial(rejected_lines, source, path),
  )  # fmt: skip


def reject_options(source: Source, path: Path) -> str:
  """Returns the arguments of read_csv that skip unreadable lines and store them in two tables."""
  name = _rejects_table(path)
  options = f", ignore_errors=true, store_rejects=true, rejects_table='{name}'"
  return f"{options}, rejects_scan='{name}_scan'" if source.skip else ''


def _rejects_table(path: Path) -> str:
  return f'rejects_{zlib.crc32(str(path).encode()):08x}'


def rejected_lines(source: Source, path: Path, db: duckdb.DuckDBPyConnection) -> Skipped:
  """Returns the skipped lines of a file, and drops the tables that store them."""
  if not source.skip:
    return Skipped()
  name = _rejects_table(path)
  count, first = db.execute(
    f"""SELECT count(DISTINCT line), arg_min('line ' || line || ': ' || error_message, line)
    FROM {name}"""
  ).fetchone()
  db.execute(f'DROP TABLE {name}; DROP TABLE {name}_scan')
  return Skipped(count, ' '.join(f'{path}: {first}'.split())[:300] if count else '')
