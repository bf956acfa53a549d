"""The gain and the cost of longer histories: models at several lengths, in AUC, time and memory.

    python experiments/length_sweep.py --config=configs/lmn_movielens.py --models=pooling,din,sam
    python experiments/length_sweep.py --models=configs/douyin.py:sam,configs/douyin.py:din \\
        --lengths=50,100,200,500,1000,10000 --max-length=douyin:din:1000 --cost-only

Every entry of --models, as in compare.py, has each history_length L of --lengths.
`--config.FIELD=VALUE` changes a field of every entry. First the costs, in --passes turns over all
models and lengths: one process each, which holds the training step, its state and two batches with
full histories (L random items: the cost of a step depends on L and not on the histories of the
log), with the allocator settings of launch.sh. Pass k has seed k. Then, unless --cost-only, the
trainings, seed by seed, one process each: the runs of compare.py, entries like
'sam[history_length=100]'. The same command continues: finished results of the same config and data
in --workdir are reused.

The table and the text below it name what is left out: lengths above --max-length of their model; a
process that ran out of memory, of the device, of --memory=GIB, or of the machine; a training whose
steps would take more than --minutes; a training that diverged, a process that failed. The others
continue.

Columns: test AUC and gAUC, mean ± standard deviation over the seeds; ms of a training step, median
(lowest to highest) over the passes of their median step; the best step of all passes; the
examples/s of the median, without reading batches and validation; the largest peak of memory, of the
device if it has memory of its own, else of the process; and the temporaries of the step reported by
the compiler. Python, JAX and compiling take hundreds of MiB of a process: the temporaries are the
part that grows with L.

Below it, for each model measured at three or more lengths, least squares over its best steps, which
depend least on other processes: ms = fixed + slope L with its R^2, the exponent p of ms = c L^p,
and that between the two largest lengths, where the fixed part has the least weight. Linear is 1.

Writes WORKDIR/length_sweep.json with all sources, WORKDIR/length_sweep.png (needs matplotlib), and
appends the tables to experiments/LOG.md.
"""

import argparse
import json
import re
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import compare
import jax
import ml_collections
import numpy as np
import step_cost
from memory_scaling import plotting

from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation import click_evaluation, report
from lmn_jax.files import jsonable, write_json
from lmn_jax.training import loop
from lmn_jax.training import setup as setups

BATCHES = 2  # batches that a measured step uses in turns
PICTURE = 'length_sweep.png'
# Messages of a process without enough memory: XLA, Python and numpy, C++, the C library.
OUT_OF_MEMORY = re.compile(
  'RESOURCE_EXHAUSTED|[Oo]ut of memory|MemoryError|bad_alloc|Cannot allocate memory'
)
COSTS = ('ms', 'ms_best', 'examples_per_s', 'peak_mib', 'temporaries_mib')
MARKS = 'osD^vP*X<>'


class Point(NamedTuple):
  """A model at a length. model: its label in the table. text: of --models. entry: of compare.py."""

  model: str
  length: int
  text: str
  entry: compare.Entry


def points_of(config: str, models: str, lengths: list[int], changes: list[str]) -> list[Point]:
  """All points, length by length.

  Args:
    config: of --config. models: of --models. changes: '--config.FIELD=VALUE', for every entry.
  """
  points = []
  for L in lengths:
    for name, changed in compare.split_entries(models):
      longer = [*changed, f'history_length={L}']
      entry = compare.read_entry(config, name, longer, changes)
      text = f'{name}[{",".join(longer)}]'
      points.append(Point(compare.label_of(name, changed), L, text, entry))
  return points


def bounds_of(text: str, models: Iterable[str]) -> dict[str, int]:
  """'bst:1000,lmn[a=1]:500' -> {'bst': 1000, 'lmn[a=1]': 500}.

  Raises:
    UserError: for anything else, or an unknown label.
  """
  bounds = {}
  for piece in compare.pieces_of(text):
    model, _, bound = piece.rpartition(':')
    if not model or not bound.isdecimal():
      raise UserError(f'--max-length: {piece!r} is not MODEL:LENGTH, such as bst:1000')
    bounds[one_of('--max-length', model, models)] = int(bound)
  return bounds


