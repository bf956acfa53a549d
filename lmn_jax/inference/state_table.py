"""The states of all users in a file, a SQLite database.

What is written within `StateTable.writing` is one transaction, which does not block readers.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from lmn_jax.data.reads import Reads
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.inference.segment_states import UserStates
from lmn_jax.inference.user_states import StatefulModel, stateful_model
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup

FILE = 'states.sqlite'
OLDEST = -(2**63)  # before any event
CHUNK = 8  # batches of users in memory at a time
SCHEMA = '1'  # raise when the layout or the meaning of a column changes
TABLES = (
  'CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)',
  'CREATE TABLE IF NOT EXISTS logs (log TEXT PRIMARY KEY)',
  """CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, row INTEGER, segments INTEGER,
  held INTEGER, time INTEGER, recent BLOB, carry BLOB, newest BLOB)""",
)
COLUMNS = 'user, row, segments, held, time, recent, carry, newest'


class Newest(NamedTuple):
  """The newest time of a user's events, and the item rows of the events of that time.

  items: None in a table of an earlier version; then all events of that time count as added before.
  """

  time: int
  items: np.ndarray | None


def fingerprint(state: State) -> str:
  """Returns the sha256 of the weights: dense parameters, statistics and tables."""
  digest = hashlib.sha256()
  rows = {name: table.rows_RD for name, table in sorted(state.tables.items())}
  for leaf in jax.tree.leaves((state.params, state.stats, rows)):
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()


class StateTable:
  """The states of all users in one SQLite file, by raw user id.

  Attributes:
    path: the file.
  """

  def __init__(self, path: Path, like: UserStates, origin: dict[str, str]):
    """Opens the file, or creates it.

    Args:
      path: the file. like: states of any users, for their shapes. origin: the weights and the
        vocabulary of the states; those of an existing file must be equal.

    Raises:
      UserError: the states have another origin, or the file is not a table of states.
    """
    self.path = path
    leaves = _kept(like)
    self._carry = [(x.dtype, x.shape[1:]) for x in leaves]
    shape = [[str(dtype), list(shape)] for dtype, shape in self._carry]
    meta = {**origin, 'schema': SCHEMA, 'state': json.dumps([like.recent['item'].shape[1], shape])}
    self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
    try:
      self._begin(meta)
    except BaseException:
      self._db.close()
      raise

  def _begin(self, meta):
    """Creates missing tables, and checks that the states are of the same origin."""
    try:
      self._db.execute('PRAGMA journal_mode = WAL')
      with self.writing():
        for table in TABLES:
          self._db.execute(table)
        columns = [name for _, name, *_ in self._db.execute('PRAGMA table_info(states)')]
        if 'newest' not in columns:
          self._db.execute('ALTER TABLE states ADD COLUMN newest BLOB')
        stored = dict(self._db.execute('SELECT name, value FROM meta'))
        if not stored:
          self._db.executemany('INSERT INTO meta VALUES (?, ?)', list(meta.items()))
    except sqlite3.DatabaseError as error:
      raise UserError(f'{self.path} is not a table of user states ({error}); delete it') from None
    for name, value in stored.items():
      if meta.get(name) != value:
        raise UserError(
          f'{self.path}: the {name} of its states is {value:.60}, and now {meta.get(name)!s:.60}; '
          'delete the file, and all states are computed again from the store'
        )

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """A transaction: `put` and `note` within it are kept if it succeeds, and undone if it fails."""
    self._db.execute('BEGIN IMMEDIATE')
    try:
      yield
    except BaseException:
      self._db.execute('ROLLBACK')
      raise
    self._db.execute('COMMIT')

  def users(self) -> int:
    """Returns the number of users."""
    return self._db.execute('SELECT count(*) FROM states').fetchone()[0]

  def note(self, log: str) -> bool:
    """Records, within `writing`, that a log was added; returns False if it was added before."""
    return self._db.execute('INSERT OR IGNORE INTO logs VALUES (?)', [log]).rowcount > 0

  def logs(self) -> list[str]:
    """Returns the names of the logs that were added, sorted."""
    return [log for (log,) in self._db.execute('SELECT log FROM logs ORDER BY log')]

  def get(self, users: Sequence[str], empty: UserStates) -> tuple[UserStates, list[Newest | None]]:
    """Returns the states of users and the newest events of each, None where there is no state.

    Args:
      users: raw ids. empty: the states of users that are not in the table.
    """
    states, newest = jax.tree.map(np.copy, empty), []
    carry = _kept(states)
    for n, user in enumerate(users):
      row = self._db.execute(f'SELECT {COLUMNS} FROM states WHERE user = ?', [user]).fetchone()
      if row is None:
        newest.append(None)
        continue
      _, states.row[n], states.segments[n], states.held[n], time, recent, content, items = row
      states.recent['item'][n] = np.frombuffer(recent, np.int32)
      begin = 0
      for leaf, (dtype, shape) in zip(carry, self._carry, strict=True):
        size = int(np.prod(shape, dtype=int))
        leaf[n] = np.frombuffer(content, dtype, size, begin).reshape(shape)
        begin += size * dtype.itemsize
      newest.append(Newest(time, None if items is None else np.frombuffer(items, np.int32)))
    return states, newest

  def newest(self, users: Sequence[str | None]) -> list[int]:
    """Returns the time of each user's newest event; OLDEST where there is no state or no event."""
    query = 'SELECT time FROM states WHERE user = ?'
    rows = (self._db.execute(query, [user]).fetchone() for user in users)
    return [OLDEST if row is None else row[0] for row in rows]

  def newest_of_all(self) -> int:
    """Returns the time of the newest event of any user; OLDEST without an event."""
    (time,) = self._db.execute('SELECT max(time) FROM states').fetchone()
    return OLDEST if time is None else time

  def put(self, users: Sequence[str], states: UserStates, newest: Sequence[Newest]) -> None:
    """Stores, within `writing`, the states of users and the newest events of each."""
    carry = _kept(states)
    self._db.executemany(
      f'INSERT OR REPLACE INTO states ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
      (
        (
          user, int(states.row[n]), int(states.segments[n]), int(states.held[n]), newest[n].time,
          states.recent['item'][n].tobytes(), b''.join(leaf[n].tobytes() for leaf in carry),
          None if newest[n].items is None else np.asarray(newest[n].items, np.int32).tobytes(),
        )
        for n, user in enumerate(users)
      ),
    )  # fmt: skip

  def close(self) -> None:
    """Closes the file."""
    self._db.close()


