"""Trains at full speed for some time, with saves and validations, and reports the memory over time.

    python experiments/soak.py [--minutes=20] [--config=FILE] [--config.FIELD=VALUE]

Starts `python -m lmn_jax` with a very large number of steps, a save every 100 steps and a
validation every 200, and samples every five seconds the resident memory, open files and threads of
the process and its children. Then it ends the training by SIGTERM. The slope is that of least
squares over the samples after the first quarter. Exits with status 1 if the training does not end
correctly.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from step_cost import show

ROOT = Path(__file__).resolve().parents[1]
QUANTITIES = ('rss_mib', 'files', 'threads')


def family(pid: int) -> list[int]:
  """The ids of a process and of all processes below it."""
  pids = [pid]
  for path in Path(f'/proc/{pid}/task').glob('*/children'):
    for child in path.read_text().split():
      pids += family(int(child))
  return pids


def look(pid: int) -> tuple[float, ...]:
  """QUANTITIES of a process and of all processes below it."""
  sums = np.zeros(len(QUANTITIES))
  for member in family(pid):
    folder = Path(f'/proc/{member}')
    status = dict(re.findall(r'^(\w+):\s+(\d+)', (folder / 'status').read_text(), re.MULTILINE))
    sums += (
      int(status['VmRSS']) / 1024,
      len(list((folder / 'fd').iterdir())),
      int(status['Threads']),
    )
  return tuple(sums)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--minutes', type=float, default=20.0)
  parser.add_argument('--config', default=str(ROOT / 'configs' / 'lmn_douyin.py'))
  parser.add_argument('--json', default='', help='where to write all of it, with the samples')
  args, rest = parser.parse_known_args(arguments)
  with tempfile.TemporaryDirectory() as root:
    command = [
      sys.executable, '-m', 'lmn_jax', f'--config={args.config}', f'--workdir={root}/run',
      '--config.steps=2000000000', '--config.save_every=100', '--config.eval_every=200', *rest,
    ]  # fmt: skip
    output = Path(root, 'output')
    with output.open('w') as file:
      process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    began, samples = time.monotonic(), []
    while process.poll() is None and time.monotonic() - began < 60 * args.minutes:
      time.sleep(5)
      if '\nstep ' in output.read_text() and process.poll() is None:
        samples.append((time.monotonic() - began, *look(process.pid)))
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    lines = output.read_text().splitlines()
    steps = [int(x[1]) for x in (re.match(r'step (\d+)/', line) for line in lines) if x]
    table = np.array(samples)[len(samples) // 4 :]
    rows = []
    for k, name in enumerate(QUANTITIES, 1):
      slope = np.polyfit(table[:, 0] / 3600, table[:, k], 1)[0]
      rows.append(
        {
          'quantity': name,
          'first': round(table[0, k], 1),
          'last': round(table[-1, k], 1),
          'most': round(table[:, k].max(), 1),
          'slope_per_hour': round(slope, 1),
        }
      )
    show(rows, args)
    print(
      f'{args.minutes:g} minutes, {steps[-1]} steps, {len(samples)} samples, status {status}: '
      f'{lines[-1]}'
    )
    if args.json:
      report = json.loads(Path(args.json).read_text())
      Path(args.json).write_text(json.dumps({'table': report, 'samples': samples}))
    sys.exit(bool(status))


if __name__ == '__main__':
  main()
