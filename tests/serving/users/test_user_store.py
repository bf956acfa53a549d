"""Both stores of users behave alike, also with concurrent writers."""

import contextlib
import multiprocessing
import random
import shutil
import socket
import sqlite3
import subprocess
import threading

import fakeredis
import pytest
import redis

from lmn_jax.errors import UserError
from lmn_jax.serving.users import redis_store
from lmn_jax.serving.users import store as user_store
from lmn_jax.serving.users.records import NO_RECORD, Event, Record, StoreError
from lmn_jax.serving.users.store import SqliteStore, open_store


@pytest.fixture(scope='module')
def redis_address():
  """Yields the address of a Redis server, if the machine has one."""
  program = shutil.which('redis-server')
  if program is None:
    pytest.skip('no redis-server on the path')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  quiet = ['--save', '', '--appendonly', 'no', '--bind', '127.0.0.1', '--loglevel', 'warning']
  with subprocess.Popen([program, '--port', str(port), *quiet]) as process:
    try:
      with contextlib.closing(redis.Redis(port=port)) as client:
        retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
        retry.call_with_retry(client.ping, lambda error: None)
      yield f'redis://127.0.0.1:{port}/0'
    finally:
      process.terminate()


@pytest.fixture(params=['sqlite', 'fakeredis', 'redis'])
def opened(request, tmp_path):
  """Yields a function that opens the same store of one kind each time."""
  server, stores = fakeredis.FakeServer(), []
  if request.param == 'redis':
    address = request.getfixturevalue('redis_address')
    with contextlib.closing(redis.Redis.from_url(address)) as client:
      client.flushall()

  def opened(keep=5):
    if request.param == 'sqlite':
      store = open_store(str(tmp_path / 'users.sqlite'), keep)
    elif request.param == 'redis':
      store = open_store(address, keep)
    else:
      client = fakeredis.FakeRedis(server=server)
      store = redis_store.RedisStore('redis://server', keep, client)
    stores.append(store)
    return store

  yield opened
  for store in stores:
    store.close()


def events_of(items):
  return [Event(item) for item in items]


def items(store, n):
  return [event.item for event in store.events('u', n)]


def test_a_put_is_read_by_another_connection(opened):
  store = opened()
  assert store.get('u') == NO_RECORD == Record(0, '', None)
  assert items(store, 9) == []
  assert store.put('u', 0, 0, events_of(['a', 'b']), 'of this', b'\0state\xff')
  assert store.put('v', 0, 0, events_of([]), '', None)
  assert opened().get('u') == Record(1, 'of this', b'\0state\xff')
  assert store.get('v') == Record(1, '', None)
  assert store.put('u', 1, 0, events_of(['c']), '', None)
  assert store.get('u') == Record(2, '', None)
  assert items(opened(), 9) == ['a', 'b', 'c']
  assert items(store, 2) == ['b', 'c'] and items(store, 0) == []


def test_the_newest_events_are_stored(opened):
  store = opened(keep=3)
  assert store.put('u', 0, 0, events_of(list('abcde')), '', None)
  assert items(store, 9) == ['c', 'd', 'e']
  assert store.put('u', 1, 0, events_of(['f']), '', None)
  assert store.put('u', 2, 0, events_of([]), '', None)
  assert items(store, 9) == ['d', 'e', 'f']
  assert store.put('u', 3, 0, events_of(list('vwxyz')), '', None)
  assert items(store, 9) == ['x', 'y', 'z']
  # The distinct items of older events are stored as met.
  assert sorted(opened(keep=3).met('u')) == list('abcdefvw') and store.met('v') == []


@pytest.mark.parametrize('keep', [3, 50])
def test_the_newest_events_are_replaced(opened, keep):
  """As in a list; items of events that are cut off count as met."""
  store, rng, held, met, version = opened(keep), random.Random(keep), [], set(), 0
  for n in range(30):
    replaced = rng.randint(0, len(held))
    new = [Event(f'i{rng.randrange(9)}', n, f'{k}') for k in range(rng.randint(0, 5))]
    assert store.put('u', version, replaced, new, '', None)
    version, held = version + 1, held[: len(held) - replaced] + new
    met |= {event.item for event in held[:-keep]}
    held = held[-keep:]
    assert store.events('u', 99) == held and set(store.met('u')) == met


