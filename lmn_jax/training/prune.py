"""Lists the stores that no run needs, and removes them on request."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmn_jax import files
from lmn_jax.data import store_folder
from lmn_jax.distributed import compilation_cache
from lmn_jax.errors import UserError
from lmn_jax.evaluation.report import aligned
from lmn_jax.training import run_store
from lmn_jax.training.trained_run import CHECKPOINTS

REMAINS = ('.*.building', '.*.removed')  # folders that a killed command leaves


class Entry(NamedTuple):
  """A folder among the stores. reason: why it is kept; '' if it may be removed."""

  folder: Path
  size: int
  reason: str


def prune(root: Path, places: list[Path], name: str = '', remove: bool = False) -> str:
  """Returns a table of the stores, and removes those that no run needs if `remove`.

  It keeps the stores of runs, stores in use, and the newest store of each name, which the next
  training would otherwise build again.

  Args:
    root: folder of the stores. places: folders that are searched for runs, with their subfolders.
    name: of the data whose stores are listed; '' for all. remove: whether to remove.

  Returns:
    A table: stores to remove, stores to keep with the reason, and the searched folders.

  Raises:
    UserError: `root` is not a folder, or no checkpoint of a run names its store.
  """
  if not root.is_dir():
    raise UserError(f'--stores={root} is not a folder')
  runs = {
    workdir: run_store.run_of(workdir) for place in places for workdir in _workdirs(place, root)
  }
  needed = {
    workdir: store_folder.locate(root, run.fingerprint)
    for workdir, run in runs.items()
    if run is not None
  }
  entries = [*_stores(root, name, needed), *_remains(root, name), *_compiled(root)]
  unneeded = [entry for entry in entries if not entry.reason]
  lines = [*aligned([('store', 'size'), *((x.folder.name, _size(x.size)) for x in entries)])]
  notes = ['', *(f'kept: {x.reason}' if x.reason else 'not needed' for x in entries)]
  lines = [f'{line}  {note}'.rstrip() for line, note in zip(lines, notes, strict=True)]
  searched = ' and '.join(map(str, places))
  lines.append(f'runs that need a store: {len(needed)}; only {searched} was searched for runs')
  if not unneeded:
    return '\n'.join([*lines, 'nothing to remove'])
  size = _size(sum(x.size for x in unneeded))
  what = f'{len(unneeded)} folder{"s" if len(unneeded) > 1 else ""}, {size}'
  if not remove:
    return '\n'.join([*lines, f'--yes removes {what}; nothing was removed'])
  for entry in unneeded:
    _remove(entry.folder)
  return '\n'.join([*lines, f'removed: {what}'])


def _workdirs(place: Path, root: Path) -> Iterator[Path]:
  """Yields the folders below a place that hold checkpoints. It does not follow symlinks further."""
  root = root.resolve()
  for folder, below, _ in os.walk(place.resolve()):
    linked = [path for x in below if (path := Path(folder, x)).is_symlink()]
    yield from (path for path in (Path(folder), *linked) if (path / CHECKPOINTS).is_dir())
    below[:] = [x for x in below if x != CHECKPOINTS and Path(folder, x) != root]


def _stores(root, name, needed) -> Iterator[Entry]:
  """Yields the stores, the newest first."""
  complete, names = {folder for folder, _ in store_folder.manifests(root, name)}, set()
  for folder in store_folder.folders(root, name):
    runs = [str(workdir) for workdir, store in needed.items() if store == folder]
    reason = f'{len(runs)} runs, {runs[0]} and others' if len(runs) > 1 else ''.join(runs)
    data = store_folder.name_of(folder)
    if data not in names and folder in complete:
      names.add(data)
      reason = reason or f'the newest of {data}'
    yield Entry(folder, _bytes(folder), reason or _in_use(folder / 'manifest.json'))


def _in_use(file: Path) -> str:
  """Returns 'in use' if another process holds the lock of a file, otherwise ''."""
  try:
    os.close(files.take_lock(file))
  except UserError:
    return 'in use'
  return ''


def _remains(root, name) -> Iterator[Entry]:
  """Yields the folders that killed commands have left."""
  for pattern in REMAINS:
    for folder in sorted(root.glob(pattern)):
      store = folder.name.removeprefix('.').rpartition('.')[0]
      lock = root / f'.{store}.lock'
      if not name or store_folder.name_of(Path(store)) == name:
        yield Entry(folder, _bytes(folder), _in_use(lock) if lock.exists() else '')


def _compiled(root) -> Iterator[Entry]:
  """Yields the folder of compiled programs, which JAX keeps below a size."""
  if (folder := root / compilation_cache.FOLDER).is_dir():
    yield Entry(folder, _bytes(folder), 'compiled programs')


def _remove(folder: Path):
  """Renames a folder, so that no part of it is used, and then deletes its files."""
  manifest, aside = folder / 'manifest.json', folder
  if not folder.name.startswith('.'):
    lock = files.take_lock(manifest)  # raises if another process uses it since
    aside = folder.with_name(f'.{folder.name}.removed')
    folder.rename(aside)
    os.close(lock)
  shutil.rmtree(aside)


def _bytes(folder: Path) -> int:
  return sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())


def _size(number: int) -> str:
  return f'{number / 1e6:,.1f} MB'