def fill(batch: dict[str, np.ndarray], store: Store, rng: np.random.Generator) -> dict:
  """A batch of `batches.py` with full histories: items at random, and their features."""
  V, (B, L) = store.vocabulary['item'], batch['history'].shape
  history_BL = rng.integers(0, V, (B, L), np.int32)
  features = {
    f'history.{name.removeprefix("item.")}': codes.take(history_BL, axis=0)
    for name, codes in store.items.items()
  }
  full_B = np.full(B, L, np.int32)
  return batch | features | {'history': history_BL, 'length': full_B, 'total': full_B}


def measure(config: ml_collections.ConfigDict, store: Store, steps: int, seconds: float) -> dict:
  """The costs of a training step in this process, and their origin.

  Args:
    config: of the run. store: its data. steps, seconds: of `step_cost.timed`.
  """
  setup = setups.set_up(config, store)
  rng, source = np.random.default_rng(config.seed), setup.sources['train']
  batches = [meshes.place(setup.mesh, fill(source[k], store, rng)) for k in range(BATCHES)]
  init, step = setup.trainer.init, setup.trainer.update
  *_, cost = step_cost.cost_of_step(init, step, batches, steps, seconds)
  return report.origin(config, store) | cost


def place_of(kind: str, workdir: Path, label: str, number: int) -> Path:
  """The file with the result of a process: kind 'cost' of a pass, 'train' of a seed."""
  folder = compare.folder_of(workdir, label, number)
  return folder / (loop.REPORT if kind == 'train' else 'cost.json')


def why(done: subprocess.CompletedProcess[str]) -> str:
  """The reason why a process has no result: a few words for the table, a colon, and more.

  Raises:
    UserError: the process ended with an error of the user.
  """
  lines = done.stderr.strip().splitlines() or ['']
  if done.returncode == -signal.SIGKILL:
    return 'out of memory: killed, as Linux does when none is left'
  for line in lines:
    if OUT_OF_MEMORY.search(line):
      return f'out of memory: {line.strip()}'
  mistake, message = lines[-1].startswith('error: '), lines[-1].removeprefix('error: ')
  if mistake and done.returncode == 2:
    raise UserError(message)
  return f'diverged: {message}' if mistake else f'failed: status {done.returncode} {message}'


def attempt(kind: str, point: Point, number: int, args: argparse.Namespace) -> tuple[dict, str]:
  """Runs one process: (its result, '') or ({}, the reason why there is none).

  Raises:
    UserError: the process ended with an error of the user.
  """
  words = [
    sys.executable, __file__, f'--one={kind}', f'--config={args.config}', f'--models={point.text}',
    f'--seeds={number}', f'--workdir={args.workdir}', f'--steps={args.steps}',
    f'--seconds={args.seconds}', f'--memory={args.memory}', *args.changes,
  ]  # fmt: skip
  done, others = step_cost.run_process(words, 'kept')
  if done.returncode:
    return {}, why(done)
  record = json.loads(done.stdout.splitlines()[-1])
  return record | {'others': others}, ''


