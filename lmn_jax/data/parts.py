"""One part of the store: a range of users with their events and examples, written as Arrow files.

Parts do not know of each other. `write_part` reads one part's staged rows and writes its three
files, so writers may run in any order and in several processes, and the bytes are the same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from lmn_jax.data import interactions
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.splits import SPLITS
from lmn_jax.distributed import interrupts


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
  limit = {'memory_limit': plan['memory_limit']}
  with interrupts.stops(duckdb.connect(config=limit)) as db:
    db.execute(f'SET temp_directory = {literal(scratch / name)}')
    interactions.hide_progress(db)
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
  chosen, chosen_item, chosen_label, left_out = logged, item[logged], label[logged], 0
  if plan['negatives']:
    training = np.zeros(len(user), bool)
    training[logged] = split[logged] == 0
    log = Rows(user, item, time, training, rows.column('row').to_numpy())
    possible, copies, negative = with_negatives(logged, label[logged] > 0, log, plan)
    left_out = int((~possible).sum())
    logged = logged[possible]
    # Each positive is followed by its negatives.
    order = np.argsort(
      np.concatenate([np.arange(len(logged)), np.repeat(np.arange(len(logged)), copies)]),
      kind='stable',
    )
    chosen = np.concatenate([logged, np.repeat(logged, copies)])[order]
    chosen_item = np.concatenate([item[logged], negative])[order]
    chosen_label = np.concatenate([label[logged], np.zeros(len(negative), np.float32)])[order]
  files['examples.arrow'] = dict(
    user=user[chosen],
    item=chosen_item,
    label=chosen_label,
    time=time[chosen],
    end=end[chosen],
    place=np.where(event, order_of(user, event), -1)[chosen],
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
    left_out=left_out,
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


def order_of(user: np.ndarray, event: np.ndarray) -> np.ndarray:
  """For each row, the number of the user's events in the rows before it: an event's own place.

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
  """For each row, the number of the user's events with a time strictly earlier.

  Rows of one user and one time form a tie group; all of them see what lies before its first row.

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


class Rows(NamedTuple):
  """The rows of a part, sorted by user, then time; each [R].

  user: int, within the part. item: int, embedding row, 0 unknown. time: int64.
  training: bool, an example of training. identity: int64, original row numbers.
  """

  user: np.ndarray
  item: np.ndarray
  time: np.ndarray
  training: np.ndarray
  identity: np.ndarray


def with_negatives(
  examples: np.ndarray, positive: np.ndarray, log: Rows, plan: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The examples that stay, with the sampled negatives of each positive.

  An example without any other item of its kind (see `sample_negatives`) is left out whatever its
  label: as a positive without negatives, or as the only label 0 of its kind, it would tell its
  label.

  Args:
    examples: int [E], indices into the rows. positive: bool [E]. log: the rows.
    plan: has `negatives` for each positive, `items` and `seed`.

  Returns:
    Which examples stay, bool [E]; negatives of each that stays, int [S]; their items, int32,
    grouped by example.
  """
  copies = np.where(positive, plan['negatives'], 1)  # of a label 0 only to see if there is one
  negative = sample_negatives(examples, copies, log, plan['items'], plan['seed'])
  possible = negative[np.cumsum(copies) - copies] >= 0
  kept = np.repeat(possible & positive, copies)
  return possible, np.where(positive, plan['negatives'], 0)[possible], negative[kept]


# How a user has met an item, at a row: not at all; before it; at the very same time, which
# the history does not show, but a training example does.
NEVER, BEFORE, LEARNT, AT_ONCE = range(4)


