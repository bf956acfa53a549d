"""Requests: training examples of one user that share his history in a batch.

A request is a run of at most Q examples of a user record, in the order of time. Its history is that
of its first example, the events strictly before it, so no target sees its future. The later
examples may have newer events, which the request lacks: at most `stale_events`. With 0 each target
has exactly the history that it has alone, as between two events, or at equal times.

    bounds_R1 = request_bounds(user, end, targets=8, stale_events=0)
    examples of request r: bounds_R1[r] .. bounds_R1[r + 1] - 1
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lmn_jax.data.store import Part
from lmn_jax.data.times import Clock


class Requests(NamedTuple):
  """The requests of a split, R of them.

  targets: Q, the most examples of a request. bounds: int64 [R + 1], positions in the split; request
  r has the examples from bounds[r] to bounds[r + 1] - 1. stale: number of targets whose history
  lacks events. lacking: number of events that they lack, together. late: mean seconds from the
  first target of a request to a target, which its gaps of time lack; None if times are not read.
  """

  targets: int
  bounds: Int[np.ndarray, 'R1']
  stale: int
  lacking: int
  late: float | None = None

  @property
  def count(self) -> int:
    """R."""
    return len(self.bounds) - 1

  def examples(
    self, request: Int[np.ndarray, 'B']
  ) -> tuple[Int[np.ndarray, 'B Q'], Bool[np.ndarray, 'B Q']]:
    """The positions of the examples of requests, and where there is one.

    Where there is none, the position is that of the last example of the request.
    """
    first_B, end_B = self.bounds[request], self.bounds[request + 1]
    position_BQ = first_B[:, None] + np.arange(self.targets)[None, :]
    return np.minimum(position_BQ, end_B[:, None] - 1), position_BQ < end_B[:, None]

  def describe(self) -> str:
    """One line: how many, their size, how many targets lack events, and how late they are."""
    examples = int(self.bounds[-1])
    text = (
      f'{self.count:,} requests of at most {self.targets} training examples, '
      f'{examples / self.count:.2f} on average'
    )
    late = ''
    if self.late is not None:
      late = f'; gaps of time are those of the first target, {self.late:,.1f} s before a target'
    if not self.stale:
      return f'{text}; every target has its whole history{late}'
    return (
      f'{text}; {self.stale / examples:.1%} of the targets lack their newest events, '
      f'{self.lacking / self.stale:.1f} on average{late}'
    )


def requests_of(
  parts: Sequence[Part], split: str, targets: int, stale_events: int, clock: Clock | None = None
) -> Requests:
  """Groups the examples of a split into requests.

  Args:
    parts: of the store, those that have examples of the split. split: its name.
    targets: Q, most examples of a request, at least 1.
    stale_events: most events that the history of a target may lack, at least 0. clock: of the
      times, if they are read.
  """
  bounds, begin, stale, lacking, late = [], 0, 0, 0, 0
  for part in parts:
    rows = slice(*part.bounds[split])
    user_E, end_E = part.examples['user'][rows], part.examples['end'][rows]
    first_R1 = request_bounds(user_E, end_E, targets, stale_events)
    lacks_E = end_E - np.repeat(end_E[first_R1[:-1]], np.diff(first_R1))
    stale, lacking = stale + np.count_nonzero(lacks_E), lacking + int(lacks_E.sum())
    if clock:
      seconds_E = clock.seconds(part.examples['time'][rows])
      late += int((seconds_E - np.repeat(seconds_E[first_R1[:-1]], np.diff(first_R1))).sum())
    bounds.append(first_R1[:-1] + begin)
    begin += len(user_E)
  bounds_R1 = np.concatenate([*bounds, [begin]])
  return Requests(targets, bounds_R1, stale, lacking, late / begin if clock else None)


def request_bounds(
  user_E: Int[np.ndarray, 'E'], end_E: Int[np.ndarray, 'E'], targets: int, stale_events: int
) -> Int[np.ndarray, 'R1']:
  """Where requests begin, and the number of examples at the end.

  A request takes the next examples of its user until it has `targets`, or the next one has more
  than `stale_events` events that the first one has not.

  Args:
    user_E: user records, ascending. end_E: events before each example, ascending for each user.
    targets: Q. stale_events: as for `requests_of`.
  """
  E = len(user_E)
  begins_E = np.r_[True, user_E[1:] != user_E[:-1]]
  # Ascending, and those of two users are further apart than `stale_events`.
  key_E = user_E.astype(np.int64) * (int(end_E.max()) + stale_events + 1) + end_E
  after_E = np.searchsorted(key_E, key_E + stale_events, side='right')
  after_E = np.minimum(after_E, np.arange(E) + targets)  # where a request from e on would end
  at = np.flatnonzero(begins_E)
  while len(at):  # the next requests of all users at once
    at = after_E[at]
    at = at[at < E]
    at = at[~begins_E[at]]
    begins_E[at] = True
  return np.append(np.flatnonzero(begins_E), E)
