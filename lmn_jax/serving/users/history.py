"""Placing new events of a user among the stored ones: which are repeats, and in what order."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lmn_jax.serving.users.records import Event


class Merged(NamedTuple):
  """The result of `merged`.

  first: the stored events from this index on are replaced by `events`, oldest first. taken,
  repeated: numbers of new events. late: how many of those taken are placed after newer stored
  events, which the model has read before.
  """

  first: int
  events: list[Event]
  taken: int
  repeated: int
  late: int


def merged(held: Sequence[Event], new: Sequence[Event], begin: int = 0) -> Merged:
  """Merges new events into the stored ones.

  An event with an id is a repeat if a stored event has this id. An event with a time and no id is a
  repeat if a stored event has the same item and time; each stored event makes one new event a
  repeat. An event with neither is never a repeat.

  Events are ordered by time, and events of the same time by arrival. An event without a time is the
  newest when it arrives; events before and after it stay there.

  Args:
    held: stored events, in order. new: new events, in order of arrival; all or none have times.
    begin: the first index at which a new event may be placed.
  """
  fresh = _new(held, new)
  if fresh and fresh[0].time is not None:
    fresh.sort(key=lambda event: event.time)
  events, at, late = list(held[begin:]), len(held) - begin, 0
  first = at
  for event in reversed(fresh):
    while at and _after(events[at - 1], event):
      at -= 1
    late += at == 0 and begin > 0 and _after(held[begin - 1], event)
    events.insert(at, event)
    first = at
  return Merged(begin + first, events[first:], len(fresh), len(new) - len(fresh), late)


def _after(event, other):
  """Returns whether an event is known to have happened after another."""
  return None not in (event.time, other.time) and event.time > other.time


def _new(held, new):
  """Returns the new events that are not repeats."""
  ids = {event.id for event in held if event.id}
  alike = Counter((event.item, event.time) for event in held if event.time is not None)
  events = []
  for event in new:
    if event.id:
      is_new = event.id not in ids
      ids.add(event.id)
    else:
      is_new = not alike[event.item, event.time]
      alike[event.item, event.time] -= not is_new
    if is_new:
      events.append(event)
  return events
