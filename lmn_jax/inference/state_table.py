"""The states of all users in a file, and the command that brings them up to date.

The file is a table of SQLite, of the standard library: a log of new events is taken in as one
transaction, all of it or nothing, while others go on reading. The first time all histories of the
store are read, from then on the new events alone.
"""

import contextlib
import hashlib
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from lmn_jax.data.new_events import Events, events_of_log, events_of_store, log_of
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.inference.user_states import Server, UserStates, make_server
from lmn_jax.training import trained_run
from lmn_jax.training.program import State
from lmn_jax.training.tasks import TASKS

FILE = 'states.sqlite'
COUNTS = ('users', 'events', 'new_users', 'old_events')
OLDEST = -(2**63)  # before any event
CHUNK = 8  # lanes full of users, held at a time
SCHEMA = '1'  # raise when the layout or the meaning of a column changes
TABLES = (
  'CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)',
  'CREATE TABLE IF NOT EXISTS logs (log TEXT PRIMARY KEY)',
  """CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, row INTEGER, segments INTEGER,
  held INTEGER, time INTEGER, recent BLOB, carry BLOB, newest BLOB)""",
)
COLUMNS = 'user, row, segments, held, time, recent, carry, newest'


class Newest(NamedTuple):
  """The newest time of a user's events, and the item rows of those that have it.

  items: None in a table of an earlier version: all events of that time count as taken in.
  """

  time: int
  items: np.ndarray | None


def fingerprint(state: State) -> str:
  """sha256 of the weights that scores are made of: dense parameters, statistics, tables."""
  found = hashlib.sha256()
  rows = {name: table.rows_RD for name, table in sorted(state.tables.items())}
  for leaf in jax.tree.leaves((state.params, state.stats, rows)):
    found.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return found.hexdigest()


