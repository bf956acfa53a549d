"""Raw logs of every format, each as a `Table`: names of columns and the SQL that reads them.

A reader opens a file no further than its header; DuckDB reads the rest, out of core, when the
SQL of `Table.select` runs. Every value arrives as VARCHAR: casts with their checks are
`data/interactions.py`'s.
"""

import contextlib
import functools
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from lmn_jax.data.readers import cells, quotes, text_files
from lmn_jax.data.readers.cells import identifier, literal
from lmn_jax.errors import UserError, one_of

log = logging.getLogger(__name__)
FORMATS = (
  'csv',
  'tsv',
  'jsonl',
  'parquet',
  'recbole',
  'movielens',
  'sequences',
  'longctr',
  'tfds',
  'synthetic',
)
ENDINGS = {
  '.csv': 'csv',
  '.tsv': 'tsv',
  '.json': 'jsonl',
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.parquet': 'parquet',
  '.pq': 'parquet',
  '.inter': 'recbole',
  '.user': 'recbole',
  '.item': 'recbole',
  '.dat': 'movielens',
}
DELIMITERS = {'csv': ',', 'tsv': '\t', 'recbole': '\t', 'movielens': '::', 'sequences': '\t'}
# Bytes of a line: of an event, and of a user's whole history. DuckDB holds buffers of four lines
# for each thread.
LONGEST_LINE, LONGEST_HISTORY = 2**21, 2**24
JSON_KIND = "CASE WHEN json_valid(line) THEN json_type(line) ELSE 'none' END"
AUTO = 'auto'  # the quote that goes with the format


class Settings(NamedTuple):
  """What the fields that say how a file is read are called, for messages."""

  format: str
  delimiter: str
  header: str
  fields: str
  encoding: str


SETTINGS = Settings(*(f'config.data.{field}' for field in Settings._fields))


class Source(NamedTuple):
  """What to read, and how; the fields mean what they mean in `config.data`."""

  pattern: str  # a file or a glob
  field: str  # the field of the configuration that names it, for messages
  format: str
  delimiter: str = ''
  quote: str = AUTO
  header: bool = True
  fields: tuple[str, ...] = ()
  encoding: str = 'utf-8'
  multi: dict[str, str] = {}  # separators of the columns that hold lists
  settings: Settings = SETTINGS
  skip: bool = False  # lines that cannot be read are left out


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


def format_of(pattern: str, named: str, field: str, settings: Settings = SETTINGS) -> str:
  """Returns the format: `named` if given, otherwise what the ending of `pattern` says.

  Raises:
    UserError: if the format is unknown, or the ending says nothing.
  """
  if named:
    return one_of(settings.format, named, FORMATS)
  if pattern.partition(':')[0] == 'synthetic':
    return 'synthetic'
  if pattern.startswith('tfds:'):
    return 'tfds'
  if Path(pattern).is_dir():
    return 'longctr'
  if ending(pattern) not in ENDINGS:
    raise UserError(
      f'{field}={pattern!r}: the ending {ending(pattern)!r} does not say the format; '
      f'set {settings.format} to one of {", ".join(FORMATS)}'
    )
  return ENDINGS[ending(pattern)]


def ending(pattern: str) -> str:
  """What the name of a path or glob ends in, small, without what says that it is packed."""
  path = Path(pattern)
  return (path.with_suffix('') if path.suffix.lower() in text_files.PACKED else path).suffix.lower()


def files(pattern: str, field: str) -> list[Path]:
  """Returns the files of a path or a glob, in natural order: day_2 comes before day_10.

  What tools leave beside their parts, `_SUCCESS` or `.part-0.crc`, matches only a pattern that
  names it: names that begin with `_` or `.` are left out otherwise.

  Raises:
    UserError: if there is none.
  """
  path = Path(pattern)
  if path.is_file():
    return [path]
  if any(c in pattern for c in '*?['):
    root, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.anchor else ('', path)
    found = [
      p for p in Path(root).glob(str(rest)) if p.is_file() and not _hidden(p.parts, path.parts)
    ]
    if found:
      return sorted(found, key=_natural)
    raise UserError(f'{field}={pattern!r} matches no file; correct the pattern or the folder')
  what = 'is a folder, not a file or a glob' if path.is_dir() else 'does not exist'
  raise UserError(f'{field}={pattern!r} {what}; correct the path (relative to {Path.cwd()})')


def _hidden(parts: Sequence[str], pattern: Sequence[str]) -> bool:
  """Whether a name of the path begins with `_` or `.` and none of the pattern's names does so."""
  wild = [asked for asked in pattern if any(c in asked for c in '*?[')]
  return any(
    name.startswith(mark) and not any(asked.startswith(mark) for asked in wild)
    for name in parts
    if name not in pattern
    for mark in '_.'
  )


def _natural(path: Path) -> list[tuple]:
  """A key to sort paths by, folder by folder, with whole numbers as numbers: day, day2, day10."""
  return [
    (tuple(int(x) if k % 2 else x for k, x in enumerate(re.split('([0-9]+)', stem))), name)
    for name, stem in ((name, Path(name).stem) for name in path.parts)
  ]


