"""AUC on items that appear only after the end of training, by what is known of them.

    python experiments/cold_items.py [--models=din,sam] [--rates=0,0.1,0.3] [--seeds=0,1]

The log is generated. Users like a few categories; an item has a category, a price and an appeal of
its own, half of which the price shows. A part of the items appears during the log, the others are
there from its beginning; the split is by time, so some items of the test are in no training row.

    logit = -1.6 + 2 [category liked] + .7 (price + own) / sqrt 2,   price, own ~ N(0, 1)

The rows: `item_user_mean`, the baseline without training; `unknown`, a store without cold items, in
which the model scores all of them as the one unknown item; `0`, `0.1`, ...: cold items with
config.model.id_dropout of this rate. All have the same examples, batches and steps. Reported is the
AUC on test examples with a cold item, on the others and on all, for each seed of training.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from step_cost import show
from train_speed import whole_numbers

from lmn_jax import config as configs
from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.evaluation import baselines, click_evaluation
from lmn_jax.evaluation.click_metrics import auc
from lmn_jax.models.registry import CLICK
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.initial_state import initial_state

LIKED = 4  # categories of a user
SPAN = 10**6  # seconds of the log


def write_log(folder: Path, args: argparse.Namespace) -> None:
  """Writes log.csv and items.csv."""
  rng = np.random.default_rng(args.log_seed)
  U, items, N = args.users, args.items, args.users * args.impressions
  category_I, price_I = rng.integers(args.categories, size=items), rng.normal(size=items)
  appeal_I = (price_I + rng.normal(size=items)) / np.sqrt(2)
  liked_UC = rng.random((U, args.categories)).argsort(1) < LIKED
  birth_I = np.sort(np.where(rng.random(items) < args.new, rng.uniform(0.2, 1, items), 0.0))
  time_N, user_N = np.sort(rng.random(N)), rng.integers(U, size=N)
  exist_N = np.searchsorted(birth_I, time_N, side='right')  # items 0 to exist - 1
  # Every other impression is of one of the user's categories, where such an item exists.
  item_N = rng.integers(exist_N)
  for _ in range(4):
    again = ~liked_UC[user_N, category_I[item_N]] & (np.arange(N) % 2 == 0)
    item_N = np.where(again, rng.integers(exist_N), item_N)
  logit_N = -1.6 + 2 * liked_UC[user_N, category_I[item_N]] + 0.7 * appeal_I[item_N]
  label_N = (rng.random(N) < 1 / (1 + np.exp(-logit_N))).astype(int)
  with (folder / 'log.csv').open('w', newline='') as file:
    rows = zip(user_N, item_N, (time_N * SPAN).astype(int), label_N, strict=True)
    csv.writer(file).writerows([('user', 'item', 'time', 'label'), *rows])
  with (folder / 'items.csv').open('w', newline='') as file:
    rows = zip(range(items), category_I, np.round(price_I, 3), strict=True)
    csv.writer(file).writerows([('item', 'category', 'price'), *rows])


def make_config(name: str, folder: Path, rate: float | None, seed: int, args: argparse.Namespace):
  """The experiment of a model; rate: of id dropout, None without cold items."""
  config = configs.base(name)
  config.data = configs.data(
    name='cold', source=str(folder / 'log.csv'), items_source=str(folder / 'items.csv'),
    item_features=('category', 'price'), numeric={'price': 'standard'},
    cold_items=rate is not None, split=dict(valid=0, test=0.3),
  )  # fmt: skip
  config.model.update(dict(scale=0.2, id_dropout=rate or 0.0))
  config.optimizer.embedding.initial_accumulator = 1e-7
  config.update(dict(
    history_length=args.length, batch_size=args.batch, eval_batch_size=1024, seed=seed,
    steps=args.steps,
  ))  # fmt: skip
  return config


def scores_of(config, store: Store) -> np.ndarray:
  """Trains for config.steps; the scores of the test."""
  setup = setups.set_up(config, store)
  state, source = initial_state(setup, store, config.seed), setup.sources['train']
  for step in range(config.steps):
    state, _ = setup.trainer.update(state, meshes.place(setup.mesh, source[step]))
  return trained_run.score_split(setup, state, 'test')


def aucs(store: Store, cold: np.ndarray, score: np.ndarray) -> list[float]:
  """The AUC on test examples with a cold item, on the others, and on all."""
  label = click_evaluation.examples_of(store, 'test').label
  return [auc(label[rows], score[rows]) for rows in (cold, ~cold, slice(None))]


def row_of(who: str, kind: str, runs: list[list[float]], args: argparse.Namespace) -> dict:
  row = {'who': who, 'items': kind}
  for seed, of_seed in zip(args.seeds, runs, strict=True):
    names = (f'{name}_{seed}' for name in ('cold', 'known', 'all'))
    row |= dict(zip(names, np.round(of_seed, 4).tolist(), strict=True))
  return row


def measure(folder: Path, args: argparse.Namespace) -> list[dict]:
  """The row of the baseline, and for each model those of the store without cold items and of all
  rates."""
  write_log(folder, args)
  stores = {
    rate: prepare(make_config('din', folder, rate, 0, args).data, folder / 'stores')
    for rate in (None, 0.0)
  }
  examples = click_evaluation.examples_of(stores[0.0], 'test')
  counts = click_evaluation.count_training(stores[0.0])['label']
  by_means = baselines.item_user_mean(counts, examples.item, examples.user)
  of_means = aucs(stores[0.0], examples.cold, by_means)
  rows = [row_of('item_user_mean', 'unknown', [of_means] * len(args.seeds), args)]
  print(f'{examples.cold.mean():.1%} of {len(examples.cold):,} test examples have a cold item')
  for name in args.models:
    for rate in (None, *args.rates):
      store, runs = stores[None if rate is None else 0.0], []
      for seed in args.seeds:
        score = scores_of(make_config(name, folder, rate, seed, args), store)
        runs.append(aucs(store, examples.cold, score))
      rows.append(row_of(name, 'unknown' if rate is None else f'cold, {rate:g}', runs, args))
  return rows


SIZES = {
  'users': 300, 'items': 600, 'categories': 30, 'impressions': 200, 'length': 30, 'batch': 256,
  'steps': 500, 'log_seed': 0,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--models', type=lambda x: x.split(','), default=['din', 'sam'])
  parser.add_argument(
    '--rates', type=lambda x: [float(rate) for rate in x.split(',')], default=[0.0, 0.1, 0.3]
  )
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--new', type=float, default=0.5, help='share of items that appear later')
  parser.add_argument('--seeds', type=whole_numbers, default=[0, 1])
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  for name in args.models:
    one_of('--models', name, CLICK)
  with tempfile.TemporaryDirectory() as folder:
    rows = measure(Path(folder), args)
  show(rows, args)


if __name__ == '__main__':
  main()
