"""The AUC at full length, and the time of training, with histories of random lengths in training.

    python experiments/train_lengths.py [--models=din,lmn] [--laws=full,suffix,beta:0.3]
    python experiments/train_lengths.py --length=10000 --recent=1000     # as configs/sam_long.py

The log is the generated one of long histories (synthetic.generate_long): the newest events carry no
signal about clicks, and all of the signal is only in the whole history. It is the hardest case, as
steps with a short history learn nothing. Every law of lengths is trained on the same examples for
the same number of steps, then tested at the full length. The laws take turns, seed by seed; every
length is compiled before. Reported are seconds and seconds of the processor (of all its cores) of
the steps, the median over the seeds, their ratio to the first law, and the AUC of each seed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from step_cost import show
from train_speed import whole_numbers

from lmn_jax import config as configs
from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.data.train_lengths import BLOCK
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.models.registry import CLICK
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run


def make_config(name: str, law: str, seed: int, args: argparse.Namespace):
  """The experiment of a model with a law of lengths, such as 'suffix' or 'beta:0.3'."""
  config = configs.base(name)
  config.data = configs.long_data(users=args.users, length=args.length, recent=args.recent)
  config.data.split.valid = 0.0
  config.model.scale = 1.0
  if 'attention' in config.model:
    config.model.attention = 16
  config.optimizer.embedding.update(dict(rate=0.15, initial_accumulator=1e-7))
  law, _, mean = law.partition(':')
  config.update(dict(
    history_length=args.length, batch_size=args.batch, eval_batch_size=args.batch, seed=seed,
    steps=args.steps, train_length=law, train_length_mean=float(mean or 0.5),
  ))  # fmt: skip
  return config


def compile_lengths(setup: setups.Setup) -> None:
  """Runs one step of each length."""
  source = setup.sources['train']
  steps = {source.lengths.at(block * BLOCK): block * BLOCK for block in range(1000)}
  state = setup.trainer.init(0)
  for step in steps.values():
    state, _ = setup.trainer.update(state, meshes.place(setup.mesh, source[step]))


def train(config, store: Store) -> dict:
  """Trains for config.steps; seconds, seconds of the processor, and the test AUC."""
  setup = setups.set_up(config, store)
  compile_lengths(setup)
  state, source, pending = setup.trainer.init(config.seed), setup.sources['train'], None
  jax.block_until_ready(state)
  began, processor = time.perf_counter(), time.process_time()
  for step in range(config.steps):
    state, metrics = setup.trainer.update(state, meshes.place(setup.mesh, source[step]))
    if pending is not None:
      jax.device_get(pending)
    pending = metrics['loss']
  jax.block_until_ready(state)
  seconds, processor = time.perf_counter() - began, time.process_time() - processor
  metrics = trained_run.evaluate_split(config, store, setup, state, 'test')
  lengths = [source.lengths.at(step) for step in range(config.steps)]
  return {
    'seconds': seconds, 'cpu_seconds': processor, 'auc': metrics['overall']['auc'],
    'mean': float(np.mean(lengths)) / config.history_length,
  }  # fmt: skip


def measure(root: Path, args: argparse.Namespace) -> list[dict]:
  """A row for each model and law."""
  rows = []
  for name in args.models:
    store = prepare(make_config(name, 'full', 0, args).data, root)
    results = {law: [] for law in args.laws}
    for seed in args.seeds:
      for law, runs in results.items():
        runs.append(train(make_config(name, law, seed, args), store))
    first = statistics.median(x['cpu_seconds'] for x in results[args.laws[0]])
    for law, runs in results.items():
      row = {'who': name, 'length': args.length, 'law': law, 'steps': args.steps}
      for key in ('mean', 'seconds', 'cpu_seconds'):
        row[key] = round(statistics.median(x[key] for x in runs), 2)
      row['cost'] = round(statistics.median(x['cpu_seconds'] for x in runs) / first, 2)
      row |= {f'auc_{seed}': round(x['auc'], 4) for seed, x in zip(args.seeds, runs, strict=True)}
      rows.append(row)
  return rows


SIZES = {'length': 2000, 'recent': 200, 'users': 300, 'batch': 32, 'steps': 800}


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--models', type=lambda x: x.split(','), default=['din', 'lmn'])
  parser.add_argument('--laws', type=lambda x: x.split(','), default=['full', 'suffix', 'beta:0.3'])
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--seeds', type=whole_numbers, default=[0, 1])
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  for name in args.models:
    one_of('--models', name, CLICK)
  with tempfile.TemporaryDirectory() as root:
    rows = measure(Path(root), args)
  show(rows, args)


if __name__ == '__main__':
  main()