class StateTable:
  """The states of all users in one file of SQLite, by raw user id.

  Attributes:
    path: the file.
  """

  def __init__(self, path: Path, like: UserStates, origin: dict[str, str]):
    """Opens the file, or makes it.

    Args:
      path: the file. like: states of any users, for the shapes of one. origin: of what weights and
        vocabulary the states are; what they were made with must be the same.

    Raises:
      UserError: states of something else, or no such file.
    """
    self.path = path
    leaves = jax.tree.leaves(like.carry)
    self._carry = [(x.dtype, x.shape[1:]) for x in leaves]
    shape = [[str(dtype), list(shape)] for dtype, shape in self._carry]
    meta = {**origin, 'schema': SCHEMA, 'state': json.dumps([like.recent.shape[1], shape])}
    self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
    try:
      self._begin(meta)
    except BaseException:
      self._db.close()
      raise

  def _begin(self, meta):
    """Makes the tables that are missing; what is there must be of the same origin."""
    try:
      self._db.execute('PRAGMA journal_mode = WAL')
      with self.writing():
        for table in TABLES:
          self._db.execute(table)
        columns = [name for _, name, *_ in self._db.execute('PRAGMA table_info(states)')]
        if 'newest' not in columns:
          self._db.execute('ALTER TABLE states ADD COLUMN newest BLOB')
        found = dict(self._db.execute('SELECT name, value FROM meta'))
        if not found:
          self._db.executemany('INSERT INTO meta VALUES (?, ?)', list(meta.items()))
    except sqlite3.DatabaseError as error:
      raise UserError(f'{self.path}: no table of user states ({error}); delete it') from None
    for name, value in found.items():
      if meta.get(name) != value:
        raise UserError(
          f'{self.path}: the states are of other {name} ({value:.60}, now {meta.get(name)!s:.60}); '
          'delete the file, and all states are made anew from the store'
        )

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """A transaction: what is put within it is kept when it ends, and not at all if it fails."""
    self._db.execute('BEGIN IMMEDIATE')
    try:
      yield
    except BaseException:
      self._db.execute('ROLLBACK')
      raise
    self._db.execute('COMMIT')

  def users(self) -> int:
    """How many users there are."""
    return self._db.execute('SELECT count(*) FROM states').fetchone()[0]

  def note(self, log: str) -> bool:
    """Notes that a log was taken in, within `writing`; False if it was before."""
    found = self._db.execute('INSERT OR IGNORE INTO logs VALUES (?)', [log])
    return found.rowcount > 0

  def logs(self) -> list[str]:
    """What was taken in, as it was noted, sorted."""
    return [log for (log,) in self._db.execute('SELECT log FROM logs ORDER BY log')]

  def get(self, users: Sequence[str], empty: UserStates) -> tuple[UserStates, list[Newest | None]]:
    """The states of users, and what is newest of each one, None where there is no state.

    Args:
      users: raw ids. empty: what those have that are not in the table.
    """
    states, newest = jax.tree.map(np.copy, empty), []
    carry = jax.tree.leaves(states.carry)
    for n, user in enumerate(users):
      found = self._db.execute(f'SELECT {COLUMNS} FROM states WHERE user = ?', [user]).fetchone()
      if found is None:
        newest.append(None)
        continue
      _, states.row[n], states.segments[n], states.held[n], time, recent, kept, items = found
      states.recent[n] = np.frombuffer(recent, np.int32)
      begin = 0
      for leaf, (dtype, shape) in zip(carry, self._carry, strict=True):
        size = int(np.prod(shape, dtype=int))
        leaf[n] = np.frombuffer(kept, dtype, size, begin).reshape(shape)
        begin += size * dtype.itemsize
      newest.append(Newest(time, None if items is None else np.frombuffer(items, np.int32)))
    return states, newest

  def newest(self, users: Sequence[str | None]) -> list[int]:
    """The time of each user's newest event; OLDEST where there is no state or no event."""
    query = 'SELECT time FROM states WHERE user = ?'
    found = (self._db.execute(query, [user]).fetchone() for user in users)
    return [OLDEST if one is None else one[0] for one in found]

  def newest_of_all(self) -> int:
    """The time of the newest event of any user; OLDEST without one."""
    (found,) = self._db.execute('SELECT max(time) FROM states').fetchone()
    return OLDEST if found is None else found

  def put(self, users: Sequence[str], states: UserStates, newest: Sequence[Newest]) -> None:
    """Keeps the states of users, and what is newest of each, within `writing`."""
    carry = jax.tree.leaves(states.carry)
    self._db.executemany(
      f'INSERT OR REPLACE INTO states ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
      (
        (
          user, int(states.row[n]), int(states.segments[n]), int(states.held[n]), newest[n].time,
          states.recent[n].tobytes(), b''.join(leaf[n].tobytes() for leaf in carry),
          None if newest[n].items is None else np.asarray(newest[n].items, np.int32).tobytes(),
        )
        for n, user in enumerate(users)
      ),
    )  # fmt: skip

  def close(self) -> None:
    """Closes the file."""
    self._db.close()


def new_events(items: np.ndarray, times: np.ndarray, known: Newest | None) -> np.ndarray:
  """Which events of a user were not taken in before: those newer than the newest held, and of the
  same time those whose item is not held, one for one."""
  if known is None:
    return np.ones(len(times), bool)
  new = times > known.time
  if known.items is not None:
    held = Counter(known.items.tolist())
    for n in np.flatnonzero(times == known.time):
      new[n] = not held[items[n]]
      held[items[n]] -= not new[n]
  return new


def newest_of(
  items: np.ndarray, times: np.ndarray, known: Newest | None, new: np.ndarray
) -> Newest:
  """What is newest of a user when the new ones of these events are taken in."""
  old = known or Newest(OLDEST, np.zeros(0, np.int32))
  time = max([old.time, *times[new][-1:].tolist()])
  found = items[new & (times == time)]
  if time == old.time:
    return Newest(time, None if old.items is None else np.concatenate([old.items, found]))
  return Newest(time, found)


