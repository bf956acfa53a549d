"""The three-part Parquet layout of long CTR data sets: impressions, users with histories, items.

A folder contains train.parquet, valid.parquet and test.parquet, with one row per impression and the
columns `user_index, item_index, seq_len, is_click` (`click` in EB-NeRD); user_info.parquet, whose
row i has the `full_item_seq` of user i, oldest item first; and item_info.parquet, with the key
`item_index`, features, and in KuaiVideo and MicroVideo image vectors of 64 numbers,
`image_emb_dim64`. Source of the columns: the configs of github.com/reczoo/LongCTR.

The history of an impression is the first `seq_len` items. Events therefore get the times 0..n-1 and
impressions the time `seq_len`; the events strictly earlier than an impression are its history.
"""

from collections.abc import Mapping
from pathlib import Path

import duckdb
import ml_collections

from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.parquet import parquet_table
from lmn_jax.data.readers.reader import Opened, Reader, Source
from lmn_jax.data.readers.table import Table
from lmn_jax.data.splits import SPLITS
from lmn_jax.errors import UserError, one_of

IMPRESSION = ('user_index', 'item_index', 'seq_len', 'is_click')  # required columns of a part
CLICK = 'click'  # is `is_click` in EB-NeRD
# Columns added by this reader: 'history' or 'example', and the part that a row belongs to.
KIND, PART = '@kind', '@part'
# Fields of config.data that the layout sets itself, with their defaults.
FIXED = dict(
  user='user', item='item', time='time', order='', label='label', behaviour='', time_format='',
  history='positive', split_column='', positive_behaviours=(), history_behaviours=(),
  example_behaviours=(), event_features=(), labels=(), label_kind='click', weight='',
)  # fmt: skip


class LongCtr(Reader):
  """The folder of a long CTR data set."""

  name, rows, splits, defines_split = 'longctr', False, False, True

  def matches(self, source):
    return Path(source).is_dir()

  def check(self, data: ml_collections.ConfigDict):
    fixed = with_layout(data)
    for field, default in FIXED.items():
      if data[field] not in (default, fixed[field]):
        raise UserError(
          f'config.data.{field}={data[field]!r} is not read: the longctr layout fixes its columns; '
          f'leave it at {default!r}'
        )

  def signature(self, source, field):
    return {path.name: path for path in sorted(Path(source).glob('*.parquet'))}

  def layout(self, data: ml_collections.ConfigDict):
    """See Reader; a vector of items without a file is a column of item_info.parquet."""
    info = Path(data.source) / 'item_info.parquet'
    vectors = {
      name: value if ':' in str(value) else f'{info}:{value}'
      for name, value in data.item_vectors.items()
    }
    fixed = with_layout(data)
    fixed.item_vectors = ml_collections.ConfigDict(vectors)
    return fixed

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    log, users, items = tables(source, db)
    return Opened(with_layout(data), log, [users], [items], positions=True)


def with_layout(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the configuration with the column names of the layout."""
  data = ml_collections.ConfigDict(data)
  data.update(
    user='user_index',
    item='item_index',
    time='seq_len',
    time_format='',
    label='is_click',
    labels=(),
    label_kind='click',
    weight='',
    behaviour=KIND,
    positive_behaviours=(),
    history='positive',
    history_behaviours=('history',),
    example_behaviours=('example',),
    split_column=PART,
    event_features=(),  # histories are lists of items alone
  )
  return data


def tables(source: Source, db: duckdb.DuckDBPyConnection) -> tuple[list[Table], Table, Table]:
  """Opens the folder.

  Returns:
    The tables of events and impressions, the table of users, and the table of items.

  Raises:
    UserError: if a file or a column is missing, or a user or a length is out of range.
  """
  parts = _open_parts(source, db)
  users, items = parts.pop('user_info'), parts.pop('item_info')
  info = f'read_parquet({literal(users.name)}, file_row_number=true)'
  for part in parts.values():
    _check_impressions(part, info, db)
  log = [_events(users.name, parts, info)]
  for name, part in parts.items():
    log.append(part._replace(columns=part.columns | {KIND: "'example'", PART: literal(name)}))
  user_index = {'user_index': 'CAST(file_row_number AS VARCHAR)'}
  users = users._replace(columns=users.columns | user_index, relation=lambda _: info)
  return log, users, items


def _open_parts(source: Source, db: duckdb.DuckDBPyConnection) -> dict[str, Table]:
  """Opens the five files and checks their columns."""
  folder = Path(source.pattern)
  if not folder.is_dir():
    raise UserError(f'{source.field}={source.pattern!r} is not a folder; longctr reads a folder')
  required = dict.fromkeys(SPLITS, IMPRESSION)
  required |= {'user_info': ('full_item_seq',), 'item_info': ('item_index',)}
  opened = {}
  for part in required:
    path = folder / f'{part}.parquet'
    if not path.is_file():
      raise UserError(
        f'{path} is missing; a longctr folder needs {", ".join(f"{x}.parquet" for x in required)}'
      )
    opened[part] = table = parquet_table(source, path, db)
    if part in SPLITS and 'is_click' not in table.columns and CLICK in table.columns:
      renamed = table.columns | {'is_click': table.columns[CLICK]}
      opened[part] = table._replace(columns=renamed)
  for part, columns in required.items():
    for column in columns:
      one_of(f'{opened[part].name}: column', column, opened[part].columns)
  return opened


def _events(name: str, parts: Mapping[str, Table], info: str) -> Table:
  """The table of history events.

  An event belongs to the first part with an impression whose history contains it, so that the
  training vocabulary has no item that occurs only in later parts.
  """
  lengths = ' '.join(
    f"""LEFT JOIN (SELECT user_index AS {p}_user, max(seq_len) AS {p}_length
      FROM {parts[p].relation([])} GROUP BY ALL) ON {p}_user = file_row_number"""
    for p in ('train', 'valid')
  )
  events = f"""(SELECT file_row_number AS user_index, unnest(full_item_seq) AS item_index,
      unnest(range(len(full_item_seq))) AS position, train_length, valid_length
    FROM {info} {lengths})"""
  columns = dict.fromkeys(parts['train'].columns, 'NULL') | {
    'user_index': 'CAST(user_index AS VARCHAR)',
    'item_index': 'CAST(item_index AS VARCHAR)',
    'seq_len': 'CAST(position AS VARCHAR)',
    'is_click': "'1'",
    KIND: "'history'",
    PART: "CASE WHEN position < train_length THEN 'train' WHEN position < valid_length "
    "THEN 'valid' ELSE 'test' END",
  }
  return Table(name, columns, lambda _: events)


def _check_impressions(table: Table, info: str, db: duckdb.DuckDBPyConnection) -> None:
  """Checks that each impression has a known user and a length within the user's history."""
  row = db.execute(
    f"""SELECT user_index, seq_len, length FROM {table.relation([])}
    LEFT JOIN (SELECT file_row_number AS number, len(full_item_seq) AS length FROM {info})
      ON number = user_index
    WHERE number IS NULL OR seq_len < 0 OR seq_len > coalesce(length, 0) LIMIT 1"""
  ).fetchone()
  if row is None:
    return
  user, seq_len, length = row
  if length is None:
    raise UserError(
      f'{table.name}: user_index={user} is not a row of user_info.parquet; rows count from 0'
    )
  raise UserError(
    f'{table.name}: seq_len={seq_len} of user_index={user} is not within 0..{length}, the length '
    "of the user's full_item_seq"
  )
