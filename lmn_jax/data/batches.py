"""Batches from the history store through Grain: one element is one batch, cut by vector gathers.

A batch is a dict of numpy arrays of fixed shape, B examples of this host, L history positions:

  user [B] i32           embedding row; 0 unknown
  item [B] i32           embedding row; 0 unknown
  label [B] f32          0 or 1
  weight [B] f32         1; 0 for the filler of a last evaluation batch
  history [B, L] i32     item rows, oldest first, the newest L, left-aligned, padded with V
  length [B] i32         min(total, L)
  total [B] i32          events strictly before the example
  user_index [B] i32     the user's record over all parts, for per-user metrics
  user.<f>, item.<f>, context.<f>    [B] or [B, M] i32 codes of the features
  history.<f>            [B, L] or [B, L, M] i32, the item feature f of the history, padded with V_f

Training has no end: position p = step * batch + j is example permutation_e(p mod n) of epoch
e = p div n, so no example is lost at an epoch's end, and the step alone is the data's position.
"""

from typing import Any, SupportsIndex

import grain
import numpy as np
from absl import flags

from lmn_jax.data.parts import mix
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError, one_of

ENDLESS = 2**40  # batches of a shuffled source; times a batch it still fits int64
LEAST_BITS = 8  # of the network; with 2 to 4, few examples are visibly not uniform
ROUNDS = 8  # of the Feistel network; even, so that unequal halves end in their places


def permute(index: np.ndarray, epoch: np.ndarray, n: int, seed: int) -> np.ndarray:
  """A seeded permutation of range(n) for each epoch, evaluated at single points.

  A Feistel network over the 2^b >= n numbers of b bits, halves of unequal width alternating, is a
  bijection whatever its round function is; walking its cycle until the result is below n makes it
  a bijection of range(n) (Black and Rogaway 2002). On average fewer than 2 walks are needed, but
  for n < 128.

  Args:
    index: int64 [B], in range(n).
    epoch: int64 [B], which permutation.
    n: how many there are, at least 1.
    seed: of the config.

  Returns:
    int64 [B], in range(n).
  """
  bits = max(LEAST_BITS, (n - 1).bit_length())
  low, high = bits // 2, bits - bits // 2
  # A batch spans few epochs: their round keys are made once and looked up.
  epochs, which = np.unique(epoch, return_inverse=True)
  base = mix(epochs.astype(np.uint64) ^ mix(np.array([seed % 2**64], np.uint64)))
  keys = mix(base[:, None] + np.arange(ROUNDS, dtype=np.uint64)[None, :])
  out = index.astype(np.uint64)
  key = keys[which] if len(epochs) > 1 else keys
  walking = np.arange(len(out))
  while len(walking):
    x = _feistel(out[walking], key[walking] if len(epochs) > 1 else key, low, high)
    out[walking] = x
    walking = walking[x >= n]
  return out.astype(np.int64)