def test_ids_may_be_any_text(opened):
  store = opened()
  for user in ("'; DROP TABLE users; --", 'naïve 🦊', ' ', 'user:events', 'x' * 512):
    assert store.put(user, 0, 0, [Event(user, -(2**63), user), Event('7')], user, b'')
    assert store.get(user) == Record(1, user, b'')
    assert store.events(user, 2) == [Event(user, -(2**63), user), Event('7')]


def test_a_put_with_an_old_version_changes_nothing(opened):
  store, other = opened(), opened()
  assert store.put('u', 0, 0, events_of(['a']), 'first', b'1')
  assert not other.put('u', 0, 0, events_of(['b']), 'second', b'2')
  assert not other.put('u', 2, 0, events_of(['b']), 'second', b'2')
  assert store.get('u') == Record(1, 'first', b'1') and items(store, 9) == ['a']


def add(store, name, count):
  """Appends `count` events to a user as the service does."""
  for k in range(count):
    while not store.put(
      'u', (old := store.get('u')).version, 0, events_of([f'{name}{k}']), '', old.state
    ):
      pass


def add_in_process(path, name, count):
  store = open_store(path, 10_000)
  add(store, name, count)
  store.close()


def assert_all_once(store, names, count):
  stored = items(store, 10_000)
  assert sorted(stored) == sorted(f'{name}{k}' for name in names for k in range(count))
  for name in names:
    assert [x for x in stored if x[0] == name] == [f'{name}{k}' for k in range(count)]
  assert store.get('u').version == len(names) * count


def test_threads_lose_no_event(opened):
  store = opened(keep=10_000)
  threads = [threading.Thread(target=add, args=(store, name, 25)) for name in 'abc']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert_all_once(store, 'abc', 25)


@pytest.mark.parametrize('kind', ['sqlite', 'redis'])
def test_processes_lose_no_event(kind, tmp_path, request):
  """They also create the file at the same time."""
  path, context = str(tmp_path / 'users.sqlite'), multiprocessing.get_context('spawn')
  if kind == 'redis':
    path = f'{request.getfixturevalue("redis_address")[:-1]}1'  # a separate database
  processes = [context.Process(target=add_in_process, args=(path, x, 40)) for x in 'ab']
  for process in processes:
    process.start()
  for process in processes:
    process.join()
  assert [process.exitcode for process in processes] == [0, 0]
  store = open_store(path, 10_000)
  assert_all_once(store, 'ab', 40)
  store.close()


