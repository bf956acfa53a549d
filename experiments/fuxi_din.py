"""Trains the DIN of FuxiCTR for long histories, a task of train_speed.py: prints one JSON line.

`model_zoo.LongCTR.DIN` with the loader and the `fit` of the package; only the batches are counted,
and training ends after the last requested one. Adam over whole tables at 1e-3, clipping at 10, Dice
in the attention, one process that loads: the defaults of FuxiCTR. Needs fuxictr; train_speed.py
writes the files and starts this script.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DIN import DIN
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

WARMUP = 2  # steps that are not timed


class Enough(Exception):
  """Raised after the requested steps."""


class Counted:
  """A loader that records the time of each request for a batch, the end of the step before."""

  def __init__(self, loader, steps: int, seconds: float):
    self.loader, self.steps, self.seconds, self.marks = loader, steps, seconds, []

  def __len__(self):
    return len(self.loader)

  def __iter__(self):
    for batch in self.loader:
      self.marks.append(time.perf_counter())
      timed = self.marks[WARMUP:]
      if len(timed) > self.steps or (len(timed) > 3 and timed[-1] - timed[0] > self.seconds):
        raise Enough
      yield batch


def features(args: argparse.Namespace) -> FeatureMap:
  """User and item ids with embeddings; the other columns are only used to find the histories."""
  feature_map = FeatureMap('made', str(args.folder))
  sizes = {'user': args.users + 1, 'item': args.items + 1}
  for name, size in sizes.items():
    feature_map.features[f'{name}_id'] = {
      'type': 'categorical', 'source': name, 'vocab_size': size, 'padding_idx': 0,
    }  # fmt: skip
  for name in ('user_index', 'item_index', 'seq_len'):
    feature_map.features[name] = {'type': 'meta', 'source': ''}
  feature_map.labels, feature_map.default_emb_dim = ['is_click'], args.width
  return feature_map


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--folder', type=Path, required=True)
  for name in ('users', 'items', 'length', 'batch', 'width', 'attention', 'steps'):
    parser.add_argument(f'--{name}', type=int, required=True)
  parser.add_argument('--hidden', type=int, nargs='+', required=True)
  parser.add_argument('--seconds', type=float, required=True)
  args = parser.parse_args()
  files = [str(args.folder / f'{name}.parquet') for name in ('train', 'user_info', 'item_info')]
  feature_map = features(args)
  loader = LongCTRDataLoader(
    feature_map, *files, batch_size=args.batch, shuffle=True, max_len=args.length
  )
  with tempfile.TemporaryDirectory() as folder:
    model = DIN(
      feature_map, embedding_dim=args.width, attention_hidden_units=[args.attention],
      dnn_hidden_units=args.hidden, optimizer='adam', learning_rate=1e-3,
      loss='binary_crossentropy', metrics=['AUC'], verbose=0, model_root=folder,
    )  # fmt: skip
    counted = Counted(loader, args.steps, args.seconds)
    try:
      model.fit(counted)
    except Enough:
      pass
  marks = counted.marks[WARMUP:]
  steps = [(b - a) * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
  speed = args.batch * len(steps) / (marks[-1] - marks[0])
  print(json.dumps({'samples_per_s': speed, 'step_ms': statistics.median(steps)}))


if __name__ == '__main__':
  main()