def run_one(args: argparse.Namespace) -> dict:
  """The work of a process of `attempt`: trains or measures, and returns the result."""
  if args.memory:
    most = round(args.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
  ((name, changes),) = compare.split_entries(args.models)
  entry = compare.read_entry(args.config, name, changes, args.changes)
  (seed,), workdir = compare.seeds_of(args.seeds), Path(args.workdir)
  if args.one == 'train':
    return compare.run([entry], [seed], workdir)[entry.label][0]
  store = compare.share_data([entry], [seed], workdir / 'stores')
  return measure(compare.with_seed(entry.config, seed), store, args.steps, args.seconds)


def run_all(
  kind: str,
  points: list[Point],
  numbers: Iterable[int],
  gaps: dict[str, str],
  store: Store,
  args: argparse.Namespace,
) -> tuple[dict[str, list[dict]], dict[str, str]]:
  """Runs all points without a result, in turns; prints the progress on stderr.

  Args:
    kind: 'cost' or 'train'. numbers: of the passes, or the seeds.
    gaps: label of the entry -> reason why a point is left out. store: of the data. args: the flags.

  Returns:
    Label -> results, one for each number; and the gaps with new ones. A point that failed once is
    not tried again.
  """
  records, gaps = {}, dict(gaps)
  for number in numbers:
    for point in points:
      label, config = point.entry.label, compare.with_seed(point.entry.config, number)
      path = place_of(kind, Path(args.workdir), label, number)
      record = compare.finished(path, config, store)
      if record is None and label not in gaps:
        print(f'== {kind} {label}, seed {number}', file=sys.stderr, flush=True)
        record, reason = attempt(kind, point, number, args)
        if reason:
          gaps[label] = reason
          print(reason, file=sys.stderr, flush=True)
        else:
          write_json(path, record)
      if record:
        records.setdefault(label, []).append(record)
  return records, gaps


def minutes_of(point: Point, costs: dict[str, list[dict]]) -> float:
  """The time of the steps of a training, if it was measured."""
  times = [cost['ms'] for cost in costs.get(point.entry.label, [])]
  return point.entry.config.steps * statistics.median(times) / 6e4 if times else 0.0


def over_budget(points: list[Point], costs: dict[str, list[dict]], most: float) -> dict[str, str]:
  """Label -> gap for trainings whose steps take more than `most` minutes; 0 is no bound."""
  return {
    point.entry.label: f'not trained: {minutes_of(point, costs):,.1f} min, --minutes={most:g}'
    for point in points
    if 0 < most < minutes_of(point, costs)
  }


def lines_of(
  points: list[Point],
  costs: dict[str, list[dict]],
  reports: dict[str, list[dict]],
  gaps: tuple[dict[str, str], dict[str, str]],
) -> list[dict]:
  """The rows of the table, by model and then by length.

  Args:
    points: all. costs, reports: of `run_all`. gaps: of the costs, and of the trainings.

  Returns:
    For each point 'model', 'length'; COSTS or None, 'ms' as [median, lowest, highest]; 'auc' and
    'gauc' of `compare.spread` or None, and 'seeds', their number; 'no_cost', 'no_auc', the reason
    why there is none, or ''.
  """
  lines = []
  for point in points:
    label = point.entry.label
    line = {'model': point.model, 'length': point.length}
    line |= dict.fromkeys((*COSTS, 'auc', 'gauc'))
    if measured := costs.get(label):
      times = [cost['ms'] for cost in measured]
      ms = statistics.median(times)
      line |= {
        'ms': [ms, min(times), max(times)],
        'ms_best': min(cost['ms_best'] for cost in measured),
        'examples_per_s': 1e3 * point.entry.config.batch_size / ms,
        'peak_mib': max(cost['peak_device_mib'] or cost['peak_rss_mib'] for cost in measured),
        'temporaries_mib': max(cost['temporaries_mib'] for cost in measured),
      }
    trained = [x['test']['overall'] for x in reports.get(label, [])]
    if trained:
      line |= {name: compare.spread([x[name] for x in trained]) for name in ('auc', 'gauc')}
    no_cost, no_auc = (reasons.get(label, '') for reasons in gaps)
    lines.append(line | {'seeds': len(trained), 'no_cost': no_cost, 'no_auc': no_auc})
  order = list(dict.fromkeys(point.model for point in points))
  return sorted(lines, key=lambda line: order.index(line['model']))


def table_of(lines: list[dict], seeds: int) -> str:
  """The rows as a Markdown table; seeds: number for each, 0 leaves out the scores."""
  head = ('test AUC', 'gAUC') if seeds else ()
  rows = [
    ('model', 'L', *head, 'ms a step', 'best', 'examples/s', 'peak MiB', 'temporaries MiB'),
  ]
  for line in lines:
    cells = [line['model'], f'{line["length"]:,}']
    if seeds:
      part = f' ({line["seeds"]} of {seeds} seeds)' if 0 < line['seeds'] < seeds else ''
      missing = line['no_auc'].split(':')[0]
      cells += [
        compare.cell(line[name]) + part if line[name] else missing for name in ('auc', 'gauc')
      ]
    if line['ms']:
      cells += [
        '{:,.1f} ({:,.1f}-{:,.1f})'.format(*line['ms']),
        f'{line["ms_best"]:,.1f}',
        *(f'{line[name]:,.0f}' for name in ('examples_per_s', 'peak_mib')),
        f'{line["temporaries_mib"]:,.1f}',
      ]
    else:
      cells += [line['no_cost'].split(':')[0], *4 * '-']
    rows.append(tuple(cells))
  return compare.markdown(rows)


def fit(lengths: list[int], ms: list[float]) -> dict[str, float]:
  """The growth of the time of a step: see the docstring of the module.

  Args:
    lengths: three or more, ascending. ms: of a step at each.
  """
  L, t = np.array(lengths, float), np.array(ms)
  slope, fixed = np.polyfit(L, t, 1)
  missed = np.sum((t - fixed - slope * L) ** 2) / np.sum((t - t.mean()) ** 2)
  log_L, log_t = np.log(L), np.log(t)
  return {
    'slope': float(slope),
    'fixed': float(fixed),
    'r2': float(1 - missed),
    'exponent': float(np.polyfit(log_L, log_t, 1)[0]),
    'exponent_at_end': float((log_t[-1] - log_t[-2]) / (log_L[-1] - log_L[-2])),
  }


def fits_of(lines: list[dict]) -> dict[str, dict]:
  """Model -> 'lengths' and the `fit` over them, for models with three or more."""
  times = {}
  for line in lines:
    if line['ms']:
      times.setdefault(line['model'], {})[line['length']] = line['ms_best']
  return {
    model: {'lengths': list(by_length)} | fit(list(by_length), list(by_length.values()))
    for model, by_length in times.items()
    if len(by_length) > 2
  }


def fits_table(fits: dict[str, dict]) -> str:
  """The fits as a Markdown table."""
  head = ('best step', 'from L to L', 'ms for 1,000 events', 'fixed ms', 'R^2')
  rows = [(*head, 'exponent', 'of the last two')]
  for model, line in fits.items():
    first, *_, last = line['lengths']
    rows.append(
      (
        model,
        f'{first:,} to {last:,}',
        f'{1e3 * line["slope"]:,.1f}',
        f'{line["fixed"]:,.1f}',
        f'{line["r2"]:.4f}',
        f'{line["exponent"]:.2f}',
        f'{line["exponent_at_end"]:.2f}',
      )
    )
  return compare.markdown(rows)


def figure_of(lines: list[dict], seeds: int):
  """The picture: test AUC if there is one, ms of a step, and memory against L.

  Args:
    lines: of `lines_of`. seeds: their number.
  """
  panels = [
    ('auc', f'test AUC, mean ± deviation of {seeds} seeds' if seeds > 1 else 'test AUC'),
    ('ms', 'ms of a training step'),
    ('peak_mib', 'peak of memory, MiB'),
    ('temporaries_mib', 'temporaries of the step, MiB'),
  ]
  panels = [(key, label) for key, label in panels if any(line[key] for line in lines)]
  models = list(dict.fromkeys(line['model'] for line in lines))
  lengths = sorted({line['length'] for line in lines})
  columns = 2 if len(panels) == 4 else len(panels)
  shape = len(panels) // columns, columns
  size = (5.2 * columns, 3.9 * shape[0] + 0.5)
  figure = plotting(PICTURE)(figsize=size, dpi=150, layout='constrained')
  for axes, (key, label) in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=True):
    axes.set_xscale('log')
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)  # matplotlib has no axis for one length
    for k, model in enumerate(models):
      # Ten colours; the next ten models are dashed.
      style = dict(
        color=f'C{k % 10}', marker=MARKS[k % len(MARKS)], markersize=4.5, capsize=2, linewidth=1.3,
        linestyle='-' if k < 10 else '--', label=model,
      )  # fmt: skip
      drawn = [line for line in lines if line['model'] == model and line[key]]
      axes.errorbar(
        [line['length'] for line in drawn], *heights_of(key, [line[key] for line in drawn]), **style
      )
    if key != 'auc':
      axes.set_yscale('log')
      ticks = ticks_of(*axes.dataLim.intervaly)
      axes.set_yticks(ticks, [f'{x:,g}' for x in ticks])
      axes.set_ylim(ticks[0], ticks[-1])
    if key == 'ms':
      # Through the middle of the panel, clipped at its edges.
      slope = ((ticks[0] * ticks[-1]) / (lengths[0] * lengths[-1])) ** 0.5
      guide = dict(color='#999999', linestyle=':', label='linear in L', zorder=0, scaley=False)
      axes.plot(lengths, [slope * L for L in lengths], **guide)
    axes.set_ylabel(label)
    axes.set_xticks(lengths, [f'{L:,}' for L in lengths])
    axes.minorticks_off()
    axes.set_xlabel('length of the history, L')
    axes.grid(axis='y', color='#dddddd', linewidth=0.8)
    axes.spines[['top', 'right']].set_visible(False)
  timed = figure.axes[-3].get_legend_handles_labels()
  figure.legend(*timed, loc='outside lower center', ncols=min(7, len(models) + 1), frameon=False)
  return figure


