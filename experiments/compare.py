"""Trains several models on one store with several seeds and prints one table of metrics.

    python experiments/compare.py --config=configs/lmn_movielens.py --models=pooling,din,lmn
    python experiments/compare.py --config=configs/lmn_movielens.py --seeds=0,1,2 \\
        --models='lmn,lmn[model.freeze_values=True],din' --config.steps=500
    python experiments/compare.py --models=configs/lmn_douyin.py,configs/douyin.py:din

An entry of --models is the argument of `get_config` in the file of --config, or another config
file, FILE.py or FILE.py:MODEL; changes in brackets are for this entry alone. `--config.FIELD=VALUE`
changes a field of every entry. Each run has its folder: the same command continues an unfinished
run and reuses a finished one of the same config and data, with the commit it was trained at. A run
that fails ends the comparison.

--split=valid prints the table of the validation split: choose settings on it, and then print the
table of the test once.

Writes the table and its sources to WORKDIR/compare.json, and appends it to experiments/LOG.md.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from lmn_jax import cli_errors, config_files
from lmn_jax.data import prepare
from lmn_jax.data.store import Store
from lmn_jax.errors import DivergedError, Preempted, UserError
from lmn_jax.evaluation.criterion import ERRORS
from lmn_jax.files import write_json
from lmn_jax.training import loop
from lmn_jax.training import setup as setups

# Metrics in the table of click models; that of next-item models has all metrics of the report.
CLICK = ('auc', 'gauc', 'log_loss')
WORDS = {'auc': 'AUC', 'gauc': 'gAUC', 'log_loss': 'LogLoss'}
LOG = Path(__file__).parent / 'LOG.md'


class Entry(NamedTuple):
  """One row of the table. label: its name. config: of its runs, except for the seed."""

  label: str
  config: ml_collections.ConfigDict


def split_entries(text: str) -> list[tuple[str, list[str]]]:
  """'lmn[a=1,b=(2,3)],din' -> [('lmn', ['a=1', 'b=(2,3)']), ('din', [])].

  Raises:
    UserError: for unbalanced brackets, a change without '=', no entry, or a repeated entry.
  """
  entries = []
  for piece in pieces_of(text):
    match = re.fullmatch(r'([^\[\]]+)(?:\[(.*)\])?', piece)
    if not match:
      raise UserError(f'--models: {piece!r} is not NAME or NAME[FIELD=VALUE,...]')
    changes = pieces_of(match[2] or '')
    for change in changes:
      if '=' not in change:
        raise UserError(f'--models: {change!r} in {piece!r} is not FIELD=VALUE')
    entries.append((match[1].strip(), changes))
  labels = [label_of(*entry) for entry in entries]
  for label in labels:
    if labels.count(label) > 1:
      raise UserError(f'--models names {label!r} more than once')
  if not entries:
    raise UserError('--models has no entry; for example --models=pooling,din,lmn')
  return entries


def pieces_of(text: str) -> list[str]:
  """Splits a text at the commas outside of brackets.

  Raises:
    UserError: for unbalanced brackets.
  """
  pieces, depth = [''], 0
  for letter in text:
    depth += (letter in '[({') - (letter in '])}')
    if depth < 0:
      break
    if letter == ',' and not depth:
      pieces.append('')
    else:
      pieces[-1] += letter
  if depth:
    raise UserError(f'--models: the brackets of {text!r} are not balanced')
  return [piece.strip() for piece in pieces if piece.strip()]


def is_file(name: str) -> bool:
  """Whether an entry is a config file, FILE.py or FILE.py:MODEL, and not the name of a model."""
  return name.partition(':')[0].endswith('.py')


def label_of(name: str, changes: list[str]) -> str:
  """The name of an entry in the table: 'douyin:din' for 'a/douyin.py:din'."""
  if is_file(name):
    file, colon, model = name.partition(':')
    name = f'{Path(file).stem}{colon}{model}'
  return f'{name}[{",".join(changes)}]' if changes else name


def read_entry(file: str, name: str, changes: list[str], overrides: list[str]) -> Entry:
  """Reads the config of an entry as the command line does.

  Args:
    file: of --config, '' if there is none. name, changes: of the entry.
    overrides: '--config.FIELD=VALUE', for every entry.

  Raises:
    UserError: for an unknown file or field, or an invalid value.
  """
  label = label_of(name, changes)
  if not is_file(name) and not file:
    raise UserError(f'--models: {name!r} needs --config, the file whose get_config() takes it')
  path = name if is_file(name) else f'{file}:{name}'
  # The changes of the entry come last and override those of every entry.
  entry_flags = [f'--config.{change}' for change in changes]
  argv = ['compare', f'--config={path}', *overrides, *entry_flags]
  values = flags.FlagValues()
  flag = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  try:
    argv = config_files.resolved(argv)
    cli_errors.check_config(argv)
    values(argv)
  except Exception as error:  # a config file is code of the user: it may raise anything
    message = cli_errors.explain(error, argv)
    if 'takes no argument' in message:
      message += '; this file takes no model, so give each model as a config file of its own'
    raise UserError(f'{label}: {message}') from error
  return Entry(label, flag.value)


def share_data(entries: list[Entry], seeds: list[int], stores: Path) -> Store:
  """Checks all configs, then prepares the data that the entries share.

  Raises:
    UserError: entries do not share their data or their task, or a config is invalid.
  """
  data, task = entries[0].config.data, entries[0].config.task
  first = {'config.data': data.to_dict()}
  for label, config in entries:
    if config.task != task:
      raise UserError(
        f'{label} is of the task {config.task!r}, {entries[0].label} of {task!r}: they have no '
        'metric in common'
      )
    changed = prepare.differences(first, {'config.data': config.data.to_dict()})
    if changed:
      raise UserError(
        f'{label} has other data than {entries[0].label} ({changed[0]}), so their numbers cannot '
        'be compared; change the data for all with --config.data.FIELD=VALUE'
      )
    for seed in seeds:
      setups.check(with_seed(config, seed))
  return prepare.prepare(data, stores)


def run(entries: list[Entry], seeds: list[int], workdir: Path) -> dict[str, list[dict]]:
  """Trains every entry with every seed; returns label -> reports, in the order of the seeds.

  Raises:
    UserError: of `share_data`, or a folder holds another experiment.
    DivergedError: a training diverged.
  """
  store = share_data(entries, seeds, workdir / 'stores')
  reports: dict[str, list[dict]] = {}
  for label, config in entries:
    for seed in seeds:
      folder = folder_of(workdir, label, seed)
      seeded = with_seed(config, seed)
      report = finished(folder / loop.REPORT, seeded, store)
      if report is None:
        print(f'== {label}, seed {seed}: {folder}', file=sys.stderr, flush=True)
        try:
          report = loop.train(seeded, folder, store)
        except (UserError, DivergedError) as error:
          raise type(error)(f'{label}, seed {seed}: {error}') from error
      reports.setdefault(label, []).append(report)
  return reports


def finished(path: Path, config: ml_collections.ConfigDict, store: Store) -> dict | None:
  """The report of a finished run of this config and data; None if there is none."""
  if not path.exists():
    return None
  report = json.loads(path.read_text(encoding='utf-8'))
  # The fingerprint identifies the data, also after the log was moved.
  old, new = ({**c, 'data': None} for c in (report['config'], config.to_dict()))
  same = report['fingerprint'] == store.fingerprint and not prepare.differences(old, new)
  return report if same else None


def folder_of(workdir: Path, label: str, seed: int) -> Path:
  """The folder of the run of an entry with a seed."""
  return workdir / f'{re.sub(r"[^A-Za-z0-9_.=-]+", "-", label).strip("-")}-seed{seed}'


def with_seed(config: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
  """The config of the run of an entry with a seed."""
  config = config.copy_and_resolve_references()
  config.seed = seed
  return config


def metrics_of(report: dict) -> tuple[str, ...]:
  """The metrics of a table; the first one says which rival is the best.

  Of clicks those of CLICK, of each label if there are several.
  """
  columns = tuple(report['columns'])
  return tuple(name for name in columns if name.rpartition('/')[2] in CLICK) or columns


def summarise(reports: dict[str, list[dict]], split: str = 'test') -> dict[str, dict]:
  """The rows of the table.

  Args:
    reports: of `run`. split: 'test' or 'valid'.

  Returns:
    label -> for each of `metrics_of` [mean, sample standard deviation over the seeds, or None for
    one seed]; and for models 'step' (of the checkpoint, by seed), 'rival' (the best other model by
    the mean of the first metric) and 'over_rival' (mean and deviation of the difference in it, seed
    by seed). Baselines have no seeds and no probabilities, so no deviation and no log loss.
  """
  first = next(iter(reports.values()))[0]
  metrics = metrics_of(first)
  lines = {
    name: {m: [runs['overall'][m], None] for m in metrics}
    for name, runs in first['baselines'][split].items()
  }
  best = min if metrics[0].rpartition('/')[2] in ERRORS else max
  leading = {k: [r[split]['overall'][metrics[0]] for r in runs] for k, runs in reports.items()}
  for label, runs in reports.items():
    lines[label] = {m: spread([r[split]['overall'][m] for r in runs]) for m in metrics}
    lines[label]['step'] = [r['step'] for r in runs]
    others = [other for other in reports if other != label]
    if others:
      rival = best(others, key=lambda other: statistics.mean(leading[other]))
      difference = [a - b for a, b in zip(leading[label], leading[rival], strict=True)]
      lines[label] |= {'rival': rival, 'over_rival': spread(difference)}
  return lines


def spread(values: list[float]) -> list[float | None]:
  """[mean, sample standard deviation, or None for one value]."""
  return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def table_of(lines: dict[str, dict], metrics: tuple[str, ...], split: str = 'test') -> str:
  """The rows as a Markdown table."""
  first, *more = (WORDS.get(m, m.upper()) for m in metrics)
  rows = [('', f'{split} {first}', *more, f'{first} over the best rival')]
  for label, line in lines.items():
    over = cell(line.get('over_rival'), '+')
    rival = f' ({line["rival"]})' if 'rival' in line else ''
    rows.append((label, *(cell(line[m]) for m in metrics), over + rival))
  return markdown(rows)


def cell(pair: list[float | None] | None, sign: str = '') -> str:
  """A result of `spread` as '0.7354 ± 0.0010', '-' for None; sign: '+' to always print one."""
  if pair is None or pair[0] is None:
    return '-'
  return f'{pair[0]:{sign}.4f}' + ('' if pair[1] is None else f' ± {pair[1]:.4f}')


def markdown(rows: list[tuple[str, ...]]) -> str:
  """Cells as a Markdown table; the first row is the head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  text = [
    '| ' + ' | '.join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + ' |' for row in rows
  ]
  return '\n'.join([text[0], '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *text[1:]])


def command_of(argv: list[str], script: str = 'compare') -> str:
  """The command without the folders of paths outside of this folder."""

  def portable(argument):
    name, equals, value = argument.partition('=')
    outside = value.startswith(('/', '~', '..'))
    return f'{name}={Path("PATH", Path(value).name)}' if equals and outside else argument

  # These flags do not change the results.
  shown = [x for x in argv if x.partition('=')[0] not in ('--workdir', '--log', '--note')]
  return shlex.join(['python', f'experiments/{script}.py', *map(portable, shown)])


def origin(reports: dict[str, list[dict]], seeds: list[int]) -> dict:
  """The origin of the numbers, for an entry of the log: commits, seeds, data."""
  everything = [report for runs in reports.values() for report in runs]
  return {
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'data': everything[0]['config']['data']['name'],
    'commits': sorted({str(report['commit']) for report in everything}),
    'seeds': seeds,
    **{k: everything[0][k] for k in ('protocol', 'fingerprint', 'counts', 'devices')},
  }


def entry_of(result: dict, what: str, *notes: str) -> str:
  """The dated entry for the log, in Markdown.

  Args:
    result: of `origin`, with 'command' and 'table'; without seeds nothing was trained.
    what: second part of the heading, after the data. notes: sentences; empty ones are left out.
  """
  counts, seeds = result['counts']['examples'], result['seeds']
  drawn = f'seeds {", ".join(map(str, seeds))}; ' if seeds else ''
  fitted = '; models and trainless baselines were fitted on the training examples only'
  fitted = fitted if seeds else '; nothing was trained'
  head = [
    f'\n## {result["date"]} {result["data"]}: {what}\n',
    f'    {result["command"]}\n',
    f'- commit {", ".join(result["commits"])}; {drawn}{result["devices"]}',
    f'- {result["protocol"]}',
    f'- examples: {", ".join(f"{split} {n:,}" for split, n in counts.items())}{fitted}',
    f'- fingerprint of the data {result["fingerprint"]}',
  ]
  if seeds:
    head.append(
      f'- mean ± standard deviation over {len(seeds)} seeds; differences are taken seed by seed'
    )
  return '\n'.join([*head, *(f'- {note}' for note in notes if note), '', result['table'], ''])


def seeds_of(text: str) -> list[int]:
  """'0,1,2' -> [0, 1, 2], each once."""
  return whole_numbers('--seeds', text, 0, '0,1,2')


def whole_numbers(flag: str, text: str, least: int, example: str) -> list[int]:
  """'0,1,2' -> [0, 1, 2], without repetitions and none below `least`.

  Raises:
    UserError: for anything else.
  """
  try:
    numbers = [int(piece) for piece in text.split(',')]
  except ValueError:
    raise UserError(f'{flag}={text!r} must be whole numbers, such as {example}') from None
  if len(set(numbers)) < len(numbers) or min(numbers) < least:
    raise UserError(f'{flag}={text!r} must be different numbers, {least} or more')
  return numbers


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(arguments, changes of every entry): flags of the script and those of all comparisons.

  Raises:
    UserError: for an unknown flag.
  """
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--log', default=str(LOG), help="where the entry is appended; '' for nowhere")
  parser.add_argument('--note', default='', help='a sentence for the entry')
  arguments, rest = parser.parse_known_args(argv)
  for argument in rest:
    if not re.match(r'--config\.[^=]+=', argument):
      raise UserError(f'{argument!r} is not a flag; fields are changed by --config.FIELD=VALUE')
  return arguments, rest


def append(log: str, entry: str) -> None:
  """Appends an entry to the log, if there is one."""
  if log:
    with open(log, 'a', encoding='utf-8') as file:
      file.write(entry)


def main(argv: list[str]) -> dict:
  """Runs the comparison; prints, writes and returns it."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--config', default='', help='config file whose get_config takes a model')
  parser.add_argument('--models', required=True, help='such as pooling,lmn[model.top_k=8]')
  parser.add_argument('--split', default='test', choices=('test', 'valid'))
  parser.add_argument('--workdir', default='', help='default: runs/compare-NAME-OF-THE-CONFIG-FILE')
  arguments, rest = parse(parser, argv)
  entries = [
    read_entry(arguments.config, name, changes, rest)
    for name, changes in split_entries(arguments.models)
  ]
  stem = Path(arguments.config).stem or 'models'
  workdir = Path(arguments.workdir or Path('runs') / f'compare-{stem}')

  what = ', '.join(entry.label for entry in entries)
  return record(entries, workdir, arguments, argv, 'compare', what, table_of, arguments.split)


def record(
  entries: list[Entry],
  workdir: Path,
  args: argparse.Namespace,
  argv: list[str],
  script: str,
  what: str,
  table: Callable[[dict, tuple[str, ...], str], str],
  split: str = 'test',
) -> dict:
  """Trains all missing runs; prints, logs, writes to WORKDIR/SCRIPT.json and returns the results.

  Args:
    entries: of the table. args: of `parse`. argv: of the command. script: its name. what: second
      part of the heading. table: as `table_of`. split: 'test' or 'valid'.
  """
  seeds = seeds_of(args.seeds)
  reports = run(entries, seeds, workdir)
  lines = summarise(reports, split)
  metrics = metrics_of(next(iter(reports.values()))[0])
  result = {
    **origin(reports, seeds),
    'command': command_of(argv, script),
    'lines': lines,
    'table': table(lines, metrics, split),
    'split': split,
    'reports': reports,
  }
  write_json(workdir / f'{script}.json', result)
  append(args.log, entry_of(result, what, args.note))
  print(f'{result["table"]}\n\n{result["protocol"]}\nwritten to {workdir / f"{script}.json"}')
  return result


def start(main: Callable[[list[str]], dict]) -> None:
  """Calls the `main` of a script; an error of the user is one line and status 2."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  absl_logging.set_verbosity(absl_logging.WARNING)
  try:
    main(sys.argv[1:])
  except (UserError, DivergedError) as mistake:
    print(f'error: {mistake}', file=sys.stderr)
    sys.exit(2 if isinstance(mistake, UserError) else 1)
  except Preempted as notice:
    print(notice, file=sys.stderr)
    sys.exit(143)  # the comparison is not complete


if __name__ == '__main__':
  start(main)
