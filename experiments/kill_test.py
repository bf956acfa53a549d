"""Kills a training many times and compares its result with an uninterrupted one.

    python experiments/kill_test.py
    python experiments/kill_test.py --model=dman --task=next_item --workers=1 --seed=1

Starts `python -m lmn_jax` on the generated log; kills it, with the processes that read its batches,
--kills times with SIGKILL, ends it --terms times with SIGTERM and --ints times with SIGINT
(Ctrl-C), and then lets it finish. The moments are random: while the store is prepared, before the
first step, in a step, in a save, in a validation, or anywhere. Each time the process must end by
the signal, or with one line and the status of the signal. Then both runs are compared: every number
of the last and the best checkpoint, to the bit, the position in the data, the validations, the
lines of metrics.jsonl, the scalars of TensorBoard, the report except for its times, and that there
are no unfinished files.

Prints the number of interruptions by place, and the differences; exits with status 1 if there are
any.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from lmn_jax.files import flaw
from lmn_jax.training.step_folders import HALF, steps_of

ROOT = Path(__file__).resolve().parents[1]
PHASES = ('start', 'step', 'save', 'validation', 'anywhere')
WAIT_S = 600  # for a process to end on a busy machine
CONFIG = """from lmn_jax.config import base, douyin_data


def get_config():
  config = base({model!r}, {task!r})
  config.data = douyin_data(users=300, items=400, impressions=60)
  if config.task == 'next_item':
    config.data.split.protocol = 'leave_one_out'
    config.data.name = 'next'
  config.data.rows_per_part = 4000
  if {model!r} == 'lmn':
    config.model.slots_per_axis = 64
  config.history_length, config.batch_size, config.eval_batch_size = 20, 64, 256
  config.steps, config.log_every, config.eval_every, config.save_every = {steps}, 7, 50, 20
  config.optimizer.schedule, config.optimizer.warmup_steps = 'cosine', 10
  config.loader_workers = {workers}
  return config
