"""Ids alone against features of events, items and users, on five real logs.

    python experiments/rich_events.py --set=kuairand --data=FOLDER [--task=next_item]
        [--users=0.1] [--seeds=0,1] [--rates=0.01,0.05,0.2] [--models=din,sam,lmn]
        [--features=ids,all]

FOLDER has the files of the set; `rich_sets.py` names them and describes the configs. The rows of a
table are each model with ids alone and with all features, and the first model with each addition
alone, unless --features names those of every model. Each row has the same budget: one run for each
of --rates, the learning rate (of the embeddings; for next items of all), with the first seed. The
rate with the best validation gets the other seeds, and only its test is printed. Baselines without
training stand above.

--users is the share of the users that the log keeps, by a hash of their ids, for the sets whose log
is written by a query (complete-journey .1, instacart .5; the other sets are small and read whole).

Runs have a folder each in --workdir: the same command continues an unfinished run and reuses a
finished one. Writes WORKDIR/TASK.json, and appends the table to experiments/LOG.md.
"""

import argparse
from pathlib import Path

import compare
import duckdb
import rich_sets

from lmn_jax.errors import UserError, one_of
from lmn_jax.files import write_json

CONFIG = str(Path(__file__).parent / 'rich_sets.py')
RATES = {'click': '0.01,0.05,0.2', 'next_item': '0.003,0.01,0.03'}
NEXT_ITEM = ('ndcg@10', 'hr@10', 'hr@50')  # in the table


def write_log(name: str, folder: Path, share: float, log: Path) -> None:
  """Writes the log of a set that has a query, unless it exists.

  Args:
    name: of the set. folder: with its files. share: of the users. log: the Parquet file.

  Raises:
    UserError: the files are missing.
  """
  if log.exists():
    return
  log.parent.mkdir(parents=True, exist_ok=True)
  query = rich_sets.SETS[name].query.format(folder=folder, chosen='chosen')
  partial = log.with_suffix('.partial')
  with duckdb.connect() as db:
    db.execute(
      'CREATE MACRO chosen(user) AS '
      f'md5_number_lower(user::VARCHAR) % 1000000 < {round(share * 1_000_000)}'
    )
    try:
      db.execute(f"COPY ({query}) TO '{partial}' (FORMAT parquet)")
    except duckdb.IOException as error:
      raise UserError(f'--data={folder}: {str(error).splitlines()[0]}') from error
  partial.replace(log)


def rows_of(name: str, task: str, models: list[str], features: list[str]) -> list[tuple[str, str]]:
  """(model, features) of each row of a table; features: of every model, [] for the default.

  Raises:
    UserError: 'ids' is not among the features, with which all rows are compared.
  """
  if features and 'ids' not in features:
    raise UserError(f"--features={','.join(features)!r} must have 'ids', the row to compare with")
  rows = [(model, x) for model in models for x in features or ('ids', 'all')]
  additions = [] if features else rich_sets.additions_of(name, task)
  return rows + [(models[0], addition) for addition in additions]


def entries_of(
  name: str, task: str, row: tuple[str, str], rates: list[str], changes: list[str]
) -> list[compare.Entry]:
  """The entries of a row, one for each rate.

  Args:
    name: of the set. row: of `rows_of`. rates: as texts. changes: '--config.FIELD=VALUE'.
  """
  groups = ('embedding',) if task == 'click' else ('dense', 'embedding')
  label = ' '.join(row)
  entries = []
  for rate in rates:
    changed = [f'optimizer.{group}.rate={rate}' for group in groups]
    spec = f'{name}/{task}/{"/".join(row)}'
    config = compare.read_entry(CONFIG, spec, changed, changes).config
    entries.append(compare.Entry(f'{label} rate={rate}', config))
  return entries


def tune(entries: list[compare.Entry], seeds: list[int], workdir: Path) -> tuple[str, list[dict]]:
  """Trains a row: all entries with the first seed, the best on validation with all seeds.

  Returns:
    The label of the best entry, and its reports, in the order of the seeds.
  """
  first = compare.run(entries, seeds[:1], workdir)
  metric = compare.metrics_of(next(iter(first.values()))[0])[0]
  best = max(entries, key=lambda entry: first[entry.label][0]['valid']['overall'][metric])
  return best.label, compare.run([best], seeds, workdir)[best.label]


def check_examples(reports: dict[str, list[dict]]) -> None:
  """Refuses rows with other examples than the first: their numbers could not be compared.

  The counts of the examples and the main metric of each baseline are those of the first row.

  Raises:
    UserError: they are not.
  """
  first, *others = reports
  for label in others:
    a, b = (_identity(reports[x][0]) for x in (first, label))
    if a != b:
      raise UserError(f'{label!r} has other examples than {first!r}: {b} in place of {a}')


def _identity(report):
  metric = compare.metrics_of(report)[0]
  baselines = report['baselines']['test'].items()
  return report['counts']['examples'], {k: runs['overall'][metric] for k, runs in baselines}


