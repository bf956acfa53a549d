"""The store of users in Redis, for processes on several machines."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from lmn_jax.errors import UserError
from lmn_jax.serving.users.records import BUSY_S, NO_RECORD, Event, Record, StoreError

PREFIX = 'lmn_jax:'
FIELDS = ('version', 'tag', 'state')


class RedisStore:
  """A UserStore in Redis: for each user a hash, a list of events and a set of met items."""

  def __init__(self, address: str, keep: int, client: Any = None):
    """Connects.

    Args:
      address: of the server. keep: number of newest events to store of a user. client: a
        redis.Redis to use instead.

    Raises:
      UserError: the package is missing, or no server answers there.
    """
    try:
      import redis
    except ImportError:
      raise UserError(
        f'serve.users={_without_password(address)} needs the package redis; '
        "pip install 'lmn_jax[serve]'"
      ) from None
    self._redis, self.keep = redis, keep
    try:
      self._client = client or redis.Redis.from_url(
        address, socket_timeout=BUSY_S, socket_connect_timeout=BUSY_S
      )
      self._client.ping()
    except (redis.RedisError, ValueError) as error:
      raise UserError(
        f'serve.users={_without_password(address)}: no Redis server answers ({error}); start one, '
        'or correct the address'
      ) from None

  @contextlib.contextmanager
  def _store_errors(self):
    """Turns errors of Redis, and values that this store cannot have written, into StoreError."""
    try:
      yield
    except (self._redis.RedisError, ValueError) as error:
      raise StoreError(f'the store of users is not available ({error})') from error

  def get(self, user: str) -> Record:
    """See UserStore."""
    with self._store_errors():
      return self._record(self._client.hmget(f'{PREFIX}user:{user}', FIELDS))

  def _record(self, values):
    version, tag, state = values
    return NO_RECORD if version is None else Record(int(version), tag.decode(), state)

  def events(self, user: str, n: int) -> list[Event]:
    """See UserStore."""
    with self._store_errors():
      events = self._client.lrange(f'{PREFIX}events:{user}', -n, -1) if n > 0 else []
      return [_unpacked(event) for event in events]

  def met(self, user: str) -> list[str]:
    """See UserStore."""
    with self._store_errors():
      return [item.decode() for item in self._client.smembers(f'{PREFIX}met:{user}')]

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
    key, events, met = (f'{PREFIX}{kind}:{user}' for kind in ('user', 'events', 'met'))
    with self._store_errors(), self._client.pipeline() as pipe:
      pipe.watch(key)  # `execute` fails if another client writes it after this
      if int(pipe.hget(key, 'version') or 0) != version:
        return False
      # If Redis evicted the hash of a user, the rest is deleted too.
      stay = max(0, pipe.llen(events) - replaced) if version else 0
      older = max(0, stay + len(new_events) - self.keep)
      gone = min(older, stay)
      past = [_unpacked(x) for x in pipe.lrange(events, 0, gone - 1)] if gone else []
      past += new_events[: older - gone]
      pipe.multi()
      if version == 0:
        pipe.delete(events, met)
      if past:
        pipe.sadd(met, *{event.item for event in past})
      pipe.ltrim(events, *((0, stay - 1) if stay else (1, 0)))
      if new_events:
        pipe.rpush(events, *map(_packed, new_events))
        pipe.ltrim(events, -self.keep, -1)
      writer = uuid.uuid4().bytes
      values = zip(FIELDS, (version + 1, tag, state), strict=True)
      fields = {name: value for name, value in values if value is not None}
      pipe.delete(key)
      pipe.hset(key, mapping=fields | {'writer': writer})
      try:
        pipe.execute()
      except self._redis.WatchError:
        # Also raised if the connection broke after this write: its answer was lost.
        return self._client.hget(key, 'writer') == writer
    return True

  def close(self) -> None:
    """See UserStore."""
    self._client.close()


def _packed(event: Event) -> str:
  """Returns an event as text. Items, ids and JSON contain no NUL.

  Earlier versions stored items only, or no features; an event without features is as theirs.
  """
  time = '' if event.time is None else event.time
  features = f'\0{event.features}' if event.features else ''
  return f'{event.item}\0{time}\0{event.id}{features}'


def _unpacked(packed: bytes) -> Event:
  item, time, id, features = (packed.decode().split('\0') + ['', '', ''])[:4]
  return Event(item, int(time) if time else None, id, features)


def _without_password(address: str) -> str:
  """Returns an address without the password that it may contain."""
  scheme, _, rest = address.partition('://')
  return f'{scheme}://{rest.rpartition("@")[2]}'
