"""Rows of an input file, a chunk at a time, and the codes of their raw ids in a store.

The file is read as logs are (data/readers/registry.py, texts.py): ` 266079.0` is 266079, and a
missing value (config.data.missing) is null. Vocabularies stay in their files; DuckDB looks up the
ids of each chunk in them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from lmn_jax.data import columns as log_columns
from lmn_jax.data import numeric, raw_log, row_lists, texts, vocabulary
from lmn_jax.data.arrow_files import numbers_of
from lmn_jax.data.readers import paths, registry
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import Reader, Source
from lmn_jax.data.readers.table import Table, reading
from lmn_jax.data.store import Store
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError
from lmn_jax.files import sha256_of_files

FIELD = '--input'
FORMATS = ('csv', 'tsv', 'jsonl', 'parquet')


class Chunk(NamedTuple):
  """N rows.

  rows: every column of the file. texts: column -> its text, null where it is missing. time: as the
  store has times; None if the file has none. history: the items of each row's history, separated by
  row_lists.MARK; None if the file has none.
  """

  rows: pa.Table
  texts: dict[str, pa.ChunkedArray]
  time: Int[np.ndarray, 'N'] | None = None
  history: pa.ChunkedArray | None = None


def reader_of(pattern: str) -> Reader:
  """Returns the reader for the ending of a path or glob.

  Raises:
    UserError: if the ending is of none of FORMATS.
  """
  ending = paths.ending(pattern)
  readers = [registry.READERS[name] for name in FORMATS]
  reader = next((reader for reader in readers if ending in reader.endings), None)
  if reader is None:
    endings = ', '.join(end for reader in readers for end in reader.endings)
    raise UserError(f'{FIELD}={pattern!r}: the ending {ending!r} must be one of {endings}')
  return reader


def fingerprint(pattern: str) -> str:
  """Returns the sha256 of the content of the files, independent of their names."""
  return sha256_of_files(paths.files(pattern, FIELD))


class RawRows:
  """The rows of files, in the order of the files' names and of their lines.

  DuckDB reads them once into a table, so that rows can be read by position, and unreadable input is
  refused before any row is scored. Columns of text files are texts; a text file has a header, and
  if it has the format of the log also the log's delimiter, quote and encoding.

  Attributes:
    names: the columns. count: the number of rows. time: the column of times, '' for none.
    history: the column of histories, '' for none.
  """

  def __init__(
    self,
    data: ml_collections.ConfigDict,
    pattern: str,
    columns: Mapping[str, str],
    clock: Clock,
    db: duckdb.DuckDBPyConnection,
    scratch: Path,
  ):
    """Reads the files.

    Args:
      data: config.data.
      pattern: a path or a glob.
      columns: the columns to read as text, each with the config field that requires it.
      clock: of the store. If its log has times and the file has the log's column of times, each row
        must have a time.
      db: gets the table.
      scratch: folder for copies of files that DuckDB cannot read.

    Raises:
      UserError: if there is no such file, a column is missing, the files differ in their columns, a
        time does not fit the clock, or a file cannot be read.
    """
    self._db, self._data, self._clock, self._columns = db, data, clock, columns
    self.names, self.count, self.time, self.history = [], 0, '', ''
    self._types, files = [], []
    source = _source_of(data, pattern)
    for table in source.reader.tables(source, db, scratch):
      if not table.empty:
        files.append((table.name, self._read(table)))
      if table.copy is not None:
        table.copy.unlink()
    if not files:
      raise UserError(f'{FIELD}={pattern!r}: the file is empty; a header or a row is expected')
    self.count = sum(rows for _, rows in files)
    if self.time:
      self._check_times(files)

  def _read(self, table: Table) -> int:
    """Appends the rows of a file to the table `staged`; returns their number."""
    for name, field in self._columns.items():
      table.require(name, field)
    is_first = not self.names
    if is_first:
      # Sequences with a file of times have this name for the column if the config has none.
      time = self._data.time or 'time'
      self.time = time if self._clock.timed and time in table.columns else ''
      history = self._data.row_history
      self.history = history if history in table.columns else ''
    query = self._select(table)
    with reading(table.name):
      names = list(table.columns)
      types = [kind for _, kind, *_ in self._db.sql(f'DESCRIBE {query}').fetchall()]
      if is_first:
        self.names, self._types = names, types
        self._db.execute(f'CREATE TABLE staged AS {query} LIMIT 0')
      elif (names, types) != (self.names, self._types):
        raise UserError(
          f'{table.name}: its columns and types differ from those of the first file '
          f'({", ".join(self.names)}); score the files with one command each'
        )
      (rows,) = self._db.execute(f'INSERT INTO staged {query}').fetchone()
      table.breaks(self._db, rows)
    return rows

  def _select(self, table: Table) -> str:
    """Returns SQL of the file's columns and then of the columns read as text, as c0, c1, ...

    Without a condition, the query keeps the order of rows. A condition of many values would not, as
    DuckDB converts it to a join.
    """
    columns = [*table.values.values(), *(table.columns[name] for name in self._columns)]
    if self.time:
      columns.append(table.columns[self.time])
    if self.history:
      columns.append(row_lists.history_sql(table, self._data))
    selected = ', '.join(f'{sql} AS c{k}' for k, sql in enumerate(columns))
    return f'SELECT {selected} FROM {table.relation(list(table.columns))}'

  def _check_times(self, files):
    """Refuses the first row whose time does not fit the clock."""
    text = f'c{len(self.names) + len(self._columns)}'
    first = self._db.execute(
      f"""SELECT rowid, {text} FROM staged WHERE ({self._time_sql(text)}) IS NULL
      ORDER BY rowid LIMIT 1"""
    ).fetchone()
    if first:
      row, value = first
      raise UserError(
        f'{raw_log.place(files, row)}: the time column {self.time!r} holds {value!r}; '
        f'{self._clock.reason(value)}; correct the row, or remove the column to score all rows on '
        'the newest history'
      )

  def _time_sql(self, text):
    return self._clock.sql(texts.strip_sql(text))

  def chunk(self, begin: int, size: int) -> Chunk:
    """Returns the rows from `begin` on, at most `size`."""
    C, T = len(self.names), len(self._columns)
    columns = [f'c{k}' for k in range(C)]
    columns += [
      log_columns.feature_sql(self._data, name, f'c{C + k}') for k, name in enumerate(self._columns)
    ]
    if self.time:
      columns.append(self._time_sql(f'c{C + T}'))
    if self.history:
      columns.append(f'c{len(columns)}')
    selected = ', '.join(f'{sql} AS c{k}' for k, sql in enumerate(columns))
    table = self._db.sql(
      f'SELECT {selected} FROM staged WHERE rowid >= {begin} AND rowid < {begin + size} '
      'ORDER BY rowid'
    ).to_arrow_table()
    return Chunk(
      table.select(range(C)).rename_columns(self.names),
      {name: table.column(C + k) for k, name in enumerate(self._columns)},
      table.column(C + T).to_numpy() if self.time else None,
      table.column(table.num_columns - 1) if self.history else None,
    )


def _source_of(data: ml_collections.ConfigDict, pattern: str) -> Source:
  """Returns how to read the input; files in the format of the log are read as the log was."""
  reader = reader_of(pattern)
  source = Source(pattern, FIELD, reader, multi=dict(data.multi))
  log_reader = registry.matching(data.source)
  log_format = data.format or (log_reader.name if log_reader else '')
  if reader.name != log_format:
    return source
  return source._replace(delimiter=data.delimiter, quote=data.quote, encoding=data.encoding)


class Context(NamedTuple):
  """Context features of N rows.

  codes: 'context.f' -> int32 [N], or [N, M] padded with V; of a number float32 [N], NaN where there
  is none. unknown: 'context.f' -> number of rows with a value that is not in the vocabulary, or is
  no number. cut: number of lists longer than M.
  """

  codes: dict[str, Int[np.ndarray, 'N ...']]
  unknown: dict[str, int]
  cut: int


class Histories(NamedTuple):
  """The histories of N rows.

  item: int32 [E], indices (item_index.py), row after row, oldest first. offset: int64 [N + 1], of
  each row.
  """

  item: Int[np.ndarray, 'E']
  offset: Int[np.ndarray, 'N1']

  def counts(self) -> Int[np.ndarray, 'N']:
    """Returns the number of events of each row."""
    return np.diff(self.offset)

  def newest(self, rows: Int[np.ndarray, 'B'], L: int, V: int) -> Int[np.ndarray, 'B L']:
    """Returns the newest L events of some rows, left-aligned and padded with V."""
    length = np.minimum(self.counts()[rows], L)
    first, place = self.offset[rows + 1] - length, np.arange(L)
    items = np.full((len(rows), L), V, np.int32)
    if len(self.item):
      items = self.item.take(first[:, None] + place, mode='clip')
    items[place >= length[:, None]] = V
    return items

  def events(self, rows: Int[np.ndarray, 'B']) -> list[np.ndarray]:
    """Returns all events of some rows."""
    return [self.item[self.offset[row] : self.offset[row + 1]] for row in rows]


class Coder:
  """Maps raw ids and values of a chunk to records, embedding rows and codes of a store."""

  def __init__(self, data: ml_collections.ConfigDict, store: Store, db: duckdb.DuckDBPyConnection):
    """Registers the vocabularies in DuckDB, which reads them from their files.

    Args:
      data: config.data. store: the store. db: gets the tables.
    """
    self._db, self._store, self._missing = db, store, data.missing
    self._max_history = data.max_history
    self._features = [f for f in vocabulary.features_of(data) if f.kind == 'context']
    users = [store.user_ids(part) for part in range(len(store.parts))]
    vocabulary.create_lookup(db, 'user', pa.chunked_array(users), store.spelt)
    vocabulary.create_lookup(db, 'item', store.raw_items(), store.spelt)
    for feature in [f for f in self._features if f.coded]:
      vocabulary.create_lookup(db, str(feature.table), store.raw_ids(feature.key), store.spelt)

  def _query(self, raw, query, values=()):
    """Returns the result of a query over `chunk` (place, raw), in the order of `place`."""
    place = pa.array(np.arange(len(raw)))
    self._db.register('chunk', pa.table({'place': place, 'raw': raw}))
    try:
      return self._db.sql(f'{query} ORDER BY place', params=list(values)).to_arrow_table()
    finally:
      self._db.unregister('chunk')

  def _codes(self, kind, raw, unknown):
    table = self._query(
      raw,
      f"""SELECT coalesce(code, {unknown:d})::INTEGER AS code FROM chunk
      LEFT JOIN lookup_{kind} ON lookup_{kind}.id = chunk.raw""",
    )
    return table.column('code').to_numpy()

  def records(self, raw: pa.ChunkedArray) -> Int[np.ndarray, 'N']:
    """Returns the records of users, over all parts; -1 for a user that the store does not have."""
    return self._codes('user', raw, -1)

  def items(self, raw: pa.ChunkedArray) -> Int[np.ndarray, 'N']:
    """Returns the indices of items (item_index.py); 0 for an item that the store does not have."""
    return self._codes('item', raw, 0)

  def histories(self, raw: pa.ChunkedArray) -> Histories:
    """Returns the newest config.data.max_history events of histories separated by MARK."""
    item = texts.value_sql('token', self._missing)
    newest = f'[-{self._max_history}:]' if self._max_history else ''
    tokens = f'string_split(raw, {literal(row_lists.MARK)})'
    table = self._query(
      raw,
      f"""SELECT coalesce(codes{newest}, []) AS codes FROM chunk LEFT JOIN (
        SELECT place, list(coalesce(code, 0)::INTEGER ORDER BY position) AS codes FROM (
          SELECT place, {item} AS id, position FROM (
            SELECT place, unnest({tokens}) AS token, generate_subscripts({tokens}, 1) AS position
            FROM chunk))
        LEFT JOIN lookup_item USING (id) WHERE id IS NOT NULL GROUP BY place
      ) USING (place)""",
    )
    codes = table.column('codes').combine_chunks()
    return Histories(codes.flatten().to_numpy(), np.r_[0, np.cumsum(pc.list_value_length(codes))])

  def context(self, raws: Mapping[str, pa.ChunkedArray]) -> Context:
    """Returns the codes and numbers of the context features, as in the store.

    A token that is not in the vocabulary, a missing value, and in a binned feature a text that is
    not a number, have the code 0. A list is cut to its first M tokens, the width in the store. A
    text that is not a number of float32 is NaN, as a missing one is.

    Args:
      raws: column -> texts [N].
    """
    codes, unknown, cut = {}, {}, 0
    for feature in self._features:
      if not feature.coded:
        codes[feature.key], unknown[feature.key] = self._numbers(raws[feature.name])
        continue
      V, width = self._store.vocabulary[feature.key], self._store.widths[feature.key]
      edges: Sequence[float] = self._store.manifest['bins'].get(feature.key, ())
      tokens, values = vocabulary.tokens_of(feature, edges, self._missing)
      table = self._query(
        raws[feature.name],
        vocabulary.codes_sql(feature, tokens, V, width, 'chunk'),
        values,
      )
      code = table.column('code').combine_chunks().flatten().to_numpy()
      codes[feature.key] = code.reshape(-1, width) if width else code
      unknown[feature.key] = int(np.sum(table.column('unknown').to_numpy()))
      if width:
        length = table.column('length').fill_null(0).to_numpy()
        cut += int(np.sum(length > width))
    return Context(codes, unknown, cut)

  def _numbers(self, raw: pa.ChunkedArray) -> tuple[Float[np.ndarray, 'N'], int]:
    """Returns the numbers of texts, and how many texts are not missing and no number."""
    table = self._query(
      raw,
      f"""SELECT {numeric.value_sql('raw')} AS value,
        {numeric.invalid_sql('raw', 'standard')} AS unknown FROM chunk""",
    )
    return numbers_of(table, 'value'), int(np.sum(table.column('unknown').to_numpy()))
