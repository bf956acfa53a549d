"""--mode=export: writes a folder that scores without the model's code (see runtime/manifest.py)."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from lmn_jax import files
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation.report import origin
from lmn_jax.export import contents, copies, functions, quantize, stored_rows
from lmn_jax.export.runtime import bundle, histories, manifest
from lmn_jax.files import write_json
from lmn_jax.inference.state_table import fingerprint
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.program import State
from lmn_jax.training.tasks import reads_of


def export(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, to: Path, precision: str
) -> dict[str, Any]:
  """Exports the best checkpoint of a run.

  The folder is written and sealed under a temporary name, then renamed, and the symbolic link `to`
  is set to it: a reader of `to` finds the old export or the new one, always complete. Earlier
  folders stay.

  Args:
    config: of a trained run. workdir: of the run. store: its data. to: the link.
    precision: of the tables, see `quantize.stored`.

  Returns:
    'path' of the link, 'folder', 'bytes' by kind of file, 'metrics' by precision, the 'metric' that
    chose the checkpoint, 'opens_s' and 'seconds'.

  Raises:
    UserError: no checkpoint; several hosts; `to` exists and is not a symlink; a run that another
      command uses.
  """
  _check(config, to, precision)
  trained_run.check_trained(workdir)
  start = time.monotonic()
  _check_fields(config, store)
  with trained_run.only_command(workdir):
    setup, best = trained_run.best_of(config, workdir, store)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{to.name}-', dir=to.parent) as scratch:
      new = Path(scratch) / 'export'
      metrics = _write(new, config, store, setup, best, precision)
      folder = to.parent / f'{to.name}-{_name_of(new, precision)}'
      if folder.exists():  # of the same weights and functions
        shutil.rmtree(folder)
      new.rename(folder)
      link = Path(scratch) / 'link'
      link.symlink_to(folder.name)
      os.replace(link, to)
  written = time.monotonic()
  bundle.Bundle(folder)
  end = time.monotonic()
  return dict(
    path=str(to), folder=folder.name, bytes=_sizes(folder), metrics=metrics,
    metric=metric_of(config, setup.task.columns(config)), opens_s=end - written,
    seconds=end - start,
  )  # fmt: skip


def _check(config, to, precision):
  """Refuses what cannot be exported, and a path that cannot be the link."""
  one_of('--precision', precision, quantize.PRECISIONS)
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=export runs on one host, and {jax.process_count()} were started; start one'
    )
  if to.name in ('', '..'):
    raise UserError(f'--export={to} has no name; give the path of a link to be made')
  if to.exists() and not to.is_symlink():
    raise UserError(f'--export={to} exists and is not a symlink to an export; give another name')
  if config.model.get('encoders', {}):
    raise UserError(
      f'--mode=export: config.model.encoders={dict(config.model.encoders)!r:.80}; an export has '
      'one history of each user, so train another model, or use --mode=predict'
    )


def _check_fields(config, store):
  """Refuses a run whose requests cannot have what its model reads.

  Raises:
    UserError: an event feature with the name of another part of an event, or gaps of positions.
  """
  for name in config.data.event_features:
    if name in histories.EVENT:
      raise UserError(
        f'config.data.event_features has {name!r}, but in a request {", ".join(histories.EVENT)} '
        'are other parts of an event; rename the column of the log'
      )
  if reads_of(config, store).time and not store.clock.timed:
    raise UserError(
      f'config.model.time={config.model.time!r} on a log without times: its gaps are of positions, '
      "which requests do not have; train with config.model.time='none' to export"
    )


def metric_of(config: ml_collections.ConfigDict, columns: Sequence[str]) -> str:
  """Returns the metric that config.criterion names if it is a column, otherwise the first column.

  A criterion may also be '', or a function.
  """
  name = config.criterion.removeprefix('-')
  return name if name in columns else columns[0]


def _name_of(folder, precision):
  manifest = json.loads((folder / 'manifest.json').read_text())
  return f'{precision}-{manifest["fingerprint"][:12]}'


def _sizes(folder):
  """Returns the bytes of the files by the name of their folder."""
  sizes: dict[str, int] = {}
  for path in folder.rglob('*'):
    if path.is_file():
      kind = path.relative_to(folder).parts[0]
      sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
  return sizes


def _write(folder, config, store, setup, best, precision):
  """Writes the whole folder, and returns the metrics at each precision."""
  folder.mkdir()
  setup, state = fold_item_fields(setup, best.state)
  specs = setup.model.tables()
  tables = {
    name: quantize.stored_table(jax.device_get(state.tables[name].rows_RD), spec, precision)
    for name, spec in specs.items()
  }
  variables = {'params': jax.device_get(state.params), **jax.device_get(state.stats)}
  dense = traverse_util.flatten_dict(variables, sep='/')
  description = _write_functions(folder, config, store, setup, state, dense, tables)
  np.savez(folder / 'dense.npz', allow_pickle=False, **dense)
  table_files = contents.write_tables(folder / 'tables', tables)
  contents.write_ids(folder / 'vocabulary/item', [store.raw_items()])
  features = contents.write_features(folder, config.data, store)
  keep = 0 if description['whole'] else config.history_length
  contents.write_users(folder, store, keep)
  metrics = measure(config, store, setup, state, tables, precision)
  labels = _described_labels(store)
  description |= {
    'format': manifest.FORMATS[1 if labels else 0],
    'task': config.task,
    'model': config.model.name,
    **labels,
    'length': config.history_length,
    'block': min(functions.BLOCK, store.vocabulary['item']),
    'tables': {
      name: {
        'rows': spec.rows, 'width': spec.width, 'precision': precision, 'files': table_files[name]
      }
      for name, spec in specs.items()
    },
    'vocabulary': {name: V for name, V in store.vocabulary.items() if name != 'user'},
    'users': store.manifest['counts']['users'],
    'timed': store.clock.timed,
    **({'reads_time': True} if setup.sources['train'].reads.time else {}),
    **({'cold_items': store.cold_items} if store.cold_items else {}),
    'time': store.clock._asdict(),
    'missing': list(config.data.missing),
    'features': features,
    'metrics': metrics,
    'step': best.step,
    'origin': origin(config, store),
    'config': config.to_dict(),
    'jax': jax.__version__,
  }  # fmt: skip
  write_json(folder / 'manifest.json', description)
  copies.copy_loader(folder)
  files.seal(folder)
  return metrics


def _described_labels(store):
  """Returns what the manifest has of labels; {} of one label of clicks."""
  names = {'labels': list(store.labels)} if len(store.labels) > 1 else {}
  return names | ({'label_kind': 'number'} if store.label_kind == 'number' else {})


def _write_functions(folder, config, store, setup, state, dense, tables):
  """Writes the functions, and returns their part of the manifest and the fingerprint."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dense, tables))
  whole, carry, bag_table = False, [], ''
  if not setup.task.states:
    batch = setup.sources['train'][0]
    exported, bag_table = functions.click_functions(setup.model, *shapes, batch)
  else:
    T = config.history_length
    exported = functions.next_item_functions(setup.model, *shapes, setup.sources['train'][0])
    whole = setup.model.whole and not config.latest
    empty = setup.model.carry({'item': np.zeros((1, T), np.int32)})
    carry = [[list(x.shape[1:]), str(x.dtype)] for x in jax.tree.leaves(empty)]
  mean = []  # of the rows, used when no shard answers
  if bag_table:
    rows_VD = stored_rows.restored(tables[bag_table])
    mean = rows_VD.mean(axis=0, dtype=np.float64).tolist()
  (folder / 'functions').mkdir()
  digest = hashlib.sha256(fingerprint(state).encode() + store.fingerprint.encode())
  for name, function in exported.items():
    content = functions.serialized(function)
    digest.update(content)
    (folder / f'functions/{name}.jax').write_bytes(content)
  return {
    'fingerprint': digest.hexdigest(),
    'any_length': setup.model.any_length,
    'whole': whole,
    'carry': carry,
    'pooled': bag_table,
    'mean': mean,
    'functions': {name: [_text_of(x) for x in f.shapes] for name, f in exported.items()},
  }