def take_in(
  table: StateTable, server: Server, state: State, events: Iterator[Events], timed: bool
) -> dict[str, int]:
  """Brings states up to date, within `writing`.

  Args:
    table: of the states. server, state: of the model. events: of users, each once.
    timed: events older than the newest that a state holds were taken in before, and are left out,
      and so is one of the same time and item as one that it holds; where a log has no times all are
      new.

  Returns:
    Counts: 'users' and 'events' taken in, 'new_users', and 'old_events' left out.
  """
  counts = dict.fromkeys(COUNTS, 0)
  for some in events:
    states, known = table.get(some.user, server.empty(some.row))
    pairs = list(zip(some.items, some.times, known, strict=True))
    news = [new_events(*one) if timed else np.ones(len(one[0]), bool) for one in pairs]
    items = [one[new] for one, new in zip(some.items, news, strict=True)]
    newest = [newest_of(*one, new) for one, new in zip(pairs, news, strict=True)]
    table.put(some.user, server.update(state, states, items), newest)
    counts['users'] += len(some.user)
    counts['new_users'] += known.count(None)
    counts['events'] += sum(map(len, items))
    counts['old_events'] += sum(int(np.sum(~new)) for new in news)
  return counts


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what has no states, before anything is read.

  Raises:
    UserError: a task without states, or several hosts.
  """
  if not TASKS[config.task].states:
    raise UserError(f'--mode=states is for config.task=next_item, and this is {config.task}')
  if jax.process_count() > 1:
    raise UserError(f'--mode=states runs on one host, and these are {jax.process_count()}')


def update_states(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, events: str
) -> dict[str, Any]:
  """Makes the states of all users of the store, or brings them up to date from a log.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data.
    events: a log of new events, see `log_of`; '' for none.

  Returns:
    Counts of `take_in` with 'path', 'users_in_all', and 'seconds'.

  Raises:
    UserError: a task without states; no checkpoint; states of another model; a log that was taken
      in before; a run that is in use.
  """
  check(config)
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    return _update_states(config, workdir, store, events)


def _update_states(config, workdir, store, events):
  began = time.monotonic()
  setup, best = trained_run.best_of(config, workdir, store)
  lanes = config.eval_batch_size
  server = make_server(
    setup.model, setup.trainer, setup.mesh, config.history_length, lanes, config.latest
  )
  table = open_table(workdir, store, server, fingerprint(best.state))
  size, timed = CHUNK * lanes, store.clock.timed
  scratch = workdir / '.states'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a command that was killed
  try:
    with table.writing():
      counts = dict.fromkeys(COUNTS)
      if table.note(whole(store)):
        counts = take_in(table, server, best.state, events_of_store(store, size), timed)
      if events:
        data, content = log_of(config.data, events)
        if not table.note(content):
          raise UserError(f'{events}: its events were taken in before; nothing was changed')
        log = events_of_log(data, store, scratch, size)
        counts = take_in(table, server, best.state, log, timed)
    users = table.users()
  finally:
    table.close()
    shutil.rmtree(scratch, ignore_errors=True)
  return counts | {
    'path': str(workdir / FILE),
    'users_in_all': users,
    'seconds': time.monotonic() - began,
  }


def open_table(workdir: Path, store: Store, server: Server, weights: str) -> StateTable:
  """The table of a run, made if there is none.

  Args:
    workdir: of the run. store: its data. server: of its model. weights: their `fingerprint`.

  Raises:
    UserError: as `StateTable`.
  """
  origin = {'weights': weights, 'vocabulary': store.fingerprint}
  return StateTable(workdir / FILE, server.empty(np.zeros(0, np.int32)), origin)


def whole(store: Store) -> str:
  """What is noted when all histories of a store were taken in."""
  return f'store {store.fingerprint}'


def line_of(found: dict[str, Any]) -> str:
  """What `update_states` did, in a line."""
  if found['events'] is None:
    return f'{found["path"]}: {found["users_in_all"]:,} users; up to date, no new events were given'
  old = f', {found["old_events"]:,} left out as older' if found['old_events'] else ''
  return (
    f'{found["path"]}: {found["events"]:,} events of {found["users"]:,} users taken in, '
    f'{found["new_users"]:,} of them new{old}; {found["users_in_all"]:,} users in all; '
    f'{found["seconds"]:.1f} s'
  )
