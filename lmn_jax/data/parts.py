"""One part of a store: a range of users with their events and examples, written as Arrow files.

Parts are independent. `write_part` reads the staged rows of one part and writes its three files, so
parts may be written in any order and in several processes, and the bytes are the same.

Each named history is written as a file of its own, a copy of its rows of the main history, and not
as a list of places in it: so the events that a batch reads are adjacent, one copy on the host and
one gather on a device, and the two histories are read at the same cost.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from lmn_jax.data import interactions, label_counts
from lmn_jax.data.arrow_files import codes_of, numbers_of, write_arrow
from lmn_jax.data.labels import WEIGHT
from lmn_jax.data.labels import column_of as column_of_label
from lmn_jax.data.named_histories import MAIN, column_of, staged_column
from lmn_jax.data.negatives import Rows, with_negatives
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.splits import SPLITS
from lmn_jax.distributed import interrupts


class _Log(NamedTuple):
  """The staged rows of a part, sorted by user, time and original row. R rows.

  table: all columns. user: int32 [R], within the part. item: int32 [R]. time: int64 [R]. label:
  float32 [R]. event: bool [R], the row is a history event. logged: bool [R], the row is an example.
  split: int8 [R], 0 where the row is no example. histories: name -> bool [R], the row is an event
  of this history; MAIN has all events.
  """

  table: pa.Table
  user: np.ndarray
  item: np.ndarray
  time: np.ndarray
  label: np.ndarray
  event: np.ndarray
  logged: np.ndarray
  split: np.ndarray
  histories: dict[str, np.ndarray]


class _Examples(NamedTuple):
  """The examples of a part, by split; E with sampled negatives, S without.

  row: int [E], the row that each results from. item: int32 [E]. labels: float32 [E] each by their
  columns in examples.arrow, the main one first; NaN where a label is missing, 0 of a sampled
  negative. logged: int [S], the rows that are examples. dropped: rows without another item of their
  kind, see `with_negatives`.
  """

  row: np.ndarray
  item: np.ndarray
  labels: dict[str, np.ndarray]
  logged: np.ndarray
  dropped: int


def write_part(scratch: str | Path, folder: str | Path, part: int) -> dict:
  """Writes `folder/part-<part>` from the rows that `build.plan` staged in `scratch`.

  Args:
    scratch: has plan.json, rows/part=*/ and users/part=*/.
    folder: the store under construction.
    part: number of the part.

  Returns:
    The part's entry in the manifest: counts, and size and checksum of each file.
  """
  scratch = Path(scratch)
  plan = json.loads((scratch / 'plan.json').read_text())
  name = f'part-{part:05d}'
  target = Path(folder) / name
  target.mkdir()
  limit = {'memory_limit': plan['memory_limit']}
  with interrupts.stops(duckdb.connect(config=limit)) as db:
    db.execute(f'SET temp_directory = {literal(scratch / name)}')
    interactions.hide_progress(db)
    users = _staged(db, scratch / 'users', part, 'position')
    log = _log_of(_staged(db, scratch / 'rows', part, 'user, time, row'), plan)
  examples = _examples_of(log, plan)
  first, size = plan['parts'][part]['first'], plan['parts'][part]['users']
  profile, context = _features(users, plan, 'user'), _features(log.table, plan, 'context')
  events = dict(item=log.item, time=log.time, **_features(log.table, plan, 'event'))
  tables = {
    'users.arrow': _users_table(users, log, size, profile),
    **{
      f'{column_of(history, "history")}.arrow': {name: x[rows] for name, x in events.items()}
      for history, rows in log.histories.items()
    },
    'examples.arrow': _examples_table(log, examples, context, plan),
  }
  counts = {}
  if len(plan['labels']) > 1 or plan['label_kind'] != 'click':
    of_labels = dict(zip(plan['labels'], examples.labels.values(), strict=True))
    split = log.split[examples.row]
    counts['labels'] = label_counts.of_part(of_labels, split, plan['label_kind'])
  return dict(
    folder=name,
    first=first,
    users=size,
    users_without_history=int((tables['users.arrow']['count'] == 0).sum()),
    events=int(log.event.sum()),
    **_counts(log, examples, tables['users.arrow'], profile, context, plan),
    left_out=examples.dropped,
    **counts,
    files={file: write_arrow(target / file, columns) for file, columns in tables.items()},
  )


def _features(table: pa.Table, plan: dict, kind: str) -> dict[str, np.ndarray]:
  """The features of a kind in a staged table, by key: int32 codes, then float32 numbers."""
  codes = {key: codes_of(table, key, plan['widths'][key]) for key in plan['features'].get(kind, ())}
  numbers = [key for key in plan['numeric'] if key.startswith(f'{kind}.')]
  return codes | {key: numbers_of(table, key) for key in numbers}


def _staged(db: duckdb.DuckDBPyConnection, folder: Path, part: int, order: str) -> pa.Table:
  """The staged rows of one part, sorted; an empty table if the part has none."""
  files = [str(path) for path in sorted((folder / f'part={part}').glob('*.parquet'))]
  limit = ''
  if not files:  # all users of the part are without a row: the columns are those of another part
    files, limit = [str(next(folder.glob('part=*/*.parquet')))], 'LIMIT 0'
  query = f'SELECT * FROM read_parquet($1, hive_partitioning=false) ORDER BY {order} {limit}'
  return db.sql(query, params=[files]).to_arrow_table()


def _log_of(table: pa.Table, plan: dict) -> _Log:
  user, logged = codes_of(table, 'user'), table.column('example').to_numpy()
  split = np.zeros(len(user), np.int8)
  split[logged] = table.column('split').filter(pa.array(logged)).to_numpy()
  event = table.column('history').to_numpy()
  histories = {
    name: event & table.column(staged_column(name)).to_numpy() for name in plan['histories']
  }
  return _Log(
    table,
    user,
    codes_of(table, 'item'),
    table.column('time').to_numpy(),
    table.column('label').to_numpy().astype(np.float32, copy=False),
    event,
    logged,
    split,
    {MAIN: event} | histories,
  )


def _examples_of(log: _Log, plan: dict) -> _Examples:
  """The examples by split, so that a batch finds its rows without an index, and their negatives."""
  logged = np.flatnonzero(log.logged)
  logged = logged[np.argsort(log.split[logged], kind='stable')]
  labels = _labels(log, plan)
  if not plan['negatives']:
    of_examples = {name: values[logged] for name, values in labels.items()}
    return _Examples(logged, log.item[logged], of_examples, logged, 0)
  training, identity = log.logged & (log.split == 0), log.table.column('row').to_numpy()
  rows = Rows(log.user, log.item, log.time, training, identity)
  possible, copies, negative = with_negatives(logged, log.label[logged] > 0, rows, plan)
  logged = logged[possible]
  # Each positive is followed by its negatives.
  order = np.argsort(
    np.concatenate([np.arange(len(logged)), np.repeat(np.arange(len(logged)), copies)]),
    kind='stable',
  )
  zeros = np.zeros(len(negative), np.float32)
  return _Examples(
    np.concatenate([logged, np.repeat(logged, copies)])[order],
    np.concatenate([log.item[logged], negative])[order],
    {name: np.concatenate([x[logged], zeros])[order] for name, x in labels.items()},
    logged,
    int((~possible).sum()),
  )


def _labels(log: _Log, plan: dict) -> dict[str, np.ndarray]:
  """The labels of the rows, by their columns in examples.arrow: float32 [R] each."""
  others = {
    f'label.{name}': log.table.column(column_of_label(name)).to_numpy()
    for name in plan['labels'][1:]
  }
  return {'label': log.label} | {k: x.astype(np.float32, copy=False) for k, x in others.items()}


def _users_table(
  users: pa.Table, log: _Log, size: int, profile: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The columns of users.arrow, in the order of the user records."""
  spans = {}
  for history, rows in log.histories.items():
    count = np.bincount(log.user[rows], minlength=size).astype(np.int64)
    spans[column_of(history, 'offset')] = np.cumsum(count) - count
    spans[column_of(history, 'count')] = count
  return dict(
    user_id=users.column('user').combine_chunks().cast(pa.large_string()),
    row=codes_of(users, 'row'),
    **spans,
    **profile,
  )


