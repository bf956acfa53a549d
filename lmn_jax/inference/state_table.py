"""The states of all users in a file, and --mode=states, which updates them with new events.

The file is a SQLite database. A log of new events is added in one transaction: all of it or
nothing, and readers are not blocked. The first command reads all histories of the store, later ones
the new events only.
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
from lmn_jax.inference.segment_states import UserStates
from lmn_jax.inference.user_states import StatefulModel, stateful_model
from lmn_jax.training import trained_run
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup
from lmn_jax.training.tasks import TASKS

FILE = 'states.sqlite'
COUNTS = ('users', 'events', 'new_users', 'old_events')
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
    carry = jax.tree.leaves(states.carry)
    for n, user in enumerate(users):
      row = self._db.execute(f'SELECT {COLUMNS} FROM states WHERE user = ?', [user]).fetchone()
      if row is None:
        newest.append(None)
        continue
      _, states.row[n], states.segments[n], states.held[n], time, recent, content, items = row
      states.recent[n] = np.frombuffer(recent, np.int32)
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


def new_events(items: np.ndarray, times: np.ndarray, newest: Newest | None) -> np.ndarray:
  """Returns which events of a user were not added before.

  These are the events newer than the newest one held, and events of the same time beyond those of
  the same item that are held.
  """
  if newest is None:
    return np.ones(len(times), bool)
  new = times > newest.time
  if newest.items is not None:
    held = Counter(newest.items.tolist())
    for n in np.flatnonzero(times == newest.time):
      new[n] = not held[items[n]]
      held[items[n]] -= not new[n]
  return new


def newest_of(
  items: np.ndarray, times: np.ndarray, newest: Newest | None, new: np.ndarray
) -> Newest:
  """Returns a user's newest events after the `new` ones of these events are added."""
  before = newest or Newest(OLDEST, np.zeros(0, np.int32))
  time = max([before.time, *times[new][-1:].tolist()])
  latest = items[new & (times == time)]
  if time == before.time:
    return Newest(time, None if before.items is None else np.concatenate([before.items, latest]))
  return Newest(time, latest)


def add_events(
  table: StateTable, model: StatefulModel, state: State, events: Iterator[Events], timed: bool
) -> dict[str, int]:
  """Updates the states with new events, within `writing`.

  Args:
    table: of the states. model, state: the model and its weights. events: of users, each user once.
    timed: events that were added before, by their times and items, are skipped; see `new_events`.
      Where a log has no times all events are new.

  Returns:
    Counts: 'users' and 'events' added, 'new_users', and 'old_events' skipped.
  """
  counts = dict.fromkeys(COUNTS, 0)
  for chunk in events:
    states, newest = table.get(chunk.user, model.empty(chunk.row))
    users = list(zip(chunk.items, chunk.times, newest, strict=True))
    masks = [new_events(*user) if timed else np.ones(len(user[0]), bool) for user in users]
    items = [x[new] for x, new in zip(chunk.items, masks, strict=True)]
    latest = [newest_of(*user, new) for user, new in zip(users, masks, strict=True)]
    table.put(chunk.user, model.update(state, states, items), latest)
    counts['users'] += len(chunk.user)
    counts['new_users'] += newest.count(None)
    counts['events'] += sum(map(len, items))
    counts['old_events'] += sum(int(np.sum(~new)) for new in masks)
  return counts


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses, before anything is read, a command that cannot have states.

  Raises:
    UserError: a task without states, or several hosts.
  """
  if not TASKS[config.task].states:
    raise UserError(
      f"--mode=states needs config.task='next_item'; models of this run's task, {config.task!r}, "
      'keep no states'
    )
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=states runs on one host, and {jax.process_count()} were started; start one'
    )


def update_states(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, events: str
) -> dict[str, Any]:
  """Computes the states of all users of the store, or updates them with the events of a log.

  Args:
    config: of a trained run. workdir: of the run. store: its data.
    events: a log of new events, see `log_of`; '' for none.

  Returns:
    Counts of `add_events`, None where there was nothing to read, with 'path', 'users_in_all' and
    'seconds'.

  Raises:
    UserError: a task without states; no checkpoint; states of another model; a log that was added
      before; a run that another command uses.
  """
  check(config)
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    return _update_states(config, workdir, store, events)


def _update_states(config, workdir, store, events):
  start = time.monotonic()
  setup, best = trained_run.best_of(config, workdir, store)
  model = stateful_model(config, setup)
  table = open_table(workdir, store, model, fingerprint(best.state))
  size, timed = CHUNK * config.eval_batch_size, store.clock.timed
  scratch = workdir / '.states'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a command that was killed
  try:
    with table.writing():
      counts = dict.fromkeys(COUNTS)
      if table.note(store_log(store)):
        counts = add_events(table, model, best.state, events_of_store(store, size), timed)
      if events:
        data, content = log_of(config.data, events)
        if not table.note(content):
          raise UserError(
            f'--events={events}: these events were added before; nothing was changed; give a log '
            'of newer events'
          )
        log = events_of_log(data, store, scratch, size)
        counts = add_events(table, model, best.state, log, timed)
    users = table.users()
  finally:
    table.close()
    shutil.rmtree(scratch, ignore_errors=True)
  return counts | {
    'path': str(workdir / FILE),
    'users_in_all': users,
    'seconds': time.monotonic() - start,
  }


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


def line_of(report: dict[str, Any]) -> str:
  """Returns a line about the result of `update_states`."""
  if report['events'] is None:
    return (
      f'{report["path"]}: {report["users_in_all"]:,} users; up to date, no new events were given'
    )
  old = f', {report["old_events"]:,} skipped as older' if report['old_events'] else ''
  return (
    f'{report["path"]}: {report["events"]:,} events of {report["users"]:,} users added, '
    f'{report["new_users"]:,} of them new{old}; {report["users_in_all"]:,} users in all; '
    f'{report["seconds"]:.1f} s'
  )