def summarise(chosen: dict[str, tuple[str, list[dict]]], metrics: tuple[str, ...]) -> dict:
  """The rows of the table.

  Args:
    chosen: row -> (label of the best entry, its reports). metrics: of the table.

  Returns:
    row -> for each metric [mean, deviation], None for a label that the row has not; for models also
    'valid', the first metric in validation; 'over_ids', its difference in the test to the row of
    the same model with ids alone, seed by seed; 'rate'; and 'step' of the checkpoints.
  """
  main = metrics[0]
  first = next(iter(chosen.values()))[1][0]
  lines = {
    name: {m: [runs['overall'][m], None] for m in metrics}
    for name, runs in first['baselines']['test'].items()
  }
  for row, (label, reports) in chosen.items():
    of_ids = chosen[f'{row.partition(" ")[0]} ids'][1]
    pairs = zip(_values(reports, main, main), _values(of_ids, main, main), strict=True)
    values = {m: _values(reports, m, main) for m in metrics}
    lines[row] = {m: None if None in x else compare.spread(x) for m, x in values.items()} | {
      'valid': compare.spread(_values(reports, main, main, 'valid')),
      'over_ids': compare.spread([a - b for a, b in pairs]),
      'rate': label.rpartition('=')[2],
      'step': [report['step'] for report in reports],
    }
  return lines


def _values(reports, metric, main, split='test'):
  """A metric of the table for each report; None for a label that the run has not."""
  label, single = main.rpartition('/')[0], '/' not in reports[0]['columns'][0]
  # A run with one label has its metrics without the name of the label, the main one.
  name = metric.removeprefix(f'{label}/') if label and single else metric
  return [report[split]['overall'].get(name) for report in reports]


def table_of(lines: dict[str, dict], metrics: tuple[str, ...]) -> str:
  """The rows as a Markdown table."""
  names = [compare.WORDS.get(m, m) for m in metrics]
  rows = [('', *names, f'{names[0]} over ids', f'valid {names[0]}', 'rate')]
  for row, line in lines.items():
    cells = [compare.cell(line[m]) for m in metrics]
    over = '-' if row.endswith(' ids') else compare.cell(line.get('over_ids'), '+')
    rows.append((row, *cells, over, compare.cell(line.get('valid')), line.get('rate', '-')))
  return compare.markdown(rows)


def share_of(name: str, text: str) -> float:
  """The share of the users of --users; that of the set for ''.

  Raises:
    UserError: it is not a number above 0 and up to 1, or the set has no query.
  """
  real = rich_sets.SETS[name]
  if not text:
    return real.share
  if not real.query:
    raise UserError(f'--users={text}: {name} is small and read whole; leave the flag out')
  try:
    share = float(text)
  except ValueError:
    share = 0.0
  if not 0 < share <= 1:
    raise UserError(f'--users={text!r} must be a number above 0 and up to 1, such as 0.1')
  return share


def main(argv: list[str]) -> dict:
  """Trains all missing runs; prints, writes and returns the results."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--set', required=True, help=' or '.join(rich_sets.SETS))
  parser.add_argument('--data', required=True, help='folder with the files of the set')
  parser.add_argument('--task', default='click', help=' or '.join(rich_sets.TASKS))
  parser.add_argument('--models', default='', help='default: all of the task')
  parser.add_argument('--features', default='', help='of every model, such as ids,all,time+events')
  parser.add_argument('--rates', default='', help='learning rates to choose from')
  parser.add_argument('--users', default='', help='share of the users')
  parser.add_argument('--workdir', default='', help='default: runs/rich_events-SET')
  args, changes = compare.parse(parser, argv)
  name = one_of('--set', args.set, rich_sets.SETS)
  task = one_of('--task', args.task, rich_sets.TASKS)
  models = args.models.split(',') if args.models else list(rich_sets.MODELS[task])
  rates = (args.rates or RATES[task]).split(',')
  workdir = Path(args.workdir or Path('runs') / f'rich_events-{name}')
  share, seeds = share_of(name, args.users), compare.seeds_of(args.seeds)

  folder, log = Path(args.data), workdir / f'{name}-{share:g}.parquet'
  if rich_sets.SETS[name].query:
    write_log(name, folder, share, log)
  changes = [*rich_sets.files_of(name, folder, log), *changes]
  rows = rows_of(name, task, models, args.features.split(',') if args.features else [])
  entries = {' '.join(row): entries_of(name, task, row, rates, changes) for row in rows}
  chosen = {row: tune(of_row, seeds, workdir / task) for row, of_row in entries.items()}
  return record(chosen, seeds, workdir, args, argv, share)


def record(
  chosen: dict[str, tuple[str, list[dict]]],
  seeds: list[int],
  workdir: Path,
  args: argparse.Namespace,
  argv: list[str],
  share: float,
) -> dict:
  """Prints, logs, writes to WORKDIR/TASK.json and returns the results.

  Args:
    chosen: of `tune`, by row. args: of the command `argv`. share: of the users.
  """
  reports = {row: of_row for row, (_, of_row) in chosen.items()}
  check_examples(reports)
  metrics = compare.metrics_of(next(iter(reports.values()))[0])
  metrics = NEXT_ITEM if args.task == 'next_item' else metrics
  lines = summarise(chosen, metrics)
  result = {
    **compare.origin(reports, seeds),
    'fingerprint': ', '.join(sorted({x['fingerprint'] for runs in reports.values() for x in runs})),
    'command': compare.command_of(argv, 'rich_events'),
    'lines': lines,
    'table': table_of(lines, metrics),
    'reports': reports,
  }
  users = f'{share:.0%} of the users, by a hash of their ids' if share < 1 else 'all users'
  unseen = result['counts']['out_of_vocabulary']['item']['test']
  unseen = f'{unseen:.0%} of the test rows have an item that training did not see'
  notes = (users, unseen, rich_sets.SETS[args.set].note, args.note)
  write_json(workdir / f'{args.task}.json', result)
  compare.append(args.log, compare.entry_of(result, f'rich events, {args.task}', *notes))
  print(f'{result["table"]}\n\n{result["protocol"]}\nwritten to {workdir / f"{args.task}.json"}')
  return result


if __name__ == '__main__':
  compare.start(main)
