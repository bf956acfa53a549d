"""Training examples a second, and the AUC, with Q targets of a user in a row of the batch.

    python experiments/request_batches.py [--models=din,sam,lmn] [--targets=1,4,8,16]
    python experiments/request_batches.py --labels=100000 --seeds=0,1     # and the test AUC

The log is the generated one of searches (synthetic.generate) with users of many impressions; --bias
sets the share of clicks, between which impressions share a history. All Q have about the same
number of labels in a step: the batch has as many requests as --batch divided by the mean size of a
request. They take turns in every pass. Reported are labels a second, the median over the passes,
the lowest and the highest, and labels a second of the processor (of all its cores), which other
programs disturb less; with the ratio of each median to that of the first Q. With --labels, each Q
is trained on that number of labels and tested once.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from step_cost import show
from train_speed import WARMUP, Training, whole_numbers

from lmn_jax import config as configs
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.errors import one_of
from lmn_jax.models.registry import CLICK
from lmn_jax.training import loop


def make_config(name: str, targets: int, store: Store | None, args: argparse.Namespace):
  """The experiment of a model with at most `targets` examples in a request.

  Args:
    name: of the model. targets: Q. store: of the log; None before it is built. args: sizes.
  """
  config = configs.douyin(name)
  config.data = configs.douyin_data(users=args.users, impressions=args.impressions, bias=args.bias)
  config.data.split.valid = 0.0
  config.update(dict(
    history_length=args.length, targets_per_request=targets, batch_size=args.batch,
    eval_batch_size=args.batch,
  ))  # fmt: skip
  if store is not None and targets > 1:
    source = BatchSource(store.path, 'train', 1, args.length, targets=targets)
    config.batch_size = max(1, round(args.batch / source.examples_per_row))
  return config


def trained(config, store: Store, args: argparse.Namespace) -> Callable[[], tuple[float, float]]:
  """A function that trains for one pass; labels a second, and a second of the processor."""
  training = Training(config, store)

  def count(batch):
    return int((batch['weight'] > 0).sum())

  def one_pass():
    training.steps(count, WARMUP, float('inf'))
    began = time.process_time()
    labels, seconds = training.steps(count, args.steps, args.seconds)
    return labels / seconds, labels / (time.process_time() - began)

  return one_pass


def auc(config, store: Store, workdir: Path, seed: int, labels: int) -> float:
  """The test AUC after training on a number of labels."""
  source = BatchSource(store.path, 'train', 1, 1, targets=config.targets_per_request)
  steps = max(1, round(labels / config.batch_size / source.examples_per_row))
  config.update(dict(
    seed=seed, steps=steps, eval_every=steps, save_every=steps, log_every=steps
  ))  # fmt: skip
  return loop.train(config, workdir, store)['test']['overall']['auc']


def measure(root: Path, args: argparse.Namespace) -> list[dict]:
  """A row for each model and Q."""
  store = prepare(make_config(args.models[0], 1, None, args).data, root / 'stores')
  rows = []
  for name in args.models:
    made = {Q: make_config(name, Q, store, args) for Q in args.targets}
    turns = {Q: trained(config, store, args) for Q, config in made.items()}
    speeds = {Q: [] for Q in turns}
    for _ in range(args.passes):
      for Q, one_pass in turns.items():
        speeds[Q].append(one_pass())
    medians = {Q: [statistics.median(x) for x in zip(*speeds[Q], strict=True)] for Q in speeds}
    first = medians[args.targets[0]]
    for Q, samples in speeds.items():
      wall = [x for x, _ in samples]
      row = {
        'who': name, 'length': args.length, 'targets': Q, 'requests': made[Q].batch_size,
        'labels_per_s': round(medians[Q][0]), 'low': round(min(wall)), 'high': round(max(wall)),
        'ratio': round(medians[Q][0] / first[0], 2), 'labels_per_cpu_s': round(medians[Q][1]),
        'cpu_ratio': round(medians[Q][1] / first[1], 2),
      }  # fmt: skip
      for seed in args.seeds if args.labels else ():
        workdir = root / f'{name}-{Q}-{seed}'
        row[f'auc_{seed}'] = round(auc(made[Q], store, workdir, seed, args.labels), 4)
      rows.append(row)
  return rows


SIZES = {'length': 1000, 'users': 100, 'impressions': 4000, 'batch': 512}


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--models', type=lambda x: x.split(','), default=['din', 'sam', 'lmn'])
  parser.add_argument('--targets', type=whole_numbers, default=[1, 4, 8, 16])
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--bias', type=float, default=-4.5, help='log-odds of a click')
  parser.add_argument('--passes', type=int, default=3)
  parser.add_argument('--steps', type=int, default=20, help='most steps of a pass')
  parser.add_argument('--seconds', type=float, default=10.0, help='of a pass')
  parser.add_argument('--labels', type=int, default=0, help='of the training before the test')
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
