"""Batches from the history store through Grain: one element is one batch, cut by vector gathers.

A batch is a dict of numpy arrays of fixed shape, with B examples of this host and L history
positions:

  user [B] i32           embedding row; 0 unknown
  item [B] i32           embedding row; 0 unknown
  label [B] f32          0 or 1
  weight [B] f32         1; 0 for the padding of a last evaluation batch
  history [B, L] i32     item rows, oldest first, the newest L, left-aligned, padded with V
  length [B] i32         min(total, L)
  total [B] i32          events strictly before the example
  user_index [B] i32     the user's record over all parts, for per-user metrics
  user.<f>, item.<f>, context.<f>    [B] or [B, M] i32 codes of the features; [B] f32 of numbers,
                         as in the log, NaN where one is missing
  history.<f>            [B, L] or [B, L, M] i32, the item feature f of the history, padded with
                         V_f; [B, L] f32 of a number, padded with NaN

and, if the model reads them (`Reads`), of each event of the history

  event.<f>              as history.<f>, the event feature f
  time_gap [B, L] f32    seconds from the event to the example, at least 0; 0 on padding

Training has no end: position p = step * batch + j is example permutation_e(p mod n) of epoch
e = p div n. So no example is lost at the end of an epoch, and the step alone is the position in the
data.
"""

from typing import Any, SupportsIndex

import grain
import numpy as np
from absl import flags

from lmn_jax.data import store_columns
from lmn_jax.data.reads import Reads, clock_of, filled, padding_of
from lmn_jax.data.shuffle import permute
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.data.store_columns import Column
from lmn_jax.errors import UserError, one_of

ENDLESS = 2**40  # batches of a shuffled source; times the batch size it still fits int64
NOTHING = Reads()


class BatchSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  It can be pickled: a copy in another process opens the maps of the store again.

  Attributes:
    store: that is read.
    length: L, history positions.
    examples: n, the number of examples of the split over all hosts.
    reads: what batches have of events besides the items.
    rows: n, too; of a LaneSource this is the number of users or windows.
    batches: number of batches that cover the split once (the last one is padded or runs on).
  """

  def __init__(
    self,
    store_path,
    split: str,
    batch_size: int,
    length: int,
    seed: int = 0,
    shuffle: bool = False,
    rows: np.ndarray | None = None,
    reads: Reads = NOTHING,
  ):
    """Opens the store.

    Args:
      store_path: folder of the store.
      split: one of SPLITS.
      batch_size: examples of a global batch, over all hosts.
      length: L, history positions.
      seed: of the order.
      shuffle: True for training: without end, in a new order each epoch. False: once, in the
        store's order, with the last batch padded with examples of weight 0.
      rows: int64, ascending, the rows of the global batch that this host reads, as `mesh.share`
        returns them; None reads all.
      reads: what batches have of events besides the items.

    Raises:
      UserError: the batch size or the length is below 1, the split has no example, or times are
        read and cannot be.
    """
    if batch_size < 1:
      raise UserError(f'batch_size={batch_size} must be at least 1; raise the batch size')
    if length < 1:
      raise UserError(f'history length={length} must be at least 1; raise the length')
    one_of('split', split, SPLITS)
    self._arguments = dict(
      store_path=store_path, split=split, batch_size=batch_size, length=length, seed=seed,
      shuffle=shuffle, rows=rows, reads=reads,
    )  # fmt: skip
    self._seed, self._shuffle, self._batch, self.length = seed, shuffle, batch_size, length
    self.reads = reads
    self._rows = np.arange(batch_size) if rows is None else rows
    self._positions = np.arange(length, dtype=np.int32)[None, :]
    self.store = Store(store_path)
    self._open(self.store, split)
    self.rows, self.batches = self.examples, -(-self.examples // batch_size)

  def _open(self, store: Store, split: str) -> None:
    """Finds the columns and the examples of a split in the parts of a store."""
    self.examples = store.examples[split]
    if not self.examples:
      raise UserError(
        f'{store.path}: split {split!r} has no example ({store.protocol}); change config.data.split'
      )
    self._items, self._padding = store.items, np.int32(store.vocabulary['item'])
    self._user_keys, self._context_keys = store.fields('user'), store.fields('context')
    self._clock = clock_of(store) if self.reads.time else None
    self._event_keys = {key: padding_of(store, key) for key in self.reads.events}
    self._parts = [part for part in store.parts if part.bounds[split][0] < part.bounds[split][1]]
    bounds = np.array([part.bounds[split] for part in self._parts], np.int64)
    self._ends = np.cumsum(bounds[:, 1] - bounds[:, 0])
    self._shifts = bounds[:, 1] - self._ends  # position in the split -> row of the part
    names = ['item', *(['time'] if self.reads.time else []), *self._event_keys]
    self._windows = [
      {name: self._windows_of(part.history[name]) for name in names} for part in self._parts
    ]

  def _windows_of(self, column: np.ndarray) -> np.ndarray | None:
    """All pieces of L adjacent values; None where there is none, or values are lists."""
    if len(column) < self.length or column.ndim > 1:
      return None
    return np.lib.stride_tricks.sliding_window_view(column, self.length)

  def __reduce__(self):
    return _reopen, (self._arguments,)

  def __repr__(self) -> str:
    # Grain compares this with the text in a checkpoint. The folder of the store, and which host
    # reads which rows, do not change what is read.
    return f'BatchSource({described(self._arguments)})'

  def __len__(self) -> int:
    return ENDLESS if self._shuffle else self.batches

  def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
    """The batch of a step, as described at the top of this file."""
    index, weight = self._order(int(step), 1)
    batch = self._gather(index[0, self._rows])
    batch['weight'] = weight[0, self._rows]
    for key, codes in self._items.items():
      batch[key] = codes.take(batch['item'], axis=0)
      batch[f'history.{key.removeprefix("item.")}'] = codes.take(batch['history'], axis=0)
    return batch

  def plans(self, first: int, count: int) -> dict[str, np.ndarray]:
    """What devices that hold the store need to cut the global batches of some steps.

    The arrays are those of all hosts; see resident.py.

    Args:
      first: the first step.
      count: S, number of steps.

    Returns:
      index [S, B] i32, the examples by their positions in the split, ascending; weight [S, B] f32.
    """
    index, weight = self._order(first, count)
    return dict(index=index.astype(np.int32), weight=weight)

  def plan(self, step: int) -> dict[str, np.ndarray]:
    """`plans` of a single step, without the axis of steps."""
    return {name: x[0] for name, x in self.plans(step, 1).items()}

  def columns(self) -> dict[str, Column]:
    """The columns of the store that devices need, by the names that cuts.py expects."""
    columns = dict(
      events=store_columns.events(self.store, self.reads),
      examples=store_columns.examples(self.store, self._arguments['split'], self.reads),
      users=store_columns.users(self.store),
    )
    if self.store.fields('item'):
      columns['items'] = store_columns.item_features(self.store)
    return columns

  def _order(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of all hosts at some steps, int64 [S, B], ascending, and their weights."""
    position = first * self._batch + np.arange(count * self._batch, dtype=np.int64)
    if self._shuffle:
      epoch, within = np.divmod(position, self.examples)
      index = permute(within, epoch, self.examples, self._seed).reshape(count, self._batch)
      # The order within a batch is free: in the store's order, gathers read memory in order, part
      # by part. Each host sorts the global batch, so that row k is the same example on any number
      # of hosts.
      return np.sort(index, axis=1), np.ones(index.shape, np.float32)
    position = position.reshape(count, self._batch)
    index = np.minimum(position, self.examples - 1)
    return index, (position < self.examples).astype(np.float32)

  def _gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at sorted positions [B] of the split, over all parts."""
    part = np.searchsorted(self._ends, index, side='right')
    cuts = np.flatnonzero(np.r_[True, part[1:] != part[:-1], True])
    pieces = [
      self._gather_part(part[begin], index[begin:end])
      for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    if len(pieces) == 1:
      return pieces[0]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

  def _gather_part(self, number: np.integer, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at sorted positions of the split, all in the part of a number."""
    part = self._parts[number]
    example = index + self._shifts[number]
    user = part.examples['user'].take(example)
    end = part.examples['end'].take(example)
    length = np.minimum(end, self.length)
    first = part.users['offset'].take(user) + end - length
    batch = dict(
      user=part.users['row'].take(user),
      item=part.examples['item'].take(example),
      label=part.examples['label'].take(example),
      history=self._histories(number, 'item', first, length, self._padding),
      length=length.astype(np.int32),
      total=end.astype(np.int32),
      user_index=user + np.int32(part.first),
    )
    for key in self._user_keys:
      batch[key] = part.users[key].take(user, axis=0)
    for key in self._context_keys:
      batch[key] = part.examples[key].take(example, axis=0)
    for key, padding in self._event_keys.items():
      batch[key] = self._histories(number, key, first, length, padding)
    if self._clock:
      time_BL = self._histories(number, 'time', first, length, np.int64(0))
      batch['time_gap'] = self._gaps(part.examples['time'].take(example), time_BL, length)
    return batch

  def _gaps(self, time_B: np.ndarray, time_BL: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Seconds from the events to the examples, float32 [B, L]; 0 on padding."""
    gap_BL = self._clock.seconds(time_B)[:, None] - self._clock.seconds(time_BL)
    return np.where(self._positions < length[:, None], gap_BL, 0).astype(np.float32)

  def _histories(
    self,
    number: np.integer,
    name: str,
    first: np.ndarray,
    length: np.ndarray,
    padding: np.number,
  ) -> np.ndarray:
    """A column of the events first .. first + length - 1 of a part, padded to [B, L, ...]."""
    events, windows = self._parts[number].history[name], self._windows[number][name]
    if windows is None:
      history = filled((len(first), self.length), events, padding)
      if len(events):
        events.take(first[:, None] + self._positions, axis=0, mode='clip', out=history)
    else:
      # A window is L adjacent events, copied as one piece. Windows that would go beyond the end of
      # the part are gathered event by event.
      last = len(windows) - 1
      history = windows[np.minimum(first, last)]
      late = np.flatnonzero(first > last)
      if len(late):
        history[late] = events.take(first[late, None] + self._positions, mode='clip')
    # Events after the end of an example's history are of later times or other users.
    beyond = self._positions >= length.astype(np.int32)[:, None]
    np.copyto(history, padding, where=beyond.reshape(*beyond.shape, *[1] * (history.ndim - 2)))
    return history


def _reopen(arguments: dict) -> BatchSource:
  return BatchSource(**arguments)


def described(arguments: dict[str, Any]) -> str:
  """The arguments of a source that determine what it reads, as text.

  Those of a source of items alone are as before there was anything else to read.
  """
  return ', '.join(
    f'{name}={x!r}'
    for name, x in arguments.items()
    if name not in ('store_path', 'rows') and x != NOTHING
  )


def loader(
  source: Any, start: int = 0, workers: int = 0, buffer: int = 16, threads: int = 2
) -> grain.DatasetIterator:
  """Returns a Grain iterator over the batches from step `start`, with prefetching.

  `get_state()` and `set_state(state)` of the iterator are exact: the next batch is the first that
  was not returned yet, however many were prefetched. A state of an iterator with workers fits one
  with the same `workers` and `start`; without workers the state is the step.

  Args:
    source: a source of batches by their number, such as BatchSource.
    start: the first step, for a run without a saved iterator state.
    workers: number of processes that cut batches. 0 cuts them in threads of this process, which
      is enough for more than a million examples a second, as numpy's gathers run in parallel.
    buffer: number of batches to prefetch.
    threads: number of threads that cut batches, in each process.
  """
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
  dataset = grain.MapDataset.source(source)
  if not workers:
    iterator = iter(dataset.to_iter_dataset(options))
    if start:
      iterator.set_state({'next_index': start})
    return iterator
  # Grain copies absl's flags to its workers, and a program without absl.app has not parsed them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  dataset = dataset.slice(slice(start, None)) if start else dataset
  return iter(
    dataset.to_iter_dataset(options).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
    )
  )
