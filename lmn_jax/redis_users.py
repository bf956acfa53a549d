"""The service's users in a Redis, for the processes of many machines."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from lmn_jax.errors import UserError
from lmn_jax.user_records import BUSY_S, NOBODY, Record, StoreError

PREFIX = 'lmn_jax:'
FIELDS = ('version', 'time', 'tag', 'state')


class RedisStore:
  """A UserStore in Redis: of each user a hash and a list."""

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
    self._redis, self._keep = redis, keep
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
    version, time, tag, state = found
    if version is None:
      return NOBODY
    return Record(int(version), None if time is None else int(time), tag.decode(), state)

  def events(self, user: str, n: int) -> list[str]:
    """See UserStore."""
    with self._told():
      found = self._client.lrange(f'{PREFIX}events:{user}', -n, -1) if n > 0 else []
      return [item.decode() for item in found]

  def put(
    self,
    user: str,
    version: int,
    new_events: Sequence[str],
    time: int | None,
    tag: str,
    state: bytes | None,
  ) -> bool:
    """See UserStore."""
    key, events = f'{PREFIX}user:{user}', f'{PREFIX}events:{user}'
    with self._told(), self._client.pipeline() as pipe:
      pipe.watch(key)  # `execute` fails if it is written from here on
      if int(pipe.hget(key, 'version') or 0) != version:
        return False
      pipe.multi()
      if version == 0:
        pipe.delete(events)  # of a user whose hash was evicted
      if new_events:
        pipe.rpush(events, *new_events[-self._keep :])
        pipe.ltrim(events, -self._keep, -1)
      mine = uuid.uuid4().bytes
      values = (version + 1, time, tag, state)
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


def _shown(address: str) -> str:
  """An address without the password that may stand in it."""
  scheme, _, rest = address.partition('://')
  return f'{scheme}://{rest.rpartition("@")[2]}'
