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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from lmn_jax import lock, train
from lmn_jax.errors import UserError
from lmn_jax.store import Store
from lmn_jax.update import State
from lmn_jax.user_events import Events, events_of_log, events_of_store, log_of
from lmn_jax.user_states import Server, UserStates, make_server

FILE = 'states.sqlite'
COUNTS = ('users', 'events', 'new_users', 'old_events')
OLDEST = -(2**63)  # before any event
CHUNK = 8  # lanes full of users, held at a time
SCHEMA = '1'  # raise when the layout or the meaning of a column changes
TABLES = (
  'CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)',
  'CREATE TABLE IF NOT EXISTS logs (log TEXT PRIMARY KEY)',
  """CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, row INTEGER, segments INTEGER,
  held INTEGER, time INTEGER, recent BLOB, carry BLOB)""",
)
COLUMNS = 'user, row, segments, held, time, recent, carry'


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

  def get(self, users: Sequence[str], empty: UserStates) -> tuple[UserStates, list[int | None]]:
    """The states of users, and the time of each one's newest event, None where there is no state.

    Args:
      users: raw ids. empty: what those have that are not in the table.
    """
    states, times = jax.tree.map(np.copy, empty), []
    carry = jax.tree.leaves(states.carry)
    for n, user in enumerate(users):
      found = self._db.execute(f'SELECT {COLUMNS} FROM states WHERE user = ?', [user]).fetchone()
      if found is None:
        times.append(None)
        continue
      _, states.row[n], states.segments[n], states.held[n], time, recent, kept = found
      states.recent[n] = np.frombuffer(recent, np.int32)
      begin = 0
      for leaf, (dtype, shape) in zip(carry, self._carry, strict=True):
        size = int(np.prod(shape, dtype=int))
        leaf[n] = np.frombuffer(kept, dtype, size, begin).reshape(shape)
        begin += size * dtype.itemsize
      times.append(time)
    return states, times

  def put(self, users: Sequence[str], states: UserStates, times: Sequence[int]) -> None:
    """Keeps the states of users, within `writing`. times: of each one's newest event."""
    carry = jax.tree.leaves(states.carry)
    self._db.executemany(
      f'INSERT OR REPLACE INTO states ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)',
      (
        (
          user, int(states.row[n]), int(states.segments[n]), int(states.held[n]), int(times[n]),
          states.recent[n].tobytes(), b''.join(leaf[n].tobytes() for leaf in carry),
        )
        for n, user in enumerate(users)
      ),
    )  # fmt: skip

  def close(self) -> None:
    """Closes the file."""
    self._db.close()


def take_in(
  table: StateTable, server: Server, state: State, events: Iterator[Events], timed: bool
) -> dict[str, int]:
  """Brings states up to date, within `writing`.

  Args:
    table: of the states. server, state: of the model. events: of users, each once.
    timed: events that are not newer than what a state holds were taken in before, and are left out;
      where a log has no times all are new.

  Returns:
    Counts: 'users' and 'events' taken in, 'new_users', and 'old_events' left out.
  """
  counts = dict.fromkeys(COUNTS, 0)
  for some in events:
    states, known = table.get(some.user, server.empty(some.row))
    news = [
      np.ones(len(at), bool) if newest is None or not timed else at > newest
      for at, newest in zip(some.times, known, strict=True)
    ]
    items = [one[new] for one, new in zip(some.items, news, strict=True)]
    newest = [
      max([OLDEST if old is None else old, *at[-1:].tolist()])
      for at, old in zip(some.times, known, strict=True)
    ]
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
  if config.task != 'next_item':
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
  train.check_trained(workdir)
  with lock.held(workdir / train.LOCK):
    return _update_states(config, workdir, store, events)


def _update_states(config, workdir, store, events):
  began = time.monotonic()
  exp, best = train.best_of(config, workdir, store)
  lanes = config.eval_batch_size
  server = make_server(
    exp.model, exp.trainer, exp.mesh, config.history_length, lanes, config.latest
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