"""
TIMES = ('train_seconds', 'peak_rss', 'commit', 'seconds')


class Run:
  """The processes of a training, one after the other, in one folder."""

  def __init__(self, folder: Path, config: Path):
    self.workdir, self.stores = folder / 'run', folder / 'stores'
    self.output = folder / 'output'
    folder.mkdir()
    self.first_step_s = 8.0  # seconds from the start of the process to its first line of a step
    self._command = [
      sys.executable, '-m', 'lmn_jax', f'--config={config}', f'--workdir={self.workdir}',
      f'--stores={self.stores}',
    ]  # fmt: skip

  def begin(self) -> subprocess.Popen:
    """Starts a process in a new process group."""
    environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
    # Background processes of a shell ignore SIGINT, and so do their children. (`preexec_fn`
    # would fork, and JAX warns of forks in a process that has used it.)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
      with self.output.open('w') as file:
        return subprocess.Popen(
          self._command, cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True
        )
    finally:
      signal.signal(signal.SIGINT, before)

  def to_the_end(self) -> float:
    """Runs without interruption; returns the seconds.

    Raises:
      RuntimeError: it failed.
    """
    began, stepped = time.monotonic(), None
    process = self.begin()
    while process.poll() is None:
      if stepped is None and self.step():
        stepped = time.monotonic() - began
      time.sleep(0.02)
    if process.returncode:
      raise RuntimeError(f'the training failed: {self.output.read_text()[-2000:]}')
    self.first_step_s = stepped or self.first_step_s
    return time.monotonic() - began

  def step(self) -> int:
    """The last step in the output of the process; 0 before the first."""
    steps = re.findall(r'^step (\d+)/', self.output.read_text(), re.MULTILINE)
    return int(steps[-1]) if steps else 0

  def is_saving(self) -> bool:
    """Whether there is an unfinished checkpoint."""
    return any((self.workdir / 'checkpoints').glob(HALF))

  def is_validating(self) -> bool:
    """Whether the output has a step that is validated, and not yet its validation."""
    lines = [x for x in self.output.read_text().splitlines() if x.startswith(('step ', 'valid '))]
    last = re.match(r'step (\d+)/', lines[-1]) if lines else None
    return last is not None and int(last[1]) % 50 == 0

  def is_preparing(self) -> bool:
    """Whether a store is being built."""
    return any(self.stores.glob('.*.building'))


def ended_well(status: int, number: int, output: str) -> bool:
  """Whether a process ended correctly after a signal: by the signal, or with one line about it."""
  if 'Traceback' in output or 'Fatal Python error' in output:
    return False
  last = output.splitlines()[-1] if output else ''
  return (
    status == -number  # at once: SIGKILL, or before the program handles signals
    or (number == signal.SIGTERM and status == 0 and last.startswith('ended by SIGTERM: '))
    or (number == signal.SIGTERM and status == 143 and last.startswith('error: ended by SIGTERM; '))
    or (number == signal.SIGINT and status == 130 and last.startswith('error: interrupted'))
  )


def interrupt(run: Run, phase: str, number: int, life: int, rng: random.Random) -> str:
  """Starts the training and sends it a signal in a phase.

  Args:
    run: to start. phase: of the signal. number: of the signal. life: largest number of steps before
      it. rng: of the moment.

  Returns:
    '' if the signal ended it, 'too late' if it had finished before.

  Raises:
    RuntimeError: it ended with another status or output.
  """
  process = run.begin()
  is_there = {
    'prepare': run.is_preparing, 'save': run.is_saving, 'validation': run.is_validating,
  }.get(phase)  # fmt: skip
  longest = {'anywhere': run.first_step_s, 'start': run.first_step_s, 'prepare': 0.1, 'save': 0.02}
  delay = rng.uniform(0, longest.get(phase, 0.1))
  began = None
  while process.poll() is None:
    if phase in ('anywhere', 'start', 'prepare'):
      reached = True
    else:
      began = run.step() if not began else began
      reached = bool(began) and run.step() >= began + life
    if reached and (is_there is None or is_there()):
      until = time.monotonic() + delay
      while time.monotonic() < until and not (phase == 'start' and run.step()):
        time.sleep(min(0.01, delay))
      break
    time.sleep(0.002)
  if process.poll() is None:
    os.killpg(process.pid, number)
  status, output = process.wait(WAIT_S), run.output.read_text()
  if ended_well(status, number, output):
    return ''
  if status == 0:
    return 'too late'
  raise RuntimeError(f'status {status} after signal {number}: {output[-2000:]}')


def events_of(workdir: Path) -> Iterator[event_pb2.Event]:
  """The events of TensorBoard of a run, file by file; a file can end with an incomplete record.

  A record is: length u64, crc u32, data, crc u32.
  """
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
      size = int.from_bytes(data[at : at + 8], 'little')
      body, crc = data[at + 12 : at + 12 + size], data[at + 12 + size : at + 16 + size]
      if len(crc) < 4 or masked_crc32c(body) != int.from_bytes(crc, 'little'):
        break
      yield event_pb2.Event.FromString(body)
      at += 16 + size


def scalars_of(workdir: Path) -> dict[str, list[tuple[int, float]]]:
  """(step, value) by tag, as TensorBoard shows them: a new session hides steps not before it."""
  scalars: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
  for event in events_of(workdir):
    if event.HasField('session_log'):
      for tag in scalars:
        scalars[tag] = [x for x in scalars[tag] if x[0] < event.step]
    for value in event.summary.value:
      scalars[value.tag].append((event.step, value.simple_value))
  return dict(scalars)


def without_times(value: Any) -> Any:
  """JSON without the times, which differ between any two runs."""
  if not isinstance(value, dict):
    return value
  return {name: without_times(x) for name, x in value.items() if name not in TIMES}


def left_by(run: Run) -> dict[str, Any]:
  """All results of a finished run, by name."""
  folder = run.workdir / 'checkpoints'
  contents: dict[str, Any] = {
    'metrics.jsonl': (run.workdir / 'metrics.jsonl').read_text(),
    'TensorBoard': scalars_of(run.workdir),
    'report.json': without_times(json.loads((run.workdir / 'report.json').read_text())),
    'validations.json': json.loads((folder / 'validations.json').read_text()),
    'steps': steps_of(folder),
    'half-written': sorted(
      path.name
      for place in (run.workdir, folder, run.stores)
      for path in place.iterdir()
      if path.name.endswith('.tmp') or path.match(HALF) or path.match('.*.building')
    ),
  }
  with ocp.StandardCheckpointer() as reader:
    for step in steps_of(folder):
      step_folder = folder / f'step_{step}'
      contents[f'seal of step {step}'] = flaw(step_folder)
      contents[f'state of step {step}'] = reader.restore((step_folder / 'state').absolute())
      for name in ('loop', 'config'):
        # Orbax writes JSON to a file `metadata`; a .txt marks it as complete.
        files = sorted(x for x in (step_folder / name).iterdir() if x.suffix != '.txt')
        contents[f'{name} of step {step}'] = [
          without_times(json.loads(x.read_text())) for x in files
        ]
  return contents


def differences(contents: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  """Names of the results that are not equal to the bit."""

  def alike(x, y):
    if isinstance(x, dict) and isinstance(y, dict):
      return x.keys() == y.keys() and all(alike(x[name], y[name]) for name in x)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
      return len(x) == len(y) and all(map(alike, x, y))
    if hasattr(x, 'dtype') or hasattr(y, 'dtype'):
      x, y = np.asarray(x), np.asarray(y)
      return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return x == y or (x != x and y != y)  # nan

  names = sorted(contents.keys() | expected.keys())
  return [
    x
    for x in names
    if x not in contents or x not in expected or not alike(contents[x], expected[x])
  ]


def plan(kills: int, terms: int, ints: int, rng: random.Random) -> list[tuple[str, int]]:
  """(phase, signal) of the interruptions: first those in the preparation of the store."""
  numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms + [signal.SIGINT] * ints
  rng.shuffle(numbers)
  # A store is prepared once: one signal of each kind interrupts it.
  first = [x for x in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL) if x in numbers]
  for number in first:
    numbers.remove(number)
  numbers = first + numbers
  early = len(first)
  later = [PHASES[k % len(PHASES)] for k in range(len(numbers) - early)]
  rng.shuffle(later)
  return list(zip(['prepare'] * early + later, numbers, strict=True))


def torture(args: argparse.Namespace, root: Path) -> list[str]:
  """Runs both trainings; returns their differences."""
  config = root / 'killed.py'
  sizes = dict(steps=args.steps, workers=args.workers)
  config.write_text(CONFIG.format(model=args.model, task=args.task, **sizes))
  whole, cut = Run(root / 'whole', config), Run(root / 'cut', config)
  print(f'uninterrupted: {whole.to_the_end():.0f} s', flush=True)
  rng = random.Random(args.seed)
  counts: collections.Counter[str] = collections.Counter()
  cut.first_step_s = whole.first_step_s
  interruptions = plan(args.kills, args.terms, args.ints, rng)
  # So that the training is long enough for the last interruptions.
  life = max(args.steps // (len(interruptions) + 4) - 20, 0)
  began = time.monotonic()
  for phase, number in interruptions:
    late = interrupt(cut, phase, number, rng.randint(0, life), rng)
    name = signal.Signals(number).name
    counts[f'{name} in {phase}{": " if late else ""}{late}'] += 1
    print(f'{name} in {phase}: step {cut.step()} {late}', flush=True)
  cut.to_the_end()
  seconds = time.monotonic() - began
  for name, count in sorted(counts.items()):
    print(f'{count:3d} {name}')
  print(f'interrupted {len(interruptions)} times: {seconds:.0f} s')
  return differences(left_by(cut), left_by(whole))


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=25)
  parser.add_argument('--terms', type=int, default=5)
  parser.add_argument('--ints', type=int, default=5)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--model', default='lmn')
  parser.add_argument('--task', default='click', choices=('click', 'next_item'))
  parser.add_argument('--workers', type=int, default=0, help='processes that read batches')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  args = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as root:
    differing = torture(args, Path(root))
  print(f'differs: {", ".join(differing)}' if differing else 'all equal, to the bit')
  sys.exit(bool(differing))


if __name__ == '__main__':
  main()
