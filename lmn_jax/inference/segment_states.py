"""The states of users between two requests, and how new events are taken into them.

A state is what a model carries of the full segments of a user, and the events since. NumPy and
JAX alone: a copy of this file lies in every exported folder.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class UserStates(NamedTuple):
  """States of N users of a next-item model, on the host.

  row: of the embedding, 0 for a user that training did not see. segments: how many are carried.
  held: events since, 0 to T. recent: their item rows, oldest first, padded with V. carry: of the
  model, arrays [N, ...].
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
  """The states after new events, in steps; those given are not changed.

  Args:
    states: of N users. events: item rows of each one's new events, oldest first.
    fold: (states, numbers of users), reads these users' full segments into what is carried, in
      place; each call is a step. None for a model of windows, of which the newest T events are all.
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
  """Runs steps to their end and returns what they give."""
  while True:
    try:
      next(steps)
    except StopIteration as end:
      return end.value
