"""Examples a second of the Grain loader and of a pipeline with one element for each example.

    python experiments/batch_speed.py [--batch_size=1024] [--repeats=5] [--parts=1]

Builds a store with long histories in a temporary folder, reads it at L = 50, 100, 1000 with both
loaders in turns, and prints JSON: the median over the repeats, and the lowest and the highest. The
other loader is Grain as it is commonly used: a source of examples, each sliced and padded by
itself, with the shuffle and batch of Grain, and the same threads and number of batches read ahead.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import grain
import numpy as np

from lmn_jax import config
from lmn_jax.data.batches import BatchSource, loader
from lmn_jax.data.build import build
from lmn_jax.data.store import Store

USERS, ITEMS, ROWS = 1000, 50_000, 1_500_000


class ExampleSource:
  """The source of the other loader: element i is training example i of a store of one part."""

  def __init__(self, store: Store, length: int):
    (self._part,) = store.parts
    self._start, stop = self._part.bounds['train']
    self._size = stop - self._start
    self._items, self._padding = store.items, store.vocabulary['item']
    self._length = length

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    examples, users = self._part.examples, self._part.users
    i = self._start + int(index)
    user, end, item = examples['user'][i], examples['end'][i], examples['item'][i]
    length = min(end, self._length)
    stop = users['offset'][user] + end
    history = np.full(self._length, self._padding, np.int32)
    history[:length] = self._part.history['item'][stop - length : stop]
    category = self._items['item.category']
    return {
      'user': users['row'][user],
      'item': item,
      'label': examples['label'][i],
      'weight': np.float32(1),
      'history': history,
      'length': np.int32(length),
      'total': np.int32(end),
      'user_index': user,
      'user.age': users['user.age'][user],
      'context.query': examples['context.query'][i],
      'item.category': category[item],
      'history.category': category[history],
    }


def make_store(folder: Path, parts: int) -> Store:
  """Builds a store of a seeded log of 1,500 rows for each user, in a number of parts."""
  data = config.data(
    user_features=('age',),
    item_features=('category',),
    context_features=('query',),
    history='all',
    rows_per_part=-(-(ROWS + USERS) // parts),
  )
  with duckdb.connect() as db:
    db.execute(
      f"""CREATE TABLE interactions AS SELECT i AS row, 'u' || hash(i) % {USERS} AS user,
        'i' || hash(i + 1) % {ITEMS} AS item, i AS time, (hash(i + 2) % 2)::FLOAT AS label,
        true AS history, true AS example, NULL::TINYINT AS split, 'q' || hash(i + 3) % 500 AS query
      FROM range({ROWS}) AS rows(i)"""
    )
    db.execute(
      f"CREATE TABLE users AS SELECT 'u' || i AS user, '' || i % 70 AS age "
      f'FROM range({USERS}) AS rows(i)'
    )
    db.execute(
      f"CREATE TABLE items AS SELECT 'i' || i AS item, 'c' || i % 40 AS category "
      f'FROM range({ITEMS}) AS rows(i)'
    )
    return Store(build(data, db, {}, folder))


def speed(iterator, batches: int, batch_size: int) -> float:
  """Examples a second over `batches`, after reading ahead has started."""
  for _ in range(3):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    batch = next(iterator)
  seconds = time.perf_counter() - start
  assert len(batch['user']) == batch_size
  return batches * batch_size / seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--batch_size', type=int, default=1024)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--parts', type=int, default=1, help='more than 1 leaves the rival out')
  arguments = parser.parse_args()
  size, threads = arguments.batch_size, arguments.threads
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    store = make_store(Path(folder) / 'store', arguments.parts)
    for length in (50, 100, 1000):
      ours, rival = [], []
      for repeat in range(arguments.repeats):
        source = BatchSource(store.path, 'train', size, length, seed=repeat, shuffle=True)
        ours.append(speed(loader(source, threads=threads), 300 if length < 1000 else 60, size))
        if len(store.parts) == 1:
          examples = grain.MapDataset.source(ExampleSource(store, length)).seed(repeat).shuffle()
          # Batched before the threads: several times faster than `to_iter_dataset().batch()`.
          options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)
          naive = examples.batch(size).to_iter_dataset(options)
          rival.append(speed(iter(naive), 20, size))
      row = {
        'L': length,
        'examples_per_second': round(statistics.median(ours)),
        'lowest': round(min(ours)),
        'highest': round(max(ours)),
      }
      if rival:
        row |= {
          'one_element_per_example': round(statistics.median(rival)),
          'rival_lowest': round(min(rival)),
          'rival_highest': round(max(rival)),
          'ratio': round(statistics.median(ours) / statistics.median(rival), 1),
        }
      rows.append(row)
    head = {
      'batch_size': size,
      'threads': threads,
      'repeats': arguments.repeats,
      'cores': os.cpu_count(),
      'processor': platform.processor() or platform.machine(),
      'parts': len(store.parts),
      'examples': store.examples['train'],
      'events_per_user': round(ROWS / USERS),
    }
  print(json.dumps(head | {'table': rows}, indent=1))


if __name__ == '__main__':
  main()
