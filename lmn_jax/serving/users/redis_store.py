"""The service's users in a Redis, for the processes of many machines."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from lmn_jax.errors import UserError
from lmn_jax.serving.users.records import BUSY_S, NOBODY, Event, Record, StoreError

PREFIX = 'lmn_jax:'
FIELDS = ('version', 'tag', 'state')


class RedisStore:
  """A UserStore in Redis: of each user a hash, a list of events, and a set of items met before."""

  def __init__(self, address: str, keep: int, client: Any = None):
    """Connects.

    Args:
      address: of the server. keep: newest events of a user that are kept. client: a redis.Redis
        that is used instead.

    Raises:
      UserError: the package is missing, or no server answers there.
    """
    try:
      import redis
    except ImportError:
      raise UserError(
        f"serve.users={_shown(address)} needs the package redis; pip install 'lmn_jax[serve]'"
      ) from None
    self._redis, self.keep = redis, keep
    try:
      self._client = client or redis.Redis.from_url(
        address, socket_timeout=BUSY_S, socket_connect_timeout=BUSY_S
      )
      self._client.ping()
    except (redis.RedisError, ValueError) as error:
      raise UserError(
        f'serve.users={_shown(address)}: no Redis answers there ({error}); start one, or mend the '
        'address'
      ) from None

  @contextlib.contextmanager
  def _told(self):
    """Errors of Redis, and what it holds that we did not write, as the store's."""
    try:
      yield
    except (self._redis.RedisError, ValueError) as error:
      raise StoreError(f'the store of users cannot be used now ({error})') from error

  def get(self, user: str) -> Record:
    """See UserStore."""
    with self._told():
      return self._record(self._client.hmget(f'{PREFIX}user:{user}', FIELDS))

  def _record(self, found):
    version, tag, state = found
    return NOBODY if version is None else Record(int(version), tag.decode(), state)

  def events(self, user: str, n: int) -> list[Event]:
    """See UserStore."""
    with self._told():
      found = self._client.lrange(f'{PREFIX}events:{user}', -n, -1) if n > 0 else []
      return [_unpacked(one) for one in found]

  def met(self, user: str) -> list[str]:
    """See UserStore."""
    with self._told():
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
    with self._told(), self._client.pipeline() as pipe:
      pipe.watch(key)  # `execute` fails if it is written from here on
      if int(pipe.hget(key, 'version') or 0) != version:
        return False
      # Of a user whose hash was evicted nothing stays.
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
      mine = uuid.uuid4().bytes
      values = (version + 1, tag, state)
      found = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
      pipe.delete(key)
      pipe.hset(key, mapping=found | {'writer': mine})
      try:
        pipe.execute()
      except self._redis.WatchError:
        # Also where the connection broke: ours may have been done, and its answer was lost.
        return self._client.hget(key, 'writer') == mine
    return True

  def close(self) -> None:
    """See UserStore."""
    self._client.close()


def _packed(event: Event) -> str:
  """No item and no id has a NUL. An item alone is an event of earlier versions."""
  time = '' if event.time is None else event.time
  return f'{event.item}\0{time}\0{event.id}'


def _unpacked(packed: bytes) -> Event:
  item, time, name = (packed.decode().split('\0') + ['', ''])[:3]
  return Event(item, int(time) if time else None, name)


def _shown(address: str) -> str:
  """An address without the password that may stand in it."""
  scheme, _, rest = address.partition('://')
  return f'{scheme}://{rest.rpartition("@")[2]}'
