"""The report of a run: metrics with all that makes a number traceable, and how they are printed."""

import subprocess
from pathlib import Path

import jax
import ml_collections

from lmn_jax import __version__
from lmn_jax.data.store import Store
from lmn_jax.tables.spec import TableSpec


def origin(config: ml_collections.ConfigDict, store: Store) -> dict:
  """All that makes a number traceable: data, config, program and machine."""
  return {
    'model': config.model.name,
    'protocol': store.protocol,
    'fingerprint': store.fingerprint,
    'seed': config.seed,
    'rows': store.manifest['notes'],
    'counts': store.manifest['counts'],
    'vocabulary': store.vocabulary,
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'version': __version__,
    'commit': commit(),
    'config': config.to_dict(),
  }


def commit() -> str | None:
  """The commit of the source tree this package lies in, '+changes' if it was edited; or None."""
  here = Path(__file__).parent
  try:
    tracked = ['git', '-C', str(here), 'ls-files', '--error-unmatch', Path(__file__).name]
    subprocess.run(tracked, capture_output=True, check=True)
    head = ['git', '-C', str(here), 'rev-parse', 'HEAD']
    name = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    changed = ['git', '-C', str(here), 'diff', '--quiet', 'HEAD']
    return name + ('+changes' if subprocess.run(changed).returncode else '')
  except (OSError, subprocess.CalledProcessError):
    return None  # no git, or an installed package: the version stands for it


def describe(
  config: ml_collections.ConfigDict, store: Store, tables: dict[str, TableSpec], devices: int
) -> str:
  """A few lines on what is about to be trained."""
  counts = store.manifest['counts']
  examples = ', '.join(f'{split} {n:,}' for split, n in store.examples.items())
  shapes = ', '.join(f'{name} {spec.rows:,} x {spec.width}' for name, spec in tables.items())
  kind = jax.devices()[0].device_kind
  spread = f' on {jax.process_count()} hosts' if jax.process_count() > 1 else ''
  return (
    f'{config.model.name} on {store.path.name}: {counts["users"]:,} users, '
    f'{counts["events"]:,} events; examples: {examples}\n'
    f'{store.protocol}\n'
    f'tables: {shapes}; {devices} device{"s" if devices > 1 else ""} ({kind}){spread}'
  )


def line_of(values: dict, what: str) -> str:
  """Metrics on one line, those without a value left out."""
  shown = {k: v for k, v in values.items() if isinstance(v, float)}
  return f'{what} ' + ' · '.join(f'{name} {value:.4f}' for name, value in shown.items())


def table_of(report: dict) -> str:
  """The test metrics as a table, the model below the trainless baselines, and its by history.

  Without a test split it is of validation, and says so; without both there is no table.
  """
  split = next((name for name in ('test', 'valid') if name in report), None)
  if split is None:
    return f'no split is held out, so there is nothing to measure on\n\n{report["protocol"]}'
  model, test = report['model'], report[split]
  baselines = report['baselines'][split]
  rows = [*baselines.items(), (model, test)]
  columns = report['columns']
  rows = [(name, *_cells(found['overall'], columns)) for name, found in rows]
  lines = aligned([(f'{split}, {test["overall"]["rows"]:,} rows', *columns), *rows])
  parts = ('rows', *columns[:2])
  rows = [(name, *_cells(found, parts)) for name, found in test['by_history'].items()]
  lines += ['', *aligned([(f'{model} by length of history', *parts), *rows])]
  if 'sampled' in test:
    every = [*baselines.items(), (model, test)]
    head = f'among {test["sampled"]["negatives"]} sampled negatives, not comparable with the above'
    rows = [(name, *_cells(found['sampled'], columns)) for name, found in every]
    lines += ['', *aligned([(head, *columns), *rows])]
  return '\n'.join([*lines, '', report['protocol']])


def places_of(workdir: Path, report: Path, store: Store) -> str:
  """Where everything was written, a line each."""
  places = {
    'run': workdir,
    'report': report,
    'metrics': workdir / 'metrics.jsonl',
    'tensorboard': workdir / 'tensorboard',
    'store': store.path,
  }
  return '\n'.join(f'{name + ":":<13}{place}' for name, place in places.items())


def _cells(found, columns):
  """Numbers as text: counts whole, metrics with four decimals, '-' for none."""

  def cell(value):
    if value is None:
      return '-'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'

  return [cell(found.get(name)) for name in columns]


def aligned(rows):
  """Lines of equal columns: the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    f'{first:<{widths[0]}}'
    + ''.join(f'  {cell:>{width}}' for cell, width in zip(rest, widths[1:], strict=True))
    for first, *rest in rows
  ]