def ticks_of(low: float, high: float) -> list[float]:
  """Round numbers in a range: 1, 2 and 5 of each decade, or 1 if there are many decades."""
  for digits in ((1, 2, 5), (1,)):
    steps = [d * 10.0**k for k in range(-4, 9) for d in digits]
    first = max(x for x in steps if x <= max(low, steps[0]))
    last = min(x for x in steps if x >= high and x > first)
    ticks = [x for x in steps if first <= x <= last]
    if len(ticks) <= 8:
      break
  return ticks


def heights_of(key: str, values: list) -> tuple[list[float], list | None]:
  """Points and error bars of a panel; None if there are none."""
  if key == 'ms':
    return [m for m, _, _ in values], [[m - a for m, a, _ in values], [b - m for m, _, b in values]]
  if key == 'auc':
    return [m for m, _ in values], [d or 0.0 for _, d in values]
  return values, None


def notes_of(
  lines: list[dict], costs: dict[str, list[dict]], args: argparse.Namespace, store: Store
) -> list[str]:
  """The notes of the log beside the tables."""
  first, *others = [cost for measured in costs.values() for cost in measured]
  busy = [cost['others'] for cost in (first, *others) if cost['others'] is not None]
  beside = f'; other processes kept up to {max(busy)} cores busy' if busy else ''
  whose = 'device' if first['peak_device_mib'] else 'process'
  notes = [
    f'a step: batch {first["config"]["batch_size"]}, full histories of random items, a process of '
    f'its own, passes: {args.passes}; peak of memory of the {whose}{beside}'
  ]
  if not args.cost_only:
    total = click_evaluation.examples_of(store, 'test').total
    lengths = sorted({line['length'] for line in lines})
    seen = ', '.join(f'{np.minimum(total, L).mean():,.1f} of {L:,}' for L in lengths)
    notes.append(f'events that a history of the test has, mean: {seen}')
  for line in lines:
    reasons = dict.fromkeys(line[name] for name in ('no_cost', 'no_auc') if line[name])
    notes += [f'{line["model"]} at L = {line["length"]:,}: {reason}' for reason in reasons]
  # Messages have folders of this machine, which the log leaves out.
  return [note.replace(args.workdir, 'WORKDIR') for note in notes]


