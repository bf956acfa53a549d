"""New events of a user among those that are held: which are repeats, and where each one stands."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lmn_jax.serving.users.records import Event


class Merged(NamedTuple):
  """What becomes of new events.

  first: the place among the held events from which `events` take their place, oldest first.
  taken, repeated: how many of the new ones. late: how many of those taken stand after held events
  that are newer, since these were read before.
  """

  first: int
  events: list[Event]
  taken: int
  repeated: int
  late: int


def merged(held: Sequence[Event], new: Sequence[Event], begin: int = 0) -> Merged:
  """Puts new events among those that are held.

  An event with an id is a repeat if one of this id is held. An event without an id, but with a
  time, is a repeat if one of the same item and time is held, one for one: of two alike the second
  is another event, if one is held. An event with neither is never a repeat.

  Events are in the order of their times, and of the same time in the order that they came in. One
  without a time is the newest when it comes, and others stay on their side of it.

  Args:
    held: in their order. new: that came, in their order; all have times, or none has.
    begin: the first place where a new one may stand.
  """
  fresh = _fresh(held, new)
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


def _after(one, other):
  """Whether an event is known to have happened after another."""
  return None not in (one.time, other.time) and one.time > other.time


def _fresh(held, new):
  ids = {event.id for event in held if event.id}
  alike = Counter((event.item, event.time) for event in held if event.time is not None)
  found = []
  for event in new:
    if event.id:
      fresh = event.id not in ids
      ids.add(event.id)
    else:
      fresh = not alike[event.item, event.time]
      alike[event.item, event.time] -= not fresh
    if fresh:
      found.append(event)
  return found
