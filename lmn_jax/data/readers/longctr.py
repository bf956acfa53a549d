"""The three-part Parquet layout of the long CTR sets: impressions, users with histories, items.

A folder holds train.parquet, valid.parquet and test.parquet, a row an impression with
`user_index, item_index, seq_len, is_click`; user_info.parquet, whose row i holds `full_item_seq`
(oldest first) of user i; and item_info.parquet, keyed by `item_index`. The history of an
impression is the first `seq_len` items, so events get the time 0..n-1 and impressions the time
`seq_len`: "strictly earlier" then gives these items.
"""

from pathlib import Path

import duckdb
import ml_collections

from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.parquet import parquet
from lmn_jax.data.readers.reader import Opened, Reader, Source
from lmn_jax.data.readers.table import Table
from lmn_jax.data.splits import SPLITS
from lmn_jax.errors import UserError, one_of

# The columns that are made here: what a row is, and the part that it belongs to.
KIND, PART = '@kind', '@part'
# Fields of config.data that the layout decides itself, with the values that leave them alone.
DECIDED = dict(
  user='user', item='item', time='time', order='', label='label', behaviour='', time_format='',
  history='positive', split_column='', positive_behaviours=(), history_behaviours=(),
  example_behaviours=(),
)  # fmt: skip


class LongCtr(Reader):
  """The folder of such a set."""

  name, rows, splits, tells_split = 'longctr', False, False, True

  def matches(self, source):
    return Path(source).is_dir()

  def check(self, data: ml_collections.ConfigDict):
    own = mapped(data)
    for field, default in DECIDED.items():
      if data[field] not in (default, own[field]):
        raise UserError(
          f'config.data.{field}={data[field]!r} is not read: the folder has columns of its own'
        )

  def signature(self, source, field):
    return {path.name: path for path in sorted(Path(source).glob('*.parquet'))}

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    log, users, items = tables(source, db)
    return Opened(mapped(data), log, [users], [items], positions=True)


def mapped(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the configuration with the layout's own column names filled in."""
  data = ml_collections.ConfigDict(data)
  data.update(
    user='user_index',
    item='item_index',
    time='seq_len',
    time_format='',
    label='is_click',
    behaviour=KIND,
    positive_behaviours=(),
    history='positive',
    history_behaviours=('history',),
    example_behaviours=('example',),
    split_column=PART,
  )
  return data


def tables(source: Source, db: duckdb.DuckDBPyConnection) -> tuple[list[Table], Table, Table]:
  """Opens the folder.

  An event of a history belongs to the first part whose impressions see it, so that the training
  vocabulary holds no item that training never shows.

  Returns:
    The tables of events and impressions, the table of users, and the table of items.

  Raises:
    UserError: if a file or a column is missing; a user or a length is out of its range.
  """
  folder = Path(source.pattern)
  if not folder.is_dir():
    raise UserError(f'{source.field}={source.pattern!r} is not a folder; longctr reads a folder')
  opened = {}
  for part in (*SPLITS, 'user_info', 'item_info'):
    path = folder / f'{part}.parquet'
    if not path.is_file():
      raise UserError(
        f'{path} is missing; a longctr folder holds {", ".join(SPLITS)}, user_info, item_info'
      )
    opened[part] = parquet(source, path, db)
  one_of(f'{opened["user_info"].name}: column', 'full_item_seq', opened['user_info'].columns)
  one_of(f'{opened["item_info"].name}: column', 'item_index', opened['item_info'].columns)
  for part in SPLITS:
    for column in ('user_index', 'item_index', 'seq_len', 'is_click'):
      one_of(f'{opened[part].name}: column', column, opened[part].columns)

  info = f'read_parquet({literal(folder / "user_info.parquet")}, file_row_number=true)'
  for part in SPLITS:
    _check(opened[part], info, db)

  lengths = ' '.join(
    f"""LEFT JOIN (SELECT user_index AS {p}_user, max(seq_len) AS {p}_length
      FROM {opened[p].relation([])} GROUP BY ALL) ON {p}_user = file_row_number"""
    for p in ('train', 'valid')
  )
  events = f"""(SELECT file_row_number AS user_index, unnest(full_item_seq) AS item_index,
      unnest(range(len(full_item_seq))) AS position, train_length, valid_length
    FROM {info} {lengths})"""
  columns = dict.fromkeys(opened['train'].columns, 'NULL') | {
    'user_index': 'CAST(user_index AS VARCHAR)',
    'item_index': 'CAST(item_index AS VARCHAR)',
    'seq_len': 'CAST(position AS VARCHAR)',
    'is_click': "'1'",
    KIND: "'history'",
    PART: "CASE WHEN position < train_length THEN 'train' WHEN position < valid_length "
    "THEN 'valid' ELSE 'test' END",
  }
  log = [Table(opened['user_info'].name, columns, lambda _: events)]
  for part in SPLITS:
    marks = {KIND: "'example'", PART: literal(part)}
    log.append(opened[part]._replace(columns=opened[part].columns | marks))
  number = {'user_index': 'CAST(file_row_number AS VARCHAR)'}
  users = opened['user_info']._replace(
    columns=opened['user_info'].columns | number, relation=lambda _: info
  )
  return log, users, opened['item_info']


def _check(table: Table, info: str, db: duckdb.DuckDBPyConnection) -> None:
  """Every impression is of a known user, and no longer than the history allows."""
  bad = db.execute(
    f"""SELECT user_index, seq_len, length FROM {table.relation([])}
    LEFT JOIN (SELECT file_row_number AS number, len(full_item_seq) AS length FROM {info})
      ON number = user_index
    WHERE number IS NULL OR seq_len < 0 OR seq_len > coalesce(length, 0) LIMIT 1"""
  ).fetchone()
  if bad is None:
    return
  user, seq_len, length = bad
  if length is None:
    raise UserError(f'{table.name}: user_index={user} is no row of user_info.parquet')
  raise UserError(
    f'{table.name}: seq_len={seq_len} of user_index={user} is not within 0..{length}, the length '
    'of its full_item_seq'
  )
