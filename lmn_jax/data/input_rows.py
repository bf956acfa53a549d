"""Rows of a file as they are, a chunk at a time, and what their raw ids are in a store.

The file is read as logs are (data/readers/registry.py, texts.py): ` 266079.0` is 266079, and what
stands for nothing (config.data.missing) is null. Vocabularies stay in their files: DuckDB
looks the ids of a chunk up in them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from lmn_jax.data import columns as log_columns
from lmn_jax.data import row_lists, texts, vocabulary
from lmn_jax.data.readers import paths, registry
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import Reader, Source
from lmn_jax.data.readers.table import reading
from lmn_jax.data.store import Store
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError, one_of
from lmn_jax.files import sha256_of_files

FIELD = '--input'
FORMATS = ('csv', 'tsv', 'jsonl', 'parquet')


class Chunk(NamedTuple):
  """N rows. kept: every column of the file. texts: column -> its text, null where it is missing.

  time: of each row, as the store has times; None where the file has none. history: the items of
  each row's own history, which row_lists.MARK parts; None where the file has none.
  """

  kept: pa.Table
  texts: dict[str, pa.ChunkedArray]
  time: Int[np.ndarray, 'N'] | None = None
  history: pa.ChunkedArray | None = None


def reader_of(pattern: str) -> Reader:
  """The reader that the ending of a path or glob says.

  Raises:
    UserError: it says none of FORMATS.
  """
  ending = paths.ending(pattern)
  readers = [registry.READERS[name] for name in FORMATS]
  reader = next((reader for reader in readers if ending in reader.endings), None)
  if reader is None:
    known = ', '.join(end for reader in readers for end in reader.endings)
    raise UserError(f'{FIELD}={pattern!r}: the ending {ending!r} is none of {known}')
  return reader


def fingerprint(pattern: str) -> str:
  """sha256 of what the files hold, whatever they are called."""
  return sha256_of_files(paths.files(pattern, FIELD))


class RawRows:
  """The rows of files, in the order of the files' names and of their lines.

  DuckDB reads them once into a table of its own, in which a row has its place, and what cannot be
  read is known before anything is scored. Columns of text files are texts; a text file
  has a header, and where it is of the format of the log also the log's delimiter, quote and
  encoding. JSON lines have the keys of the first 1000.

  Attributes:
    names: the columns. count: how many rows there are. time: the column of times, '' for none.
    history: the column of histories, '' for none.
  """

  def __init__(
    self,
    data: ml_collections.ConfigDict,
    pattern: str,
    wanted: Mapping[str, str],
    clock: Clock,
    db: duckdb.DuckDBPyConnection,
    scratch: Path,
  ):
    """Reads the files.

    Args:
      data: config.data. pattern: a path or a glob. wanted: columns that are asked for as text, each
        with the field that asks. clock: of the store; where its log has times, and the file the
        log's column of times, each row must have one. db: gets the table. scratch: folder for
        copies of files that cannot be read as they are.

    Raises:
      UserError: no such file, a column that is missing, files of several kinds, a time that is none
        of the log, what cannot be read.
    """
    reader = reader_of(pattern)
    source = Source(pattern, FIELD, reader, multi=dict(data.multi))
    log_reader = registry.matching(data.source)
    if reader.name == (data.format or (log_reader.name if log_reader else '')):
      source = source._replace(delimiter=data.delimiter, quote=data.quote, encoding=data.encoding)
    self._db, self._wanted, self.names, self.count = db, list(wanted), [], 0
    self._data, self._clock = data, clock
    types, self.time, self.history, files = None, '', '', []
    for table in reader.tables(source, db, scratch):
      if table.empty:
        continue
      for name, field in wanted.items():
        one_of(f'{table.name}: column {field}', name, table.columns)
      # Sequences with a file of times call the column so where the config names none.
      if types is None and clock.timed and (data.time or 'time') in table.columns:
        self.time = data.time or 'time'
      if types is None and data.row_history in table.columns:
        self.history = data.row_history
      query = self._query(table)
      with reading(table.name):
        found = (
          list(table.columns),
          [kind for _, kind, *_ in db.sql(f'DESCRIBE {query}').fetchall()],
        )
        if types is None:
          self.names, types = found
          db.execute(f'CREATE TABLE staged AS {query} LIMIT 0')
        elif found != (self.names, types):
          raise UserError(
            f'{table.name}: its columns are not those of the first file '
            f'({", ".join(self.names)}, of the same types); read them with a command each'
          )
        rows = db.execute(f'INSERT INTO staged {query}').fetchone()[0]
        table.breaks(db, rows)
        self.count += rows
        files.append((table.name, rows))
      if table.scratch is not None:
        table.scratch.unlink()

    if types is None:
      raise UserError(f'{FIELD}={pattern!r}: the file is empty; a header or a row is expected')
    if self.time:
      self._check_times(files)

  def _check_times(self, files):
    """Refuses the first row whose time cannot be one of the log."""
    text = f'c{len(self.names) + len(self._wanted)}'
    found = self._db.execute(
      f"""SELECT rowid, {text} FROM staged WHERE ({self._time_of(text)}) IS NULL
      ORDER BY rowid LIMIT 1"""
    ).fetchone()
    if found:
      row, value = found
      raise UserError(
        f'{log_columns.place(files, row)}: the time column {self.time!r} holds {value!r}; '
        f'{self._clock.reason(value)}; mend the row, or leave the column out and all rows are '
        'scored on all that is known'
      )

  def _time_of(self, text):
    return self._clock.sql(texts.strip_sql(text))

  def _query(self, table):
    """SQL of the file's columns, c0, c1, ..., and then of those that are asked for as text.

    As plain as it is it keeps the order. With a condition of many values it would not: DuckDB makes
    a join of that.
    """
    kept = list(table.values.values())
    asked = [table.columns[name] for name in [*self._wanted, *filter(None, [self.time])]]
    if self.history:
      asked.append(row_lists.history_sql(table, self._data))
    columns = ', '.join(f'{sql} AS c{k}' for k, sql in enumerate(kept + asked))
    return f'SELECT {columns} FROM {table.relation(list(table.columns))}'

  def chunk(self, begin: int, size: int) -> Chunk:
    """Rows from `begin` on, `size` or what is left."""
    C = len(self.names)
    kept = [f'c{k}' for k in range(C)]
    read = [
      log_columns.feature_sql(self._data, name, f'c{C + k}') for k, name in enumerate(self._wanted)
    ]
    times = [self._time_of(f'c{C + len(read)}')] if self.time else []
    history = [f'c{C + len(read) + len(times)}'] if self.history else []
    columns = ', '.join(f'{sql} AS c{k}' for k, sql in enumerate(kept + read + times + history))
    table = self._db.sql(
      f'SELECT {columns} FROM staged WHERE rowid >= {begin} AND rowid < {begin + size} '
      'ORDER BY rowid'
    ).to_arrow_table()
    found = {name: table.column(C + k) for k, name in enumerate(self._wanted)}
    time = table.column(C + len(read)).to_numpy() if self.time else None
    own = table.column(table.num_columns - 1) if self.history else None
    return Chunk(table.select(range(C)).rename_columns(self.names), found, time, own)


class Context(NamedTuple):
  """Context features of N rows. codes: 'context.f' -> int32 [N], or [N, M] filled up with V.

  unknown: 'context.f' -> rows with a value that training did not see. cut: lists longer than M.
  """

  codes: dict[str, Int[np.ndarray, 'N ...']]
  unknown: dict[str, int]
  cut: int


class Histories(NamedTuple):
  """The histories that N rows bring along.

  item: int32 [E], embedding rows, row after row, oldest first. offset: int64 [N + 1], of each row.
  """

  item: Int[np.ndarray, 'E']
  offset: Int[np.ndarray, 'N1']

  def counts(self) -> Int[np.ndarray, 'N']:
    """How many events each row has."""
    return np.diff(self.offset)

  def newest(self, rows: Int[np.ndarray, 'B'], L: int, V: int) -> Int[np.ndarray, 'B L']:
    """The newest L events of some rows, left-aligned and padded with V."""
    length = np.minimum(self.counts()[rows], L)
    first, place = self.offset[rows + 1] - length, np.arange(L)
    found = np.full((len(rows), L), V, np.int32)
    if len(self.item):
      found = self.item.take(first[:, None] + place, mode='clip')
    found[place >= length[:, None]] = V
    return found

  def events(self, rows: Int[np.ndarray, 'B']) -> list[np.ndarray]:
    """All events of some rows."""
    return [self.item[self.offset[row] : self.offset[row + 1]] for row in rows]


class Coder:
  """Raw ids and values of a chunk -> records, rows and codes of a store."""

  def __init__(self, data: ml_collections.ConfigDict, store: Store, db: duckdb.DuckDBPyConnection):
    """Hands the vocabularies to DuckDB, which reads them where they lie.

    Args:
      data: config.data. store: the store. db: in which tables are registered.
    """
    self._db, self._store, self._missing, self._most = db, store, data.missing, data.max_history
    self._features = [one for one in vocabulary.features_of(data) if one.kind == 'context']
    users = [store.user_ids(part) for part in range(len(store.parts))]
    vocabulary.make_known(db, 'user', pa.chunked_array(users), store.spelt)
    vocabulary.make_known(db, 'item', store.raw_ids('item'), store.spelt)
    for feature in self._features:
      vocabulary.make_known(db, str(feature.table), store.raw_ids(feature.key), store.spelt)

  def _ask(self, raw, query, values=()):
    """The answer to a query over `asked` (place, raw), in the order of `place`."""
    place = pa.array(np.arange(len(raw)))
    self._db.register('asked', pa.table({'place': place, 'raw': raw}))
    try:
      return self._db.sql(f'{query} ORDER BY place', params=list(values)).to_arrow_table()
    finally:
      self._db.unregister('asked')

  def _codes(self, kind, raw, unknown):
    found = self._ask(
      raw,
      f"""SELECT coalesce(code, {unknown:d})::INTEGER AS code FROM asked
      LEFT JOIN known_{kind} ON known_{kind}.id = asked.raw""",
    )
    return found.column('code').to_numpy()

  def records(self, raw: pa.ChunkedArray) -> Int[np.ndarray, 'N']:
    """The records of users, over all parts; -1 for one that the store does not have."""
    return self._codes('user', raw, -1)

  def items(self, raw: pa.ChunkedArray) -> Int[np.ndarray, 'N']:
    """The embedding rows of items; 0 for one that training did not see."""
    return self._codes('item', raw, 0)

  def histories(self, raw: pa.ChunkedArray) -> Histories:
    """Histories of texts that row_lists.MARK parts, the newest config.data.max_history events."""
    item, kept = texts.value_sql('token', self._missing), f'[-{self._most}:]' if self._most else ''
    table = self._ask(
      raw,
      f"""SELECT coalesce(codes{kept}, []) AS codes FROM asked LEFT JOIN (
        SELECT place, list(coalesce(code, 0)::INTEGER ORDER BY position) AS codes FROM (
          SELECT place, {item} AS id, position FROM (
            SELECT place, unnest(string_split(raw, {literal(row_lists.MARK)})) AS token,
              generate_subscripts(string_split(raw, {literal(row_lists.MARK)}), 1) AS position
            FROM asked))
        LEFT JOIN known_item USING (id) WHERE id IS NOT NULL GROUP BY place
      ) USING (place)""",
    )
    codes = table.column('codes').combine_chunks()
    return Histories(codes.flatten().to_numpy(), np.r_[0, np.cumsum(pc.list_value_length(codes))])

  def context(self, raws: Mapping[str, pa.ChunkedArray]) -> Context:
    """Codes of the context features, as the store has them.

    A token that training did not see, a missing value, and of a binned feature what is no number
    are the unknown token. A list has the store's M tokens, the first of those that are given.

    Args:
      raws: column -> texts [N].
    """
    codes, unknown, cut = {}, {}, 0
    for feature in self._features:
      V, width = self._store.vocabulary[feature.key], self._store.widths[feature.key]
      edges: Sequence[float] = self._store.manifest['bins'].get(feature.key, ())
      tokens, values = vocabulary.tokens_of(feature, edges, self._missing)
      table = self._ask(
        raws[feature.name],
        f"""SELECT len(tokens) AS given,
          list_resize(coalesce(codes, [0::INTEGER]), {max(1, width)}, {V}::INTEGER) AS code,
          raw IS NOT NULL AND (coalesce(list_contains(codes, 0), false)
            OR ({feature.bins > 0} AND len(tokens) = 0)) AS unknown
        FROM (SELECT place, raw, {tokens} AS tokens FROM asked) LEFT JOIN (
          SELECT place, list(coalesce(code, 0)::INTEGER ORDER BY position) AS codes FROM (
            SELECT place, unnest(tokens) AS id, generate_subscripts(tokens, 1) AS position
            FROM (SELECT place, {tokens} AS tokens FROM asked)
          ) LEFT JOIN known_{feature.table} USING (id) GROUP BY place
        ) USING (place)""",
        values,
      )
      found = table.column('code').combine_chunks().flatten().to_numpy()
      codes[feature.key] = found.reshape(-1, width) if width else found
      unknown[feature.key] = int(np.sum(table.column('unknown').to_numpy()))
      if width:
        given = table.column('given').fill_null(0).to_numpy()
        cut += int(np.sum(given > width))
    return Context(codes, unknown, cut)
