"""The gain and the cost of a larger memory: LMN at several sizes, also with frozen values.

    python experiments/memory_scaling.py
    python experiments/memory_scaling.py --axes=64,256,1024 --seeds=0,1,2 --din=0.7136

Trains the config at every slots_per_axis of --axes (n is its square) with every seed, and for each
size a control whose memory has the same slots with constant random values. The runs are those of
compare.py, entries like 'configs/lmn_douyin.py[model.slots_per_axis=64]': both scripts reuse the
runs in --workdir. `--config.FIELD=VALUE` changes a field of every run.

The step is timed at the end by step_cost.py --task=model, one process for each size, in --passes
turns, because the throughput of a training depends on the other load of the machine. That step has
the sizes of configs/lmn_douyin.py, whatever --config is; --no-times leaves it out.

Columns: test AUC, mean ± standard deviation over the seeds, with trained and with frozen values;
their difference, and that to the size before, seed by seed; for trained values, means over the
seeds: slots `ever` read in training and `dead`, not read in the last window before the validation
that chose the checkpoint, KL of the reads in that window from uniform, in nats; ms of a training
step, median (lowest to highest) over the passes; seconds of the whole training.

Writes WORKDIR/memory_scaling.json with all sources, WORKDIR/memory_scaling.png (needs matplotlib),
and appends the table to experiments/LOG.md.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import compare
import step_cost

from lmn_jax.errors import UserError
from lmn_jax.files import write_json

USAGE = ('ever', 'dead', 'kl')
PICTURE = 'memory_scaling.png'
CONTROL = 'model.freeze_values=True'
COLORS = {'trained': '#1f5fa8', 'frozen': '#c8643c', 'din': '#555555'}


def changes_of(axis: int) -> list[str]:
  """The changes of the entry at slots_per_axis=axis; its control adds CONTROL."""
  return [f'model.slots_per_axis={axis}']


def labels_of(config: str, axis: int) -> tuple[str, str]:
  """The labels of the entries at a size: trained and control."""
  changed = changes_of(axis)
  return compare.label_of(config, changed), compare.label_of(config, [*changed, CONTROL])


def entries_of(config: str, axes: list[int], overrides: list[str]) -> list[compare.Entry]:
  """The entries of compare.py, size by size.

  Args:
    config: path of a config file. axes: sizes. overrides: '--config.FIELD=VALUE', for every entry.
  """
  if not config.endswith('.py'):
    raise UserError(f'--config={config!r} must be a config file, such as configs/lmn_douyin.py')
  return [
    compare.read_entry('', config, [*changes_of(axis), *control], overrides)
    for axis in axes
    for control in ([], [CONTROL])
  ]


def log2_slots(axis: int) -> int:
  """The logarithm of the slots, axis^2, to base 2.

  Raises:
    UserError: for a size that is not a power of two.
  """
  if axis & (axis - 1):
    raise UserError(
      f'--axes: the step is timed at powers of two, which {axis} is not; take '
      f'{1 << axis.bit_length() - 1} or {1 << axis.bit_length()}, or add --no-times'
    )
  return 2 * (axis.bit_length() - 1)


def times_of(axes: list[int], passes: int) -> dict:
  """The report of step_cost.py on the step of the model, with freed memory kept as in launch.sh."""
  sizes = ','.join(str(log2_slots(axis)) for axis in axes)
  flags = ['--task=model', '--only=lmn_jax', '--settings=kept']
  args = step_cost.parse([*flags, f'--sizes={sizes}', f'--passes={passes}'])
  return step_cost.summary(args, *step_cost.run_all(args))


def usage_of(folder: Path, step: int) -> dict[str, float]:
  """USAGE of the memory up to a step, from the line of its validation.

  Raises:
    UserError: the run counts no reads of a memory.
  """
  file = folder / 'metrics.jsonl'
  for line in file.read_text(encoding='utf-8').splitlines():
    record = json.loads(line)
    if (record['step'], record['group']) == (step, 'valid') and 'memory/ever' in record:
      return {name: record[f'memory/{name}'] for name in USAGE}
  raise UserError(f'{file} has no memory/ever at step {step}; --config must be of an LMN')


def lines_of(
  sizes: dict[int, tuple[list[dict], list[dict]]],
  usage: dict[int, list[dict[str, float]]],
  times: dict | None,
) -> list[dict]:
  """The rows of the table, from small to large.

  Args:
    sizes: slots_per_axis, ascending -> reports of trained and control, by seed.
    usage: slots_per_axis -> results of `usage_of`, by seed. times: of `times_of`, if measured.

  Returns:
    For each size 'slots'; by `compare.spread` 'auc', 'frozen', 'over_frozen' and 'over_before'
    (None for the first); means of USAGE and of 'seconds'; 'ms' [median, lowest, highest], None if
    not measured.
  """
  rows = {2 ** row['log2']: row for row in times['table']} if times else {}
  lines, before = [], None
  for axis, pair in sizes.items():
    auc, frozen = ([r['test']['overall']['auc'] for r in reports] for reports in pair)
    row = rows.get(axis**2)
    lines.append(
      {
        'slots': axis**2,
        'auc': compare.spread(auc),
        'frozen': compare.spread(frozen),
        'over_frozen': compare.spread(_differences(auc, frozen)),
        'over_before': compare.spread(_differences(auc, before)) if before else None,
        **{name: statistics.mean(u[name] for u in usage[axis]) for name in USAGE},
        'ms': [row[name] for name in ('ms', 'ms_low', 'ms_high')] if row else None,
        'seconds': statistics.mean(r['train_seconds'] for r in pair[0]),
      }
    )
    before = auc
  return lines


def _differences(these, those):
  return [a - b for a, b in zip(these, those, strict=True)]


def table_of(lines: list[dict]) -> str:
  """The rows as a Markdown table."""
  head = ('slots n', 'test AUC', 'frozen values', 'AUC over frozen', 'AUC over the size before')
  rows = [(*head, 'ever read', 'dead', 'KL', 'ms a step', 'train s')]
  for line in lines:
    ms = '{:.1f} ({:.1f}-{:.1f})'.format(*line['ms']) if line['ms'] else '-'
    rows.append(
      (
        f'{line["slots"]:,}',
        *(compare.cell(line[name]) for name in ('auc', 'frozen')),
        *(compare.cell(line[name], '+') for name in ('over_frozen', 'over_before')),
        *(f'{100 * line[name]:.1f} %' for name in ('ever', 'dead')),
        f'{line["kl"]:.2f}',
        ms,
        f'{line["seconds"]:.0f}',
      )
    )
  return compare.markdown(rows)


def plotting(picture: str):
  """The class Figure of matplotlib, which draws without a display.

  Args:
    picture: file of the picture, for the message.

  Raises:
    UserError: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError(
      f"{picture} needs matplotlib, which is not installed; in the clone, pip install '.[plot]'"
    ) from None
  return Figure


