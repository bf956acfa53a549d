"""The states of users between two requests, and how new events are added to them.

A state is what a model carries of a user's full segments, and the events after these. This file
needs NumPy and JAX only: every exported folder has a copy of it.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class UserStates(NamedTuple):
  """States of N users of a next-item model, on the host.

  row: embedding rows, 0 for a user that training did not see. segments: how many are carried.
  held: number of events after these segments, 0 to T. recent: item rows of these events, oldest
  first, padded with V. carry: what the model carries, arrays [N, ...].
  """

  row: np.ndarray
  segments: np.ndarray
  held: np.ndarray
  recent: np.ndarray
  carry: Any


def take_in(
  states: UserStates,
  events: Sequence[np.ndarray],
  fold: Callable[[UserStates, np.ndarray], None] | None,
) -> Generator[None, None, UserStates]:
  """Returns the states after new events, in steps; `states` is not changed.

  Args:
    states: of N users. events: item rows of each user's new events, oldest first.
    fold: (states, indices of users), reads the full segments of these users into their carry, in
      place; each call is a step. None for a model of windows, which keeps the newest T events only.
  """
  states = jax.tree.map(np.copy, states)
  T = states.recent.shape[1]
  if fold is None:
    for user, items in enumerate(events):
      newest = np.concatenate([states.recent[user, : states.held[user]], items])[-T:]
      states.recent[user, : len(newest)], states.held[user] = newest, len(newest)
    return states
  taken, size = np.zeros(len(events), np.int64), np.array([len(items) for items in events])
  while len(users := np.flatnonzero(taken < size)):
    full = users[states.held[users] == T]
    if len(full):
      fold(states, full)
      yield
    for user in users:
      held, begin = states.held[user], taken[user]
      items = events[user][begin : begin + T - held]
      states.recent[user, held : held + len(items)] = items
      states.held[user] += len(items)
      taken[user] += len(items)
  return states


def all_steps(steps: Generator[None, None, Any]) -> Any:
  """Runs a generator to its end and returns its value."""
  while True:
    try:
      next(steps)
    except StopIteration as end:
      return end.value
