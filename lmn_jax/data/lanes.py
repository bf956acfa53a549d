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

and, if the model reads them (`Reads`), of each event

  event.<f> [B, T]     i32 or [B, T, M] codes of the event feature f, padded with V_f; f32 of a
                       number, padded with NaN
  time [B, T] i32      seconds since the earliest time of the log; 0 on padding
  time_gap [B, T] f32  seconds to the next event of the user, which the position predicts, so that
                       `time + time_gap` is the time of the request; in validation and test to the
                       requested target at the position, the earliest if there are several;
                       0 on padding

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
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from lmn_jax.data import store_columns
from lmn_jax.data.batches import ENDLESS, NOTHING, described
from lmn_jax.data.histories import (
  histories_of,
  item_counts,
  latest_of,
  users_of,
  windows_before,
  windows_of,
)
from lmn_jax.data.packing import pack, place_of
from lmn_jax.data.pieces import EventColumns, Pieces, Places
from lmn_jax.data.reads import Reads
from lmn_jax.data.sampling import Sampler
from lmn_jax.data.shuffle import permute
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.data.store_columns import Column
from lmn_jax.data.targets import targets_of, times_of_targets, training_events
from lmn_jax.data.walks import Walks
from lmn_jax.errors import UserError, one_of

Ints = Int[np.ndarray, '_']


class LaneSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  It can be pickled: a copy in another process opens the maps of the store again.

  Attributes:
    store: that is read. length: T. padding: V. training, packed: whether batches have the fields
      `target` and `begin`. reads: what batches have of events besides the items.
    sampler: of negatives, or None.
    targets: of validation and test.
    numbers: the targets of this split by their number, [E].
    rows: what a lane reads at a time: the number of users, of windows, or of groups of windows that
      share a lane.
    batches: number of steps in which every lane has read its users once.
    examples_per_row: 1, a lane counts as an example.
  """

  examples_per_row = 1.0

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
    reads: Reads = NOTHING,
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
      reads: what batches have of events besides the items.

    Raises:
      UserError: nothing to predict; without end, fewer users than lanes of whole histories; or
        times are read and cannot be.
    """
    one_of('split', split, SPLITS)
    self._arguments = dict(
      store_path=store_path, split=split, lanes=lanes, length=length, seed=seed, shuffle=shuffle,
      rows=rows, sampler=sampler, negatives=negatives, whole=whole, latest=latest,
      packed=packed, exclude_seen=exclude_seen, reads=reads,
    )  # fmt: skip
    self.length, self._lanes, self._seed, self._shuffle = length, lanes, seed, shuffle
    self._rows = np.arange(lanes) if rows is None else rows
    self.training, self._whole = split == 'train', whole and not latest
    self.packed = packed and not self._whole
    self.store, self.reads = Store(store_path), reads
    self._open(self.store, split)
    self._arrange()

  def _open(self, store: Store, split: str) -> None:
    """Finds the histories, entries and targets of a split in a store."""
    self._users, self.targets = users_of(store), targets_of(store)
    self._columns = EventColumns(store, self.reads)
    self.numbers = np.flatnonzero(self.targets.split == SPLITS.index(split))
    self._items = [part.history['item'] for part in store.parts]
    self._part_begin = np.cumsum([0, *map(len, self._items)])[:-1]  # first event over all parts
    self.padding = np.int32(store.vocabulary['item'])
    self._read = histories_of(training_events(store), self.targets, split)
    if self._arguments['latest'] and self.training:
      self._read = latest_of(self._read, self.length)
    if not len(self._read.record):
      raise UserError(
        f'{store.path}: split {split!r} has nothing to predict from ({store.protocol}); change '
        'config.data.split'
      )
    # An entry is what is read from a user at a time: a whole history or a window.
    self._entries = self._read
    if not self._whole and self.training:
      self._entries = windows_of(self._read, self.length)
    elif not self._whole:
      self._entry_number = self.numbers[self.targets.place[self.numbers] > 0]
      self._entries = windows_before(self.targets, self._entry_number, self.length)
    # The last event of training is only a target.
    self._inputs = self._entries.events - self.training
    if not self.training:
      self._keys = _key(self.targets.user[self.numbers], self.targets.place[self.numbers])
      self._times = times_of_targets(store) if self.reads.time else None
    self.sampler = self._sampler_of(self._arguments['sampler'])

  def _sampler_of(self, name: str) -> Sampler | None:
    if not name:
      return None
    count_V, V = None, int(self.padding)
    if name != 'uniform':
      count_V = item_counts(self._read, self._users, self._items, V)
    shape = self._lanes, self.length, self._arguments['negatives']
    return Sampler(name, V, count_V, shape, self._seed)

  def _arrange(self) -> None:
    """Groups the entries that share a lane, and deals the groups to the lanes or to the steps."""
    entries = len(self._inputs)
    # The entries of group r are order[bounds[r]:bounds[r + 1]], read in segments[r] segments.
    self._order, self._bounds = np.arange(entries), np.arange(entries + 1)
    if self.packed:
      self._order, self._bounds = pack(self._inputs, self.length)
    self.rows = len(self._bounds) - 1
    self._most_pieces = int(np.diff(self._bounds).max())
    if not self._whole:
      self.batches = -(-self.rows // self._lanes)
    else:
      if self._shuffle and entries < self._lanes:
        raise UserError(
          f'config.batch_size={self._lanes} lanes are more than the {entries} users with at least '
          f'two training events; use at most {entries}'
        )
      segments = -(-self._inputs // self.length)
      self._walks = Walks(segments, self._lanes, self._seed, self._shuffle)
      self.batches = self._walks.batches
    if not self.training:
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
    row, segment = self._groups_at(self._rows, np.full(len(self._rows), int(step)))
    pieces = self._pieces(row, segment)
    first, part = self._first_events(pieces)
    places = Places.of(pieces, self.length, part, first)
    batch = dict(item=self._columns.items(places), first=self._first_segments(segment))
    batch |= self._columns.features(places)
    if self.packed:
      batch['begin'] = np.zeros(places.shape, np.int32)
      batch['begin'][places.at] = pieces.column[places.piece]
    else:
      batch['user'] = self._user_rows(pieces)
    asked = None if self.training else self._targets_in(pieces)
    if self.reads.time:
      batch |= self._columns.times(places, asked)
    if asked:
      return batch | {name: asked[name] for name in ('asked', 'number')}
    batch['target'] = self._columns.items(places, 1)
    if self.sampler:
      batch |= self.sampler.sample(int(step), batch['target'], self._rows)
    return batch

  def plans(self, first: int, count: int) -> dict[str, np.ndarray]:
    """What devices that hold the store need to cut the global batches of some steps.

    The arrays are those of all hosts; see resident.py.

    Args:
      first: the first step.
      count: S, number of steps.

    Returns:
      event, count [S, B, P] i32: the first event, over all parts, and the number of events of each
      of the P pieces that a lane reads at most. first [S, B] bool, user [S, B] i32 unless packed,
      asked and number [S, B, P] i32 of validation and test: those of the batches, and asked_time,
      the seconds of the targets if times are read. With a sampler, keys [S, 4] u32 of the draws.
    """
    lane, step = np.tile(np.arange(self._lanes), count), first + np.arange(count)
    row, segment = self._groups_at(lane, np.repeat(step, self._lanes))
    pieces = self._pieces(row, segment)
    event, part = self._first_events(pieces)
    plan = dict(
      event=pieces.grid(event + self._part_begin[part], self._most_pieces),
      count=pieces.grid(pieces.events, self._most_pieces),
      first=self._first_segments(segment),
    )
    if not self.packed:
      plan['user'] = self._user_rows(pieces)
    if not self.training:
      plan |= self._targets_in(pieces)
    plan = {name: x.reshape(count, self._lanes, *x.shape[1:]) for name, x in plan.items()}
    return plan | (dict(keys=self.sampler.keys(step)) if self.sampler else {})

  def plan(self, step: int) -> dict[str, np.ndarray]:
    """`plans` of a single step, without the axis of steps."""
    return {name: x[0] for name, x in self.plans(step, 1).items()}

  def columns(self) -> dict[str, Column]:
    """The columns of the store that devices need, by the names that cuts.py expects."""
    tables = self.sampler.tables if self.sampler else {}
    return dict(events=store_columns.events(self.store, self.reads)) | {
      name: store_columns.table(values) for name, values in tables.items()
    }

  def _pieces(self, row: Ints, segment: Ints) -> Pieces:
    """What lanes read of their groups [rows] in a segment; nothing where the group is -1."""
    count = np.where(row >= 0, self._bounds[row + 1] - self._bounds[row], 0)
    lane = np.repeat(np.arange(len(row)), count)
    entry = self._order[self._bounds[row][lane] + place_of(count)]
    begin = segment[lane] * self.length
    events = np.minimum(self._inputs[entry] - begin, self.length)
    column = np.cumsum(events) - events
    column -= column[np.searchsorted(lane, lane)]
    return Pieces(len(row), lane, entry, self._entries.record[entry], begin, events, column)

  def _first_events(self, pieces: Pieces) -> tuple[Ints, Ints]:
    """The first event of each piece within its part, and the part; each [P]."""
    first = self._users.offset[pieces.record] + self._entries.first[pieces.entry] + pieces.begin
    return first, self._users.part[pieces.record]

  def _first_segments(self, segment: Ints) -> Bool[np.ndarray, '_']:
    """The field `first` of a batch."""
    return (segment == 0) | (not self._whole)

  def _user_rows(self, pieces: Pieces) -> Ints:
    """The field `user` of a batch: int32 [rows]."""
    user = np.zeros(pieces.rows, np.int32)
    user[pieces.lane] = self._users.row[pieces.record]
    return user

  def _targets_in(self, pieces: Pieces) -> dict[str, np.ndarray]:
    """The fields `asked` and `number` of a batch of evaluation, and the targets' times if read."""
    if self._whole:
      piece, number = self._targets_within(pieces.record, pieces.begin)
      asked = self.targets.place[number] - 1 - pieces.begin[piece]
    else:
      piece, number = np.arange(len(pieces.entry)), self._entry_number[pieces.entry]
      asked = pieces.column + pieces.events - 1
    lane = pieces.lane[piece]
    at = lane, place_of(np.bincount(lane, minlength=pieces.rows))
    batch = dict(
      asked=np.zeros((pieces.rows, self._most), np.int32),
      number=np.full((pieces.rows, self._most), -1, np.int32),
    )
    batch['asked'][at], batch['number'][at] = asked, number
    if self.reads.time:
      batch['asked_time'] = np.zeros((pieces.rows, self._most), np.int32)
      batch['asked_time'][at] = self._columns.seconds(self._times[number])
    return batch

  def _targets_within(self, record: Ints, begin: Ints) -> tuple[Ints, Ints]:
    """The targets that follow one of the T events from `begin` on: their pieces and numbers.

    The item at place p is predicted after event p - 1.
    """
    low = np.searchsorted(self._keys, _key(record, begin + 1))
    count = np.searchsorted(self._keys, _key(record, begin + self.length + 1)) - low
    piece = np.repeat(np.arange(len(record)), count)
    return piece, self.numbers[low[piece] + place_of(count)]

  def _most_targets(self) -> int:
    """P, the largest number of targets of a lane at a step."""
    if not self._whole:
      return self._most_pieces
    user, place = self.targets.user[self.numbers], self.targets.place[self.numbers]
    segment = _key(user, np.maximum(place - 1, 0) // self.length)
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

  def _groups_at(self, lane: Ints, step: Ints) -> tuple[Ints, Ints]:
    """The groups that lanes [N] read at steps [N], and the segments; -1 for a finished lane."""
    if self._whole:
      return self._walks.at(lane, step)
    # Windows are independent: all lanes together read all of them.
    turn, row = np.divmod(step * self._lanes + lane, self.rows)
    if self._shuffle:
      row = permute(row, turn, self.rows, self._seed)
    else:
      row = np.where(turn > 0, -1, row)
    return row, np.zeros_like(row)


def _key(record: Ints, place: Ints) -> Ints:
  """Numbers in the order of (user record, place)."""
  return record * 2**40 + place


def _reopen(arguments: dict) -> LaneSource:
  return LaneSource(**arguments)
