"""The store of users by its address, and the one in a SQLite file."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmn_jax.errors import UserError
from lmn_jax.serving.users.records import BUSY_S, NO_RECORD, Event, Record, StoreError, UserStore
from lmn_jax.serving.users.redis_store import RedisStore

SCHEMA = 3  # raise when the layout or the meaning of a column changes
APPLICATION = 0x6C6D6E75  # 'lmnu' in the header of the file, which marks it as ours
MET = 'CREATE TABLE met (user TEXT, item TEXT, PRIMARY KEY (user, item)) WITHOUT ROWID'
TABLES = (
  """CREATE TABLE users (user TEXT PRIMARY KEY, version INTEGER NOT NULL, tag TEXT NOT NULL,
  state BLOB)""",
  """CREATE TABLE events (user TEXT, seq INTEGER, item TEXT NOT NULL, time INTEGER,
  id TEXT NOT NULL DEFAULT '', features TEXT NOT NULL DEFAULT '', PRIMARY KEY (user, seq))
  WITHOUT ROWID""",
  MET,
)
# From layout 1, which stored the time of the newest event only.
FROM_1 = (
  'ALTER TABLE events ADD COLUMN time INTEGER',
  "ALTER TABLE events ADD COLUMN id TEXT NOT NULL DEFAULT ''",
  """UPDATE events SET time = (SELECT time FROM users WHERE users.user = events.user)
  WHERE (user, seq) IN (SELECT user, max(seq) FROM events GROUP BY user)""",
  'ALTER TABLE users DROP COLUMN time',
  MET,
)
# From layout 2, which stored no features of events.
FROM_2 = ("ALTER TABLE events ADD COLUMN features TEXT NOT NULL DEFAULT ''",)
CHANGES = {1: (*FROM_1, *FROM_2), 2: FROM_2}  # of files of earlier layouts


def open_store(address: str, keep: int) -> UserStore:
  """Opens a store, or creates it.

  Args:
    address: PATH.sqlite or redis://HOST:PORT/NUMBER (rediss:// with TLS). keep: number of newest
      events to store of a user.

  Raises:
    UserError: another kind of address, a file that is not a store, or a Redis that does not answer.
  """
  if keep < 1:
    raise UserError(f'serve.keep_events={keep} must be at least 1')
  if address.startswith(('redis://', 'rediss://')):
    return RedisStore(address, keep)
  if address.endswith('.sqlite'):
    return SqliteStore(Path(address), keep)
  raise UserError(
    f'serve.users={address!r} is not a store of users; give PATH.sqlite, or redis://HOST:6379/0'
  )


class SqliteStore:
  """A UserStore in one SQLite file; a writer does not block readers.

  `put` returns after the data are on the disk, so that answered updates survive a power failure.
  """

  def __init__(self, path: Path, keep: int):
    """Opens or creates the file. keep: number of newest events to store of a user.

    Raises:
      UserError: the file is not a store, is damaged, or cannot be created.
    """
    self._path, self.keep = path, keep
    self._local, self._connections, self._lock = threading.local(), [], threading.Lock()
    try:
      self._begin(self._connection())
    except sqlite3.Error as error:
      self.close()
      problem, remedy = 'cannot be created', 'make its folder first'
      if path.exists():
        problem, remedy = 'is not a store of users', 'give another file'
      raise UserError(f'serve.users={path} {problem} ({error}); {remedy}') from None
    except BaseException:
      self.close()
      raise

  def _connection(self):
    """Returns the connection of this thread."""
    if not hasattr(self._local, 'db'):
      # Only `close` uses it from another thread.
      db = sqlite3.connect(
        self._path, isolation_level=None, timeout=BUSY_S, check_same_thread=False
      )
      with self._lock:
        self._connections.append(db)
      self._local.db = db
    return self._local.db

  def _begin(self, db):
    """Creates the tables of a new file; refuses a file of another program before writing to it."""
    with _writing(db):
      (application,) = db.execute('PRAGMA application_id').fetchone()
      (schema,) = db.execute('PRAGMA user_version').fetchone()
      (tables,) = db.execute('SELECT count(*) FROM sqlite_master').fetchone()
      if tables and application != APPLICATION:
        raise UserError(
          f'serve.users={self._path} has the tables of another program; give another file'
        )
      if tables and schema not in (*CHANGES, SCHEMA):
        raise UserError(
          f'serve.users={self._path} has layout {schema} of another version of lmn_jax; this one '
          f'reads layout {SCHEMA}; give another file'
        )
      for statement in CHANGES.get(schema, ()) if tables else TABLES:
        db.execute(statement)
      db.execute(f'PRAGMA application_id = {APPLICATION}')
      db.execute(f'PRAGMA user_version = {SCHEMA}')
    # This setting is stored in the file. SQLite does not wait for other connections here.
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
  def _store_errors(self):
    """Turns errors of SQLite into StoreError."""
    try:
      yield
    except sqlite3.Error as error:
      raise StoreError(f'the store of users is not available ({error})') from error

  def get(self, user: str) -> Record:
    """See UserStore."""
    with self._store_errors():
      query = 'SELECT version, tag, state FROM users WHERE user = ?'
      row = self._connection().execute(query, [user]).fetchone()
    return Record(*row) if row else NO_RECORD

  def events(self, user: str, n: int) -> list[Event]:
    """See UserStore."""
    with self._store_errors():
      query = """SELECT item, time, id, features FROM events WHERE user = ?
        ORDER BY seq DESC LIMIT ?"""
      rows = self._connection().execute(query, [user, n]).fetchall()
    return [Event(*row) for row in reversed(rows)]

  def met(self, user: str) -> list[str]:
    """See UserStore."""
    with self._store_errors():
      rows = self._connection().execute('SELECT item FROM met WHERE user = ?', [user])
      return [item for (item,) in rows]

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
    with self._store_errors():
      db = self._connection()
      with _writing(db):
        row = db.execute('SELECT version FROM users WHERE user = ?', [user]).fetchone()
        if (row[0] if row else 0) != version:
          return False
        (last,) = db.execute(
          'SELECT coalesce(max(seq), 0) FROM events WHERE user = ?', [user]
        ).fetchone()
        last -= replaced
        db.execute('DELETE FROM events WHERE user = ? AND seq > ?', [user, last])
        db.executemany(
          'INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)',
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
      for db in self._connections:
        db.close()
      self._connections.clear()


@contextlib.contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
  """A transaction that locks out other writers from its first read on."""
  db.execute('BEGIN IMMEDIATE')
  try:
    yield
  except BaseException:
    if db.in_transaction:  # some errors end it themselves
      db.execute('ROLLBACK')
    raise
  db.execute('COMMIT')