def _examples_table(
  log: _Log, examples: _Examples, context: dict[str, np.ndarray], plan: dict
) -> dict[str, np.ndarray]:
  """The columns of examples.arrow. A sampled negative has the weight of its positive."""
  row = examples.row
  more = {name: x for name, x in examples.labels.items() if name != 'label'}
  if plan['weighted']:
    more['weight'] = log.table.column(WEIGHT).to_numpy().astype(np.float32, copy=False)[row]
  return dict(
    user=log.user[row],
    item=examples.item,
    label=examples.labels['label'],
    time=log.time[row],
    **{
      column_of(history, 'end'): events_before(log.user, log.time, rows)[row]
      for history, rows in log.histories.items()
    },
    place=np.where(log.event, order_of(log.user, log.event), -1)[row],
    split=log.split[row],
    **more,
    **{key: column[row] for key, column in context.items()},
  )


def _counts(
  log: _Log,
  examples: _Examples,
  users: dict[str, Any],
  profile: dict[str, np.ndarray],
  context: dict[str, np.ndarray],
  plan: dict,
) -> dict:
  """Counts of the examples by split: all, clicks, and logged ones with unknown ids and values."""
  logged = examples.logged
  user = log.user[logged]

  def by_split(row: np.ndarray, mask: np.ndarray | None = None) -> dict[str, int]:
    split = log.split[row if mask is None else row[mask]]
    return dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist(), strict=True))

  features = {key: column[user] for key, column in profile.items()}
  features |= {key: column[logged] for key, column in context.items()}
  clicks, cold = {}, {}
  if plan['label_kind'] == 'click':
    clicks['clicks'] = by_split(examples.row, examples.labels['label'] > 0)
  if plan['cold_items']:
    cold['cold_items'] = by_split(logged, log.item[logged] > plan['items'])
  return dict(
    examples=by_split(examples.row),
    **clicks,
    logged=by_split(logged),
    unknown_items=by_split(logged, log.item[logged] == 0),
    **cold,
    unknown_users=by_split(logged, users['row'][user] == 0),
    unknown_features={key: by_split(logged, _unknown(column)) for key, column in features.items()},
  )