def tables(source: Source, db: duckdb.DuckDBPyConnection, scratch: Path) -> Iterator[Table]:
  """Yields a Table for each file of a text, JSON or Parquet source, in the order of their names.

  Raises:
    UserError: if there is no file, or one has no readable header.
  """
  for path in files(source.pattern, source.field):
    yield table(source, path, db, scratch)


def table(source: Source, path: Path, db: duckdb.DuckDBPyConnection, scratch: Path) -> Table:
  """Returns the Table of one file; sequences are read by the ending, as text if it says nothing."""
  kind = source.format
  if kind == 'sequences':
    kind = ENDINGS.get(ending(str(path)), kind)
  if not path.stat().st_size:
    return _nothing(path)
  if kind == 'parquet':
    return parquet(source, path, db)
  if kind == 'jsonl':
    return _json(source, path, db, scratch)
  return text(source, path, scratch)


def _nothing(path: Path, local: Path | None = None) -> Table:
  """The Table of a file without a line, such as tools leave for a part without rows."""
  return Table(str(path), {}, lambda _: '', {}, None if local == path else local, empty=True)


def quote_of(source: Source) -> str:
  """The quote of a text source: unless one is set, none where a tab or several characters part.

  Raises:
    UserError: if it has several characters.
  """
  if source.quote == AUTO:
    # Quotes are plain characters in these formats: a film may be called `"Great" Gatsby`.
    plain = source.format in ('recbole', 'movielens')
    delimiter = source.delimiter or DELIMITERS[source.format]
    return '' if plain or delimiter == '\t' or len(delimiter) > 1 else '"'
  if len(source.quote) > 1:
    raise UserError(
      f"config.data.quote={source.quote!r} must be one character, '' for none, or {AUTO!r}"
    )
  return source.quote


def text(source: Source, path: Path, scratch: Path) -> Table:
  """Delimited text: csv, tsv, RecBole's atomic files, MovieLens' `::` files."""
  delimiter, quote = source.delimiter or DELIMITERS[source.format], quote_of(source)
  local = text_files.plain(
    path, source.encoding, source.settings.encoding, scratch, delimiter, quote, source.skip
  )
  if text_files.is_blank(local):
    return _nothing(path, local)
  header = source.header and source.format != 'movielens'
  names = list(source.fields)
  if header:
    names = text_files.header(local, path, delimiter, quote, source.settings.encoding)
    if source.format == 'recbole':
      names = [name.partition(':')[0] for name in names]
  elif not names:
    raise UserError(
      f'{path}: no header, so the columns need names; set {source.settings.fields}, in order'
    )
  types = ', '.join(f"'s{k}': 'VARCHAR'" for k in range(len(names)))
  longest = LONGEST_HISTORY if source.format == 'sequences' else LONGEST_LINE
  relation = (
    f'read_csv({literal(local)}, auto_detect=false, header={header}, delim={literal(delimiter)}, '
    f'quote={literal(quote)}, escape={literal(quote)}, '
    f'max_line_size={longest}, buffer_size={4 * longest}, columns={{{types}}}'
    f'{_skipping(source, path)})'
  )
  values = {name: f's{k}' for k, name in enumerate(text_files.distinct(names))}
  columns = {name: cells.text_of(name, sql, source.multi) for name, sql in values.items()}

  def breaks(db: duckdb.DuckDBPyConnection, rows: int) -> int:
    if not quote or text_files.lines(local) <= rows + header:
      return 0
    trusted = source.quote != AUTO
    return quotes.line_breaks(db, str(path), relation, list(values.values()), delimiter, trusted)

  copy = None if local == path else local
  return Table(
    str(path), columns, lambda _: relation, values, copy, breaks=breaks, settings=source.settings,
    skipped=functools.partial(_left_out, source, path),
  )  # fmt: skip


def _skipping(source: Source, path: Path) -> str:
  """Arguments of read_csv that let it leave out what it cannot read, and note it in two tables."""
  name = _rejects(path)
  options = f", ignore_errors=true, store_rejects=true, rejects_table='{name}'"
  return f"{options}, rejects_scan='{name}_scan'" if source.skip else ''


def _rejects(path: Path) -> str:
  return f'rejects_{zlib.crc32(str(path).encode()):08x}'


def _left_out(source: Source, path: Path, db: duckdb.DuckDBPyConnection) -> Skipped:
  """What reading has noted of a file; the tables of the notes are dropped."""
  if not source.skip:
    return Skipped()
  name = _rejects(path)
  count, first = db.execute(
    f"""SELECT count(DISTINCT line), arg_min('line ' || line || ': ' || error_message, line)
    FROM {name}"""
  ).fetchone()
  db.execute(f'DROP TABLE {name}; DROP TABLE {name}_scan')
  return Skipped(count, ' '.join(f'{path}: {first}'.split())[:300] if count else '')


