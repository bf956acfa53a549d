"""What a run leaves behind: metrics.jsonl, TensorBoard events, reports, and a line of progress.

Only process 0 writes; on the others every method does nothing.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX

from lmn_jax.errors import UserError
from lmn_jax.files import jsonable, write_text

Real = int | float | np.number


class Writer:
  """Appends scalars to `workdir/metrics.jsonl` and to event files in `workdir/tensorboard`.

  A line is {"step": 10, "group": "train", "loss": 0.69, ...}. A resumed run leaves the file as an
  unbroken run would have: lines after the resumed step are cut away, and what is already there is
  not written again. Use as a context manager, or call `close`.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    """Opens the files.

    Args:
      workdir: folder of the run; made if it is missing.
      resume_step: steps already done; lines of later steps are cut. None begins a new file.

    Raises:
      UserError: if metrics.jsonl holds a line that is no metric.
    """
    self._primary = jax.process_index() == 0
    if not self._primary:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    kept = [] if resume_step is None else _kept_lines(path, resume_step)
    write_text(path, ''.join(line + '\n' for line, _ in kept))
    self._kept = {(record['step'], record['group']) for _, record in kept}
    self._last: dict[str, int] = {}
    self._lines = path.open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(
      logdir=str(workdir / 'tensorboard'),
      purge_step=resume_step or 0,
      # Two files begun in one second would have one name, and the second would replace the first.
      filename_suffix=f'.{time.time_ns()}',
    )
    # Which events of the last step came to the disk is not known: they are purged, and made anew of
    # its lines.
    for _, record in kept:
      if record['step'] == resume_step:
        self._add_scalars(resume_step, record['group'], record)

  def write(self, step: int, values: Mapping[str, Any], group: str = 'train') -> None:
    """Writes one line, flushed, and the numbers among the values as scalars `group/name`.

    Args:
      step: updates done.
      values: numbers, None, or nested mappings of them (`a: {b: 1}` is the scalar `group/a/b`).
        Numbers that are not finite are the strings 'nan', 'inf', '-inf' in the line.
      group: train, valid, test, ...; a step has one line a group.

    Raises:
      ValueError: if the group's steps do not ascend.
    """
    if not self._primary or (step, group) in self._kept:
      return
    if step <= self._last.get(group, -1):
      raise ValueError(f'{group} step {step} after step {self._last[group]}; steps must ascend')
    self._last[group] = step
    record = {'step': step, 'group': group} | jsonable(values)
    self._lines.write(json.dumps(record, allow_nan=False) + '\n')
    self._lines.flush()
    self._add_scalars(step, group, record)

  def _add_scalars(self, step, group, record):
    values = {name: x for name, x in record.items() if name not in ('step', 'group')}
    for name, value in _scalars(values, group):
      self._events.add_scalar(name, value, step)

  def say(self, line: str) -> None:
    """Prints a line to standard error; standard output is left to the results."""
    if self._primary:
      print(line, file=sys.stderr, flush=True)

  def flush(self) -> None:
    """Puts all that was written on disk: call it before a checkpoint of the same step."""
    if self._primary:
      self._lines.flush()
      os.fsync(self._lines.fileno())
      self._events.flush()

  def close(self) -> None:
    """Closes the files; closing twice is allowed."""
    if self._primary:
      self._lines.close()
      self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def show(text: str) -> None:
  """Prints a result to standard output; does nothing but on process 0.

  A reader that has left, as `head` does when it has had enough, is no error.
  """
  if jax.process_index() == 0:
    try:
      print(text, flush=True)
    except BrokenPipeError:
      # Python flushes once more when it ends.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(
  step: int,
  steps: int,
  elapsed: Real,
  examples_per_second: Real,
  loss: Real,
  best: tuple[str, Real] | None = None,
  rss: int | None = None,
  start: int = 0,
) -> str:
  """One line on where the run stands.

  Args:
    step: updates done.
    steps: updates in all.
    elapsed: seconds since step `start`.
    examples_per_second: recent throughput.
    loss: recent training loss.
    best: name and value of the best validation score, if there is one.
    rss: bytes of memory, if known (see `peak_rss`).
    start: the step at which this process began (a resumed run).

  Returns:
    'step 1200/5000 24% · eta 3m12s · 51.2k ex/s · loss 0.4312 · auc 0.7312 · 1.2 GiB'.
  """
  parts = [f'step {step}/{steps} {100 * step // max(steps, 1)}%']
  if step > start:
    parts.append(f'eta {duration(elapsed / (step - start) * (steps - step))}')
  parts += [f'{_short(examples_per_second)} ex/s', f'loss {loss:.4f}']
  if best is not None:
    parts.append(f'{best[0]} {best[1]:.4f}')
  if rss is not None:
    parts.append(f'{rss / 2**30:.1f} GiB')
  return ' · '.join(parts)


def duration(seconds: Real) -> str:
  """Seconds as '42s', '3m12s', '5h07m' or '2d03h'."""
  whole = max(round(seconds), 0)
  for big, small, name_big, name_small in ((86400, 3600, 'd', 'h'), (3600, 60, 'h', 'm')):
    if whole >= big:
      return f'{whole // big}{name_big}{whole % big // small:02d}{name_small}'
  return f'{whole // 60}m{whole % 60:02d}s' if whole >= 60 else f'{whole}s'


def peak_rss() -> int:
  """The most memory this process ever held, in bytes.

  Linux's ru_maxrss survives fork and exec, so a small child of a large parent would report the
  parent; VmHWM is the process's own.
  """
  status = Path('/proc/self/status')
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def _kept_lines(path, resume_step):
  """(line, record) of the steps up to resume_step; a torn last line is dropped."""
  if not path.exists():
    return []
  kept = []
  lines = path.read_text(encoding='utf-8').split('\n')
  for number, line in enumerate(lines, 1):
    # The last piece is empty, or a line that a killed process did not finish.
    if number == len(lines):
      break
    try:
      record = json.loads(line)
      known = isinstance(record['step'], int) and isinstance(record['group'], str)
    except (ValueError, TypeError, KeyError):
      known = False
    if not known:
      raise UserError(f'{path} line {number} is not a metric; move the file away to go on')
    if record['step'] <= resume_step:
      kept.append((line, record))
  return kept


def _scalars(values, prefix):
  """(name, float) of the numbers in nested mappings that are `jsonable`."""
  for key, value in values.items():
    name = f'{prefix}/{key}'
    if isinstance(value, Mapping):
      yield from _scalars(value, name)
    elif isinstance(value, int | float) or value in ('nan', 'inf', '-inf'):
      yield name, float(value)


def _short(number):
  for bound, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= bound:
      return f'{number / bound:.1f}{suffix}'
  return f'{number:.0f}'
