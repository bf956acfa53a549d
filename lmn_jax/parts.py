"""One part of the store: a range of users with their events and examples, written as Arrow files.

Parts do not know of each other. `write_part` reads one part's staged rows and writes its three
files, so writers may run in any order and in several processes, and the bytes are the same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from lmn_jax.readers import literal
from lmn_jax.splits import SPLITS


def write_arrow(path: Path, columns: dict[str, Any]) -> dict:
  """Writes columns as an Arrow file of one record batch, so each is contiguous in the file.

  Args:
    path: the file to write.
    columns: name to numpy array [N] or [N, M] (a fixed-size list), or to an Arrow array [N].

  Returns:
    The file's entry in the manifest: `bytes` and `sha256`.
  """
  arrays = {
    name: pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])
    if isinstance(column, np.ndarray) and column.ndim == 2
    else pa.array(column)
    for name, column in columns.items()
  }
  batch = pa.RecordBatch.from_pydict(arrays)
  with pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_file(sink, batch.schema) as writer:
    writer.write_batch(batch)
  return entry(path)


def entry(path: Path) -> dict:
  """A file's size in bytes and its sha256."""
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return dict(bytes=path.stat().st_size, sha256=digest)


def column(table: pa.Table, name: str, width: int = 0) -> np.ndarray:
  """A column of codes, [N] or, for width M > 0, [N, M], int32."""
  array = table.column(name).combine_chunks()
  if width:
    return array.flatten().to_numpy().astype(np.int32, copy=False).reshape(-1, width)
  return array.to_numpy().astype(np.int32, copy=False)


