"""Prepares the history store once, and reuses it as long as log and config are the same.

A store is built beside its place and renamed into it, so a half-written one is never seen.
"""

import json
import logging
import shutil
from pathlib import Path

import ml_collections

from lmn_jax import lock, logs
from lmn_jax.build import build
from lmn_jax.errors import UserError
from lmn_jax.store import SCHEMA, Store, read_manifest

log = logging.getLogger(__name__)
SHOWN = 5  # changes named in the line that says why a store is built again


def prepare(
  data: ml_collections.ConfigDict, root: str | Path, force: bool = False, repair: bool = False
) -> Store:
  """Returns the store of a data config, built if there is none that fits.

  Args:
    data: the data config.
    root: folder of the stores; the store is `root/<data.name>`.
    force: build even if the store fits.
    repair: build a store again whose files are damaged, instead of raising.

  Raises:
    UserError: of the log, or of a damaged store.
  """
  root = Path(root)
  if Path(data.name).name != data.name or not data.name.strip('.'):
    raise UserError(f'config.data.name={data.name!r} must be the name of a folder, without a path')
  folder, working = root / data.name, root / f'.{data.name}.building'
  signature = logs.signature(data)
  root.mkdir(parents=True, exist_ok=True)
  # The second builder waits and then finds the store of the first.
  with lock.held(root / f'.{data.name}.lock', wait=True):
    reason = 'it is wanted' if force else _misfit(folder, signature, repair)
    if not reason:
      log.info('store %s is reused', folder)
      return Store(folder)
    if folder.exists():
      if not (folder / 'manifest.json').exists():
        raise UserError(
          f'{folder} exists and is no store; choose another config.data.name or delete it'
        )
      log.info('store %s is built again: %s', folder, reason)
    else:
      log.info('store %s is built', folder)
    shutil.rmtree(working, ignore_errors=True)  # left by a build that was killed
    try:
      scratch = working / 'scratch'
      scratch.mkdir(parents=True)
      with logs.connect(scratch / 'stage.duckdb', data.memory_limit, scratch / 'spill') as db:
        notes = logs.stage(data, db, scratch)
        build(data, db, notes, working / 'store', signature)
      old = working / 'old'
      if folder.exists():
        folder.rename(old)
      (working / 'store').rename(folder)
    finally:
      shutil.rmtree(working, ignore_errors=True)
    return Store(folder)


def _misfit(folder: Path, signature: dict, repair: bool) -> str:
  """Why the store in `folder` cannot be used; '' if it can."""
  if not folder.exists():
    return 'there is none'
  if not (folder / 'manifest.json').exists():
    return 'it has no manifest'
  try:
    manifest = read_manifest(folder)
    if manifest['schema'] != SCHEMA:
      return f'schema {manifest["schema"]} -> {SCHEMA}'
    changes = differences(manifest['signature'], signature)
    if changes:
      more = [f'and {len(changes) - SHOWN} more'] if len(changes) > SHOWN else []
      return '; '.join(changes[:SHOWN] + more)
    Store(folder)
  except UserError as error:
    if not repair:
      raise
    return str(error)
  return ''


def differences(old: dict, new: dict) -> list[str]:
  """What changed between two signatures, a phrase each, such as 'config.data.min_count 1 -> 2'."""
  old, new = _leaves(json.loads(json.dumps(old))), _leaves(json.loads(json.dumps(new)))
  missing = object()
  return [
    f'{name} {"absent" if name not in old else old[name]!r} -> '
    f'{"absent" if name not in new else new[name]!r}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name, missing) != new.get(name, missing)
  ]


def _leaves(tree, prefix: str = '') -> dict:
  """Dotted name -> value; files in a list are named by their `name`, not by their place."""
  if isinstance(tree, list) and tree and all(isinstance(x, dict) and 'name' in x for x in tree):
    tree = {x['name']: {key: x[key] for key in x if key != 'name'} for x in tree}
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  leaves = {}
  for key, value in tree.items():
    leaves.update(_leaves(value, f'{prefix}.{key}' if prefix else key))
  return leaves