def parse(argv: list[str]) -> argparse.Namespace:
  """The flags; `changes` are those of every entry.

  Raises:
    UserError: for an unknown flag, or a value out of its bounds.
  """
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--config', default='', help='config file whose get_config takes a model')
  parser.add_argument('--models', required=True, help='such as pooling,din,sam')
  parser.add_argument('--lengths', default='50,100,200,500,1000')
  parser.add_argument('--max-length', default='', help='such as sasrec:1000,bst:1000')
  parser.add_argument('--cost-only', action='store_true', help='measure steps, train nothing')
  parser.add_argument('--passes', type=int, default=3, help='turns of the timing')
  parser.add_argument('--steps', type=int, default=30, help='most steps timed in a process')
  parser.add_argument('--seconds', type=float, default=5.0, help='of timing in a process')
  parser.add_argument('--minutes', type=float, default=0.0, help='most of a training; 0: no bound')
  parser.add_argument('--memory', type=float, default=0.0, help='GiB of a process; 0: no bound')
  parser.add_argument('--workdir', default='', help='default: runs/length_sweep-NAME-OF-THE-CONFIG')
  parser.add_argument('--one', choices=('cost', 'train'), help=argparse.SUPPRESS)
  args, changes = compare.parse(parser, argv)
  args.changes = changes
  for name, least in (('passes', 1), ('steps', 1), ('seconds', 0), ('minutes', 0), ('memory', 0)):
    value = getattr(args, name)
    if not value >= least:
      raise UserError(f'--{name}={value} must be {least} or more')
  stem = Path(args.config).stem or 'models'
  args.workdir = args.workdir or str(Path('runs') / f'length_sweep-{stem}')
  return args


