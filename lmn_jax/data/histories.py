"""The histories that a split reads: which events of which users, whole or cut into windows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lmn_jax.data.named_histories import MAIN, column_of
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.data.targets import Targets

Ints = Int[np.ndarray, '_']


class Users(NamedTuple):
  """Where the history of each user record is, each int64 [U].

  part: of the store. offset: of the first event in the part. count: events. row: of the embedding.
  """

  part: Ints
  offset: Ints
  count: Ints
  row: Ints


def users_of(store: Store, history: str = MAIN) -> Users:
  """The user records of all parts, with their events in a history, by default the main one."""

  def column(name):
    return np.concatenate([part.users[name] for part in store.parts]).astype(np.int64)

  sizes = [len(part.users['count']) for part in store.parts]
  offset, count = (column(column_of(history, name)) for name in ('offset', 'count'))
  return Users(np.repeat(np.arange(len(sizes)), sizes), offset, count, column('row'))


class Histories(NamedTuple):
  """Pieces of histories, each int64 [N].

  record: of the user. first: the first event that is read. events: how many are read.
  """

  record: Ints
  first: Ints
  events: Ints


def histories_of(training: Ints, targets: Targets, split: str) -> Histories:
  """The histories of a split, from the first event on, of users with anything to predict.

  Args:
    training: of `training_events`.
    targets: of `targets_of`.
    split: 'train' reads the training events of users with two or more. Another split reads up to
      the user's last target of that split; a target without an event before it is not predicted.
  """
  if split == 'train':
    events = training
    record = np.flatnonzero(events > 1)
  else:
    chosen = targets.split == SPLITS.index(split)
    events = np.zeros_like(training)
    np.maximum.at(events, targets.user[chosen], targets.place[chosen])
    record = np.flatnonzero(events)
  return Histories(record, np.zeros_like(record), events[record])


def latest_of(histories: Histories, length: int) -> Histories:
  """The last `length` events of each history; the last of them is only a target."""
  events = np.minimum(histories.events, length + 1)
  return Histories(histories.record, histories.first + histories.events - events, events)


def windows_of(histories: Histories, length: int) -> Histories:
  """Cuts training histories into windows of `length` events, each with one more as last target.

  The last window of a history is full, and its first one may be shorter.
  """
  inputs = histories.events - 1
  windows = -(-inputs // length)
  history = np.repeat(np.arange(len(windows)), windows)
  # Counted from the end of the history.
  k = np.cumsum(windows)[history] - 1 - np.arange(len(history))
  end = inputs[history] - k * length
  begin = np.maximum(end - length, 0)
  return Histories(histories.record[history], histories.first[history] + begin, end - begin + 1)


def windows_before(targets: Targets, numbers: Ints, length: int) -> Histories:
  """The window of at most `length` events before each of some targets.

  Args:
    targets: of `targets_of`.
    numbers: of the targets; each has an event before it.
    length: T.
  """
  place = targets.place[numbers]
  first = np.maximum(place - length, 0)
  return Histories(targets.user[numbers], first, place - first)


def item_counts(histories: Histories, users: Users, items: list[np.ndarray], V: int) -> Ints:
  """How often each item occurs in histories that do not overlap: int64 [V].

  Args:
    histories: at most one of each user.
    users: of `users_of`.
    items: item rows of the events of each part.
    V: items of the vocabulary.
  """
  count_V = np.zeros(V, np.int64)
  part, begin = users.part[histories.record], users.offset[histories.record] + histories.first
  for number, item in enumerate(items):
    in_part = part == number
    # +1 at the first event that is read and -1 after the last: the sum is 1 where events are read.
    edge = np.zeros(len(item) + 1, np.int32)
    edge[begin[in_part]] += 1
    np.subtract.at(edge, begin[in_part] + histories.events[in_part], 1)
    count_V += np.bincount(item[np.cumsum(edge)[:-1] > 0], minlength=V)
  return count_V