def _json(source: Source, path: Path, db: duckdb.DuckDBPyConnection, scratch: Path) -> Table:
  """JSON lines. A key may come late and its values may be of several types; each is read as it is.

  Lists are joined by their separator, other values give their text. A nested object is refused if
  it is asked for.
  """
  local = text_files.plain(
    path, source.encoding, source.settings.encoding, scratch, skip=source.skip
  )
  # A delimiter that no JSON holds, so that a line is one column.
  file = (
    f"read_csv({literal(local)}, auto_detect=false, header=false, delim='\x01', quote='', "
    f"escape='', max_line_size={LONGEST_HISTORY}, buffer_size={4 * LONGEST_HISTORY}, "
    f"columns={{'line': 'VARCHAR'}}{_skipping(source, path)})"
  )
  with reading(str(path), source.settings):
    names, no_object = _json_shape(path, file, db)
  if no_object.count and not source.skip:
    raise UserError(no_object.first)
  keys = {key: k for k, key in enumerate(names)}
  lines = f"(SELECT line FROM {file} WHERE trim(line) <> '')"
  if no_object.count:
    lines = f"(SELECT line FROM {file} WHERE trim(line) <> '' AND {JSON_KIND} = 'OBJECT')"

  def skipped(db: duckdb.DuckDBPyConnection) -> Skipped:
    unread = _left_out(source, path, db)
    return Skipped(unread.count + no_object.count, no_object.first or unread.first)

  if not keys:
    return _nothing(path, local)._replace(skipped=skipped)
  columns = {key: cells.json_text(key, f'j{k}', source.multi) for key, k in keys.items()}
  values = {key: f"json_extract_string(j{k}, '$')" for key, k in keys.items()}
  lists = {key: cells.json_list(key, f'j{k}') for key, k in keys.items()}

  def relation(names: list[str]) -> str:
    wanted = list(dict.fromkeys(names))
    paths = ', '.join(literal('/' + n.replace('~', '~0').replace('/', '~1')) for n in wanted)
    values = ', '.join(f'v[{k}] AS j{keys[n]}' for k, n in enumerate(wanted, 1))
    return f'(SELECT {values} FROM (SELECT json_extract(line, [{paths}]) AS v FROM {lines}))'

  copy = None if local == path else local
  return Table(
    str(path), columns, relation, values, copy, lists=lists, settings=source.settings,
    skipped=skipped,
  )  # fmt: skip


def _json_shape(path: Path, file: str, db: duckdb.DuckDBPyConnection) -> tuple[list[str], Skipped]:
  """The keys of all lines, in the order in which they come, and the lines that are no objects."""
  db.execute(
    f"""CREATE OR REPLACE TEMP TABLE json_shape AS
    SELECT kind, keys, count(*) AS n, min(number) AS first, arg_min(line, number) AS line FROM (
      SELECT number, left(line, 80) AS line, {JSON_KIND} AS kind,
        CASE WHEN {JSON_KIND} = 'OBJECT' THEN json_keys(line) END AS keys
      FROM (SELECT line, row_number() OVER () AS number FROM {file}) WHERE trim(line) <> ''
    ) GROUP BY kind, keys"""
  )
  count, number, line, kind = db.execute(
    """SELECT coalesce(sum(n), 0)::BIGINT, min(first), arg_min(line, first), arg_min(kind, first)
    FROM json_shape WHERE kind <> 'OBJECT'"""
  ).fetchone()
  keys = db.execute(
    """SELECT key FROM (SELECT unnest(keys) AS key, unnest(range(len(keys))) AS place, first
    FROM json_shape) GROUP BY key ORDER BY min((first, place))"""
  ).fetchall()
  db.execute('DROP TABLE json_shape')
  what = 'no JSON' if kind == 'none' else 'no JSON object; one object a line is read'
  said = f'{path}: line {number}, {line!r}, is {what}' if count else ''
  return [key for (key,) in keys], Skipped(count, said)


def parquet(source: Source, path: Path, db: duckdb.DuckDBPyConnection) -> Table:
  """Returns the Table of a Parquet file."""
  relation = f'read_parquet({literal(path)})'
  return typed(source, str(path), relation, db)


def typed(source: Source, name: str, relation: str, db: duckdb.DuckDBPyConnection) -> Table:
  """Returns the Table of a relation whose columns have types of their own."""
  with reading(name, source.settings):
    described = db.sql(f'DESCRIBE SELECT * FROM {relation}').fetchall()
  columns = {
    column: cells.as_text(column, identifier(column), kind, source.multi)
    for column, kind, *_ in described
  }
  values = {column: identifier(column) for column in columns}
  lists = {
    column: f'coalesce({cells.texts(identifier(column), kind)}, [])'
    for column, kind, *_ in described
    if kind.endswith(']') and not cells.is_nested(kind)
  }
  return Table(name, columns, lambda _: relation, values, lists=lists, settings=source.settings)


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
