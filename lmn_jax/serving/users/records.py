"""What the service remembers of a user, and how it is kept: the interface of the stores.

A user's record has a version, which a writer names: who read version 7 and finds 8 there has lost
to another writer, reads again and tries again. So no event is lost and none is taken in twice,
whatever processes and threads write.

The newest events of a user are kept whole. Of an event that is older than these the item is kept,
each item once: the user has met it. That grows with the different items of a user, not with his
events: in SQLite about 30 bytes and the two ids for each.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

BUSY_S = 5.0  # a transaction waits so long for another's; also for an answer of Redis


class StoreError(Exception):
  """The store cannot be read or written now. The message is one line."""


class Event(NamedTuple):
  """An event of a user. time: as the store of the log has it, None for none. id: '' for none."""

  item: str
  time: int | None = None
  id: str = ''


class Record(NamedTuple):
  """What is kept of a user beside the events.

  version: how often it was written; 0: it is not there. tag: of what model `state` is, '' for none.
  state: as bytes, None for none.
  """

  version: int
  tag: str
  state: bytes | None


NOBODY = Record(0, '', None)


@runtime_checkable
class UserStore(Protocol):
  """Users by raw id. All methods may be called by several threads and processes at once.

  All but `close` raise a StoreError when the store is out of reach, damaged or locked for long.

  Attributes:
    keep: newest events of a user that are kept.
  """

  keep: int

  def get(self, user: str) -> Record:
    """The record of a user; version 0 if it is not there."""

  def events(self, user: str, n: int) -> list[Event]:
    """The newest n events that are kept, in their order."""

  def met(self, user: str) -> list[str]:
    """Items of the events that are kept no more, each once."""

  def put(
    self,
    user: str,
    version: int,
    replaced: int,
    new_events: Sequence[Event],
    tag: str,
    state: bytes | None,
  ) -> bool:
    """Writes the newest events and replaces the rest of the record, all of it or nothing.

    Args:
      user: raw id. version: that was read; it becomes one more. replaced: how many of the newest
        events `new_events` take the place of. new_events: oldest first. tag, state: of the record
        from now on.

    Returns:
      False, and nothing was changed, if the version is no longer the one that was read.
    """

  def close(self) -> None:
    """Ends all connections."""
