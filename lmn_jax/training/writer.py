"""Writes metrics.jsonl and TensorBoard events, and formats lines of progress.

Only process 0 writes; on the other processes every method does nothing.
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

  A line is {"step": 10, "group": "train", "loss": 0.69, ...}. A resumed run writes the same file as
  an uninterrupted one: lines after the resumed step are removed, and existing lines are not written
  again. Use as a context manager, or call `close`.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    """Opens the files.

    Args:
      workdir: folder of the run; created if it is missing.
      resume_step: updates already done; lines of later steps are removed. None begins a new file.

    Raises:
      UserError: metrics.jsonl has a line that is not a record of metrics.
    """
    self._primary = jax.process_index() == 0
    if not self._primary:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    records = [] if resume_step is None else _records(path, resume_step)
    write_text(path, ''.join(line + '\n' for line, _ in records))
    self._written = {(record['step'], record['group']) for _, record in records}
    self._last: dict[str, int] = {}
    self._lines = path.open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(
      logdir=str(workdir / 'tensorboard'),
      purge_step=resume_step or 0,
      # Two files created in one second would have the same name.
      filename_suffix=f'.{time.time_ns()}',
    )
    # Only some events of the last step may be on disk: they are purged, and written again from its
    # lines.
    for _, record in records:
      if record['step'] == resume_step:
        self._add_scalars(resume_step, record['group'], record)

  def write(self, step: int, values: Mapping[str, Any], group: str = 'train') -> None:
    """Writes one line, flushed, and the numbers among the values as scalars `group/name`.

    Args:
      step: number of updates.
      values: numbers, None, or nested mappings of them (`a: {b: 1}` is the scalar `group/a/b`).
        Numbers that are not finite become the strings 'nan', 'inf', '-inf' in the line.
      group: train, valid, test, ...; a step has one line for each group.

    Raises:
      ValueError: the steps of a group do not ascend.
    """
    if not self._primary or (step, group) in self._written:
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

  def print(self, line: str) -> None:
    """Prints a line to standard error; standard output is for results."""
    if self._primary:
      print(line, file=sys.stderr, flush=True)

  def flush(self) -> None:
    """Syncs all lines to disk. Call it before a checkpoint of the same step."""
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


def print_result(text: str) -> None:
  """Prints a result to standard output, on process 0.

  A closed pipe, such as that of `head`, is not an error.
  """
  if jax.process_index() == 0:
    try:
      print(text, flush=True)
    except BrokenPipeError:
      # Python flushes again when it ends.
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
  """Returns one line on the progress of a run.

  Args:
    step: updates so far.
    steps: updates in all.
    elapsed: seconds since step `start`.
    examples_per_second: recent throughput.
    loss: recent training loss.
    best: name and value of the best validation score, or None.
    rss: bytes of memory (see `peak_rss`), or None.
    start: step at which this process began, above 0 in a resumed run.

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
  """Returns seconds as '42s', '3m12s', '5h07m' or '2d03h'."""
  whole = max(round(seconds), 0)
  for big, small, name_big, name_small in ((86400, 3600, 'd', 'h'), (3600, 60, 'h', 'm')):
    if whole >= big:
      return f'{whole // big}{name_big}{whole % big // small:02d}{name_small}'
  return f'{whole // 60}m{whole % 60:02d}s' if whole >= 60 else f'{whole}s'


def peak_rss() -> int:
  """Returns the peak resident memory of this process, in bytes.

  On Linux, ru_maxrss survives fork and exec, so a small child of a large parent would report its
  parent; VmHWM does not.
  """
  status = Path('/proc/self/status')
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def _records(path, resume_step):
  """Returns (line, record) of the steps up to resume_step, without an unfinished last line."""
  if not path.exists():
    return []
  records = []
  lines = path.read_text(encoding='utf-8').split('\n')
  for number, line in enumerate(lines, 1):
    # The last item is empty, or a line that a killed process did not finish.
    if number == len(lines):
      break
    try:
      record = json.loads(line)
      is_record = isinstance(record['step'], int) and isinstance(record['group'], str)
    except (ValueError, TypeError, KeyError):
      is_record = False
    if not is_record:
      raise UserError(f'{path} line {number} is not a metric; move the file away to continue')
    if record['step'] <= resume_step:
      records.append((line, record))
  return records


def _scalars(values, prefix):
  """Yields (name, float) of the numbers in nested mappings that are `jsonable`."""
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