def figure_of(lines: list[dict], seeds: int, din: float | None = None):
  """The picture: test AUC against slots and, if measured, ms of a step beside it.

  Args:
    lines: of `lines_of`. seeds: their number. din: test AUC of a DIN, a dashed line.
  """
  timed = [line for line in lines if line['ms']]
  panels = 2 if timed else 1
  figure = plotting(PICTURE)(figsize=(5.2 * panels, 4.4), dpi=150, layout='constrained')
  scores, *costs = figure.subplots(1, panels, squeeze=False)[0]
  slots = [line['slots'] for line in lines]
  drawn = []
  for name, key, label, mark in (
    ('trained', 'auc', 'LMN', 'o'),
    ('frozen', 'frozen', 'values frozen at random', 's'),
  ):
    means, deviations = zip(*(line[key] for line in lines), strict=True)
    errors = deviations if seeds > 1 else None
    style = dict(fmt=f'{mark}-', markersize=5, capsize=3, color=COLORS[name], label=label)
    drawn.append(scores.errorbar(slots, means, errors, **style))
  if din is not None:
    drawn.append(scores.axhline(din, linestyle='--', color=COLORS['din'], label='DIN'))
  # Below the axes, where it hides no point.
  below = dict(loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
  scores.legend(handles=drawn, **below)
  scores.set_ylabel(f'test AUC, mean ± deviation of {seeds} seeds' if seeds > 1 else 'test AUC')
  for axes in costs:
    median, low, high = zip(*(line['ms'] for line in timed), strict=True)
    bars = [_differences(median, low), _differences(high, median)]
    label = 'median of the passes, lowest to highest'
    style = dict(fmt='o-', markersize=5, capsize=3, color=COLORS['trained'], label=label)
    axes.errorbar([line['slots'] for line in timed], median, bars, **style)
    # From 0, so that a small growth looks small.
    axes.set_ylim(0, 1.15 * max(high))
    axes.set_ylabel('ms of a training step')
    axes.legend(**below)
  for axes in (scores, *costs):
    axes.set_xscale('log', base=2)
    axes.set_xticks(slots, [f'{n:,}' for n in slots])
    axes.minorticks_off()
    axes.set_xlabel('slots of the memory')
    axes.grid(axis='y', color='#dddddd', linewidth=0.8)
    axes.spines[['top', 'right']].set_visible(False)
  return figure


def main(argv: list[str]) -> dict:
  """Runs all sizes; prints, writes and returns the results."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--config', default='configs/lmn_douyin.py', help='config file of an LMN')
  parser.add_argument('--axes', default='64,128,256,512,1024', help='slots_per_axis of the sizes')
  parser.add_argument('--din', type=float, help='test AUC of DIN on the same data, for the picture')
  parser.add_argument('--passes', type=int, default=3, help='turns of the timing over all sizes')
  parser.add_argument('--no-times', action='store_true', help='leave the timing of a step out')
  parser.add_argument('--workdir', default='runs/memory_scaling')
  arguments, rest = compare.parse(parser, argv)
  # All errors of the user are found before hours of training.
  seeds = compare.seeds_of(arguments.seeds)
  axes = sorted(compare.whole_numbers('--axes', arguments.axes, 1, '64,128,256'))
  entries = entries_of(arguments.config, axes, rest)
  if arguments.din is not None and not 0 < arguments.din < 1:
    raise UserError(f'--din={arguments.din} must be between 0 and 1, as an AUC is')
  if not arguments.no_times:
    if arguments.passes < 1:
      raise UserError(f'--passes={arguments.passes} must be 1 or more, or add --no-times')
    for axis in axes:
      log2_slots(axis)
  plotting(PICTURE)

  workdir = Path(arguments.workdir)
  reports = compare.run(entries, seeds, workdir)
  sizes, usage = {}, {}
  for axis in axes:
    trained, control = labels_of(arguments.config, axis)
    sizes[axis] = reports[trained], reports[control]
    usage[axis] = [
      usage_of(compare.folder_of(workdir, trained, seed), report['step'])
      for seed, report in zip(seeds, reports[trained], strict=True)
    ]
  times = None if arguments.no_times else times_of(axes, arguments.passes)
  lines = lines_of(sizes, usage, times)
  result = {
    **compare.origin(reports, seeds),
    'command': compare.command_of(argv, 'memory_scaling'),
    'lines': lines,
    'table': table_of(lines),
    'din': arguments.din,
    'usage': usage,
    'times': times,
    'reports': reports,
  }
  write_json(workdir / 'memory_scaling.json', result)
  picture = workdir / PICTURE
  figure_of(lines, len(seeds), arguments.din).savefig(picture)
  what = f'LMN from {lines[0]["slots"]:,} to {lines[-1]["slots"]:,} slots'
  compare.append(arguments.log, compare.entry_of(result, what, note_on(times), arguments.note))
  print(
    f'{result["table"]}\n\n{result["protocol"]}\nwritten to {workdir}: {picture.name} and .json'
  )
  return result


def note_on(times: dict | None) -> str:
  """A sentence about the timing of the step for the log; '' if it was not timed."""
  if not times:
    return ''
  busy = [row['others'] for row in times['table'] if row['others'] is not None]
  beside = f'; other processes kept up to {max(busy)} cores busy' if busy else ''
  missing = ''.join(f'; {reason}' for reason in dict.fromkeys(times['missing']))
  return (
    'ms a step: step_cost.py --task=model at the sizes of configs/lmn_douyin.py, '
    f'passes: {times["passes"]}, cores: {times["cores"]}{beside}{missing}'
  )


if __name__ == '__main__':
  # The processes that time the step use the accelerator on which this one has trained.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  compare.start(main)
