"""Prepares the history store of a log once, and reuses it while log and config are the same.

A store is built in another folder and then renamed, so no reader sees a half-written store. An
existing store is never changed.
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
SHOWN = 5  # changes named in the log line that gives the reason of a build


def prepare(data: ml_collections.ConfigDict, root: str | Path, repair: bool = False) -> Store:
  """Returns the store of a log in its current state; builds it if there is none.

  Args:
    data: the data config.
    root: folder of the stores, see `store_folder`.
    repair: whether to build a store with damaged files again instead of raising.

  Raises:
    UserError: the log has an error or was written to while it was read, or the store is damaged.
  """
  root = Path(root)
  check_name(data)
  root.mkdir(parents=True, exist_ok=True)
  # A second process waits, and then reuses the store that the first one built.
  with files.locked(root / f'.{data.name}.lock', wait=True):
    index = store_folder.Index(root, data.name)
    files_before = sources.stat_files(data)
    signature = sources.signature(data, index.hashes)
    store, reason = _existing(root, data.name, index, signature, repair)
    if store is not None:
      log.info('store %s is reused', store.path)
    else:
      log.info('the log is read: %s', reason)
      store = _build(data, root, index, signature, files_before)
    index.write()
    return store


def find(data: ml_collections.ConfigDict, root: Path) -> Store | None:
  """Returns the store of a log in its current state, or None; builds and writes nothing.

  Raises:
    UserError: the log has an error, or the store is damaged.
  """
  check_name(data)
  index = store_folder.Index(root, data.name)
  return _existing(root, data.name, index, sources.signature(data, index.hashes), False)[0]


def check_name(data: ml_collections.ConfigDict) -> None:
  """Checks that config.data.name can be the name of a folder.

  Raises:
    UserError: it is empty, or has a path.
  """
  if Path(data.name).name != data.name or not data.name.strip('.'):
    raise UserError(f'config.data.name={data.name!r} must be the name of a folder, without a path')


def _existing(
  root: Path, name: str, index: store_folder.Index, signature: dict, repair: bool
) -> tuple[Store | None, str]:
  """The existing store of a log's signature; or None, and the reason why it must be built."""
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
    return None, f'{folder} was built by another version, which may read logs differently'
  return None, f'{folder} was built from other data ({_shown(before, signature)})'


def _build(
  data: ml_collections.ConfigDict,
  root: Path,
  index: store_folder.Index,
  signature: dict,
  files_before: dict,
) -> Store:
  """Builds the store of a log and renames it to its place, unless the same store is there."""
  began, working = time.monotonic(), root / f'.{data.name}.building'
  shutil.rmtree(working, ignore_errors=True)  # left by a build that was killed
  try:
    scratch = working / 'scratch'
    scratch.mkdir(parents=True)
    with interactions.connect(scratch / 'stage.duckdb', data.memory_limit, scratch / 'spill') as db:
      notes = interactions.stage(data, db, scratch)
      _check_unchanged(data, files_before)
      build(data, db, notes, working / 'store', signature)
    built = Store(working / 'store')
    folder = store_folder.folder_of(root, data.name, built.fingerprint)
    existing = _intact(folder)
    if existing is not None:
      index.add(folder, json.loads(json.dumps(signature)))
      log.info('store %s has the same content and is reused', folder)
      return existing
    if folder.exists():
      folder.rename(working / 'damaged')
    (working / 'store').rename(folder)
    seconds = time.monotonic() - began
    log.info('store %s is built: %s; %.1f s', folder, counts.line_of(built), seconds)
    return Store(folder)
  finally:
    shutil.rmtree(working, ignore_errors=True)


def _check_unchanged(data: ml_collections.ConfigDict, files_before: dict) -> None:
  """Raises a UserError if a file of the log was written to since `files_before`."""
  now = sources.stat_files(data)
  for key in files_before.keys() | now.keys():
    if files_before.get(key) != now.get(key):
      path = (now.get(key) or files_before[key])[0]
      raise UserError(
        f'{path} was changed while the log was read; run the command again when no program writes '
        'to the file, or use a copy'
      )


def _intact(folder: Path) -> Store | None:
  """The store in a folder; None if there is none or if it is damaged."""
  try:
    return Store(folder)
  except UserError:
    return None


def _shown(old: dict, new: dict) -> str:
  """What changed between two signatures, in a line; no hash of a file whose size has changed."""
  changes = differences(old, new)
  resized = {x.partition('.size ')[0] for x in changes if '.size ' in x}
  changes = [x for x in changes if x.partition('.sha256 ')[0] not in resized]
  changes = changes or ['the order of the files']
  more = [f'and {len(changes) - SHOWN} more'] if len(changes) > SHOWN else []
  return '; '.join(changes[:SHOWN] + more)


def differences(old: dict, new: dict) -> list[str]:
  """What changed between two signatures, a phrase each, such as 'config.data.min_count 1 -> 2'."""
  old, new = (files.flatten(json.loads(json.dumps(x)), _children) for x in (old, new))
  missing = object()
  return [
    f'{name} {"absent" if name not in old else old[name]!r} -> '
    f'{"absent" if name not in new else new[name]!r}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name, missing) != new.get(name, missing)
  ]


def _children(tree, path: str) -> dict | None:
  """The entries of a dict; of a list of files with distinct names, the files by `name`."""
  del path
  if isinstance(tree, list) and all(isinstance(x, dict) and 'name' in x for x in tree):
    if len({x['name'] for x in tree}) == len(tree):
      return {x['name']: {key: x[key] for key in x if key != 'name'} for x in tree}
  return tree if isinstance(tree, dict) else None