class _Met:
  """How the user of a row has met items, by their other rows."""

  def __init__(self, log: Rows, items: int):
    self._log, self._items = log, items
    user = log.user.astype(np.int64)
    # The first occurrence of a (user, item) pair is its earliest, for rows are in time order.
    self._pairs, where = np.unique(user * items + log.item, return_index=True)
    self._earliest = log.time[where]
    new = np.r_[True, (user[1:] != user[:-1]) | (log.time[1:] != log.time[:-1])]
    self._second = np.cumsum(new) - 1  # number of the group of one user and time
    tie = self._second * items + log.item
    self._ties, of_tie = np.unique(tie, return_inverse=True)
    self._learnt = np.bincount(of_tie, log.training) > 0
    # Pools to draw from: a user's items in the order of meeting them, then those of each second.
    of_user = self._pairs // items
    order = np.lexsort((self._earliest, of_user))
    self._pool = np.concatenate([self._pairs[order] % items, self._ties % items])
    stamps, rank = np.unique(log.time, return_inverse=True)
    key = of_user * len(stamps) + np.searchsorted(stamps, self._earliest)
    self._first = np.searchsorted(of_user, user)
    self._before = np.searchsorted(key[order], user * len(stamps) + rank) - self._first

  def kind(self, row: np.ndarray, item: np.ndarray, own: bool = False) -> np.ndarray:
    """NEVER | BEFORE | LEARNT | AT_ONCE of items at rows, int [N].

    own: the items are the rows' own. A held-out one may be LEARNT, none is AT_ONCE with itself.
    """
    pair, tie = (x[row] * np.int64(self._items) + item for x in (self._log.user, self._second))
    found = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
    before = (self._pairs[found] == pair) & (self._earliest[found] < self._log.time[row])
    found = np.minimum(np.searchsorted(self._ties, tie), len(self._ties) - 1)
    tied, trains = self._ties[found] == tie, self._log.training[row]
    learnt = tied & self._learnt[found]
    # What training draws must not depend on held-out rows, or it would show them.
    tied = np.where(trains, learnt, tied) & (not own)
    learnt &= ~trains
    return np.where(learnt, LEARNT, np.where(tied, AT_ONCE, np.where(before, BEFORE, NEVER)))

  def pool(self, row: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and size of the pool that has all items of a kind, and others; each int64 [N]."""
    low, high = (
      np.searchsorted(self._ties, (self._second[row] + k) * self._items) for k in range(2)
    )
    known = np.full(len(row), self._items - 1)
    begin = [np.zeros(len(row), np.int64), self._first[row], len(self._pairs) + low]
    return np.choose(kind, begin), np.choose(kind, [known, self._before[row], high - low])

  def item(self, kind: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The item at a place of a pool; the pool of NEVER are the rows 1..V-1."""
    return np.where(kind == NEVER, at + 1, self._pool[np.minimum(at, len(self._pool) - 1)])


def sample_negatives(
  rows: np.ndarray, copies: np.ndarray, log: Rows, items: int, seed: int
) -> np.ndarray:
  """Items for label-0 examples, uniform over the other items of the positive's kind.

  A negative must not be told from its positive by how it was drawn, so the user has met both alike:
  never, before, or in a training example of the very same time; and the negative of an item outside
  of the vocabulary is outside of it too, row 0. Where no user meets an item twice, this is: uniform
  over the vocabulary without what the user has met by then.

  Draw t of copy c of the example of original row r is a hash of (seed, r, c, t), so that neither
  the cut into parts nor the order of writing changes it.

  Args:
    rows: int [E], the positives (indices into the rows).
    copies: int [E], negatives wanted for each.
    log: the part's rows.
    items: V; rows 1..V-1 can be drawn.
    seed: of the config.

  Returns:
    int32 [sum(copies)], grouped by example; -1 where there is no other item of the kind.
  """
  row = np.repeat(rows, copies)
  copy = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
  own = log.item[row]
  negative = np.where(own == 0, 0, -1).astype(np.int32)
  met = _Met(log, items)
  kind = met.kind(row, own, own=True)
  begin, size = met.pool(row, kind)

  def fits(i, drawn):
    return (drawn > 0) & (drawn != own[i]) & (met.kind(row[i], drawn) == kind[i])

  seeded = mix(np.array([seed % 2**64], np.uint64))
  key = mix(mix(log.identity[row].astype(np.uint64) ^ seeded) + np.uint64(1))
  key = mix(key ^ copy.astype(np.uint64))
  left = np.flatnonzero((own > 0) & (size > 1))
  for attempt in range(32):
    draw = mix(key[left] + np.uint64(attempt)) % size[left].astype(np.uint64)
    drawn = met.item(kind[left], begin[left] + draw.astype(np.int64))
    fit = fits(left, drawn)
    negative[left[fit]] = drawn[fit]
    left = left[~fit]
  # Where little of a pool fits: list what does, and take one of it.
  for i in left:
    every = np.full(size[i], i)
    free = met.item(kind[every], begin[i] + np.arange(size[i]))
    free = np.sort(free[fits(every, free)])
    if len(free):
      negative[i] = free[int(mix(key[i : i + 1] + np.uint64(32))[0] % np.uint64(len(free)))]
  return negative


def mix(x: np.ndarray) -> np.ndarray:
  """A bijection of uint64 that scatters its bits (the finaliser of SplitMix64, Steele 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
