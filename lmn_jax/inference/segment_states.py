"""The states of users between two requests, and how new events are added to them.

A state is what a model carries of a user's full segments, and the events after these. This file
needs NumPy and JAX only: every exported folder has a copy of it.

The events of a user are arrays by name, oldest first: `item`, int32 rows [E]; and, if the model
reads them, the event features `event.<f>`, int32 codes [E] or [E, M] or float32 numbers [E], and
`time`, seconds since the earliest time of the log, UNTIMED where it is not known.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

UNTIMED = np.iinfo(np.int32).min  # an event without a time; it counts as of the time of the request
Events = Mapping[str, np.ndarray]


class UserStates(NamedTuple):
  """States of N users of a next-item model, on the host.

  row: embedding rows, 0 for a user that training did not see. segments: how many are carried.
  held: number of events after these segments, 0 to T. recent: these events, oldest first and
  padded: arrays [N, T, ...] by name. carry: what the model carries, arrays [N, ...].
  """

  row: np.ndarray
  segments: np.ndarray
  held: np.ndarray
  recent: dict[str, np.ndarray]
  carry: Any


def no_events(padding: Events, N: int, T: int) -> dict[str, np.ndarray]:
  """Returns `recent` of N users without events.

  Args:
    padding: by name the value of a missing event, [] or [M].
  """
  return {name: np.full((N, T, *x.shape), x, x.dtype) for name, x in padding.items()}


def clear(states: UserStates, users: np.ndarray, padding: Events) -> None:
  """Removes the events of some users, in place, after they were read into the carry."""
  states.segments[users] += 1
  states.held[users] = 0
  for name, x in states.recent.items():
    x[users] = padding[name]


def segment_of(
  states: UserStates, users: np.ndarray, request: np.ndarray | None
) -> dict[str, np.ndarray]:
  """Returns the arrays of a batch of the events that some users hold.

  `time_gap`, float32 [U, T], is the time from an event to the next one, and from the last one to
  the request; 0 on padding.

  Args:
    states: of users. users: U indices.
    request: int64 [U], the time of the request after the last event, in seconds as the times of the
      events; None if the model reads no times.
  """
  batch = {name: x[users] for name, x in states.recent.items()}
  batch |= {'first': states.segments[users] == 0, 'user': states.row[users]}
  if 'time' in batch:
    assert request is not None
    batch['time'], batch['time_gap'] = _times(batch['time'], states.held[users], request)
  return batch


def _times(time_NT, held_N, request_N):
  """Returns `time` int32 [N, T] and `time_gap` float32 [N, T] of a batch, both 0 on padding."""
  real_NT = np.arange(time_NT.shape[1]) < held_N[:, None]
  known_NT = real_NT & (time_NT != UNTIMED)
  latest_N = np.max(time_NT, axis=1, where=known_NT, initial=UNTIMED)
  # Neither the request nor any event may have a time; then all are at 0.
  latest_N = np.where(latest_N == UNTIMED, 0, latest_N)
  request_N1 = np.where(request_N == UNTIMED, latest_N, request_N).astype(np.int64)[:, None]
  time_NT = np.where(known_NT, time_NT, request_N1)
  next_NT = np.concatenate([time_NT[:, 1:], request_N1], axis=1)
  gap_NT = np.maximum(next_NT - time_NT, 0)
  return (
    np.where(real_NT, time_NT, 0).astype(np.int32),
    np.where(real_NT, gap_NT, 0).astype(np.float32),
  )


def take_in(
  states: UserStates,
  events: Sequence[Events],
  fold: Callable[[UserStates, np.ndarray, np.ndarray | None], None] | None,
) -> Generator[None, None, UserStates]:
  """Returns the states after new events, in steps; `states` is not changed.

  A full segment is folded when one more event comes: the gap of its last event ends there.

  Args:
    states: of N users. events: each user's new events.
    fold: (states, indices of users, times of the next events), reads the full segments of these
      users into their carry, in place; each call is a step. None for a model of windows, which
      keeps the newest T events only. The times are None if the model reads none.
  """
  states = jax.tree.map(np.copy, states)
  T = states.recent['item'].shape[1]
  size = np.array([len(new['item']) for new in events], np.int64)
  if fold is None:
    for user, new in enumerate(events):
      held = states.held[user]
      for name, x in states.recent.items():
        newest = np.concatenate([x[user, :held], new[name]])[-T:]
        x[user, : len(newest)] = newest
      states.held[user] = min(T, held + size[user])
    return states
  taken = np.zeros(len(events), np.int64)
  while len(users := np.flatnonzero(taken < size)):
    full = users[states.held[users] == T]
    if len(full):
      fold(states, full, _next_times(states, events, full, taken))
      yield
    for user in users:
      held, begin = states.held[user], taken[user]
      count = min(T - held, size[user] - begin)
      for name, x in states.recent.items():
        x[user, held : held + count] = events[user][name][begin : begin + count]
      states.held[user] += count
      taken[user] += count
  return states


def _next_times(states, events, users, taken):
  """Returns the time of each user's next event, int64; None if the model reads no times."""
  if 'time' not in states.recent:
    return None
  return np.array([events[user]['time'][taken[user]] for user in users], np.int64)


def all_steps(steps: Generator[None, None, Any]) -> Any:
  """Runs a generator to its end and returns its value."""
  while True:
    try:
      next(steps)
    except StopIteration as end:
      return end.value
