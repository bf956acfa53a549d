"""Kernels beside XLA: the weighted read, its gradients, a step of a memory, and a pass of SAM.

    python experiments/kernels.py [--json=PATH] [--only=read,weights,rows,step,sam] [--sweep]

Contestants are in kernel_cases.py, kernels in kernel_reads.py and kernel_sam.py. Tasks:

    read     out_t = sum_k w_tk row[id_tk]; `xla fill B`, `xla clip B`: B rows of a read at a time
    weights  d w_tk = row[id_tk] . g_t
    rows     d row_i = sum w_tk g_t, one sum for each distinct row
    step     all three, and Adam on the rows; `xla`: the forms of fewest launches
    sam      the gradient of three passes over L events

First a small case of each task compares every contestant with the library: `difference`, relative
to the largest number. Then all contestants of a case take turns. A call is a loop of `--steps`
steps over as many batches on the device; `ms` is the median time of a step over the calls, with the
lowest and the highest. `gb_per_s` is the least traffic of a step by its time, and `share` that by
the rate at which the device copies an array, read and write. JSON lines are written as they come;
after `--seconds` the other cases are reported as skipped. The program ends with status 1 if a
difference exceeds TOLERANCE or a contestant does not compile, which its line says. Kernels need a
GPU: elsewhere sizes are small and Pallas interprets the kernels, which shows that they run and
measures nothing.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernel_cases
import kernel_reads
import kernel_sam
import numpy as np
from kernel_cases import Blocks, Case, History, Options, Reading
from step_cost import names

from lmn_jax.tables.table import RowGrads

TASKS = {
  'step': kernel_cases.step_case,
  'read': kernel_cases.read_case,
  'weights': kernel_cases.weights_case,
  'rows': kernel_cases.rows_case,
  'sam': kernel_cases.sam_case,
}
# A GPU rounds the factors of float32 products to 10 bits, and bfloat16 has 8; a step of Adam
# divides a gradient by its own size.
TOLERANCE = {'read': 1e-4, 'weights': 2e-3, 'rows': 1e-4, 'step': 3e-3, 'sam': 5e-2}

# The first case of each task comes first, so that a cut run has measured all tasks.
READINGS = [
  Reading(2**14, 32, 64, 2**24),
  Reading(2**14, 32, 64, 2**20, power=4),
  Reading(2**9, 32, 64, 2**24),
  Reading(2**14, 32, 128, 2**24),
  Reading(2**14, 32, 64, 2**24, 'bfloat16'),
  Reading(2**9, 32, 128, 2**20),
]
HISTORIES = [
  History(2048, 1000, 32, 16),
  History(2048, 1000, 32, 16, 'bfloat16'),
  History(256, 1000, 32, 16),
]
# Sums of many entries, and blocks that the sizes do not fill.
CHECKED = Reading(1000, 32, 64, 2**14, power=4), History(5, 300, 32, 16)
# Without a GPU.
SMALL = Reading(9, 8, 16, 512, power=4), History(3, 40, 16, 4)
# The copied array: well above the caches of the device.
COPIED = {'gpu': 2**28, 'cpu': 2**20}


VARIANTS = 2  # cases of a task with all forms in XLA; the others have the best of them


class Writer(NamedTuple):
  """Prints JSON lines, and appends them to a file if there is a path."""

  path: str

  def write(self, **line: Any) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if self.path:
      with Path(self.path).open('a') as file:
        file.write(text + '\n')


def cases(args: argparse.Namespace) -> list[Case]:
  """The cases to measure, those of all tasks in turns."""
  readings, histories = READINGS, HISTORIES
  if args.interpret:
    readings, histories = ([sizes] for sizes in SMALL)
  made = []
  for i in range(max(len(readings), len(histories))):
    for task in args.only:
      sizes = histories if task == 'sam' else readings
      if i < len(sizes) and has(task, sizes[i].dtype):
        options = args.options._replace(variants=i < VARIANTS, sweep=args.sweep and i == 0)
        made.append(TASKS[task](sizes[i], options))
  return made


def has(task: str, dtype: str) -> bool:
  """Whether a task has a case of a dtype; gradients of rows, and so their updates, are float32."""
  return dtype == 'float32' or task not in ('rows', 'step')


def checks(args: argparse.Namespace) -> list[Case]:
  """The small cases of each task."""
  reading, history = SMALL if args.interpret else CHECKED
  return [
    TASKS[task]((history if task == 'sam' else reading)._replace(dtype=dtype), args.options)
    for task in args.only
    for dtype in ('float32', 'bfloat16')
    if has(task, dtype)
  ]


class Compiled(NamedTuple):
  """program: None if the compiler refused it. seconds: of compiling. error: its message, or ''."""

  program: jax.stages.Compiled | None
  seconds: float
  error: str


def compiled(functions: dict[str, Any], *arguments: Any) -> dict[str, Compiled]:
  """Compiles jitted functions at once, in threads. A refused one does not end the others."""

  def compile_one(function):
    began = time.perf_counter()
    try:
      program, error = function.lower(*arguments).compile(), ''
    except Exception as refusal:  # compilers raise any exception; it becomes a line of the result
      program, error = None, f'{type(refusal).__name__}: {str(refusal)[:300]}'
    return Compiled(program, time.perf_counter() - began, error)

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(functions, pool.map(compile_one, functions.values()), strict=True))


def check(case: Case, writer: Writer) -> bool:
  """Compares one step of all contestants with the library; whether all agree."""
  constant, batches = case.make(1)
  batch = jax.tree.map(lambda x: x[0], batches)
  expected, agreed = None, True
  jitted = {name: jax.jit(function) for name, function in case.contestants.items()}
  for name, (program, _, error) in compiled(jitted, constant, batch).items():
    line = {'check': case.task, 'dtype': case.sizes.dtype, 'who': name}
    if error:
      writer.write(**line, agrees=False, error=error)
      agreed = False
      continue
    result = comparable(case, program(constant, batch))
    expected = result if expected is None else expected
    apart = max(map(relative, jax.tree.leaves(result), jax.tree.leaves(expected)))
    agrees = apart <= TOLERANCE[case.task]
    writer.write(**line, agrees=agrees, difference=apart)
    agreed &= agrees
  return agreed


def comparable(case: Case, result: Any) -> Any:
  """Summed gradients as an array of all rows: contestants order them differently."""
  if not isinstance(result, RowGrads):
    return result
  zeros_RD = jnp.zeros((case.sizes.R, case.sizes.D))
  return zeros_RD.at[result.ids_N].add(result.grads_ND, mode='drop')


def relative(x: jax.Array, y: jax.Array) -> float:
  """The largest difference, relative to the largest number of y; infinite if not finite."""
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  if not np.all(np.isfinite(x)):
    return math.inf
  return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))


def looped(case: Case, name: str):
  """A function of (constant, stacked batches): a contestant for one batch after the other.

  Returns the state, or a number that depends on every result.
  """
  function = case.contestants[name]

  def step(constant, batch):
    return function(constant, batch), None

  def run(constant, batches):
    if case.stateful:
      return jax.lax.scan(step, constant, batches)[0]

    def add(total, batch):
      # The barrier keeps XLA from computing no more than the numbers that are added.
      results = jax.tree.leaves(jax.lax.optimization_barrier(function(constant, batch)))
      return total + sum(x[(0,) * x.ndim].astype(jnp.float32) for x in results), None

    return jax.lax.scan(add, jnp.float32(0), batches)[0]

  return jax.jit(run, donate_argnums=0 if case.stateful else ())


def measure(case: Case, args: argparse.Namespace, copy_gb_per_s: float, writer: Writer) -> bool:
  """Times the contestants of a case in turns, and writes a line for each; whether all compiled."""
  constant, batches = case.make(args.steps)
  tried = compiled({name: looped(case, name) for name in case.contestants}, constant, batches)
  programs = {name: x.program for name, x in tried.items() if x.program}
  times = {name: [] for name in programs}
  for _ in range(args.passes + 1):
    for name, program in programs.items():
      began = time.perf_counter()
      result = jax.block_until_ready(program(constant, batches))
      times[name].append((time.perf_counter() - began) * 1e3 / args.steps)
      constant = result if case.stateful else constant
  for name, (_, seconds, error) in tried.items():
    line = {'task': case.task, **case.sizes._asdict(), 'who': name, 'blocks': case.blocks.get(name)}
    line |= {'error': error} if error else timed(case, times[name][1:], copy_gb_per_s)
    writer.write(**line, compile_s=round(seconds, 2))
  return len(programs) == len(tried)


def timed(case: Case, times: list[float], copy_gb_per_s: float) -> dict[str, float]:
  """The columns of a contestant, from its milliseconds a step in each pass."""
  ms = statistics.median(times)
  rate = case.bytes / ms / 1e6
  return {
    'ms': round(ms, 4),
    'ms_low': round(min(times), 4),
    'ms_high': round(max(times), 4),
    f'{case.counted}_per_s': round(case.count / ms * 1e3),
    'gb_per_s': round(rate, 1),
    'share': round(rate / copy_gb_per_s, 3),
  }


def copy_rate(platform: str, passes: int) -> float:
  """GB/s of `x + 1` on a large array: bytes read and written by the median time."""
  size = COPIED.get(platform, COPIED['cpu'])
  x, times = jnp.zeros(size), []
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  for _ in range(passes + 1):
    began = time.perf_counter()
    x = jax.block_until_ready(add(x))
    times.append(time.perf_counter() - began)
  return 2 * 4 * size / statistics.median(times[1:]) / 1e9


def block_sizes(kind: type):
  """The type of a flag: the fields of a NamedTuple with commas; fields left out have defaults."""

  def read(text):
    numbers = [int(x) for x in text.split(',')]
    fields = kind._fields
    if len(numbers) > len(fields) or min(numbers) < 0:
      raise argparse.ArgumentTypeError(f'{text}: give up to {len(fields)} of {", ".join(fields)}')
    return kind(*numbers)

  return read


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', type=names(tuple(TASKS)), default=list(TASKS))
  parser.add_argument('--sweep', action='store_true', help='more sizes of blocks, largest cases')
  parser.add_argument('--steps', type=int, default=8, help='of a call')
  parser.add_argument('--passes', type=int, default=7, help='calls of each contestant')
  parser.add_argument('--seconds', type=float, default=210, help='no case begins after them')
  parser.add_argument('--json', default='', help='append the lines to this file')
  for name, kind in (
    ('read', kernel_reads.ReadBlocks),
    ('segment', kernel_reads.SegmentBlocks),
    ('atomic', kernel_reads.AtomicBlocks),
    ('sam', kernel_sam.PassBlocks),
  ):
    help_text = f'sizes of a kernel: {",".join(kind._fields)}'
    parser.add_argument(f'--{name}-blocks', type=block_sizes(kind), default=kind(), help=help_text)
  args = parser.parse_args(arguments)
  args.interpret = jax.default_backend() != 'gpu'
  blocks = args.read_blocks, args.segment_blocks, args.atomic_blocks, args.sam_blocks
  args.options = Options(Blocks(*blocks), args.interpret)
  return args


def main(arguments: list[str] | None = None) -> None:
  began, args = time.monotonic(), parse(arguments)
  device, writer = jax.devices()[0], Writer(args.json)
  copy_gb_per_s = copy_rate(device.platform, args.passes)
  writer.write(
    device=device.device_kind,
    jax=jax.__version__,
    python=sys.version.split()[0],
    copy_gb_per_s=round(copy_gb_per_s, 1),
    interpreted=args.interpret,
  )
  if args.interpret:
    note = 'no GPU: kernels are interpreted, which is no measure of them'
    print(f'kernels.py: {note}', file=sys.stderr)
  succeeded = True
  for case in checks(args):
    succeeded &= check(case, writer)
  for case in cases(args):
    if time.monotonic() - began > args.seconds:
      writer.write(task=case.task, **case.sizes._asdict(), skipped=f'after {args.seconds} s')
    else:
      succeeded &= measure(case, args, copy_gb_per_s, writer)
  writer.write(seconds=round(time.monotonic() - began, 1))
  if not succeeded:
    sys.exit('kernels.py: a contestant disagrees with the library or did not compile: see its line')


if __name__ == '__main__':
  main()