def write_part(scratch: str | Path, folder: str | Path, part: int) -> dict:
  """Writes `folder/part-<part>` from the rows that `prepare.plan` staged in `scratch`.

  Args:
    scratch: holds plan.json, rows/part=*/ and users/part=*/.
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
  with duckdb.connect(config={'memory_limit': plan['memory_limit']}) as db:
    db.execute(f'SET temp_directory = {literal(scratch / name)}; SET enable_progress_bar = false')
    users = _staged(db, scratch / 'users', part, 'position')
    rows = _staged(db, scratch / 'rows', part, 'user, time, row')
  widths = plan['widths']
  count = plan['parts'][part]['users']
  user, event = column(rows, 'user'), rows.column('history').to_numpy()
  item, time = column(rows, 'item'), rows.column('time').to_numpy()
  label = rows.column('label').to_numpy().astype(np.float32, copy=False)
  end = events_before(user, time, event)

  events = np.bincount(user[event], minlength=count).astype(np.int64)
  user_rows = column(users, 'row')
  files = {
    'users.arrow': dict(
      user_id=users.column('user').combine_chunks().cast(pa.large_string()),
      row=user_rows,
      offset=np.cumsum(events) - events,
      count=events,
      **{key: column(users, key, widths[key]) for key in plan['features']['user']},
    ),
    'history.arrow': dict(item=item[event], time=time[event]),
  }

  logged = np.flatnonzero(rows.column('example').to_numpy())
  split = np.zeros(len(user), np.int8)
  split[logged] = rows.column('split').take(pa.array(logged)).to_numpy()
  # Examples of a split lie together, so that a batch finds its rows without an index.
  logged = logged[np.argsort(split[logged], kind='stable')]
  chosen, chosen_item, chosen_label = logged, item[logged], label[logged]
  short = 0
  if plan['negatives']:
    copies = np.where(label[logged] > 0, plan['negatives'], 0)
    negative = sample_negatives(
      logged, copies, user, item, time, rows.column('row').to_numpy(), plan['items'], plan['seed']
    )
    short = int((negative == 0).sum())
    # Each positive is followed by its negatives.
    order = np.argsort(
      np.concatenate([np.arange(len(logged)), np.repeat(np.arange(len(logged)), copies)]),
      kind='stable',
    )
    chosen = np.concatenate([logged, np.repeat(logged, copies)])[order]
    chosen_item = np.concatenate([item[logged], negative])[order]
    chosen_label = np.concatenate([label[logged], np.zeros(len(negative), np.float32)])[order]
    possible = np.concatenate([np.ones(len(logged), bool), negative > 0])[order]
    chosen, chosen_item, chosen_label = (
      chosen[possible],
      chosen_item[possible],
      chosen_label[possible],
    )
  files['examples.arrow'] = dict(
    user=user[chosen],
    item=chosen_item,
    label=chosen_label,
    time=time[chosen],
    end=end[chosen],
    split=split[chosen],
    **{key: column(rows, key, widths[key])[chosen] for key in plan['features']['context']},
  )

  def by_split(index: np.ndarray, mask: np.ndarray) -> dict[str, int]:
    counts = np.bincount(split[index[mask]], minlength=len(SPLITS))
    return dict(zip(SPLITS, counts.tolist(), strict=True))

  return dict(
    folder=name,
    first=plan['parts'][part]['first'],
    users=count,
    users_without_history=int((events == 0).sum()),
    events=int(event.sum()),
    examples=by_split(chosen, np.ones(len(chosen), bool)),
    clicks=by_split(chosen, chosen_label > 0),
    logged=by_split(logged, np.ones(len(logged), bool)),
    unknown_items=by_split(logged, item[logged] == 0),
    unknown_users=by_split(logged, user_rows[user[logged]] == 0),
    unknown_features={
      key: by_split(logged, (codes == 0).any(axis=tuple(range(1, codes.ndim))))
      for key, codes in {
        **{key: files['users.arrow'][key][user[logged]] for key in plan['features']['user']},
        **{key: column(rows, key, widths[key])[logged] for key in plan['features']['context']},
      }.items()
    },
    negatives_short=short,
    files={file: write_arrow(target / file, columns) for file, columns in files.items()},
  )


def _staged(db: duckdb.DuckDBPyConnection, folder: Path, part: int, order: str) -> pa.Table:
  """The rows of one part, sorted; of no rows where the folder has none for this part."""
  found = folder / f'part={part}'
  files = [str(path) for path in sorted(found.glob('*.parquet'))]
  limit = ''
  if not files:  # users without a row
    files, limit = [str(next(folder.glob('part=*/*.parquet')))], 'LIMIT 0'
  query = f'SELECT * FROM read_parquet($1, hive_partitioning=false) ORDER BY {order} {limit}'
  return db.sql(query, params=[files]).to_arrow_table()


def events_before(user: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
  """For each row, the number of the user's events with a time strictly earlier.

  Rows of one user and one time form a tie group; all of them see what lies before its first row.

  Args:
    user: int [R], sorted.
    time: int64 [R], sorted within a user.
    event: bool [R], the row is a history event.

  Returns:
    int64 [R].
  """
  earlier = np.cumsum(event, dtype=np.int64) - event  # events of the part before each row
  new_user = np.r_[True, user[1:] != user[:-1]]
  new_group = new_user | np.r_[True, time[1:] != time[:-1]]
  index = np.arange(len(user))
  group = np.maximum.accumulate(np.where(new_group, index, 0))
  first = np.maximum.accumulate(np.where(new_user, index, 0))
  return earlier[group] - earlier[first]


def sample_negatives(
  rows: np.ndarray,
  copies: np.ndarray,
  user: np.ndarray,
  item: np.ndarray,
  time: np.ndarray,
  identity: np.ndarray,
  items: int,
  seed: int,
) -> np.ndarray:
  """Items for label-0 examples, uniform over the vocabulary without what the user already met.

  An item is refused if the user has a row with it at or before the example's time. Draw t of copy
  c of the example of original row r is a hash of (seed, r, c, t), so that neither the cut into
  parts nor the order of writing changes it.

  Args:
    rows: int [E], the positives (indices into the part's rows).
    copies: int [E], negatives wanted for each.
    user, item, time: [R], the part's rows, sorted by user, then time.
    identity: int64 [R], original row numbers.
    items: V; rows 1..V-1 can be drawn.
    seed: of the config.

  Returns:
    int32 [sum(copies)], grouped by example; 0 where the user has met every item.
  """
  row = np.repeat(rows, copies)
  copy = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
  negative = np.zeros(len(row), np.int32)
  # The first occurrence of a (user, item) pair is its earliest, for rows are in time order.
  pairs, where = np.unique(user.astype(np.int64) * items + item, return_index=True)
  earliest = time[where]
  seeded = mix(np.array([seed % 2**64], np.uint64))
  key = mix(mix(identity[row].astype(np.uint64) ^ seeded) + np.uint64(1))
  key = mix(key ^ copy.astype(np.uint64))
  left = np.arange(len(row)) if items > 1 else np.arange(0)
  for attempt in range(32):
    if not len(left):
      return negative
    draw = mix(key[left] + np.uint64(attempt)) % np.uint64(items - 1) + np.uint64(1)
    wanted = user[row[left]].astype(np.int64) * items + draw.astype(np.int64)
    found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    met = (pairs[found] == wanted) & (earliest[found] <= time[row[left]])
    negative[left[~met]] = draw[~met]
    left = left[met]
  # Users who know nearly everything: list what is left for each and take one of it.
  for i in left:
    lo, hi = np.searchsorted(pairs, user[row[i]].astype(np.int64) * items + np.array([0, items]))
    free = np.ones(items, bool)
    free[0] = False
    free[pairs[lo:hi][earliest[lo:hi] <= time[row[i]]] % items] = False
    free = np.flatnonzero(free)
    if len(free):
      negative[i] = free[int(mix(key[i : i + 1] + np.uint64(32))[0] % np.uint64(len(free)))]
  return negative


def mix(x: np.ndarray) -> np.ndarray:
  """A bijection of uint64 that scatters its bits (the finaliser of SplitMix64, Steele 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
