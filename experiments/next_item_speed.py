"""Targets a second of training and users a second of ranking, beside SASRec of RecTools.

    python experiments/next_item_speed.py --source=FOLDER/sequences.tsv [--models=sasrec,dman]
    python experiments/next_item_speed.py --source=... --peers-python=PATH    # one with rectools

Both SASRecs read 200 events, width 128, two blocks, two heads, dropout .2, softmax over all items,
batches of 32 histories, Adam at 1e-3; DMAN reads segments of 20 in 128 lanes, width 128. A target
is an event with a next event, without padding; input is included. In every pass all take turns,
RecTools in another process with the allocator settings of launch.sh, which this process should have
too. Ranking is the test as in training: all items except seen ones, for every user; for RecTools it
is `recommend`, ten items. The first call of both, which compiles or warms up, does not count.
Reported are the median over the passes, the lowest and the highest.

--minutes trains the model of RecTools for that time, as its `fit` does, and each of ours for half
of it, with half the batch and a rate that falls from 2e-3 to 0, and prints HR@10 of the test beside
the seconds of both, with compiling.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from step_cost import environment, show
from train_speed import Training

from lmn_jax import config as configs
from lmn_jax.data.prepare import prepare
from lmn_jax.errors import one_of
from lmn_jax.training import trained_run

PEER = 'RecTools sasrec'
MODELS = ('sasrec', 'dman')


def make_config(name: str, args: argparse.Namespace):
  """The experiment of a model. args: the source, and sizes for tests."""
  config = configs.movielens_next(name)
  config.data.source = args.source
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 1e-3
  config.optimizer.update(dict(schedule='constant', warmup_steps=0))
  config.model.width, config.model.dropout = args.width, 0.2
  config.history_length, config.batch_size = args.length, args.batch
  if name == 'dman':
    config.history_length, config.batch_size = args.segment, args.lanes
  else:
    config.model.update(dict(blocks=2, heads=2))
  config.eval_batch_size = 64 if name == 'dman' else 16
  return config


def targets(batch: dict[str, np.ndarray], V: int) -> int:
  """The number of events of a batch with a next item in the vocabulary."""
  return int(np.sum((batch['target'] > 0) & (batch['target'] < V)))


class Turn:
  """A model of lmn_jax: trains for a pass, or ranks the test."""

  def __init__(self, name: str, root: Path, args: argparse.Namespace):
    self.config, self.args = make_config(name, args), args
    self.store = prepare(self.config.data, root / 'stores')
    self.training = Training(self.config, self.store)
    self.rank()

  def train(self) -> float:
    """Targets a second."""
    V = self.training.setup.model.items
    return self.training.speed(lambda batch: targets(batch, V), self.args)

  def rank(self) -> float:
    """Users a second."""
    setup, state, began = self.training.setup, self.training.state, time.perf_counter()
    report = trained_run.evaluate_split(self.config, self.store, setup, state, 'test')
    return report['overall']['rows'] / (time.perf_counter() - began)


def learn(name: str, root: Path, args: argparse.Namespace) -> dict[str, float]:
  """Trains a model of lmn_jax for half of --minutes: hr10 of the test, train_s.

  The number of steps follows from the speed of a few others; a tenth of the time is for compiling.
  """
  config = make_config(name, args)
  config.batch_size = max(1, config.batch_size // 2)
  config.optimizer.schedule = 'cosine'
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 1e-2
  config.optimizer.warmup_steps = 50
  store = prepare(config.data, root / 'stores')
  steps_per_s = Training(config, store).speed(lambda batch: 1, args)
  config.steps = max(config.optimizer.warmup_steps + 1, int(27 * args.minutes * steps_per_s))
  began = time.perf_counter()
  training = Training(config, store)
  training.steps(lambda batch: 1, config.steps, np.inf)
  seconds = time.perf_counter() - began
  report = trained_run.evaluate_split(config, store, training.setup, training.state, 'test')
  return {'hr10': round(report['overall']['hr@10'], 4), 'train_s': round(seconds, 1)}


def peer(args: argparse.Namespace) -> dict[str, float]:
  """SASRec of RecTools in another process: targets_per_s, users_per_s, and hr10.

  Raises:
    RuntimeError: with the last line of its output, if it fails.
  """
  script = Path(__file__).with_name('rectools_sasrec.py')
  names = ('source', 'length', 'width', 'batch', 'steps', 'seconds', 'minutes')
  sizes = [f'--{name}={getattr(args, name)}' for name in names]
  done = subprocess.run(
    [args.peers_python, '-W', 'ignore', str(script), *sizes],
    capture_output=True, text=True, env=environment('kept', dict(os.environ)),
  )  # fmt: skip
  if done.returncode:
    message = (done.stderr.strip().splitlines() or [''])[-1]
    raise RuntimeError(f'{args.peers_python} {script.name}: status {done.returncode} {message}')
  return json.loads(done.stdout.splitlines()[-1])


def measure(root: Path, args: argparse.Namespace) -> list[dict]:
  """A row for each contestant."""
  turns = {name: Turn(name, root, args) for name in args.models}
  speeds_of = {name: {'targets_per_s': [], 'users_per_s': []} for name in turns}
  learnt: dict[str, dict] = {}
  for _ in range(args.passes):
    for name, turn in turns.items():
      speeds_of[name]['targets_per_s'].append(turn.train())
      speeds_of[name]['users_per_s'].append(turn.rank())
    if args.peers_python:
      peer_result = peer(args)
      for key in ('targets_per_s', 'users_per_s'):
        speeds_of.setdefault(PEER, {}).setdefault(key, []).append(peer_result[key])
      learnt[PEER] = {key: peer_result[key] for key in ('hr10', 'train_s') if key in peer_result}
  if args.minutes:
    learnt |= {name: learn(name, root, args) for name in turns}
  rows = []
  for name, speeds in speeds_of.items():
    row = {'who': name}
    for key, values in speeds.items():
      median = statistics.median(values)
      row |= {
        key: round(median),
        f'low_{key}': round(min(values)),
        f'high_{key}': round(max(values)),
      }
      if PEER in speeds_of:
        row[f'by_{key}'] = round(median / statistics.median(speeds_of[PEER][key]), 2)
    rows.append(row | learnt.get(name, {}))
  return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--source', required=True, help='one line a user, films in time order')
  parser.add_argument('--models', type=lambda x: x.split(','), default=list(MODELS))
  sizes = {'length': 200, 'batch': 32, 'width': 128, 'segment': 20, 'lanes': 128}
  for name, value in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--passes', type=int, default=3)
  parser.add_argument('--steps', type=int, default=60, help='most steps of a pass')
  parser.add_argument('--seconds', type=float, default=20.0, help='of a pass')
  parser.add_argument('--minutes', type=float, default=0.0, help="of RecTools' training; 0: none")
  parser.add_argument('--peers-python', default='', help='a Python that has rectools')
  parser.add_argument('--json', default='', help='where to write all of it')
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  for name in args.models:
    one_of('--models', name, MODELS)
  with tempfile.TemporaryDirectory() as root:
    rows = measure(Path(root), args)
  show(rows, args)


if __name__ == '__main__':
  main()
