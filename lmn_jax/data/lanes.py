"""Streaming batches of whole histories: lanes walk through users, segment by segment.

A batch is a dict of numpy arrays of fixed shape, B lanes of this host, T positions of a segment:

  item [B, T] i32      item rows of the events, oldest first, padded with V behind a user's last
  target [B, T] i32    of training: the item after each, V where there is none to be learnt
  asked [B, P] i32     of validation and test: positions after which an item is to be told
  number [B, P] i32    which it is, in `targets_of`; -1 behind the last that is asked
  negative [B, T, N] i32      of training, where asked for: items drawn for each target, with
  log_q [B, T] f32            the log of how often the target,
  negative_log_q [B, T, N]    and each of them, is drawn
  first [B] bool       the segment is its user's first: what a model carries begins anew
  user [B] i32         embedding row; 0 unknown
  begin [B, T] i32     instead of `user`, where several windows stand side by side in a lane: the
                       position at which the window of each event begins

Whole histories are for models that carry something on; a model that reads a window at a time gets
the same batches with each window for itself, or, if it can tell them apart, as many as a lane
holds: see `whole` and `packed` of LaneSource.

Of whole histories a lane has users of its own and takes one after the other, each from the oldest
event on, so that what a model carries from a segment to the next is of one user. Users are dealt to
the lanes by length, so that all have about as much to do; nothing is padded to the longest user,
and a step costs the same however long histories are. Training has no end: when a lane has gone
through its users, or all lanes through the windows, it begins again, in a new order. The step alone
is the data's position.
"""

from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int, Shaped

from lmn_jax.data.batches import ENDLESS, permute
from lmn_jax.data.packing import pack, place_of
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Part, Store
from lmn_jax.errors import UserError, one_of

Ints = Int[np.ndarray, '_']


class Targets(NamedTuple):
  """What is to be predicted in validation and test: their clicked examples, each an array [E].

  user: records of the store. place: of the event in its user's history, which is read up to there.
  item: rows. split: numbers of SPLITS.
  """

  user: Ints
  place: Ints
  item: Ints
  split: Shaped[np.ndarray, '_']