def _kept(states: UserStates) -> list[np.ndarray]:
  """Returns the arrays of the column `carry`: the carry, then the recent events but their items."""
  rest = {name: x for name, x in states.recent.items() if name != 'item'}
  return jax.tree.leaves((states.carry, rest))


def newest_time(store: Store, table: StateTable | None, reads: Reads) -> int:
  """Returns the time of the newest event that is known, of the store or of the states.

  Where the log has no times, it is the newest position of the store, or 0 if no times are read.
  """
  newest = OLDEST if table is None else table.newest_of_all()
  if store.clock.timed:
    return max(store.clock.last, newest)
  if not reads.time:
    return 0
  columns = (x['time'] for part in store.parts for x in (part.history, part.examples))
  return max(int(x.max()) for x in columns if len(x))


def open_table(workdir: Path, store: Store, model: StatefulModel, weights: str) -> StateTable:
  """Opens the table of a run, and creates it if there is none.

  Args:
    workdir: of the run. store: its data. model: its model. weights: their `fingerprint`.

  Raises:
    UserError: as `StateTable`.
  """
  origin = {'weights': weights, 'vocabulary': store.fingerprint}
  return StateTable(workdir / FILE, model.empty(np.zeros(0, np.int32)), origin)


def open_complete(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, setup: Setup, weights: str
) -> StateTable | None:
  """Opens the table of a run; None if the run has none, or the store's histories are not in it.

  Raises:
    UserError: as `StateTable`.
  """
  if not setup.task.states or not (workdir / FILE).exists():
    return None
  table = open_table(workdir, store, stateful_model(config, setup), weights)
  if store_log(store) in table.logs():
    return table
  table.close()
  return None


def store_log(store: Store) -> str:
  """Returns the name under which `StateTable.note` records all histories of a store."""
  return f'store {store.fingerprint}'
