"""The cost of checkpoints during training: steps with a save every --every steps, and without.

    python experiments/save_cost.py [--axis=1024 --every=100 --windows=3 --passes=3]

Trains configs/lmn_douyin.py with a memory of axis^2 slots. A window has --every steps. With saves
it begins with one, which is written during the steps, and the last window ends when all is on disk:
so the delay of the loop, the slower steps and the rest of a write all count. In every pass both
take turns; reported are medians over the passes of seconds a window, the share that saving adds,
the seconds for which `save` delayed the loop, and the bytes of a step.
"""

import argparse
import importlib
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from step_cost import mib, show

from lmn_jax.data.batches import loader
from lmn_jax.data.prepare import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.step_folders import steps_of

ROOT = Path(__file__).resolve().parents[1]


def make_config(args: argparse.Namespace):
  """The config with a number of slots, on a small log."""
  sys.path.append(str(ROOT / 'configs'))
  config = importlib.import_module('lmn_douyin').get_config()
  config.model.slots_per_axis = args.axis
  return config


def measure(root: Path, args: argparse.Namespace) -> list[dict]:
  """A row with saves and one without."""
  config = make_config(args)
  store = prepare(config.data, root / 'stores')
  setup = setups.set_up(config, store)
  state, data = setup.trainer.init(0), loader(setup.sources['train'])
  times: dict[str, list[float]] = {'saving': [], 'plain': []}
  held_up: list[float] = []
  with Checkpoints(root / 'checkpoints') as checkpoints:

    def window(state, save):
      if save:
        began = time.perf_counter()
        checkpoints.save(state, {}, {})
        held_up.append(time.perf_counter() - began)
      pending = None
      for batch in itertools.islice(data, args.every):
        state, metrics = setup.trainer.update(state, meshes.place(setup.mesh, batch))
        if pending is not None:
          jax.block_until_ready(pending)
        pending = metrics
      jax.block_until_ready(pending)
      return state

    state = window(state, True)  # compiles, and creates the folders
    checkpoints.wait()
    held_up.clear()
    for _ in range(args.passes):
      for name, seconds in times.items():
        began = time.perf_counter()
        for _ in range(args.windows):
          state = window(state, name == 'saving')
        checkpoints.wait()
        seconds.append((time.perf_counter() - began) / args.windows)
    last = root / 'checkpoints' / f'step_{steps_of(root / "checkpoints")[-1]}'
    size = sum(x.stat().st_size for x in last.rglob('*') if x.is_file())
  plain = statistics.median(times['plain'])
  rows = []
  for name, seconds in times.items():
    middle = statistics.median(seconds)
    row = {
      'windows': name,
      'slots': args.axis**2,
      'window_s': round(middle, 2),
      'low_s': round(min(seconds), 2),
      'high_s': round(max(seconds), 2),
      'adds_percent': round(100 * (middle / plain - 1), 1),
      'held_up_s': round(statistics.median(held_up), 2) if name == 'saving' else None,
      'step_mib': round(mib(size)),
    }
    rows.append(row)
  return rows


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--axis', type=int, default=1024)
  parser.add_argument('--every', type=int, default=100, help='steps')
  parser.add_argument('--windows', type=int, default=3)
  parser.add_argument('--passes', type=int, default=3)
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as root:
    show(measure(Path(root), args), args)


if __name__ == '__main__':
  main()
