"""`--mode=export`: one folder that scores without the model's code (layout: runtime/bundle.py)."""

import hashlib
import json
import os
import shutil
import tempfile
import time
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
from lmn_jax.export import contents, copies, functions, quantize
from lmn_jax.export.runtime import bundle, manifest
from lmn_jax.files import write_json
from lmn_jax.inference.state_table import fingerprint
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.program import State


def export(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, to: Path, precision: str
) -> dict[str, Any]:
  """Exports the best checkpoint of a run.

  The folder is written beside its place, sealed, and then `to`, a symbolic link, is put on it: who
  reads `to` sees an old export or the new one, whole. Earlier folders stay.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data. to: the link.
    precision: of the tables, see `stored`.

  Returns:
    'folder', 'bytes' by kind of file, 'metrics' by precision, 'opens_s' and 'seconds'.

  Raises:
    UserError: no checkpoint; several hosts; `to` is there and is no link; a run that is in use.
  """
  one_of('--precision', precision, quantize.PRECISIONS)
  if jax.process_count() > 1:
    raise UserError(f'--mode=export runs on one host, and these are {jax.process_count()}')
  if to.exists() and not to.is_symlink():
    raise UserError(f'--export={to} is there and is no link to an export; choose another name')
  trained_run.check_trained(workdir)
  began = time.monotonic()
  with trained_run.only_command(workdir):
    setup, best = trained_run.best_of(config, workdir, store)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{to.name}-', dir=to.parent) as scratch:
      made = Path(scratch) / 'export'
      metrics = _write(made, config, store, setup, best, precision)
      folder = to.parent / f'{to.name}-{_name_of(made, precision)}'
      if folder.exists():  # of the same weights and functions
        shutil.rmtree(folder)
      made.rename(folder)
      link = Path(scratch) / 'link'
      link.symlink_to(folder.name)
      os.replace(link, to)
  opening = time.monotonic()
  bundle.Bundle(folder)
  now = time.monotonic()
  sizes = _sizes(folder)
  return dict(
    path=str(to), folder=folder.name, bytes=sizes, metrics=metrics, opens_s=now - opening,
    seconds=now - began,
  )  # fmt: skip


def _name_of(folder, precision):
  manifest = json.loads((folder / 'manifest.json').read_text())
  return f'{precision}-{manifest["fingerprint"][:12]}'


def _sizes(folder):
  """Bytes of the files by the folder they lie in."""
  found: dict[str, int] = {}
  for path in folder.rglob('*'):
    if path.is_file():
      kind = path.relative_to(folder).parts[0]
      found[kind] = found.get(kind, 0) + path.stat().st_size
  return found


def _write(folder, config, store, setup, best, precision):
  """Writes the whole folder; returns what the weights are worth at each precision."""
  folder.mkdir()
  state, specs = best.state, setup.model.tables()
  tables = {
    name: quantize.stored_table(jax.device_get(state.tables[name].rows_RD), spec, precision)
    for name, spec in specs.items()
  }
  kept = {'params': jax.device_get(state.params), **jax.device_get(state.stats)}
  dense = traverse_util.flatten_dict(kept, sep='/')
  described = _write_functions(folder, config, store, setup, state, dense, tables)
  np.savez(folder / 'dense.npz', allow_pickle=False, **dense)
  table_files = contents.write_tables(folder / 'tables', tables)
  contents.write_ids(folder / 'vocabulary/item', [store.raw_ids('item')])
  features = contents.write_features(folder, config.data, store)
  keep = 0 if described['whole'] else config.history_length
  contents.write_users(folder, store, keep)
  metrics = measure(config, store, setup, state, tables, precision)
  described |= {
    'format': manifest.FORMAT,
    'task': config.task,
    'model': config.model.name,
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
    'time': store.clock._asdict(),
    'missing': list(config.data.missing),
    'features': features,
    'metrics': metrics,
    'step': best.step,
    'origin': origin(config, store),
    'config': config.to_dict(),
    'jax': jax.__version__,
  }  # fmt: skip
  write_json(folder / 'manifest.json', described)
  copies.copy_loader(folder)
  files.seal(folder)
  return metrics


def _write_functions(folder, config, store, setup, state, dense, tables):
  """Writes the functions; returns what the manifest says of them, and the fingerprint."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dense, tables))
  whole, carry, pooled_table = False, [], ''
  if not setup.task.states:
    batch = setup.sources['train'][0]
    exported, pooled_table = functions.click_functions(setup.model, *shapes, batch)
  else:
    T = config.history_length
    exported = functions.next_item_functions(setup.model, T, *shapes)
    whole = setup.model.whole and not config.latest
    empty = setup.model.carry({'item': np.zeros((1, T), np.int32)})
    carry = [[list(x.shape[1:]), str(x.dtype)] for x in jax.tree.leaves(empty)]
  mean = []  # of the rows, for shards that are out of reach
  if pooled_table:
    rows_VD = np.asarray(jax.jit(quantize.restored)(tables[pooled_table]))
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
    'pooled': pooled_table,
    'mean': mean,
    'functions': {name: [_described(x) for x in f.shapes] for name, f in exported.items()},
  }


def _described(argument):
  """Shapes of an argument of a function, as text."""
  return jax.tree.map(lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]', argument)


def measure(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: setups.Setup,
  state: State,
  tables: dict[str, dict[str, np.ndarray]],
  precision: str,
) -> dict[str, dict[str, dict[str, float]]]:
  """The metrics of what is held out with float32 rows, and with those that are stored."""

  def of(state):
    return {
      split: {
        name: found[name]
        for found in [trained_run.evaluate_split(config, store, setup, state, split)['overall']]
        for name in setup.task.columns(config)
      }
      for split in setup.sources
      if split != 'train'
    }

  found = {'float32': of(state)}
  if precision != 'float32':
    rounded = dict(state.tables)
    for name, table in tables.items():
      rows_RD = rounded[name].rows_RD
      rows_VD = np.asarray(jax.jit(quantize.restored)(table))
      filled = np.pad(rows_VD, ((0, rows_RD.shape[0] - len(rows_VD)), (0, 0)))
      placed = jax.device_put(filled.astype(rows_RD.dtype), rows_RD.sharding)
      rounded[name] = rounded[name]._replace(rows_RD=placed)
    found[precision] = of(state._replace(tables=rounded))
  return found


def lines_of(found: dict[str, Any]) -> str:
  """What `export` did, a line each for sizes, metrics and time."""
  sizes = ', '.join(f'{kind} {size / 2**20:,.1f}' for kind, size in sorted(found['bytes'].items()))
  total = sum(found['bytes'].values()) / 2**20
  base = found['metrics']['float32']
  worth = [] if base else ['nothing is held out to measure on']
  for precision, splits in found['metrics'].items():
    for split, values in splits.items():
      criterion = next(iter(values))
      value, change = values[criterion], values[criterion] - base[split][criterion]
      worth.append(f'{precision}: {split} {criterion} {value:.5f} ({change:+.5f})')
  return (
    f'{found["path"]} -> {found["folder"]}: {total:,.1f} MiB ({sizes})\n'
    f'{"; ".join(worth)}\n'
    f'opens in {found["opens_s"]:.2f} s; exported in {found["seconds"]:.1f} s'
  )
