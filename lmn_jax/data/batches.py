"""Batches from the history store through Grain: one element is one batch, cut by vector gathers.

A batch is a dict of numpy arrays of fixed shape, with B examples of this host and L history
positions:

  user [B] i32           embedding row; 0 unknown
  item [B] i32           embedding row; 0 unknown
  label [B] f32          0 or 1, or the number; with K labels [B, K], NaN where a label is missing
  weight [B] f32         1; in training the sample weight, if the log has weights; 0 for the padding
                         of a last evaluation batch
  history [B, L] i32     item rows, oldest first, the newest L, left-aligned, padded with V
  length [B] i32         min(total, L)
  total [B] i32          events strictly before the example
  user_index [B] i32     the user's record over all parts, for per-user metrics
  user.<f>, item.<f>, context.<f>    [B] or [B, M] i32 codes of the features; [B] f32 of numbers,
                         as in the log, NaN where one is missing
  history.<f>            [B, L] or [B, L, M] i32, the item feature f of the history, padded with
                         V_f; [B, L] f32 of a number, padded with NaN
  item_index, history_index    only with vectors of cold items, see item_index.py

and, if the model reads them (`Reads`), of each event of the history

  event.<f>              as history.<f>, the event feature f
  time_gap [B, L] f32    seconds from the event to the example, at least 0; 0 on padding

and of each named history, such as `orders` (named_histories.py), all of these with a length of its
own: `orders:history`, `orders:length`, `orders:total`, `orders:history.<f>`, `orders:event.<f>`,
`orders:time_gap`.

With Q > 1 targets a request (requests.py), a row is a request: item, label, weight, item.<f> and
context.<f> are [B, Q] or [B, Q, M], and the history is that of the first target. Where a request
has fewer targets, the weight is 0, the label 0, the item V and a feature V_f.

In training L may be shorter in some steps (train_lengths.py), for all histories by the same share.

Training has no end: position p = step * batch + j is row permutation_e(p mod n) of epoch e = p div
n. So no row is lost at the end of an epoch, and the step alone is the position in the data.
"""

from typing import Any, SupportsIndex

import grain
import numpy as np
from absl import flags

from lmn_jax.data import item_index, store_columns
from lmn_jax.data.history_reader import HistoryReader
from lmn_jax.data.named_histories import MAIN
from lmn_jax.data.reads import Reads, clock_of, padding_of
from lmn_jax.data.requests import requests_of
from lmn_jax.data.shuffle import permute
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Part, Store
from lmn_jax.data.store_columns import Column
from lmn_jax.data.train_lengths import MEAN, TrainLengths
from lmn_jax.errors import UserError, one_of

ENDLESS = 2**40  # batches of a shuffled source; times the batch size it still fits int64
NOTHING = Reads()


class BatchSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  It can be pickled: a copy in another process opens the maps of the store again.

  Attributes:
    store: that is read.
    length: L, history positions. lengths: those of each step.
    examples: the number of examples of the split over all hosts.
    reads: what batches have of events besides the items, and their named histories.
    requests: of the split, or None if each row is an example.
    rows: n, the number of examples, or of requests; of a LaneSource that of users or windows.
    examples_per_row: their quotient.
    batches: number of batches that cover the split once (the last one is padded or runs on).
    weighted: whether examples have their sample weights: in training, if the store has weights.
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
    targets: int = 1,
    stale_events: int = 0,
    train_length: str = 'full',
    train_length_mean: float = MEAN,
  ):
    """Opens the store.

    Args:
      store_path: folder of the store.
      split: one of SPLITS.
      batch_size: examples, or requests, of a global batch, over all hosts.
      length: L, history positions.
      seed: of the order.
      shuffle: True for training: without end, in a new order each epoch. False: once, in the
        store's order, with the last batch padded with examples of weight 0.
      rows: int64, ascending, the rows of the global batch that this host reads, as `mesh.share`
        returns them; None reads all.
      reads: what batches have of events besides the items, and their named histories.
      targets: Q, most examples of a request; with 1 each example is a row. stale_events: see
        `requests_of`.
      train_length, train_length_mean: law and mean of the lengths of each step, see TrainLengths.

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
      shuffle=shuffle, rows=rows, reads=reads, targets=targets, stale_events=stale_events,
      train_length=train_length, train_length_mean=train_length_mean,
    )  # fmt: skip
    self._seed, self._shuffle, self._batch, self.length = seed, shuffle, batch_size, length
    self.reads = reads
    self._rows = np.arange(batch_size) if rows is None else rows
    self.lengths = TrainLengths(train_length, train_length_mean, length, seed)
    self.store = Store(store_path)
    self._open(self.store, split)
    self.requests = None
    if targets > 1:
      self.requests = requests_of(self._parts, split, targets, stale_events, self._clock)
    self.rows = self.examples if self.requests is None else self.requests.count
    self.examples_per_row = self.examples / self.rows
    self.batches = -(-self.rows // batch_size)

  def _open(self, store: Store, split: str) -> None:
    """Finds the columns and the examples of a split in the parts of a store."""
    self.examples = store.examples[split]
    if not self.examples:
      raise UserError(
        f'{store.path}: split {split!r} has no example ({store.protocol}); change config.data.split'
      )
    self._items, self._padding = store.items, np.int32(store.vocabulary['item'])
    self.weighted = self._shuffle and store.weighted  # metrics count every example once
    self._user_keys, self._context_keys = store.fields('user'), store.fields('context')
    self._clock = clock_of(store) if self.reads.time else None
    self._parts = [part for part in store.parts if part.bounds[split][0] < part.bounds[split][1]]
    bounds = np.array([part.bounds[split] for part in self._parts], np.int64)
    self._ends = np.cumsum(bounds[:, 1] - bounds[:, 0])
    self._shifts = bounds[:, 1] - self._ends  # position in the split -> row of the part
    lengths = {MAIN: self.length} | dict(self.reads.histories)
    self._histories = [
      HistoryReader(store, self._parts, self.reads, self._clock, self.lengths.ladder_of(L), history)
      for history, L in lengths.items()
    ]

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
    index, weight, rung = index[0, self._rows], weight[0, self._rows], self.lengths.rung(int(step))
    if self.requests is None:
      batch = self._gather(index, rung)
    else:
      position, exists = self.requests.examples(index)
      batch = self._gather(position, rung)
      weight = np.where(exists, weight[:, None], np.float32(0))
      self._pad_targets(batch, exists)
    batch['weight'] = weight * batch['weight'] if self.weighted else weight
    for key, codes in self._items.items():
      batch[key] = codes.take(batch['item'], axis=0)
      for history in self._histories:
        name, items = history.array(key.replace('item.', 'history.', 1)), history.array('history')
        batch[name] = codes.take(batch[items], axis=0)
    if self.store.cold_items:
      batch = item_index.with_rows(batch, int(self._padding), self.store.has_item_vectors)
    return batch

  def plans(self, first: int, count: int) -> dict[str, np.ndarray]:
    """What devices that hold the store need to cut the global batches of some steps.

    The arrays are those of all hosts; see resident.py.

    Args:
      first: the first step.
      count: S, number of steps, of one length.

    Returns:
      index [S, B] i32, the examples by their positions in the split, ascending; weight [S, B] f32,
      0 for padding and 1 otherwise. Of requests, index is the first example, and targets [S, B] i32
      the number of them. If steps differ in length, place [S, L] i32 has the positions of a
      history, and orders:place those of a named one.
    """
    index, weight = self._order(first, count)
    plans = dict(index=index.astype(np.int32), weight=weight)
    if self.requests is not None:
      bounds = self.requests.bounds
      plans['index'] = bounds[index].astype(np.int32)
      plans['targets'] = (bounds[index + 1] - bounds[index]).astype(np.int32)
    if len(self.lengths.ladder) > 1:
      (rung,) = {self.lengths.rung(first + k) for k in range(count)}
      for history in self._histories:
        place = np.arange(history.ladder[rung], dtype=np.int32)
        plans[history.array('place')] = np.tile(place, (count, 1))
    return plans

  def plan(self, step: int) -> dict[str, np.ndarray]:
    """`plans` of a single step, without the axis of steps."""
    return {name: x[0] for name, x in self.plans(step, 1).items()}

  def columns(self) -> dict[str, Column]:
    """The columns of the store that devices need, by the names that cuts.py expects."""
    columns = dict(
      examples=store_columns.examples(
        self.store, self._arguments['split'], self.weighted, self.reads
      ),
      users=store_columns.users(self.store, self.reads),
    )
    for history in self._histories:
      events = store_columns.events(self.store, self.reads, history.name)
      columns[history.array('events')] = events
    if self.store.fields('item'):
      columns['items'] = store_columns.item_features(self.store)
    return columns

  def _order(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all hosts at some steps, int64 [S, B], ascending, and their weights."""
    position = first * self._batch + np.arange(count * self._batch, dtype=np.int64)
    if self._shuffle:
      epoch, within = np.divmod(position, self.rows)
      index = permute(within, epoch, self.rows, self._seed).reshape(count, self._batch)
      # The order within a batch is free: in the store's order, gathers read memory in order, part
      # by part. Each host sorts the global batch, so that row k is the same example on any number
      # of hosts.
      return np.sort(index, axis=1), np.ones(index.shape, np.float32)
    position = position.reshape(count, self._batch)
    index = np.minimum(position, self.rows - 1)
    return index, (position < self.rows).astype(np.float32)

  def _pad_targets(self, batch: dict[str, np.ndarray], exists: np.ndarray) -> None:
    """Replaces the targets that requests do not have; bool [B, Q]."""
    padding = {key: padding_of(self.store, key) for key in self._context_keys}
    for key, value in (padding | {'item': self._padding, 'label': np.float32(0)}).items():
      has = exists.reshape(*exists.shape, *[1] * (batch[key].ndim - 2))
      batch[key] = np.where(has, batch[key], value)

  def _gather(self, index: np.ndarray, rung: int) -> dict[str, np.ndarray]:
    """The examples at sorted positions [B], or [B, Q] of requests, over all parts.

    Args:
      rung: of the lengths of the step.
    """
    part = np.searchsorted(self._ends, index if index.ndim == 1 else index[:, 0], side='right')
    cuts = np.flatnonzero(np.r_[True, part[1:] != part[:-1], True])
    pieces = [
      self._gather_part(part[begin], index[begin:end], rung)
      for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    if len(pieces) == 1:
      return pieces[0]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

  def _gather_part(self, number: np.integer, index: np.ndarray, rung: int) -> dict[str, np.ndarray]:
    """The examples at positions of the split, see `_gather`, all in the part of a number.

    Args:
      rung: of the lengths of the step.
    """
    part = self._parts[number]
    example = index + self._shifts[number]
    leader = example if example.ndim == 1 else example[:, 0]  # has the user and the history
    user = part.examples['user'].take(leader)
    batch = dict(
      user=part.users['row'].take(user),
      item=part.examples['item'].take(example),
      label=self._labels_of(part, example),
      user_index=user + np.int32(part.first),
    )
    for key in self._user_keys:
      batch[key] = part.users[key].take(user, axis=0)
    if self.weighted:
      batch['weight'] = part.examples['weight'].take(example)
    for key in self._context_keys:
      batch[key] = part.examples[key].take(example, axis=0)
    for history in self._histories:
      batch |= history.read(int(number), leader, user, rung)
    return batch

  def _labels_of(self, part: Part, example: np.ndarray) -> np.ndarray:
    """The label of each example [...], or its labels [..., K]."""
    labels = [part.examples[name].take(example) for name in self.store.label_columns]
    return labels[0] if len(labels) == 1 else np.stack(labels, axis=-1)


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
