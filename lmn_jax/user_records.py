"""What the service remembers of a user, and how it is kept: the interface of the stores.

A user's record has a version, which a writer names: who read version 7 and finds 8 there has lost
to another writer, reads again and tries again. So no event is lost and none is taken in twice,
whatever processes and threads write.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

BUSY_S = 5.0  # a transaction waits so long for another's; also for an answer of Redis


class StoreError(Exception):
  """The store cannot be read or written now. The message is one line."""


class Record(NamedTuple):
  """What is kept of a user beside his events.

  version: how often he was written; 0: he is not there. time: of his newest event, None if none had
  one. tag: of what model `state` is, '' for none. state: as bytes, None for none.
  """

  version: int
  time: int | None
  tag: str
  state: bytes | None


NOBODY = Record(0, None, '', None)


@runtime_checkable
class UserStore(Protocol):
  """Users by raw id. All methods may be called by several threads and processes at once.

  All but `close` raise a StoreError when the store is out of reach, damaged or locked for long.
  """

  def get(self, user: str) -> Record:
    """The record of a user; version 0 if he is not there."""

  def events(self, user: str, n: int) -> list[str]:
    """His newest n items that are kept, oldest first."""

  def put(
    self,
    user: str,
    version: int,
    new_events: Sequence[str],
    time: int | None,
    tag: str,
    state: bytes | None,
  ) -> bool:
    """Appends events and replaces the rest of the record, all of it or nothing.

    Args:
      user: raw id. version: that was read; it becomes one more. new_events: oldest first.
      time, tag, state: of the record from now on.

    Returns:
      False, and nothing was changed, if the version is no longer the one that was read.
    """

  def close(self) -> None:
    """Ends all connections."""
