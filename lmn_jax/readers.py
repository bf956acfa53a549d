"""Raw logs of every format, each as a `Table`: names of columns and the SQL that reads them.

A reader opens a file no further than its header; DuckDB reads the rest, out of core, when the
SQL of `Table.select` runs. Every value arrives as VARCHAR: casts with their checks are `logs.py`'s.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from lmn_jax import textfiles
from lmn_jax.errors import UserError, one_of

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
JSON_SAMPLE = 1000  # lines looked at for the names of the keys


class Source(NamedTuple):
  """What to read, and how; the fields mean what they mean in `config.data`."""

  pattern: str  # a file or a glob
  field: str  # the field of the configuration that names it, for messages
  format: str
  delimiter: str = ''
  quote: str = '"'
  header: bool = True
  fields: tuple[str, ...] = ()
  encoding: str = 'utf-8'
  multi: dict[str, str] = {}  # separators of the columns that hold lists


class Table(NamedTuple):
  """One file: its columns and the relation that holds them."""

  name: str  # for messages
  columns: dict[str, str]  # column's name -> SQL expression that gives it as VARCHAR
  relation: Callable[[list[str]], str]  # the columns wanted -> SQL of the FROM clause
  scratch: Path | None = None  # a copy made for reading, to be removed when read

  def select(self, names: Sequence[str]) -> str:
    """Returns SQL that gives the named columns as c0, c1, ... in the order of the file."""
    wanted = ', '.join(f'{self.columns[name]} AS c{k}' for k, name in enumerate(names))
    return f'SELECT {wanted} FROM {self.relation(list(names))}'


def literal(text: object) -> str:
  """Returns an SQL string literal."""
  return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
  """Returns a quoted SQL identifier."""
  return '"' + name.replace('"', '""') + '"'


def format_of(pattern: str, named: str, field: str) -> str:
  """Returns the format: `named` if given, otherwise what the ending of `pattern` says.

  Raises:
    UserError: if the format is unknown, or the ending says nothing.
  """
  if named:
    return one_of('config.data.format', named, FORMATS)
  if pattern.partition(':')[0] == 'synthetic':
    return 'synthetic'
  if pattern.startswith('tfds:'):
    return 'tfds'
  if Path(pattern).is_dir():
    return 'longctr'
  ending = Path(pattern.removesuffix('.gz')).suffix.lower()
  if ending not in ENDINGS:
    raise UserError(
      f'{field}={pattern!r}: the ending {ending!r} does not say the format; '
      f'set config.data.format to one of {", ".join(FORMATS)}'
    )
  return ENDINGS[ending]


def files(pattern: str, field: str) -> list[Path]:
  """Returns the files of a path or a glob, sorted by name.

  Raises:
    UserError: if there is none.
  """
  path = Path(pattern)
  if path.is_file():
    return [path]
  if any(c in pattern for c in '*?['):
    root, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.anchor else ('', path)
    found = sorted(p for p in Path(root).glob(str(rest)) if p.is_file())
    if found:
      return found
    raise UserError(f'{field}={pattern!r} matches no file; correct the pattern or the folder')
  what = 'is a folder, not a file or a glob' if path.is_dir() else 'does not exist'
  raise UserError(f'{field}={pattern!r} {what}; correct the path (relative to {Path.cwd()})')


def tables(source: Source, db: duckdb.DuckDBPyConnection, scratch: Path) -> Iterator[Table]:
  """Yields a Table for each file of a text, JSON or Parquet source, in the order of their names.

  Raises:
    UserError: if there is no file, or one has no readable header.
  """
  for path in files(source.pattern, source.field):
    if source.format == 'parquet':
      yield parquet(source, path, db)
    elif source.format == 'jsonl':
      yield _json(source, path, scratch)
    else:
      yield text(source, path, scratch)


def text(source: Source, path: Path, scratch: Path) -> Table:
  """Delimited text: csv, tsv, RecBole's atomic files, MovieLens' `::` files."""
  local = textfiles.plain(path, source.encoding, scratch)
  delimiter = source.delimiter or DELIMITERS[source.format]
  # Quotes are plain characters in both formats: a film may be called `"Great" Gatsby`.
  quote = '' if source.format in ('recbole', 'movielens') else source.quote
  header = source.header and source.format != 'movielens'
  names = list(source.fields)
  if header:
    names = textfiles.header(local, path, delimiter, quote)
    if source.format == 'recbole':
      names = [name.partition(':')[0] for name in names]
  elif not names:
    raise UserError(
      f'{path}: no header, so the columns need names; set config.data.fields, in order'
    )
  types = ', '.join(f"'s{k}': 'VARCHAR'" for k in range(len(names)))
  longest = LONGEST_HISTORY if source.format == 'sequences' else LONGEST_LINE
  relation = (
    f'read_csv({literal(local)}, auto_detect=false, header={header}, delim={literal(delimiter)}, '
    f'quote={literal(quote)}, escape={literal(quote)}, '
    f'max_line_size={longest}, buffer_size={4 * longest}, columns={{{types}}})'
  )
  columns = {name: f's{k}' for k, name in enumerate(textfiles.distinct(names))}
  return Table(str(path), columns, lambda _: relation, None if local == path else local)


def _json(source: Source, path: Path, scratch: Path) -> Table:
  """JSON lines. Keys that nobody asks for, nested or not, are not read."""
  local = textfiles.plain(path, source.encoding, scratch)
  samples: dict[str, Any] = {}
  with open(local, 'rb') as lines:
    for number, line in enumerate(itertools.islice(lines, JSON_SAMPLE), 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
      except (ValueError, RecursionError) as error:  # nor UTF-8, nor of a depth that can be read
        raise UserError(f'{path}: line {number} is not JSON: {error}') from None
      if not isinstance(record, dict):
        raise UserError(f'{path}: line {number} is not a JSON object; one object a line is read')
      samples.update((k, v) for k, v in record.items() if v is not None or k not in samples)
  if not samples:
    raise UserError(f'{path}: the file is empty; a JSON object a line is expected')
  types = {k: 'VARCHAR[]' if isinstance(v, list) else 'VARCHAR' for k, v in samples.items()}
  columns = {k: as_text(k, identifier(k), t, source) for k, t in types.items()}

  def relation(names: list[str]) -> str:
    wanted = ', '.join(f'{literal(n)}: {literal(types[n])}' for n in dict.fromkeys(names))
    return f"read_json({literal(local)}, format='newline_delimited', columns={{{wanted}}})"

  return Table(str(path), columns, relation, None if local == path else local)


def parquet(source: Source, path: Path, db: duckdb.DuckDBPyConnection) -> Table:
  """Returns the Table of a Parquet file."""
  relation = f'read_parquet({literal(path)}, binary_as_string=true)'
  return typed(source, str(path), relation, db)


def typed(source: Source, name: str, relation: str, db: duckdb.DuckDBPyConnection) -> Table:
  """Returns the Table of a relation whose columns have types of their own."""
  with reading(name):
    described = db.sql(f'DESCRIBE SELECT * FROM {relation}').fetchall()
  columns = {
    column: as_text(column, identifier(column), kind, source) for column, kind, *_ in described
  }
  return Table(name, columns, lambda _: relation)


def load(
  db: duckdb.DuckDBPyConnection, into: str, opened: Iterable[Table], wanted: Mapping[str, str]
) -> list[tuple[str, int]]:
  """Creates the table `into` with columns c0, c1, ... (VARCHAR) from all files, rows in order.

  Args:
    db: the database.
    into: name of the new table; its rowid is the position over all files.
    opened: the files, read one after the other.
    wanted: the columns to read, in the order c0, c1, ..., each with the field that asks for it.

  Returns:
    The name of each file and the number of its rows.

  Raises:
    UserError: if a column is missing, or a file cannot be parsed.
  """
  db.execute(f'CREATE TABLE {into} ({", ".join(f"c{k} VARCHAR" for k in range(len(wanted)))})')
  counts = []
  for table in opened:
    for name, field in wanted.items():
      one_of(f'{table.name}: column {field}', name, table.columns)
    with reading(table.name):
      (inserted,) = db.execute(f'INSERT INTO {into} {table.select(list(wanted))}').fetchone()
    counts.append((table.name, inserted))
    if table.scratch is not None:
      table.scratch.unlink()
  return counts


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
  """Turns what DuckDB says of a file it cannot read into one line of a UserError."""
  try:
    yield
  except (duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException) as error:
    text = str(error).partition('Possible fixes')[0].partition('Possible Solution')[0]
    line = ' '.join(text.partition(':')[2].split())[:300]
    line = line.removeprefix(f'{name}: ')
    raise UserError(
      f'{name}: {line} (mend the file, or check config.data.format, config.data.delimiter, '
      'config.data.quote, config.data.header and config.data.encoding)'
    ) from error


def as_text(column: str, expression: str, kind: str, source: Source) -> str:
  """Returns SQL that gives a typed column as text; lists are joined by their separator."""
  if kind.endswith(']'):
    if column not in source.multi:
      # An error only if the column is asked for: DuckDB does not evaluate what is not selected.
      message = (
        f'column {column!r} holds lists; give a separator to join them by, such as '
        f"config.data.multi={{{column!r}: '|'}}"
      )
      return f'error({literal(message)})::VARCHAR'
    separator = literal(source.multi[column])
    return f'array_to_string(CAST({expression} AS VARCHAR[]), {separator})'
  return f'CAST({expression} AS VARCHAR)'
