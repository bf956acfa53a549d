"""Trains SASRec of RecTools, a task of next_item_speed.py: prints one JSON line.

`SASRecModel` with its `fit` under a Lightning trainer and its `recommend`; only the targets are
counted, and training ends after the last requested step, or, with --minutes, after the epoch that
exceeds them. Needs rectools[torch].
"""

import argparse
import json
import logging
import time

import pandas as pd
import pytorch_lightning as lightning
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

WARMUP = 2  # steps that are not timed


class Clock(lightning.Callback):
  """Counts targets and seconds of steps after the warm-up, and ends the training."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.done, self.targets, self.began = args, 0, 0, 0.0
    self.started = time.perf_counter()

  def __deepcopy__(self, memo):  # RecTools copies the trainer with its callbacks
    return self

  def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
    self.done += 1
    now = time.perf_counter()
    if self.done <= WARMUP:
      self.began = now
      return
    self.targets, self.seconds = self.targets + int((batch['y'] != 0).sum()), now - self.began
    enough = self.done > WARMUP + self.args.steps or self.seconds > self.args.seconds
    if enough and not self.args.minutes:
      trainer.should_stop = True

  def on_train_epoch_end(self, trainer, module):
    if time.perf_counter() - self.started > 60 * self.args.minutes:
      trainer.should_stop = True


def frame(histories: dict[str, list[str]], left_out: int) -> pd.DataFrame:
  """Interactions of all users except the last items of each."""
  rows = [
    (user, item, 1.0, pd.Timestamp('2000-01-01') + pd.Timedelta(seconds=at))
    for user, items in histories.items()
    for at, item in enumerate(items[: len(items) - left_out])
  ]
  return pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--source', required=True)
  for name in ('length', 'width', 'batch', 'steps'):
    parser.add_argument(f'--{name}', type=int, required=True)
  parser.add_argument('--seconds', type=float, required=True)
  parser.add_argument('--minutes', type=float, default=0.0)
  args = parser.parse_args()
  logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)

  histories = {}
  with open(args.source, encoding='utf-8') as file:
    next(file)
    for line in file:
      first, *_, last = line.rstrip('\n').split('\t')
      histories[first] = last.split(',')
  clock = Clock(args)

  def make_trainer():
    return lightning.Trainer(
      max_epochs=1000, accelerator='cpu', devices=1, logger=False, enable_checkpointing=False,
      enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
    )  # fmt: skip

  model = SASRecModel(
    session_max_len=args.length, n_factors=args.width, n_heads=2, n_blocks=2, dropout_rate=0.2,
    loss='softmax', batch_size=args.batch, lr=1e-3, recommend_batch_size=128,
    get_trainer_func=make_trainer,
  )  # fmt: skip
  model.fit(Dataset.construct(frame(histories, 2)))
  train_s = time.perf_counter() - clock.started
  context = Dataset.construct(frame(histories, 1))
  for _ in range(2):  # the first warms up
    began = time.perf_counter()
    recommended = model.recommend(users=list(histories), dataset=context, k=10, filter_viewed=True)
    seconds = time.perf_counter() - began
  target = {user: items[-1] for user, items in histories.items()}
  hits = (recommended[Columns.Item] == recommended[Columns.User].map(target)).sum()
  print(
    json.dumps(
      {
        'targets_per_s': clock.targets / clock.seconds,
        'users_per_s': len(histories) / seconds,
        'hr10': round(float(hits) / len(histories), 4),
        'train_s': round(train_s, 1),
        'steps': clock.done,
      }
    )
  )


if __name__ == '__main__':
  main()