def _feistel(x: np.ndarray, key: np.ndarray, low: int, high: int) -> np.ndarray:
  """uint64 [B] of low + high bits and keys [B or 1, ROUNDS] -> uint64 [B]."""
  left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
  left_bits, right_bits = high, low
  for k in range(ROUNDS):
    scattered = (right ^ key[:, k]) * np.uint64(0x9E3779B97F4A7C15)
    scattered = (scattered ^ (scattered >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    left, right = right, left ^ (scattered >> np.uint64(64 - left_bits))
    left_bits, right_bits = right_bits, left_bits
  return (left << np.uint64(low)) | right


class BatchSource:
  """A Grain random access source: element k is this host's share of the global batch k.

  Picklable: a copy in another process opens the store's maps anew.

  Attributes:
    examples: n, the examples of the split over all hosts. rows: what a batch has rows of, the same.
    batches: batches that cover the split once (the last one filled up or running on).
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
  ):
    """Opens the store.

    Args:
      store_path: folder of the store.
      split: train | valid | test.
      batch_size: examples of a global batch, over all hosts.
      length: L, history positions.
      seed: of the order.
      shuffle: True for training: without end, a new order each epoch. False: once, in the store's
        order, the last batch filled up with examples of weight 0.
      rows: int64, ascending, those of the global batch that this host reads, as `mesh.share`
        finds them; None reads all.

    Raises:
      UserError: no batch size or history length, an empty split.
    """
    if batch_size < 1:
      raise UserError(f'batch_size={batch_size} must be at least 1; raise the batch size')
    if length < 1:
      raise UserError(f'history length={length} must be at least 1; raise the length')
    one_of('split', split, SPLITS)
    self._arguments = dict(
      store_path=store_path,
      split=split,
      batch_size=batch_size,
      length=length,
      seed=seed,
      shuffle=shuffle,
      rows=rows,
    )
    store = Store(store_path)
    self.examples = store.examples[split]
    if not self.examples:
      raise UserError(
        f'{store.path}: split {split!r} has no example ({store.protocol}); change config.data.split'
      )
    self.rows = self.examples
    self.batches = -(-self.examples // batch_size)
    self._items, self._padding = store.items, np.int32(store.vocabulary['item'])
    self._parts = [part for part in store.parts if part.bounds[split][0] < part.bounds[split][1]]
    bounds = np.array([part.bounds[split] for part in self._parts], np.int64)
    self._uptos = np.cumsum(bounds[:, 1] - bounds[:, 0])
    self._shifts = bounds[:, 1] - self._uptos  # position in the split -> row of the part
    self._windows = [
      np.lib.stride_tricks.sliding_window_view(part.history['item'], length)
      if len(part.history['item']) >= length
      else None
      for part in self._parts
    ]
    self._user_keys, self._context_keys = store.features['user'], store.features['context']
    self._batch = batch_size
    self._rows = np.arange(batch_size) if rows is None else rows
    self._seed, self._shuffle = seed, shuffle
    self._length = length
    self._positions = np.arange(length, dtype=np.int32)[None, :]

  def __reduce__(self):
    return _reopen, (self._arguments,)

  def __repr__(self) -> str:
    # Grain compares this with the one in a checkpoint: where the data lie, and which host reads
    # which rows, is not part of what is read.
    named = {name: x for name, x in self._arguments.items() if name not in ('store_path', 'rows')}
    return f'BatchSource({", ".join(f"{name}={x!r}" for name, x in named.items())})'

  def __len__(self) -> int:
    return ENDLESS if self._shuffle else self.batches

  def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
    """The batch of a step, as described at the head of this file."""
    position = int(step) * self._batch + np.arange(self._batch, dtype=np.int64)
    if self._shuffle:
      epoch, within = np.divmod(position, self.examples)
      # A batch is a set: in the store's order its gathers touch memory in order, part by part.
      # Each host orders the whole of it, so that row k is the same example on any number of hosts.
      index = np.sort(permute(within, epoch, self.examples, self._seed))[self._rows]
      weight = np.ones(len(index), np.float32)
    else:
      position = position[self._rows]
      index = np.minimum(position, self.examples - 1)
      weight = (position < self.examples).astype(np.float32)
    batch = self._gather(index)
    batch['weight'] = weight
    for key, codes in self._items.items():
      batch[key] = codes.take(batch['item'], axis=0)
      batch[f'history.{key.removeprefix("item.")}'] = codes.take(batch['history'], axis=0)
    return batch

  def _gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """Examples at sorted positions [B] of the split, whichever parts they lie in."""
    owners = np.searchsorted(self._uptos, index, side='right')
    cuts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1], True])
    pieces = [
      self._gather_part(owners[lo], index[lo:hi])
      for lo, hi in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    if len(pieces) == 1:
      return pieces[0]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

  def _gather_part(self, number: np.integer, index: np.ndarray) -> dict[str, np.ndarray]:
    part = self._parts[number]
    example = index + self._shifts[number]
    user = part.examples['user'].take(example)
    end = part.examples['end'].take(example)
    length = np.minimum(end, self._length)
    batch = dict(
      user=part.users['row'].take(user),
      item=part.examples['item'].take(example),
      label=part.examples['label'].take(example),
      history=self._slice(number, part.users['offset'].take(user) + end - length, length),
      length=length.astype(np.int32),
      total=end.astype(np.int32),
      user_index=user + np.int32(part.first),
    )
    for key in self._user_keys:
      batch[key] = part.users[key].take(user, axis=0)
    for key in self._context_keys:
      batch[key] = part.examples[key].take(example, axis=0)
    return batch

  def _slice(self, number: np.integer, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Events first .. first + length of a part, padded to [B, L]."""
    events, windows = self._parts[number].history['item'], self._windows[number]
    if windows is None:  # the whole part is shorter than L
      history = np.full((len(first), self._length), self._padding, np.int32)
      if len(events):
        events.take(first[:, None] + self._positions, mode='clip', out=history)
    else:
      # A window is L neighbouring events, copied as one piece; those that would run over the
      # part's end are gathered event by event.
      last = len(windows) - 1
      history = windows[np.minimum(first, last)]
      late = np.flatnonzero(first > last)
      if len(late):
        history[late] = events.take(first[late, None] + self._positions, mode='clip')
    # What lies behind an example's end is of another time or user, and is padded over.
    np.copyto(history, self._padding, where=self._positions >= length.astype(np.int32)[:, None])
    return history


def _reopen(arguments: dict) -> BatchSource:
  return BatchSource(**arguments)


def loader(
  source: Any, start: int = 0, workers: int = 0, buffer: int = 16, threads: int = 2
) -> grain.DatasetIterator:
  """An iterator over the batches from step `start`, read ahead.

  Its `get_state()` and `set_state(state)` are exact: the next batch after either is the next that
  was not yet returned, whatever was read ahead. A state made with workers fits an iterator of the
  same `workers` and `start`; without workers it is the step alone.

  Args:
    source: of batches by their number, such as BatchSource.
    start: first step, for a run without a saved iterator state.
    workers: processes that cut batches; 0 cuts them in threads of this one, which is enough for
      more than a million examples a second, for numpy's gathers run beside each other.
    buffer: batches read ahead.
    threads: that cut batches, in each process.

  Returns:
    A Grain iterator of batches.
  """
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
  dataset = grain.MapDataset.source(source)
  if not workers:
    iterator = iter(dataset.to_iter_dataset(options))
    if start:
      iterator.set_state({'next_index': start})
    return iterator
  # Grain's workers take absl's flags along, which a program without absl.app has not parsed.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  dataset = dataset.slice(slice(start, None)) if start else dataset
  return iter(
    dataset.to_iter_dataset(options).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
    )
  )
