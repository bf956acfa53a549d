"""Streaming batches of whole histories: each lane walks through users, segment by segment.

A batch is a dict of numpy arrays of fixed shape, with B lanes of this host and T positions of a
segment:

  item [B, T] i32      item rows of the events, oldest first, padded with V after a user's last
  target [B, T] i32    in training: the item after each, V where there is none to learn
  asked [B, P] i32     in validation and test: positions whose next item is predicted
  number [B, P] i32    the number of each in `targets_of`; -1 after the last one
  negative [B, T, N] i32      in training with a sampler: items drawn for each target, with the log
  log_q [B, T] f32            of how often the target,
  negative_log_q [B, T, N]    and each of them, is drawn
  first [B] bool       whether the segment is its user's first, so that no state is carried into it
  user [B] i32         embedding row; 0 unknown
  begin [B, T] i32     in place of `user`, where a lane holds several windows: the position at which
                       the window of each event begins

Whole histories are for models that carry a state from segment to segment. Each lane has its own
users and reads one after the other, each from the oldest event on. Users are dealt to the lanes by
length, so that all lanes have about as much to do. Nothing is padded to the longest user, and a
step costs the same however long histories are. In evaluation the longest history of a lane is read
first, and finished lanes yield padding.

A model that reads one window at a time gets the same batches, each window on its own and `first`.
In training the last window of a user is full and the first one may be shorter; validation and test
read the T events before each target. If the model can distinguish the windows of a lane, a lane
holds as many as fit ('packed').

Training has no end: when a lane has read all of its users, or all lanes together all windows, it
starts again in a new order. The step alone is the position in the data.
"""

from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from lmn_jax.data.batches import ENDLESS, described
from lmn_jax.data.histories import (
  histories_of,
  item_counts,
  latest_of,
  users_of,
  windows_before,
  windows_of,
)
from lmn_jax.data.packing import pack, place_of
from lmn_jax.data.sampling import Sampler
from lmn_jax.data.shuffle import permute
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.data.targets import targets_of, training_events
from lmn_jax.errors import UserError, one_of

Ints = Int[np.ndarray, '_']


def deal(segments: Ints, lanes: int) -> list[Ints]:
  """Deals users to lanes, so that all lanes have about as many segments.

  The longest are dealt first, to the lanes in turn, forwards and backwards.

  Args:
    segments: [U], of each user.
    lanes: number of lanes.

  Returns:
    The users of each lane, the longest first.
  """
  order = np.argsort(-segments, kind='stable')
  turn, place = np.divmod(np.arange(len(order)), lanes)
  lane = np.where(turn % 2, lanes - 1 - place, place)
  by_lane = np.argsort(lane, kind='stable')
  return np.split(order[by_lane], np.cumsum(np.bincount(lane, minlength=lanes))[:-1])


class _Pieces(NamedTuple):
  """What the lanes read at a step, lane by lane: P pieces of entries with E events together.

  lane, entry, record (of the user), begin (events of the entry before it), events: each [P].
  piece, place (within the piece), column (of the lane): each [E].
  """

  lane: Ints
  entry: Ints
  record: Ints
  begin: Ints
  events: Ints
  piece: Ints
  place: Ints
  column: Ints


class LaneSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  It can be pickled: a copy in another process opens the maps of the store again.

  Attributes:
    targets: of validation and test.
    numbers: the targets of this split by their number, [E].
    rows: what a lane reads at a time: the number of users, of windows, or of groups of windows that
      share a lane.
    batches: number of steps in which every lane has read its users once.
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
    """Opens the store and arranges what the lanes read.

    Args:
      store_path: folder of the store.
      split: one of SPLITS.
      lanes: B, of a global batch, over all hosts.
      length: T, events of a segment or window.
      seed: of the order.
      shuffle: True: without end, in a new order each round. False: once.
      rows: int64, ascending, the lanes that this host reads, as `mesh.share` returns them; None
        reads all.
      sampler: of training, see `sampling.Sampler`; '' for none.
      negatives: N, drawn for each target.
      whole: whether histories are read from the first event on; otherwise windows.
      latest: whether training reads only the last window of each user; implies windows.
      packed: whether a lane holds as many windows as fit.
      exclude_seen: whether items that a user has met are no candidates (`excluded`).

    Raises:
      UserError: nothing to predict; or, without end, fewer users than lanes of whole histories.
    """
    one_of('split', split, SPLITS)
    self._arguments = dict(
      store_path=store_path, split=split, lanes=lanes, length=length, seed=seed, shuffle=shuffle,
      rows=rows, sampler=sampler, negatives=negatives, whole=whole, latest=latest,
      packed=packed, exclude_seen=exclude_seen,
    )  # fmt: skip
    self._length, self._lanes, self._seed, self._shuffle = length, lanes, seed, shuffle
    self._rows = np.arange(lanes) if rows is None else rows
    self._training, self._whole = split == 'train', whole and not latest
    self._packed = packed and not self._whole
    self._open(Store(store_path), split)
    self._arrange()

  def _open(self, store: Store, split: str) -> None:
    """Finds the histories, entries and targets of a split in a store."""
    self._users, self.targets = users_of(store), targets_of(store)
    self.numbers = np.flatnonzero(self.targets.split == SPLITS.index(split))
    self._items = [part.history['item'] for part in store.parts]
    self._padding = np.int32(store.vocabulary['item'])
    self._read = histories_of(training_events(store), self.targets, split)
    if self._arguments['latest'] and self._training:
      self._read = latest_of(self._read, self._length)
    if not len(self._read.record):
      raise UserError(
        f'{store.path}: split {split!r} has nothing to predict from ({store.protocol}); change '
        'config.data.split'
      )
    # An entry is what is read from a user at a time: a whole history or a window.
    self._entries = self._read
    if not self._whole and self._training:
      self._entries = windows_of(self._read, self._length)
    elif not self._whole:
      self._entry_number = self.numbers[self.targets.place[self.numbers] > 0]
      self._entries = windows_before(self.targets, self._entry_number, self._length)
    # The last event of training is only a target.
    self._inputs = self._entries.events - self._training
    if not self._training:
      self._keys = _key(self.targets.user[self.numbers], self.targets.place[self.numbers])
    sampler, V = self._arguments['sampler'], int(self._padding)
    if sampler:
      count_V = None
      if sampler != 'uniform':
        count_V = item_counts(self._read, self._users, self._items, V)
      shape = self._lanes, self._length, self._arguments['negatives']
      self._sampler = Sampler(sampler, V, count_V, shape, self._seed)

  def _arrange(self) -> None:
    """Groups the entries that share a lane, and deals the groups to the lanes or to the steps."""
    entries = len(self._inputs)
    # The entries of group r are order[bounds[r]:bounds[r + 1]], read in segments[r] segments.
    self._order, self._bounds = np.arange(entries), np.arange(entries + 1)
    if self._packed:
      self._order, self._bounds = pack(self._inputs, self._length)
    self.rows = len(self._bounds) - 1
    self._rounds: dict[
      int, tuple[int, Ints, Ints]
    ] = {}  # lane -> round, users, segments up to each
    if not self._whole:
      self._segments = np.ones(self.rows, np.int64)
      self.batches = -(-self.rows // self._lanes)
    else:
      if self._shuffle and entries < self._lanes:
        raise UserError(
          f'config.batch_size={self._lanes} lanes are more than the {entries} users with at least '
          f'two training events; use at most {entries}'
        )
      self._segments = -(-self._inputs // self._length)
      self._dealt = deal(self._segments, self._lanes)
      self.batches = max(int(self._segments[users].sum()) for users in self._dealt)
    if not self._training:
      self._most = self._most_targets()

  def __reduce__(self):
    return _reopen, (self._arguments,)

  def __repr__(self) -> str:
    # As for BatchSource: only what determines the content of batches.
    return f'LaneSource({described(self._arguments)})'

  def __len__(self) -> int:
    return ENDLESS if self._shuffle else self.batches

  def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
    """The batch of a step, as described at the top of this file."""
    row, segment = self._groups_at(int(step))
    pieces = self._pieces(row, segment)
    batch = dict(item=self._item_rows(pieces), first=(segment == 0) | (not self._whole))
    if self._packed:
      batch['begin'] = self._grid(pieces, pieces.column - pieces.place, 0)
    else:
      batch['user'] = np.zeros(len(row), np.int32)
      batch['user'][pieces.lane] = self._users.row[pieces.record]
    if not self._training:
      return batch | self._targets_in(pieces)
    batch['target'] = self._item_rows(pieces, 1)
    if self._arguments['sampler']:
      batch |= self._sampler.sample(int(step), batch['target'], self._rows)
    return batch

  def _pieces(self, row: Ints, segment: Ints) -> _Pieces:
    """What each lane reads of its group `row` in a segment; nothing where row is -1."""
    count = np.where(row >= 0, self._bounds[row + 1] - self._bounds[row], 0)
    lane = np.repeat(np.arange(len(row)), count)
    entry = self._order[self._bounds[row][lane] + place_of(count)]
    begin = segment[lane] * self._length
    events = np.minimum(self._inputs[entry] - begin, self._length)
    return _Pieces(
      lane,
      entry,
      self._entries.record[entry],
      begin,
      events,
      np.repeat(np.arange(len(lane)), events),
      place_of(events),
      place_of(np.bincount(lane, events, len(row)).astype(np.int64)),
    )

  def _grid(self, pieces: _Pieces, values: np.ndarray, padding: int | np.integer) -> np.ndarray:
    """Values of the events [E] at their positions [B, T], padded."""
    grid = np.full((len(self._rows), self._length), padding, np.int32)
    grid[pieces.lane[pieces.piece], pieces.column] = values
    return grid

  def _item_rows(self, pieces: _Pieces, shift: int = 0) -> np.ndarray:
    """The item rows [B, T] of the events, or of the events `shift` later."""
    record = pieces.record
    first = self._users.offset[record] + self._entries.first[pieces.entry] + pieces.begin
    event = first[pieces.piece] + pieces.place + shift
    part = self._users.part[record][pieces.piece]
    item = np.empty(len(event), np.int32)
    for number in np.unique(part):
      in_part = part == number
      item[in_part] = self._items[number][event[in_part]]
    return self._grid(pieces, item, self._padding)

  def _targets_in(self, pieces: _Pieces) -> dict[str, np.ndarray]:
    """The fields `asked` and `number` of a batch of evaluation."""
    if self._whole:
      piece, number = self._targets_within(pieces.record, pieces.begin)
      asked = self.targets.place[number] - 1 - pieces.begin[piece]
    else:
      piece, number = np.arange(len(pieces.entry)), self._entry_number[pieces.entry]
      asked = pieces.column[np.cumsum(pieces.events) - 1]
    lanes = len(self._rows)
    batch = dict(
      asked=np.zeros((lanes, self._most), np.int32),
      number=np.full((lanes, self._most), -1, np.int32),
    )
    lane = pieces.lane[piece]
    at = lane, place_of(np.bincount(lane, minlength=lanes))
    batch['asked'][at], batch['number'][at] = asked, number
    return batch

  def _targets_within(self, record: Ints, begin: Ints) -> tuple[Ints, Ints]:
    """The targets that follow one of the T events from `begin` on: their pieces and numbers.

    The item at place p is predicted after event p - 1.
    """
    low = np.searchsorted(self._keys, _key(record, begin + 1))
    count = np.searchsorted(self._keys, _key(record, begin + self._length + 1)) - low
    piece = np.repeat(np.arange(len(record)), count)
    return piece, self.numbers[low[piece] + place_of(count)]

  def _most_targets(self) -> int:
    """P, the largest number of targets of a lane at a step."""
    if not self._whole:
      return int(np.diff(self._bounds).max())
    user, place = self.targets.user[self.numbers], self.targets.place[self.numbers]
    segment = _key(user, np.maximum(place - 1, 0) // self._length)
    return int(np.unique(segment[place > 0], return_counts=True)[1].max())

  def before(self, number: Ints) -> list[np.ndarray]:
    """The item rows that the user of each target has met before it. number: of the targets."""
    user = self.targets.user[number]
    part, offset = self._users.part[user], self._users.offset[user]
    return [
      self._items[p][first : first + place]
      for p, first, place in zip(part, offset, self.targets.place[number], strict=True)
    ]

  def excluded(self, number: Ints) -> list[np.ndarray]:
    """The item rows that are no candidates for each target. number: of the targets."""
    seen = self.before(number)
    return seen if self._arguments['exclude_seen'] else [items[:0] for items in seen]

  def histories(self) -> Iterator[np.ndarray]:
    """Yields the item rows of each user, as far as this split reads them."""
    for record, first, events in zip(*self._read, strict=True):
      offset = self._users.offset[record] + first
      yield self._items[self._users.part[record]][offset : offset + events]

  def _groups_at(self, step: int) -> tuple[Ints, Ints]:
    """The group that each lane reads at a step, and the segment; -1 for a finished lane."""
    if self._whole:
      walks = np.array([self._walk(lane, step) for lane in self._rows.tolist()], np.int64)
      return walks[:, 0], walks[:, 1]
    # Windows are independent: all lanes together read all of them.
    turn, row = np.divmod(step * self._lanes + self._rows, self.rows)
    if self._shuffle:
      row = permute(row, turn, self.rows, self._seed)
    else:
      row = np.where(turn > 0, -1, row)
    return row, np.zeros_like(row)

  def _walk(self, lane: int, step: int) -> tuple[int, int]:
    """The user of a lane at a step, and the segment; (-1, 0) for a finished lane."""
    users = self._dealt[lane]
    total = int(self._segments[users].sum())
    turn, step = divmod(step, total) if total else (1, 0)
    if turn and not self._shuffle:
      return -1, 0
    cached = self._rounds.get(lane)
    if cached is None or cached[0] != turn:
      if self._shuffle:
        epoch = np.full(len(users), turn * self._lanes + lane)
        users = users[permute(np.arange(len(users)), epoch, len(users), self._seed)]
      cached = turn, users, np.cumsum(self._segments[users])
      self._rounds[lane] = cached
    _, users, upto = cached
    k = int(np.searchsorted(upto, step, side='right'))
    return int(users[k]), step - int(upto[k] - self._segments[users[k]])


def _key(record: Ints, place: Ints) -> Ints:
  """Numbers in the order of (user record, place)."""
  return record * 2**40 + place


def _reopen(arguments: dict) -> LaneSource:
  return LaneSource(**arguments)
