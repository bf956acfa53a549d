"""A training step of every model on an accelerator: the step alone, the loop, the bound, compiling.

    python experiments/accelerator.py [--json=PATH]           # under eight minutes on a GPU
    python experiments/accelerator.py --only='click/lmn*,next_item/dman*'
    python experiments/accelerator.py --quick                 # sizes for a CPU

One process measures row after row, the most important first. No row begins after --seconds; what is
left out has a line. It reads generated logs only. Prints a JSON line for the machine and one for
each row, as soon as it is measured, then everything as tables; --json writes the same lines to a
file as it goes. --quick also compiles without most optimizations.

Columns of a row TASK/LABEL/LxBATCH (L events, B examples or lanes of a step):

    device_ms   the compiled steps again and again on inputs that are on the device: of rows with
                host_ms the update of one batch, of others a dispatch as training sends it
    host_ms     a step in the loop of training with config.store_on='host', one step a dispatch;
                reading, placing and checking included
    resident_ms the same with the store on the device
    loop_ms     the same with the defaults of the config; `store` says where the store is, `steps`
                how many steps are in a dispatch
    ratio       loop_ms / device_ms
    per_s       `unit`s a second in the loop; of a memory alone, rows read a second on the device
    bound       what bounds the step: the bytes that the compiled program reads and writes
                (lmn_jax/planning/traffic.py), or XLA's count of its FLOPs, by the copy or matmul
                rate measured at the start of the run, whichever takes longer
    share       the time at that bound / device_ms, see accelerator_steps.share_of_bound
    cold_s      seconds to trace and compile the update
    second_s    the same with in-memory caches cleared, from the persistent compilation cache
    step_mib    arguments, temporaries and results of the update, by the compiler
    peak_mib    the most memory of the device in use so far in this process
    prepare_s   seconds to build the store of the generated log, 0 if another row has built it

and of an export, without training: opens_s, first_s until the first answer, ready_s with all
programs compiled, p50_ms and p99_ms of a request for B candidates after L events. The goals are
printed only for the full sizes.
"""

import argparse
import datetime
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import accelerator_export
import accelerator_rows
import accelerator_steps
import jax
import jaxlib
from accelerator_rows import Row
from accelerator_steps import Rates, Stores, Timing, digits
from step_cost import markdown

from lmn_jax.training.trainer import compile_program

COLUMNS = (
  'device_ms', 'host_ms', 'resident_ms', 'loop_ms', 'store', 'steps', 'ratio', 'per_s', 'unit',
  'bound', 'share', 'cold_s', 'second_s', 'step_mib', 'peak_mib', 'prepare_s',
)  # fmt: skip
EXPORT_COLUMNS = (
  'opens_s', 'first_s', 'ready_s', 'p50_ms', 'p99_ms', 'per_s', 'export_s', 'prepare_s',
)  # fmt: skip


class Lines:
  """Prints records as JSON lines at once, and writes them to a file if there is one."""

  def __init__(self, file: TextIO | None):
    self._file = file

  def write(self, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    if self._file:
      print(line, file=self._file, flush=True)


def commit() -> str | None:
  """The commit of the checkout that this file is in, with '+' if files were changed; or None."""
  here = Path(__file__).parent

  def git(*words):
    done = subprocess.run(['git', '-C', here, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None

  head = git('rev-parse', '--short=7', 'HEAD')
  return head and head + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')


def machine(rates: Rates) -> dict[str, Any]:
  """What the records were measured on."""
  return {
    'card': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'platform': jax.default_backend(),
    'commit': commit(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'python': sys.version.split()[0],
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'copy_gb_per_s': digits(rates.copy / 1e9),
    'tflop_per_s': {name: digits(rate / 1e12) for name, rate in rates.matmul.items()},
  }


def measure(row: Row, timing: Timing, rates: Rates, stores: Stores) -> dict[str, Any]:
  """The record of a row, without its name."""
  if timing.small:
    row = accelerator_rows.quick(row)
  if row.task == 'memory':
    return accelerator_steps.measure_memory(row, timing, rates)
  if row.task == 'export':
    return accelerator_export.measure_export(row, timing, stores)
  return accelerator_steps.measure_training(row, timing, rates, stores)


def measured(
  row: Row, timing: Timing, rates: Rates, stores: Stores, seconds: float
) -> dict[str, Any]:
  """The record of a row; one of a row that fails has `error`, so that the next rows are measured.

  seconds: what is left of the budget.
  """
  names = {'row': row.name, 'task': row.task, 'model': row.model}
  if seconds <= 0:
    return names | {'skipped': 'no time is left; raise --seconds, or choose rows by --only'}
  began = time.perf_counter()
  try:
    record = measure(row, timing, rates, stores)
  except Exception as error:  # of memory, or of a compiler; the run ends with status 1
    traceback.print_exc()
    record = {'error': f'{type(error).__name__}: {error}'.splitlines()[0][:300]}
  # The next row starts with an empty device.
  compile_program.cache_clear()
  jax.clear_caches()
  gc.collect()
  return names | record | {'row_s': round(time.perf_counter() - began, 1)}


def run(args: argparse.Namespace, lines: Lines) -> dict[str, dict]:
  """Measures the chosen rows; their records by name."""
  began = time.perf_counter()
  timing = Timing(args.measurement_seconds, args.quick)
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    with accelerator_steps.compilations_stored(folder / 'compiled', args.quick):
      rates = accelerator_steps.rates(timing)
      lines.write(machine(rates))
      records, stores = {}, Stores(folder / 'stores')
      for row in args.rows:
        left = args.seconds - (time.perf_counter() - began)
        records[row.name] = measured(row, timing, rates, stores, left)
        lines.write(records[row.name])
  lines.write({'seconds': round(time.perf_counter() - began, 1)})
  return records


def report(records: dict[str, dict], args: argparse.Namespace) -> str:
  """The tables of steps, exports and goals, and the rows without a measurement."""

  def table(columns):
    rows = [
      {'row': name} | {column: record.get(column) for column in columns}
      for name, record in records.items()
      if columns[0] in record
    ]
    return markdown(rows)

  parts = [table(COLUMNS), table(EXPORT_COLUMNS)]
  if not args.quick:
    goals = accelerator_rows.goals(records, args.rows)
    parts.append(
      markdown([
        {'goal': goal.text, 'result': goal.found, 'bound': goal.wanted, 'verdict': goal.verdict()}
        for goal in goals
      ])
    )  # fmt: skip
  for what in ('skipped', 'error'):
    lines = [f'{name}: {what}: {x[what]}' for name, x in records.items() if what in x]
    parts.append('\n'.join(lines))
  return '\n\n'.join(part for part in parts if part)


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help="rows, such as 'click/sam*,memory/*'")
  parser.add_argument('--seconds', type=float, default=420.0, help='after which no row begins')
  parser.add_argument('--json', default='', help='where to write the lines as it goes')
  parser.add_argument('--quick', action='store_true', help='sizes for a CPU')
  args = parser.parse_args(arguments)
  args.rows = accelerator_rows.chosen(args.only)
  args.measurement_seconds = 0.1 if args.quick else 1.0
  return args


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  if args.json:
    with Path(args.json).open('w') as file:
      records = run(args, Lines(file))
  else:
    records = run(args, Lines(None))
  print(report(records, args))
  if any('error' in record for record in records.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
