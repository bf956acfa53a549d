"""The store of the service's users, by its address; and the one in a file of SQLite."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmn_jax.errors import UserError
from lmn_jax.serving.users.records import BUSY_S, NOBODY, Event, Record, StoreError, UserStore
from lmn_jax.serving.users.redis_store import RedisStore

SCHEMA = 2  # raise when the layout or the meaning of a column changes
APPLICATION = 0x6C6D6E75  # 'lmnu' in the header of the file: no other program's tables
MET = 'CREATE TABLE met (user TEXT, item TEXT, PRIMARY KEY (user, item)) WITHOUT ROWID'
TABLES = (
  """CREATE TABLE users (user TEXT PRIMARY KEY, version INTEGER NOT NULL, tag TEXT NOT NULL,
  state BLOB)""",
  """CREATE TABLE events (user TEXT, seq INTEGER, item TEXT NOT NULL, time INTEGER,
  id TEXT NOT NULL DEFAULT '', PRIMARY KEY (user, seq)) WITHOUT ROWID""",
  MET,
)
# Of layout 1, which knew the time of the newest event alone.
FROM_1 = (
  'ALTER TABLE events ADD COLUMN time INTEGER',
  "ALTER TABLE events ADD COLUMN id TEXT NOT NULL DEFAULT ''",
  """UPDATE events SET time = (SELECT time FROM users WHERE users.user = events.user)
  WHERE (user, seq) IN (SELECT user, max(seq) FROM events GROUP BY user)""",
  'ALTER TABLE users DROP COLUMN time',
  MET,
)


def open_store(address: str, keep: int) -> UserStore:
  """Opens a store, or makes it.

  Args:
    address: PATH.sqlite or redis://HOST:PORT/NUMBER (rediss:// with TLS). keep: newest events of a
      user that are kept.

  Raises:
    UserError: an address of neither kind, a file that is no such store, or a Redis out of reach.
  """
  if keep < 1:
    raise UserError(f'serve.keep_events={keep} must be at least 1')
  if address.startswith(('redis://', 'rediss://')):
    return RedisStore(address, keep)
  if address.endswith('.sqlite'):
    return SqliteStore(Path(address), keep)
  raise UserError(
    f'serve.users={address!r} is no store of users; give PATH.sqlite, or redis://HOST:6379/0'
  )


class SqliteStore:
  """A UserStore in one file of SQLite, which readers read while one writes.

  A put is on the disk when it returns, so what was answered outlives a loss of power.
  """

  def __init__(self, path: Path, keep: int):
    """Opens or makes the file. keep: newest events of a user that are kept.

    Raises:
      UserError: it is no such store, damaged, or cannot be made.
    """
    self._path, self.keep = path, keep
    self._own, self._all, self._lock = threading.local(), [], threading.Lock()
    try:
      self._begin(self._connection())
    except sqlite3.Error as error:
      self.close()
      remedy = 'name another file' if path.exists() else 'is there its folder?'
      raise UserError(f'serve.users={path}: no store of users ({error}); {remedy}') from None
    except BaseException:
      self.close()
      raise

  def _connection(self):
    """The connection of this thread."""
    if not hasattr(self._own, 'db'):
      # Only `close` uses it from another thread.
      db = sqlite3.connect(
        self._path, isolation_level=None, timeout=BUSY_S, check_same_thread=False
      )
      with self._lock:
        self._all.append(db)
      self._own.db = db
    return self._own.db

  def _begin(self, db):
    """Makes the tables of a new file, and refuses another program's before it is touched."""
    with _writing(db):
      (application,) = db.execute('PRAGMA application_id').fetchone()
      (schema,) = db.execute('PRAGMA user_version').fetchone()
      (tables,) = db.execute('SELECT count(*) FROM sqlite_master').fetchone()
      if tables and application != APPLICATION:
        raise UserError(
          f'serve.users={self._path}: the tables of another program; name another file'
        )
      if tables and schema not in (1, SCHEMA):
        raise UserError(
          f'serve.users={self._path}: written by another version of lmn_jax (layout {schema}, here '
          f'{SCHEMA}); name another file'
        )
      for statement in FROM_1 if schema == 1 else () if tables else TABLES:
        db.execute(statement)
      db.execute(f'PRAGMA application_id = {APPLICATION}')
      db.execute(f'PRAGMA user_version = {SCHEMA}')
    # Kept in the file. SQLite does not wait for others here, so we do.
    deadline = time.monotonic() + BUSY_S
    while True:
      try:
        db.execute('PRAGMA journal_mode = WAL')
        break
      except sqlite3.OperationalError:
        if time.monotonic() > deadline:
          raise
        time.sleep(0.01)
    for table in ('users', 'events', 'met'):
      db.execute(f'SELECT * FROM {table} LIMIT 1').fetchall()

  @contextlib.contextmanager
  def _told(self):
    """Errors of SQLite as the store's."""
    try:
      yield
    except sqlite3.Error as error:
      raise StoreError(f'the store of users cannot be used now ({error})') from error

  def get(self, user: str) -> Record:
    """See UserStore."""
    with self._told():
      found = (
        self._connection()
        .execute('SELECT version, tag, state FROM users WHERE user = ?', [user])
        .fetchone()
      )
    return Record(*found) if found else NOBODY

  def events(self, user: str, n: int) -> list[Event]:
    """See UserStore."""
    with self._told():
      found = (
        self._connection()
        .execute(
          'SELECT item, time, id FROM events WHERE user = ? ORDER BY seq DESC LIMIT ?', [user, n]
        )
        .fetchall()
      )
    return [Event(*one) for one in reversed(found)]

  def met(self, user: str) -> list[str]:
    """See UserStore."""
    with self._told():
      found = self._connection().execute('SELECT item FROM met WHERE user = ?', [user])
      return [item for (item,) in found]

  def put(
    self,
    user: str,
    version: int,
    replaced: int,
    new_events: Sequence[Event],
    tag: str,
    state: bytes | None,
  ) -> bool:
    """See UserStore."""
    with self._told():
      db = self._connection()
      with _writing(db):
        found = db.execute('SELECT version FROM users WHERE user = ?', [user]).fetchone()
        if (found[0] if found else 0) != version:
          return False
        (last,) = db.execute(
          'SELECT coalesce(max(seq), 0) FROM events WHERE user = ?', [user]
        ).fetchone()
        last -= replaced
        db.execute('DELETE FROM events WHERE user = ? AND seq > ?', [user, last])
        db.executemany(
          'INSERT INTO events VALUES (?, ?, ?, ?, ?)',
          [(user, seq, *event) for seq, event in enumerate(new_events, last + 1)],
        )
        older = [user, last + len(new_events) - self.keep]
        db.execute(
          'INSERT OR IGNORE INTO met SELECT user, item FROM events WHERE user = ? AND seq <= ?',
          older,
        )
        db.execute('DELETE FROM events WHERE user = ? AND seq <= ?', older)
        db.execute(
          'INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?)', [user, version + 1, tag, state]
        )
    return True

  def close(self) -> None:
    """See UserStore."""
    with self._lock:
      for db in self._all:
        db.close()
      self._all.clear()


@contextlib.contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
  """A transaction that is alone from its first reading on."""
  db.execute('BEGIN IMMEDIATE')
  try:
    yield
  except BaseException:
    if db.in_transaction:  # some errors have ended it themselves
      db.execute('ROLLBACK')
    raise
  db.execute('COMMIT')