def _text_of(argument):
  """Returns the dtypes and shapes of an argument of a function as text."""
  return jax.tree.map(lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]', argument)


def measure(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: setups.Setup,
  state: State,
  tables: dict[str, dict[str, np.ndarray]],
  precision: str,
) -> dict[str, dict[str, dict[str, float]]]:
  """Returns {precision: {split: metrics}} of the held-out splits, for float32 and stored rows."""

  def evaluated(state):
    columns, splits = setup.task.columns(config), {}
    for split in setup.sources:
      if split != 'train':
        overall = trained_run.evaluate_split(config, store, setup, state, split)['overall']
        splits[split] = {name: overall[name] for name in columns}
    return splits

  metrics = {'float32': evaluated(state)}
  if precision != 'float32':
    rounded = dict(state.tables)
    for name, table in tables.items():
      rows_RD, rows_VD = rounded[name].rows_RD, stored_rows.restored(table)
      filled = np.pad(rows_VD, ((0, rows_RD.shape[0] - len(rows_VD)), (0, 0)))
      placed = jax.device_put(filled.astype(rows_RD.dtype), rows_RD.sharding)
      rounded[name] = rounded[name]._replace(rows_RD=placed)
    metrics[precision] = evaluated(state._replace(tables=rounded))
  return metrics


def lines_of(report: dict[str, Any]) -> str:
  """Returns a line each about the sizes, the metrics and the times of an export."""
  kinds = sorted(report['bytes'].items())
  sizes = ', '.join(f'{kind} {size / 2**20:,.1f}' for kind, size in kinds)
  total = sum(report['bytes'].values()) / 2**20
  metric, exact = report['metric'], report['metrics']['float32']
  metrics = [] if exact else ['no split is held out, so no metric was computed']
  for precision, splits in report['metrics'].items():
    for split, values in splits.items():
      value, before = values[metric], exact[split][metric]
      if value is None or before is None:  # such as the AUC of a split with one class
        metrics.append(f'{precision}: {split} has no {metric}')
      else:
        metrics.append(f'{precision}: {split} {metric} {value:.5f} ({value - before:+.5f})')
  return (
    f'{report["path"]} -> {report["folder"]}: {total:,.1f} MiB ({sizes})\n'
    f'{"; ".join(metrics)}\n'
    f'opens in {report["opens_s"]:.2f} s; exported in {report["seconds"]:.1f} s'
  )