def test_a_put_that_fails_is_undone(tmp_path):
  store = SqliteStore(tmp_path / 'users.sqlite', 5)
  assert store.put('u', 0, 0, events_of(['a']), '', None)
  with sqlite3.connect(tmp_path / 'users.sqlite') as other:
    other.execute(
      "CREATE TRIGGER full BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
  with pytest.raises(StoreError, match=r'is not available \(disk full\)'):
    store.put('u', 1, 0, events_of(['b']), '', None)
  assert store.get('u').version == 1 and items(store, 5) == ['a']
  other.execute('DROP TRIGGER full')
  other.close()
  assert store.put('u', 1, 0, events_of(['b']), '', None)
  store.close()


@pytest.mark.parametrize(
  'address, message',
  [
    ('', r"serve.users='' is not a store of users; give PATH.sqlite, or redis://"),
    ('users.db', "serve.users='users.db' is not a store"),
    ('/nowhere/users.sqlite', r'cannot be created \(unable to open .*\); make its folder'),
    (
      'redis://:secret@127.0.0.1:1/0',
      r'serve.users=redis://127.0.0.1:1/0: no Redis server answers',
    ),
    ('redis://127.0.0.1:port/0', 'redis://127.0.0.1:port/0: no Redis server answers'),
  ],
)
def test_wrong_addresses_are_refused(address, message):
  with pytest.raises(UserError, match=message) as raised:
    open_store(address, 5)
  assert 'secret' not in str(raised.value)


def test_storing_no_event_is_refused(tmp_path):
  with pytest.raises(UserError, match='serve.keep_events=0 must be at least 1'):
    open_store(str(tmp_path / 'users.sqlite'), 0)


def test_files_that_are_not_stores_are_refused(tmp_path):
  damaged = tmp_path / 'damaged.sqlite'
  damaged.write_bytes(b'no database at all' * 100)
  with pytest.raises(UserError, match=r'damaged.sqlite is not a store of users \(file is not a'):
    open_store(str(damaged), 5)
  foreign = tmp_path / 'foreign.sqlite'
  with sqlite3.connect(foreign) as db:
    db.execute('CREATE TABLE users (name)')
  db.close()
  before = foreign.read_bytes()
  with pytest.raises(UserError, match='foreign.sqlite has the tables of another program'):
    open_store(str(foreign), 5)
  assert foreign.read_bytes() == before and not (tmp_path / 'foreign.sqlite-wal').exists()


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
  path = str(tmp_path / 'users.sqlite')
  open_store(path, 5).close()
  monkeypatch.setattr(user_store, 'SCHEMA', 4)
  with pytest.raises(
    UserError, match='has layout 3 of another version of lmn_jax; this one reads layout 4'
  ):
    open_store(path, 5)


def test_a_file_of_the_first_layout_is_converted(tmp_path):
  """Only the newest event has a time."""
  path = tmp_path / 'users.sqlite'
  with sqlite3.connect(path) as db:
    for statement in (
      """CREATE TABLE users (user TEXT PRIMARY KEY, version INTEGER NOT NULL, time INTEGER,
      tag TEXT NOT NULL, state BLOB)""",
      """CREATE TABLE events (user TEXT, seq INTEGER, item TEXT NOT NULL, PRIMARY KEY (user, seq))
      WITHOUT ROWID""",
      "INSERT INTO users VALUES ('u', 2, 70, 'tag', x'00'), ('v', 1, NULL, '', NULL)",
      "INSERT INTO events VALUES ('u', 1, 'a'), ('u', 2, 'b'), ('v', 1, 'c')",
      f'PRAGMA application_id = {user_store.APPLICATION}',
      'PRAGMA user_version = 1',
    ):
      db.execute(statement)
  db.close()
  for _ in range(2):
    store = SqliteStore(path, 5)
    assert store.get('u') == Record(2, 'tag', b'\0') and store.get('v') == Record(1, '', None)
    assert store.events('u', 5) == [Event('a'), Event('b', 70)]
    assert store.events('v', 5) == [Event('c')] and store.met('u') == []
    store.close()


def test_a_file_of_the_second_layout_is_converted(tmp_path):
  """Its events have no features; new ones may have."""
  path = tmp_path / 'users.sqlite'
  with sqlite3.connect(path) as db:
    for statement in (
      """CREATE TABLE users (user TEXT PRIMARY KEY, version INTEGER NOT NULL, tag TEXT NOT NULL,
      state BLOB)""",
      """CREATE TABLE events (user TEXT, seq INTEGER, item TEXT NOT NULL, time INTEGER,
      id TEXT NOT NULL DEFAULT '', PRIMARY KEY (user, seq)) WITHOUT ROWID""",
      user_store.MET,
      "INSERT INTO users VALUES ('u', 2, 'tag', NULL)",
      "INSERT INTO events VALUES ('u', 1, 'a', NULL, ''), ('u', 2, 'b', 70, 'x')",
      f'PRAGMA application_id = {user_store.APPLICATION}',
      'PRAGMA user_version = 2',
    ):
      db.execute(statement)
  db.close()
  new = Event('c', 71, '', '{"dwell": "3"}')
  for number in range(2):
    store = SqliteStore(path, 5)
    assert store.events('u', 5) == [Event('a'), Event('b', 70, 'x'), *[new] * number]
    assert store.put('u', 2 + number, 0, [new] * (1 - number), '', None)
    store.close()


def test_features_of_events_are_stored(opened):
  store = opened()
  features = '{"kind": "k1|k2", "dwell": 3.5, "ü": "\\u0000"}'
  events = [Event('a', 7, 'x', features), Event('b'), Event('c', None, '', features)]
  assert store.put('u', 0, 0, events, '', None)
  assert opened().events('u', 5) == events


def test_a_redis_of_the_first_layout_is_read():
  client = fakeredis.FakeRedis()
  client.hset('lmn_jax:user:u', mapping={'version': 1, 'time': 70, 'tag': ''})
  client.rpush('lmn_jax:events:u', 'a', 'b')
  store = redis_store.RedisStore('redis://server', 5, client)
  assert store.get('u') == Record(1, '', None) and store.events('u', 5) == events_of('ab')
  assert store.put('u', 1, 0, [Event('c', 71, 'x')], '', None)
  assert store.events('u', 2) == [Event('b'), Event('c', 71, 'x')]


def test_a_damaged_file_is_refused(tmp_path):
  path = tmp_path / 'users.sqlite'
  store = SqliteStore(path, 5)
  store.put('u', 0, 0, events_of(['a']), '', None)
  store.close()
  content = path.read_bytes()
  path.write_bytes(content[:100] + b'\xff' * (len(content) - 100))
  with pytest.raises(UserError, match='is not a store of users'):
    SqliteStore(path, 5)


def test_a_locked_file_is_an_error_of_writers_only(tmp_path, monkeypatch):
  monkeypatch.setattr(user_store, 'BUSY_S', 0.05)
  store = SqliteStore(tmp_path / 'users.sqlite', 5)
  with sqlite3.connect(tmp_path / 'users.sqlite', isolation_level=None) as other:
    other.execute('BEGIN IMMEDIATE')
    with pytest.raises(StoreError, match='locked'):
      store.put('u', 0, 0, events_of(['a']), '', None)
    assert store.get('u') == NO_RECORD  # readers are not blocked
    other.execute('ROLLBACK')
  other.close()
  assert store.put('u', 0, 0, events_of(['a']), '', None)
  store.close()


def test_a_redis_that_does_not_answer_is_a_store_error():
  server = fakeredis.FakeServer()
  store = redis_store.RedisStore('redis://server', 5, fakeredis.FakeRedis(server=server))
  server.connected = False
  for call in (
    lambda: store.get('u'),
    lambda: store.events('u', 3),
    lambda: store.put('u', 0, 0, events_of(['a']), '', None),
  ):
    with pytest.raises(StoreError, match='is not available'):
      call()
  server.connected = True
  assert store.put('u', 0, 0, events_of(['a']), '', None)


def test_a_put_whose_answer_was_lost_succeeds():
  """The write was done, the connection broke, and redis-py raises a WatchError."""
  client = fakeredis.FakeRedis()

  class Pipeline(type(client.pipeline())):
    def execute(self, *arguments, **more):
      super().execute(*arguments, **more)
      raise redis.WatchError

  store = redis_store.RedisStore('redis://server', 5, client)
  client.pipeline = lambda: Pipeline(client.connection_pool, client.response_callbacks, True, None)
  assert store.put('u', 0, 0, events_of(['a']), '', None)
  assert store.get('u').version == 1 and items(store, 5) == ['a']


def test_other_values_in_redis_are_a_store_error():
  client = fakeredis.FakeRedis()
  client.hset('lmn_jax:user:u', 'version', 'seven')
  client.set('lmn_jax:events:u', 'text')
  store = redis_store.RedisStore('redis://server', 5, client)
  with pytest.raises(StoreError, match='is not available'):
    store.get('u')
  with pytest.raises(StoreError, match='is not available'):
    store.events('u', 1)
