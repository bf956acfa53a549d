"""The data that the service stores of a user, and the interface of the stores.

A user's record has a version, and a write names the version that was read. If another writer was
faster the versions differ, and the write fails; the caller then reads and tries again. So no event
is lost or stored twice, whatever processes and threads write.

The newest events of a user are stored completely. Of older events the distinct items are stored,
since the user has met them. Their size grows with the distinct items of a user, not with the
events: in SQLite about 30 bytes and the two ids for each.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

BUSY_S = 5.0  # a transaction waits so long for another one, and a client for Redis


class StoreError(Exception):
  """The store cannot be read or written now; the message is one line."""


class Event(NamedTuple):
  """An event of a user.

  time: an integer of the log, None for none. id: '' for none. features: raw values by name of the
  event feature, as a JSON object; '' for none.
  """

  item: str
  time: int | None = None
  id: str = ''
  features: str = ''


class Record(NamedTuple):
  """The data of a user besides the events.

  version: number of writes, 0 if there is no record. tag: fingerprint of the export that computed
  `state`, '' for none. state: bytes of `Bundle.pack`, None for none.
  """

  version: int
  tag: str
  state: bytes | None


NO_RECORD = Record(0, '', None)


@runtime_checkable
class UserStore(Protocol):
  """Users by raw id. Several threads and processes may call all methods at once.

  All but `close` raise a StoreError if the store cannot be reached, is damaged or stays locked.

  Attributes:
    keep: number of newest events to store of a user.
  """

  keep: int

  def get(self, user: str) -> Record:
    """Returns the record of a user, with version 0 if there is none."""

  def events(self, user: str, n: int) -> list[Event]:
    """Returns the newest n stored events, oldest first."""

  def met(self, user: str) -> list[str]:
    """Returns the distinct items of events that are no longer stored."""

  def put(
    self,
    user: str,
    version: int,
    replaced: int,
    new_events: Sequence[Event],
    tag: str,
    state: bytes | None,
  ) -> bool:
    """Writes the newest events, and the tag and state of the record, in one transaction.

    Args:
      user: raw id. version: of the record that was read; the new one is greater by 1. replaced: how
        many of the newest stored events `new_events` replace. new_events: oldest first. tag, state:
        of the new record.

    Returns:
      Whether it was written; False, without a change, if the record has another version.
    """

  def close(self) -> None:
    """Closes all connections."""
