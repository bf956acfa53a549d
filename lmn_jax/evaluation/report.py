"""The report of a run: metrics and their origin, and the texts that are printed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from lmn_jax import __version__
from lmn_jax.data.store import Store
from lmn_jax.tables.spec import TableSpec


def origin(config: ml_collections.ConfigDict, store: Store) -> dict:
  """The origin of the metrics: data, config, program and devices."""
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
  """The commit of the source tree of this package, with '+changes' if it was edited; or None."""
  folder = Path(__file__).parent
  try:
    tracked = ['git', '-C', str(folder), 'ls-files', '--error-unmatch', Path(__file__).name]
    subprocess.run(tracked, capture_output=True, check=True)
    head = ['git', '-C', str(folder), 'rev-parse', 'HEAD']
    name = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    changed = ['git', '-C', str(folder), 'diff', '--quiet', 'HEAD']
    return name + ('+changes' if subprocess.run(changed).returncode else '')
  except (OSError, subprocess.CalledProcessError):
    return None  # without git, or for an installed package, which has a version


def describe(
  config: ml_collections.ConfigDict, store: Store, tables: dict[str, TableSpec], devices: int
) -> str:
  """A summary of the training in a few lines."""
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


def line_of(values: dict, label: str) -> str:
  """The metrics on one line after a label, without counts and undefined metrics."""
  floats = {k: v for k, v in values.items() if isinstance(v, float)}
  return f'{label} ' + ' · '.join(f'{name} {value:.4f}' for name, value in floats.items())


def table_of(report: dict) -> str:
  """The test metrics of the baselines and the model as a table, and the model's by history.

  Without a test split, the metrics of the validation; without both, a line that says so.
  """
  split = next((name for name in ('test', 'valid') if name in report), None)
  if split is None:
    return f'no split is held out, so there are no metrics\n\n{report["protocol"]}'
  model, test = report['model'], report[split]
  baselines = report['baselines'][split]
  lines = []
  for label, names in _by_label(report['columns']).items():
    prefix = f'{label}/' if label else ''
    columns = [f'{prefix}{name}' for name in names]
    rows = [*baselines.items(), (model, test)]
    rows = [(name, *_cells(metrics['overall'], columns)) for name, metrics in rows]
    head = f'{split}, {test["overall"][f"{prefix}rows"]:,} rows'
    head = f'{label}, {head}' if label else head
    lines += ([''] if lines else []) + aligned([(head, *names), *rows])
    parts = (f'{prefix}rows', *columns[:2])
    rows = [(name, *_cells(metrics, parts)) for name, metrics in test['by_history'].items()]
    if 'cold_items' in test:  # whatever the length of the history
      cold = test['cold_items']
      rows.append((f'cold items, {cold["share"]:.1%}', *_cells(cold, parts)))
    lines += ['', *aligned([(f'{model} by length of history', 'rows', *names[:2]), *rows])]
  columns = report['columns']
  if 'sampled' in test:
    models = [*baselines.items(), (model, test)]
    head = f'among {test["sampled"]["negatives"]} sampled negatives, not comparable with the above'
    rows = [(name, *_cells(metrics['sampled'], columns)) for name, metrics in models]
    lines += ['', *aligned([(head, *columns), *rows])]
  return '\n'.join([*lines, '', report['protocol']])


def _by_label(columns: Sequence[str]) -> dict[str, list[str]]:
  """The metrics of each label, without its name; {'': metrics} if there is one label."""
  by_label: dict[str, list[str]] = {}
  for column in columns:
    label, _, name = column.rpartition('/')
    by_label.setdefault(label, []).append(name)
  return by_label


def output_paths(workdir: Path, report: Path, store: Store) -> str:
  """The paths of a run's outputs, one for each line."""
  paths = {
    'run': workdir,
    'report': report,
    'metrics': workdir / 'metrics.jsonl',
    'tensorboard': workdir / 'tensorboard',
    'store': store.path,
  }
  return '\n'.join(f'{name + ":":<13}{path}' for name, path in paths.items())


def _cells(metrics, columns):
  """Metrics as text: counts as integers, metrics with four decimals, '-' for None."""

  def cell(value):
    if value is None:
      return '-'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'

  return [cell(metrics.get(name)) for name in columns]


def aligned(rows):
  """Formats rows as lines of aligned columns: the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    f'{first:<{widths[0]}}'
    + ''.join(f'  {cell:>{width}}' for cell, width in zip(rest, widths[1:], strict=True))
    for first, *rest in rows
  ]