def _unknown(column: np.ndarray) -> np.ndarray:
  """Whether each row has an unknown code, or no number; bool [R]."""
  if column.dtype == np.float32:
    return np.isnan(column)
  return (column == 0).any(axis=tuple(range(1, column.ndim)))


def order_of(user: np.ndarray, event: np.ndarray) -> np.ndarray:
  """For each row, the number of the user's events in earlier rows: the place of an event.

  Args:
    user: int [R], sorted.
    event: bool [R], the row is a history event.

  Returns:
    int64 [R].
  """
  earlier = np.cumsum(event, dtype=np.int64) - event  # events of the part before each row
  new_user = np.r_[True, user[1:] != user[:-1]]
  first = np.maximum.accumulate(np.where(new_user, np.arange(len(user)), 0))
  return earlier - earlier[first]


def events_before(user: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
  """For each row, the number of the user's events with a strictly earlier time.

  Rows of one user and one time are a group; the history of all of them ends before its first row.

  Args:
    user: int [R], sorted.
    time: int64 [R], sorted within a user.
    event: bool [R], the row is a history event.

  Returns:
    int64 [R].
  """
  new_group = np.r_[True, (user[1:] != user[:-1]) | (time[1:] != time[:-1])]
  group = np.maximum.accumulate(np.where(new_group, np.arange(len(user)), 0))
  return order_of(user, event)[group]
