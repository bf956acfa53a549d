"""What one training step of LMN costs as the memory grows: time and memory, a process a size.

    python experiments/step_cost.py [--slots_per_axis=256,1024] [--steps=30]

The step is the whole of it (forward, injection, backward, update of the touched rows) at the sizes
of configs/lmn_douyin.py, on random batches. Prints a JSON line a size: n slots, median, lowest and
highest milliseconds, MiB of tables with their optimizer state, MiB of temporaries of the compiled
step, MiB the process held at most, seconds to compile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from lmn_jax import config as configs
from lmn_jax import mesh, models, update
from lmn_jax.layers import Schema
from lmn_jax.writer import peak_rss

# Vocabulary of the stand-in's store: ids and the unknown.
SIZES = {
  'user': 1001, 'item': 501, 'user.age': 6, 'user.gender': 3, 'user.city': 31,
  'item.category': 41, 'context.query': 121,
}  # fmt: skip
SCHEMA = Schema(
  tuple(SIZES.items()), ('user.age', 'user.gender', 'user.city'), ('item.category',),
  ('context.query',),
)  # fmt: skip


def random_batch(rng: np.random.Generator, B: int, L: int) -> dict[str, np.ndarray]:
  """A batch with full histories."""

  def ids(name, *shape):
    return rng.integers(0, SIZES[name], shape).astype(np.int32)

  batch = {name: ids(name, B) for name in SIZES}
  return batch | {
    'history': ids('item', B, L),
    'history.category': ids('item.category', B, L),
    'length': np.full(B, L, np.int32),
    'label': rng.integers(0, 2, B).astype(np.float32),
    'weight': np.ones(B, np.float32),
  }


def measure(slots_per_axis: int, steps: int) -> dict:
  """Costs of a step at N * N slots."""
  config = configs.base('lmn')
  config.model.update(
    dict(slots_per_axis=slots_per_axis, top_k=16, positions=1, query='axes', softmax=True)
  )
  grid = mesh.make_mesh()
  rng = np.random.default_rng(0)
  batches = [random_batch(rng, config.batch_size, config.history_length) for _ in range(8)]
  shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batches[0].items()}
  model = models.build(config.model.to_dict(), SCHEMA)
  trainer = update.make_trainer(config, model, shapes, grid)
  state = trainer.init(0)
  placed = [mesh.place(grid, batch) for batch in batches]
  began = time.perf_counter()
  compiled = trainer.update.lower(state, placed[0]).compile()
  seconds = time.perf_counter() - began
  times = []
  for step in range(steps + 5):
    began = time.perf_counter()
    state, metrics = compiled(state, placed[step % len(placed)])
    jax.block_until_ready((state, metrics))
    times.append((time.perf_counter() - began) * 1e3)
  tables = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract.tables))
  return {
    'slots': slots_per_axis**2,
    'ms': round(statistics.median(times[5:]), 1),
    'ms_low': round(min(times[5:]), 1),
    'ms_high': round(max(times[5:]), 1),
    'tables_mib': round(tables / 2**20, 1),
    'temporaries_mib': round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    'peak_rss_mib': round(peak_rss() / 2**20),
    'compile_s': round(seconds, 1),
    'device': jax.devices()[0].device_kind,
  }


def main() -> None:
  """Measures each size in a process of its own, so that its peak memory is its own."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--slots_per_axis', default='256,1024')
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--one', type=int, help='measure this size here')
  given = parser.parse_args()
  if given.one:
    print(json.dumps(measure(given.one, given.steps)))
    return
  for size in given.slots_per_axis.split(','):
    command = [sys.executable, __file__, f'--one={int(size)}', f'--steps={given.steps}']
    subprocess.run(command, check=True)


if __name__ == '__main__':
  main()
