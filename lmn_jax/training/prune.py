"""Stores that nobody needs: which they are, why others are kept, and removal on demand."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmn_jax import files
from lmn_jax.data import store_folder
from lmn_jax.errors import UserError
from lmn_jax.evaluation.report import aligned
from lmn_jax.training import run_store
from lmn_jax.training.trained_run import CHECKPOINTS

LEFT = ('.*.building', '.*.removed')  # what a command that was killed leaves, of ours


class Entry(NamedTuple):
  """A folder among the stores. kept: why it stays; '' if it may go."""

  folder: Path
  size: int
  kept: str


def prune(root: Path, places: list[Path], name: str = '', remove: bool = False) -> str:
  """Says which stores no run needs, and removes them if it is told to.

  Kept are the stores of the runs that are found, what is in use, and the newest of each name, which
  the next training would have to make again.

  Args:
    root: folder of the stores. places: folders in which, and in the folders of which, runs are
      looked for. name: of the data whose stores are meant; '' for all. remove: whether to remove.

  Returns:
    A table: what goes, what stays and why, and where runs were looked for.

  Raises:
    UserError: no such folder; a run does not say which store it is of.
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
  entries = [*_judged(root, name, needed), *_left(root, name)]
  gone = [entry for entry in entries if not entry.kept]
  lines = [*aligned([('store', 'size'), *((x.folder.name, _size(x.size)) for x in entries)])]
  whys = ['', *(f'kept: {x.kept}' if x.kept else 'to go' for x in entries)]
  lines = [f'{line}  {why}'.rstrip() for line, why in zip(lines, whys, strict=True)]
  looked = ' and '.join(map(str, places))
  lines.append(f'runs that need a store: {len(needed)}; others may lie elsewhere than in {looked}')
  if not gone:
    return '\n'.join([*lines, 'nothing to remove'])
  what = f'{len(gone)} folder{"s" if len(gone) > 1 else ""}, {_size(sum(x.size for x in gone))}'
  if not remove:
    return '\n'.join([*lines, f'--yes removes {what}; nothing was removed'])
  for entry in gone:
    _remove(entry.folder)
  return '\n'.join([*lines, f'removed: {what}'])


def _workdirs(place: Path, root: Path) -> Iterator[Path]:
  """The folders that hold checkpoints, below a place, also by a link; no link is gone into."""
  root = root.resolve()
  for folder, below, _ in os.walk(place.resolve()):
    linked = [path for x in below if (path := Path(folder, x)).is_symlink()]
    yield from (path for path in (Path(folder), *linked) if (path / CHECKPOINTS).is_dir())
    below[:] = [x for x in below if x != CHECKPOINTS and Path(folder, x) != root]


def _judged(root, name, needed) -> Iterator[Entry]:
  """The stores, the newest first, each with why it is kept."""
  whole, seen = {folder for folder, _ in store_folder.manifests(root, name)}, set()
  for folder in store_folder.folders(root, name):
    kept = [str(workdir) for workdir, own in needed.items() if own == folder]
    why = f'{len(kept)} runs, {kept[0]} and others' if len(kept) > 1 else ''.join(kept)
    of = store_folder.name_of(folder)
    if of not in seen and folder in whole:
      seen.add(of)
      why = why or f'the newest of {of}'
    yield Entry(folder, _bytes(folder), why or _used(folder / 'manifest.json'))


def _used(file: Path) -> str:
  """Why a folder cannot be had for oneself; '' if it can."""
  try:
    os.close(files.take_lock(file))
  except UserError:
    return 'in use'
  return ''


def _left(root, name) -> Iterator[Entry]:
  """What was left by commands that were killed."""
  for pattern in LEFT:
    for folder in sorted(root.glob(pattern)):
      of = folder.name.removeprefix('.').rpartition('.')[0]
      own = root / f'.{of}.lock'
      if not name or store_folder.name_of(Path(of)) == name:
        yield Entry(folder, _bytes(folder), _used(own) if own.exists() else '')


def _remove(folder: Path):
  """Takes a folder away as a whole, and then its files."""
  manifest, aside = folder / 'manifest.json', folder
  if not folder.name.startswith('.'):
    held = files.take_lock(manifest)  # raises if it has come into use meanwhile
    aside = folder.with_name(f'.{folder.name}.removed')
    folder.rename(aside)
    os.close(held)
  shutil.rmtree(aside)


def _bytes(folder: Path) -> int:
  return sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())


def _size(number: int) -> str:
  return f'{number / 1e6:,.1f} MB'
