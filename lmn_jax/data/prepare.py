"""Prepares the history store of a log once, and finds it as long as log and config are the same.

A store is built beside its place and renamed into it, so a half-written one is never seen; one that
is there is never changed.
"""

import json
import logging
import shutil
import time
from pathlib import Path

import ml_collections

from lmn_jax import files
from lmn_jax.data import counts, interactions, sources, store_folder
from lmn_jax.data.build import build
from lmn_jax.data.store import SCHEMA, Store
from lmn_jax.errors import UserError

log = logging.getLogger(__name__)
SHOWN = 5  # changes named in the line that says why a store is built


def prepare(data: ml_collections.ConfigDict, root: str | Path, repair: bool = False) -> Store:
  """Returns the store of a log as it is now, built if there is none.

  Args:
    data: the data config.
    root: folder of the stores, see `store_folder`.
    repair: build a store again whose files are damaged, instead of raising.

  Raises:
    UserError: of the log, one that is written to meanwhile, or of a damaged store.
  """
  root = Path(root)
  check_name(data)
  root.mkdir(parents=True, exist_ok=True)
  # The second builder waits and then finds the store of the first.
  with files.locked(root / f'.{data.name}.lock', wait=True):
    index = store_folder.Index(root, data.name)
    looked = sources.look(data)
    signature = sources.signature(data, index.hashes)
    store, reason = _fitting(root, data.name, index, signature, repair)
    if store is not None:
      log.info('store %s is reused', store.path)
    else:
      log.info('the log is read: %s', reason)
      store = _made(data, root, index, signature, looked)
    index.write()
    return store


def find(data: ml_collections.ConfigDict, root: Path) -> Store | None:
  """The store of a log as it is now, if there is one; nothing is built or written.

  Raises:
    UserError: of the log, or of a damaged store.
  """
  check_name(data)
  index = store_folder.Index(root, data.name)
  return _fitting(root, data.name, index, sources.signature(data, index.hashes), False)[0]


def check_name(data: ml_collections.ConfigDict) -> None:
  """Refuses a name that is none of a folder.

  Raises:
    UserError: naming it.
  """
  if Path(data.name).name != data.name or not data.name.strip('.'):
    raise UserError(f'config.data.name={data.name!r} must be the name of a folder, without a path')


def _fitting(root, name, index, signature, repair) -> tuple[Store | None, str]:
  """The store that a log makes, if it is there and whole, or why there is none."""
  signature, newest = json.loads(json.dumps(signature)), None
  for folder, manifest in store_folder.manifests(root, name):
    if manifest['schema'] != SCHEMA:
      continue
    before = manifest.get('signature', {})
    if signature not in (before, *index.signatures(folder)):
      newest = newest or (folder, before)
      continue
    try:
      return Store(folder), ''
    except UserError as error:
      if not repair:
        raise
      return None, str(error)
  if newest is None:
    return None, f'{root} has no store {name}'
  folder, before = newest
  if before.get('made') != signature['made']:
    return None, f'{folder} was made by another version, which may read logs otherwise'
  return None, f'{folder} was made of other data ({_shown(before, signature)})'


def _made(data, root, index, signature, looked) -> Store:
  """Builds the store of a log, and puts it where it belongs, unless it is there."""
  began, working = time.monotonic(), root / f'.{data.name}.building'
  shutil.rmtree(working, ignore_errors=True)  # left by a build that was killed
  try:
    scratch = working / 'scratch'
    scratch.mkdir(parents=True)
    with interactions.connect(scratch / 'stage.duckdb', data.memory_limit, scratch / 'spill') as db:
      notes = interactions.stage(data, db, scratch)
      _check_still(data, looked)
      build(data, db, notes, working / 'store', signature)
    made = Store(working / 'store')
    folder = store_folder.folder_of(root, data.name, made.fingerprint)
    there = _whole(folder)
    if there is not None:
      index.add(folder, json.loads(json.dumps(signature)))
      log.info('store %s holds the same, and is reused', folder)
      return there
    if folder.exists():
      folder.rename(working / 'damaged')
    (working / 'store').rename(folder)
    seconds = time.monotonic() - began
    log.info('store %s is built: %s; %.1f s', folder, counts.line_of(made), seconds)
    return Store(folder)
  finally:
    shutil.rmtree(working, ignore_errors=True)


def _check_still(data, looked):
  """Refuses a log that was written to while it was read."""
  now = sources.look(data)
  for key in looked.keys() | now.keys():
    if looked.get(key) != now.get(key):
      path = (now.get(key) or looked[key])[0]
      raise UserError(
        f'{path} was changed while the log was read; run it again when nobody writes to it, or '
        'give a copy'
      )


def _whole(folder: Path) -> Store | None:
  """The store in a folder; None if there is none, or it is damaged."""
  try:
    return Store(folder)
  except UserError:
    return None


def _shown(old: dict, new: dict) -> str:
  """What changed, in a line: of a file of another size its hash says nothing more."""
  changes = differences(old, new)
  sizes = {x.partition('.size ')[0] for x in changes if '.size ' in x}
  said = [x for x in changes if x.partition('.sha256 ')[0] not in sizes]
  said = said or ['the order of the files']
  more = [f'and {len(said) - SHOWN} more'] if len(said) > SHOWN else []
  return '; '.join(said[:SHOWN] + more)


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
  """Dotted name -> value; files in a list are named by their `name`, if no two have the same."""
  if isinstance(tree, list) and tree and all(isinstance(x, dict) and 'name' in x for x in tree):
    if len({x['name'] for x in tree}) == len(tree):
      tree = {x['name']: {key: x[key] for key in x if key != 'name'} for x in tree}
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  leaves = {}
  for key, value in tree.items():
    leaves.update(_leaves(value, f'{prefix}.{key}' if prefix else key))
  return leaves