def sweep(args: argparse.Namespace, command: str) -> dict:
  """Runs all points; prints, writes and returns the results."""
  # All errors of the user are found before hours of training.
  seeds = [] if args.cost_only else compare.seeds_of(args.seeds)
  lengths = sorted(compare.whole_numbers('--lengths', args.lengths, 1, '50,100,200'))
  points = points_of(args.config, args.models, lengths, args.changes)
  for point in points:
    if point.entry.config.task != 'click':
      raise UserError(f'{point.text} is of the task {point.entry.config.task!r}; this is of clicks')
  models = list(dict.fromkeys(point.model for point in points))
  bounds = bounds_of(args.max_length, models)
  plotting(PICTURE)
  workdir = Path(args.workdir)
  entries = [point.entry for point in points]
  store = compare.share_data(entries, seeds or [0], workdir / 'stores')

  gaps = {
    point.entry.label: f'not tried: --max-length={point.model}:{bounds[point.model]}'
    for point in points
    if point.length > bounds.get(point.model, point.length)
  }
  costs, cost_gaps = run_all('cost', points, range(args.passes), gaps, store, args)
  if not costs:
    raise UserError(f'nothing could be measured; {entries[0].label}: {cost_gaps[entries[0].label]}')
  train_gaps = over_budget(points, costs, args.minutes) | cost_gaps
  minutes = len(seeds) * sum(
    minutes_of(point, costs) for point in points if point.entry.label not in train_gaps
  )
  print(f'== the steps of all trainings take {minutes:,.0f} min', file=sys.stderr, flush=True)
  reports, train_gaps = run_all('train', points, seeds, train_gaps, store, args)
  lines = lines_of(points, costs, reports, (cost_gaps, train_gaps))
  fits = fits_of(lines)
  result = {
    **compare.origin({'train': sum(reports.values(), []), 'cost': sum(costs.values(), [])}, seeds),
    'command': command,
    'lines': lines,
    'fits': fits,
    'table': f'{table_of(lines, len(seeds))}\n\n{fits_table(fits)}',
    'costs': costs,
    'reports': reports,
  }
  write_json(workdir / 'length_sweep.json', result)
  figure_of(lines, len(seeds)).savefig(workdir / PICTURE)
  what = f'{", ".join(models)} with histories of {lengths[0]:,} to {lengths[-1]:,}'
  notes = notes_of(lines, costs, args, store)
  compare.append(args.log, compare.entry_of(result, what, *notes, args.note))
  print('\n'.join([result['table'], '', *notes, store.protocol]))
  print(f'written to {workdir}: {PICTURE} and .json')
  return result


def main(argv: list[str]) -> dict:
  """Runs the sweep, or one of its processes."""
  args = parse(argv)
  if args.one:
    record = run_one(args)
    print(json.dumps(jsonable(record)))
    return record
  # Only the processes that measure and train use the accelerator.
  jax.config.update('jax_platforms', 'cpu')
  return sweep(args, compare.command_of(argv, 'length_sweep'))


if __name__ == '__main__':
  compare.start(main)
