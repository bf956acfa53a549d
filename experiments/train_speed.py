"""Samples a second of training, input included, beside DIN of FuxiCTR on the same files.

    python experiments/train_speed.py [--lengths=100,1000] [--models=din,sam] [--json=PATH]
    python experiments/train_speed.py --peers-python=PATH     # one that has fuxictr: fuxi_din.py

Writes impressions of users with full histories of length L as a folder of LongCTR Parquet files.
FuxiCTR reads the files; ours are prepared as a history store, cut into batches by Grain and trained
by `trainer.update`, all built by setups.set_up as in training. The loss of a step is fetched after
the next step is sent, as in training/loop.py. In every pass all take turns; reported are the median
over the passes, the lowest and the highest, and the ratio to FuxiCTR.

The sizes are those of DIN in FuxiCTR: width 32, one hidden layer of 64 in the attention, a head of
512, 128, 64, user and item ids. Ours has a sigmoid in the attention, FuxiCTR has Dice, a batch norm
with a trained slope; SAM has the 8 hidden units of its authors. Both clip at 10 and train with
Adam, FuxiCTR over whole tables, ours on the rows that a batch reads (--rows for another rule).
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from step_cost import show

from lmn_jax import config as configs
from lmn_jax.data.batches import loader
from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.models.registry import CLICK
from lmn_jax.training import setup as setups

WARMUP = 3  # steps of a pass that are not timed
HELD = 128  # impressions of validation and of test each, which are not scored
ATTENTION = ('din', 'lmn')  # have the hidden units of FuxiCTR


def make_set(folder: Path, L: int, args: argparse.Namespace) -> None:
  """Writes users with histories of exactly L items, and impressions after them.

  Args:
    folder: to create. L: events of each user. args: users, items, samples.
  """
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)

  def items(n):
    """Draws by popularity: the item of rank r with a frequency of about r^-0.8."""
    return (1 + args.items * rng.random(n) ** 5).astype(np.int32)

  def write(name, columns):
    pq.write_table(pa.table(columns), folder / f'{name}.parquet')

  for name, n in (('train', args.samples), ('valid', HELD), ('test', HELD)):
    user_N = rng.integers(0, args.users, n)
    write(name, {
      'user_id': user_N + 1, 'user_index': user_N, 'item_index': items(n),
      'seq_len': np.full(n, L), 'is_click': np.arange(n) % 2,
    })  # fmt: skip
  history = pa.ListArray.from_arrays(np.arange(args.users + 1) * L, items(args.users * L))
  write('user_info', {'full_item_seq': history})
  ids = np.arange(args.items + 1)
  write('item_info', {'item_index': ids, 'item_id': ids})


def make_config(name: str, folder: Path, L: int, args: argparse.Namespace):
  """The experiment of a model on a set.

  Args:
    name: of the model. folder: of the set. L: history length. args: sizes and the rule of rows.
  """
  config = configs.base(name)
  config.data.update(name=folder.name, source=str(folder), format='longctr')
  config.data.split.protocol = 'column'
  config.update(dict(history_length=L, batch_size=args.batch, eval_batch_size=HELD))
  config.model.update(dict(width=args.width, hidden=tuple(args.hidden)))
  if name in ATTENTION:
    config.model.attention = args.attention
  config.optimizer.embedding.update(dict(name=args.rows, rate=1e-3))
  config.optimizer.clip_norm = 10.0
  return config


class Training:
  """An experiment that trains for some steps at a time, as training/loop.py does.

  Attributes:
    setup: the experiment. state: the newest.
  """

  def __init__(self, config, store: Store):
    self.setup = setups.set_up(config, store)
    # Batches read ahead during the turns of others are used before the time starts.
    self._data = loader(self.setup.sources['train'], buffer=WARMUP)
    self.state = self.setup.trainer.init(0)

  def speed(self, count: Callable[[dict], int], args: argparse.Namespace) -> float:
    """The count of batches by second, after the warm-up. args: largest steps and seconds."""
    self.steps(count, WARMUP, np.inf)
    counted, seconds = self.steps(count, args.steps, args.seconds)
    return counted / seconds

  def steps(self, count: Callable[[dict], int], n: int, seconds: float) -> tuple[int, float]:
    """Trains for n steps or a number of seconds; (count, seconds)."""
    pending, done, counted, began = None, 0, 0, time.perf_counter()
    while done < n and time.perf_counter() - began < seconds:
      batch = next(self._data)
      counted += count(batch)
      self.state, metrics = self.setup.trainer.update(
        self.state, meshes.place(self.setup.mesh, batch)
      )
      if pending is not None:
        jax.device_get(pending)
      pending, done = metrics['loss'], done + 1
    jax.block_until_ready(self.state)
    return counted, time.perf_counter() - began


def trained(name: str, store: Store, folder: Path, L: int, args: argparse.Namespace) -> Callable:
  """A function that trains for one pass and returns the samples a second."""
  training = Training(make_config(name, folder, L, args), store)
  return lambda: training.speed(lambda batch: args.batch, args)


def peer(folder: Path, L: int, args: argparse.Namespace) -> float:
  """Samples a second of DIN of FuxiCTR, in another process.

  Raises:
    RuntimeError: with the last line of its output, if it fails.
  """
  script = Path(__file__).with_name('fuxi_din.py')
  names = ('users', 'items', 'batch', 'width', 'attention', 'steps', 'seconds')
  sizes = [f'--{name}={getattr(args, name)}' for name in names]
  done = subprocess.run(
    [args.peers_python, '-W', 'ignore', str(script), f'--folder={folder}', f'--length={L}',
     *sizes, '--hidden', *map(str, args.hidden)],
    capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    message = (done.stderr.strip().splitlines() or [''])[-1]
    raise RuntimeError(f'{args.peers_python} fuxi_din.py: status {done.returncode} {message}')
  return json.loads(done.stdout.splitlines()[-1])['samples_per_s']


PEER = 'FuxiCTR din'


def measure(root: Path, L: int, args: argparse.Namespace) -> list[dict]:
  """A row for each contestant at length L; files in `root` of an earlier run are reused."""
  folder = root / f'users{args.users}-items{args.items}-samples{args.samples}-length{L}'
  if not folder.exists():
    make_set(folder, L, args)
  store = prepare(make_config('din', folder, L, args).data, root / 'stores')
  turns = {name: trained(name, store, folder, L, args) for name in args.models}
  if args.peers_python:
    turns[PEER] = lambda: peer(folder, L, args)
  speeds = {name: [] for name in turns}
  for _ in range(args.passes):
    for name, one_pass in turns.items():
      speeds[name].append(one_pass())
  rows = []
  for name, samples in speeds.items():
    median = statistics.median(samples)
    rows.append({
      'who': name, 'length': L, 'samples_per_s': round(median), 'low': round(min(samples)),
      'high': round(max(samples)), 'step_ms': round(args.batch / median * 1e3, 1),
      'by_fuxictr': round(median / statistics.median(speeds[PEER]), 2) if PEER in speeds else None,
    })  # fmt: skip
  return rows


def whole_numbers(text: str) -> list[int]:
  """The type of a flag: whole numbers with commas."""
  return [int(x) for x in text.split(',')]


SIZES = {
  'users': 20_000, 'items': 50_000, 'samples': 100_000, 'batch': 1024, 'width': 32,
  'attention': 64,
}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--lengths', type=whole_numbers, default=[100, 1000])
  parser.add_argument('--models', type=lambda x: x.split(','), default=['din', 'sam'])
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--hidden', type=whole_numbers, default=[512, 128, 64])
  parser.add_argument('--rows', default='adam', help='rule of the rows: adam, adagrad, ...')
  parser.add_argument('--passes', type=int, default=3)
  parser.add_argument('--steps', type=int, default=60, help='most steps of a pass')
  parser.add_argument('--seconds', type=float, default=10.0, help='of a pass')
  parser.add_argument('--folder', default='', help='where sets and stores are kept for a next run')
  parser.add_argument('--peers-python', default='', help='a Python that has fuxictr')
  parser.add_argument('--json', default='', help='where to write all of it')
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  for name in args.models:
    one_of('--models', name, CLICK)
  with tempfile.TemporaryDirectory() as scratch:
    root = Path(args.folder or scratch)
    rows = [row for L in args.lengths for row in measure(root, L, args)]
  show(rows, args)


if __name__ == '__main__':
  main()