def targets_of(store: Store) -> Targets:
  """The targets of a store, by user and place.

  A history is ordered by (time, original row), and a next item is what stands next in this order:
  events of the same second before it are read, unlike by a click model.
  """
  found = [_targets(part) for part in store.parts]
  return Targets(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _targets(part: Part) -> Targets:
  held = slice(part.bounds['train'][1], None)  # validation and test lie behind
  clicked = part.examples['label'][held] > 0
  user, item, split = (part.examples[name][held][clicked] for name in ('user', 'item', 'split'))
  place = places_of(part)[held][clicked]
  order = np.lexsort((place, user))
  return Targets(
    user[order].astype(np.int64) + part.first, place[order], item[order].astype(np.int64),
    split[order],
  )  # fmt: skip


def places_of(part: Part) -> Ints:
  """Where each example stands in its user's history, which is read up to there: [E].

  An event stands at its own place, another example behind the events of earlier times.
  """
  end = part.examples['end'].astype(np.int64)
  if 'place' not in part.examples:
    return _looked_up(part, end)
  place = part.examples['place']
  return np.where(place < 0, end, place)


def _looked_up(part: Part, end: Ints) -> Ints:
  """`places_of` a store without the column `place`: clicks are found by user, time and item.

  Those of a click's second begin at `end`; equal ones are taken in the order of the splits.
  """
  clicks = np.flatnonzero(part.examples['label'] > 0)
  user, item, time, split = (
    part.examples[name][clicks] for name in ('user', 'item', 'time', 'split')
  )
  offset, count = part.users['offset'][user], part.users['count'][user]
  order = np.lexsort((split, item, time, user))
  new = np.ones(len(order), bool)
  new[1:] = (np.diff(user[order]) != 0) | (np.diff(time[order]) != 0) | (np.diff(item[order]) != 0)
  index = np.arange(len(order))
  skip = np.empty(len(order), np.int64)
  skip[order] = index - np.maximum.accumulate(np.where(new, index, 0))
  place, at, left = end.copy(), end[clicks], np.arange(len(user))
  while len(left):
    event = np.minimum(offset[left] + at[left], len(part.history['item']) - 1)
    within = (at[left] < count[left]) & (part.history['time'][event] == time[left])
    same = within & (part.history['item'][event] == item[left])
    hit = same & (skip[left] == 0)
    place[clicks[left[hit]]] = at[left[hit]]
    skip[left[same]] -= 1
    at[left] += 1
    left = left[within & ~hit]
  return place


def training_events(store: Store) -> Ints:
  """How many events of each user are training: those before the first held-out one, int64 [U]."""
  found = []
  for part in store.parts:
    held = slice(part.bounds['train'][1], None)
    matters = part.examples['label'][held] > 0
    if 'place' in part.examples:
      matters |= part.examples['place'][held] >= 0  # an event that is no click
    events = part.users['count'].astype(np.int64)
    np.minimum.at(events, part.examples['user'][held][matters], places_of(part)[held][matters])
    found.append(events)
  return np.concatenate(found)


def training_items(store: Store) -> Iterator[np.ndarray]:
  """The item rows of each user's training events, oldest first, whatever a model reads of them."""
  events = training_events(store)
  for part in store.parts:
    own = events[part.first : part.first + len(part.users['count'])]
    for offset, count in zip(part.users['offset'], own, strict=True):
      yield part.history['item'][offset : offset + count]


class Users(NamedTuple):
  """Where a user's history lies, by record, each int64 [U].

  part: of the store. offset: of the first event in it. count: events. row: of the embedding.
  """

  part: Ints
  offset: Ints
  count: Ints
  row: Ints


def users_of(store: Store) -> Users:
  """The users of all parts."""
  columns = {
    name: np.concatenate([part.users[name] for part in store.parts]).astype(np.int64)
    for name in ('offset', 'count', 'row')
  }
  sizes = [len(part.users['count']) for part in store.parts]
  return Users(np.repeat(np.arange(len(sizes)), sizes), **columns)


class Histories(NamedTuple):
  """What a split reads, an entry for each piece of a history, each int64 [N].

  record: whose. first: the first event that is read. events: how many.
  """

  record: Ints
  first: Ints
  events: Ints


def histories_of(training: Ints, targets: Targets, split: str) -> Histories:
  """The histories of a split, from the first event on, of users who have anything to predict.

  Args:
    training: of `training_events`. targets: of `targets_of`.
    split: 'train' reads the training events of users with two or more. Another reads up to the
      user's last target of that split; targets before which there is no event are nobody's.
  """
  if split == 'train':
    events = training
    record = np.flatnonzero(events > 1)
  else:
    own = targets.split == SPLITS.index(split)
    events = np.zeros_like(training)
    np.maximum.at(events, targets.user[own], targets.place[own])
    record = np.flatnonzero(events)
  return Histories(record, np.zeros_like(record), events[record])


def deal(segments: Ints, lanes: int) -> list[Ints]:
  """Users for each lane, so that all lanes have about as many segments.

  The longest go first, to and fro over the lanes.

  Args:
    segments: [U], of each user.
  """
  order = np.argsort(-segments, kind='stable')
  turn, place = np.divmod(np.arange(len(order)), lanes)
  lane = np.where(turn % 2, lanes - 1 - place, place)
  by_lane = np.argsort(lane, kind='stable')
  return np.split(order[by_lane], np.cumsum(np.bincount(lane, minlength=lanes))[:-1])


def windows_of(read: Histories, length: int) -> Histories:
  """Histories of training cut into windows of `length` events, each with one more as last target.

  The last window of a history is full and its first may be short.
  """
  inputs = read.events - 1
  windows = -(-inputs // length)
  whose = np.repeat(np.arange(len(windows)), windows)
  # Counted from the end of the history.
  k = np.cumsum(windows)[whose] - 1 - np.arange(len(whose))
  end = inputs[whose] - k * length
  begin = np.maximum(end - length, 0)
  return Histories(read.record[whose], read.first[whose] + begin, end - begin + 1)


class LaneSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  Picklable: a copy in another process opens the store's maps anew.

  Attributes:
    targets: of validation and test. own: numbers of those of this split, [E].
    rows: what a lane reads at a time: users, or windows, or as many windows as stand together.
    batches: steps in which every lane has gone through its users once.
  """

  def __init__(
    self,
    store_path,
    split: str,
    lanes: int,
    length: int,
    seed: int = 0,
    shuffle: bool = False,
    rows: np.ndarray | None = None,
    sampler: str = '',
    negatives: int = 0,
    whole: bool = True,
    latest: bool = False,
    packed: bool = False,
    exclude_seen: bool = True,
  ):
    """Opens the store and deals the users to the lanes.

    Args:
      store_path: folder of the store.
      split: train | valid | test.
      lanes: B, of a global batch, over all hosts.
      length: T, events of a segment.
      seed: of the order.
      shuffle: True: without end, each lane's users, or all windows, in a new order each time.
        False: once, of whole histories the longest first; lanes that have done go on empty.
      rows: int64, ascending, the lanes that this host reads, as `mesh.share` finds them; None reads
        all.
      sampler: of training, as in next_item/base.py; '' for none. 'in_batch' has only `log_q`.
      negatives: N, drawn for each event by 'uniform' and 'popularity'.
      whole: histories from the first event on, in segments of which the last may be short. False:
        windows for themselves, all `first`. In training the last one is full and a user's first
        may be short; validation and test read one window, the T events before each target.
      latest: training has only the last window of each user; windows are then for themselves.
      packed: windows stand side by side in a lane, as many as it has room for.
      exclude_seen: what a user has met is no candidate (`excluded`).

    Raises:
      UserError: nothing to predict; fewer users than lanes of whole histories that have no end.
    """
    one_of('split', split, SPLITS)
    self._arguments = dict(
      store_path=store_path, split=split, lanes=lanes, length=length, seed=seed, shuffle=shuffle,
      rows=rows, sampler=sampler, negatives=negatives, whole=whole, latest=latest,
      packed=packed, exclude_seen=exclude_seen,
    )  # fmt: skip
    store, T, whole = Store(store_path), length, whole and not latest
    self._users, self.targets = users_of(store), targets_of(store)
    self.own = np.flatnonzero(self.targets.split == SPLITS.index(split))
    self._training, self._shuffle, self._seed = split == 'train', shuffle, seed
    self._length, self._lanes, self._whole = length, lanes, whole
    self._rows = np.arange(lanes) if rows is None else rows
    self._read = histories_of(training_events(store), self.targets, split)
    if latest and self._training:
      # The last event is a target only.
      record, first, events = self._read
      kept = np.minimum(events, T + 1)
      self._read = Histories(record, first + events - kept, kept)
    if not len(self._read.record):
      raise UserError(
        f'{store.path}: split {split!r} has nothing to predict from ({store.protocol}); change '
        'config.data.split'
      )
    self._entries = self._read
    if not whole and self._training:
      self._entries = windows_of(self._read, T)
    elif not whole:
      self._number = self.own[self.targets.place[self.own] > 0]
      place = self.targets.place[self._number]
      first = np.maximum(place - T, 0)
      self._entries = Histories(self.targets.user[self._number], first, place - first)
    self._items = [part.history['item'] for part in store.parts]
    self._padding = np.int32(store.vocabulary['item'])
    # The last event of training is a target only.
    self._inputs = self._entries.events - self._training
    entries = len(self._inputs)
    self._packed = packed and not whole
    # What stands in a lane together, and in how many segments it is read.
    self._together, self._bounds = np.arange(entries), np.arange(entries + 1)
    if self._packed:
      self._together, self._bounds = pack(self._inputs, T)
    self._segments = -(-self._inputs // T) if whole else np.ones(len(self._bounds) - 1, np.int64)
    self.rows = len(self._segments)
    if whole:
      if shuffle and entries < lanes:
        raise UserError(
          f'config.batch_size={lanes} lanes are more than the {entries} users with two events or '
          f'more in training; use at most {entries}'
        )
      self._dealt = deal(self._segments, lanes)
      self.batches = max(int(self._segments[own].sum()) for own in self._dealt)
    else:
      self.batches = -(-len(self._segments) // lanes)
    self._rounds: dict[int, tuple[int, Ints, Ints]] = {}
    self._sampler, self._negatives = sampler, negatives
    if sampler in ('popularity', 'in_batch'):
      count_V = self._count()
      self._upto_V = np.cumsum(count_V)
      share_V = np.maximum(count_V, 1) / self._upto_V[-1]
      self._log_q = np.append(np.log(share_V), 0).astype(np.float32)  # of the padding nothing
    if not self._training:
      # The targets of this split, in order.
      self._keys = self._key(self.targets.user[self.own], self.targets.place[self.own])
      self._most = self._most_asked()

  def __reduce__(self):
    return _reopen, (self._arguments,)

  def __repr__(self) -> str:
    # As of BatchSource: what is read, not where it lies nor which host reads it.
    named = {name: x for name, x in self._arguments.items() if name not in ('store_path', 'rows')}
    return f'LaneSource({", ".join(f"{name}={x!r}" for name, x in named.items())})'

  def __len__(self) -> int:
    return ENDLESS if self._shuffle else self.batches

  def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
    """The batch of a step, as described at the head of this file."""
    (row, segment), B, T = self._where(int(step)), len(self._rows), self._length
    there = row >= 0  # lanes that have done in evaluation are empty
    # What the lanes read, lane by lane: pieces of entries, and their events.
    count = np.where(there, self._bounds[row + 1] - self._bounds[row], 0)
    lane = np.repeat(np.arange(B), count)
    entry = self._together[self._bounds[row][lane] + place_of(count)]
    begin = segment[lane] * T
    record, events = self._entries.record[entry], np.minimum(self._inputs[entry] - begin, T)
    piece, place = np.repeat(np.arange(len(lane)), events), place_of(events)
    column = place_of(np.bincount(lane, events, B).astype(np.int64))
    at = lane[piece] * T + column
    source = (self._users.offset[record] + self._entries.first[entry] + begin)[piece] + place
    part = self._users.part[record][piece]

    def laid(values, empty):
      found = np.full(B * T, empty, np.int32)
      found[at] = values
      return found.reshape(B, T)

    def items(source):
      found = np.empty(len(source), np.int32)
      for number in np.unique(part):
        own = part == number
        found[own] = self._items[number][source[own]]
      return laid(found, self._padding)

    batch = dict(item=items(source), first=(segment == 0) | (not self._whole))
    if self._packed:
      batch['begin'] = laid(column - place, 0)
    else:
      batch['user'] = np.zeros(B, np.int32)
      batch['user'][lane] = self._users.row[record]
    if self._training:
      return batch | self._sampled(int(step), items(source + 1))
    if self._whole:
      which, number = self._targets_within(record, begin)
      asked = self.targets.place[number] - 1 - begin[which]
    else:
      which, number = np.arange(len(entry)), self._number[entry]
      asked = column[np.cumsum(events) - 1]
    shape = B, self._most
    batch |= dict(asked=np.zeros(shape, np.int32), number=np.full(shape, -1, np.int32))
    own = lane[which], place_of(np.bincount(lane[which], minlength=B))
    batch['asked'][own], batch['number'][own] = asked, number
    return batch

  def _targets_within(self, record: Ints, begin: Ints) -> tuple[Ints, Ints]:
    """Targets to be told after the T events from `begin` on: whose piece, and which.

    The item at place p is to be told after event p - 1.
    """
    low = np.searchsorted(self._keys, self._key(record, begin + 1))
    count = np.searchsorted(self._keys, self._key(record, begin + self._length + 1)) - low
    which = np.repeat(np.arange(len(record)), count)
    return which, self.own[low[which] + place_of(count)]

  def _most_asked(self) -> int:
    """P, most targets of a lane at a step."""
    if not self._whole:
      return int(np.diff(self._bounds).max())
    user, place = self.targets.user[self.own], self.targets.place[self.own]
    segment = self._key(user, np.maximum(place - 1, 0) // self._length)
    return int(np.unique(segment[place > 0], return_counts=True)[1].max())

  def before(self, number: Ints) -> list[np.ndarray]:
    """The item rows that the users of targets have met before them, by number of the target."""
    user = self.targets.user[number]
    part, offset = self._users.part[user], self._users.offset[user]
    return [
      self._items[p][first : first + place]
      for p, first, place in zip(part, offset, self.targets.place[number], strict=True)
    ]

  def excluded(self, number: Ints) -> list[np.ndarray]:
    """The item rows that are no candidates for targets, by number of the target."""
    seen = self.before(number)
    return seen if self._arguments['exclude_seen'] else [items[:0] for items in seen]

  def histories(self) -> Iterator[np.ndarray]:
    """The item rows of each entry, as far as this split reads them."""
    for record, first, events in zip(*self._read, strict=True):
      offset = self._users.offset[record] + first
      yield self._items[self._users.part[record]][offset : offset + events]

  def _count(self) -> Ints:
    """How often each item stands in what training reads: int64 [V]."""
    count_V = np.zeros(self._padding, np.int64)
    record, first, _ = self._read
    part, begin = self._users.part[record], self._users.offset[record] + first
    for number, items in enumerate(self._items):
      own = part == number
      # +1 where a user's events begin and -1 behind the last that is read.
      edge = np.zeros(len(items) + 1, np.int32)
      edge[begin[own]] += 1
      np.subtract.at(edge, begin[own] + self._read.events[own], 1)
      count_V += np.bincount(items[np.cumsum(edge)[:-1] > 0], minlength=len(count_V))
    return count_V

  def _sampled(self, step: int, target_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The targets, with what a sampled loss needs beside them."""
    found = dict(target=target_BT)
    if self._sampler in ('uniform', 'popularity'):
      # Drawn for the lanes of all hosts, so that a lane's are the same on any number of them.
      rng = np.random.default_rng((self._seed, step))
      shape = self._lanes, self._length, self._negatives
      if self._sampler == 'uniform':
        drawn = rng.integers(1, self._padding, shape, np.int32)
      else:
        place = rng.integers(0, self._upto_V[-1], shape)
        drawn = np.searchsorted(self._upto_V, place, side='right').astype(np.int32)
      found['negative'] = drawn[self._rows]
    if self._sampler in ('popularity', 'in_batch'):
      found['log_q'] = self._log_q[target_BT]
    if self._sampler == 'popularity':
      found['negative_log_q'] = self._log_q[found['negative']]
    return found

  def _where(self, step: int) -> tuple[Ints, Ints]:
    """What stands together in each lane at a step, and its segment; -1 in a lane that has done."""
    if self._whole:
      walks = np.array([self._walk(lane, step) for lane in self._rows.tolist()], np.int64)
      return walks[:, 0], walks[:, 1]
    # Windows hang on nothing before them: all lanes together go through all.
    rows = len(self._segments)
    turn, row = np.divmod(step * self._lanes + self._rows, rows)
    row = permute(row, turn, rows, self._seed) if self._shuffle else np.where(turn > 0, -1, row)
    return row, np.zeros_like(row)

  def _walk(self, lane: int, step: int) -> tuple[int, int]:
    """The user of a lane at a step, and the segment; (-1, 0) when it has done."""
    users = self._dealt[lane]
    total = int(self._segments[users].sum())
    turn, step = divmod(step, total) if total else (1, 0)
    if turn and not self._shuffle:
      return -1, 0
    known = self._rounds.get(lane)
    if known is None or known[0] != turn:
      if self._shuffle:
        epoch = np.full(len(users), turn * self._lanes + lane)
        users = users[permute(np.arange(len(users)), epoch, len(users), self._seed)]
      known = turn, users, np.cumsum(self._segments[users])
      self._rounds[lane] = known
    _, users, upto = known
    k = int(np.searchsorted(upto, step, side='right'))
    return int(users[k]), step - int(upto[k] - self._segments[users[k]])

  def _key(self, record: Ints, place: Ints) -> Ints:
    """Numbers in the order of (user, place)."""
    return record * 2**40 + place


def _reopen(arguments: dict) -> LaneSource:
  return LaneSource(**arguments)
