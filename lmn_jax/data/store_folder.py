"""The folder of stores: where each store is and which logs it was built from.

A store is in `NAME-FINGERPRINT`, with the name of its data and the first digits of its fingerprint,
and is never changed: the store of another log is beside it. In earlier versions there was one store
`NAME`, which was built again when its log changed; such a store is opened like the others and never
changed.

    NAME-0123456789abcdef/   a store
    .NAME.lock               the lock of the process that builds a store of that name
    .NAME.building/          a store under construction
    .NAME.index.json         signatures of logs of existing stores; hashes of the logs' files
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lmn_jax.data.sources import Hashes
from lmn_jax.data.store import Store, read_manifest
from lmn_jax.errors import UserError
from lmn_jax.files import write_text

DIGITS = 16  # of the fingerprint in a folder's name


class NoStore(UserError):
  """There is no store with a fingerprint."""


def folder_of(root: Path, name: str, fingerprint: str) -> Path:
  """The folder of a store. name: of the data."""
  return root / f'{name}-{fingerprint[:DIGITS]}'


def name_of(folder: Path) -> str:
  """The name of the data in the name of a store's folder."""
  return re.sub(rf'-[0-9a-f]{{{DIGITS}}}$', '', folder.name)


def folders(root: Path, name: str = '') -> list[Path]:
  """The folders that have a manifest, the newest first. name: of the data; '' for all."""
  ages = [
    (path.stat().st_mtime_ns, path.parent)
    for path in root.glob('*/manifest.json')
    if name in ('', name_of(path.parent)) and not path.parent.name.startswith('.')
  ]
  return [folder for _, folder in sorted(ages, reverse=True)]


def manifests(root: Path, name: str = '') -> Iterator[tuple[Path, dict]]:
  """Yields the folders as `folders` does, each with its manifest; skips damaged manifests."""
  for folder in folders(root, name):
    try:
      yield folder, read_manifest(folder)
    except UserError:
      continue  # `find` opens a folder by its name and reports the damage


def is_called(manifest: dict, fingerprint: str) -> bool:
  """Whether a store is the one that a run of any version knows by a fingerprint."""
  return fingerprint in (manifest.get('fingerprint'), manifest.get('content'))


def locate(root: Path, fingerprint: str) -> Path | None:
  """The folder of the store that a run knows by a fingerprint, or None."""
  for folder in folders(root):
    if folder.name.endswith(f'-{fingerprint[:DIGITS]}'):
      return folder
  # `fingerprint` before `content`: a store with the same files but other notes is second choice.
  for key in ('fingerprint', 'content'):
    for folder, manifest in manifests(root):
      if manifest.get(key) == fingerprint:
        return folder
  return None


def find(root: Path, fingerprint: str) -> Store:
  """Opens the store that a run knows by a fingerprint, and sets this as its fingerprint.

  Raises:
    NoStore: there is none.
    UserError: it is damaged.
  """
  folder = locate(root, fingerprint)
  if folder is None:
    raise NoStore(
      f'{root} has no store with the fingerprint {fingerprint[:DIGITS]}; give its folder with '
      '--stores, or build it again from the same log with --mode=prepare'
    )
  store = Store(folder)
  store.fingerprint = fingerprint
  return store


class Index:
  """What is known about the logs of one name. It is a cache: lost entries are computed again.

  Attributes:
    hashes: of the logs' files.
  """

  def __init__(self, root: Path, name: str):
    """Reads the index. The caller holds the lock of the name from here until `write`."""
    self._path = root / f'.{name}.index.json'
    try:
      content = json.loads(self._path.read_text())
      self._signatures, self.hashes = dict(content['signatures']), Hashes(dict(content['hashes']))
    except (OSError, ValueError, TypeError, KeyError):
      self._signatures, self.hashes = {}, Hashes()

  def signatures(self, folder: Path) -> list[dict]:
    """The signatures of logs of a store, except for the one in its manifest."""
    return self._signatures.get(folder.name, [])

  def add(self, folder: Path, signature: dict) -> None:
    """Adds the signature of a log whose store is in `folder`."""
    self._signatures.setdefault(folder.name, []).append(signature)

  def write(self) -> None:
    """Writes the index atomically, without the stores that do not exist any more."""
    existing = {x: y for x, y in self._signatures.items() if (self._path.parent / x).is_dir()}
    write_text(self._path, json.dumps({'signatures': existing, 'hashes': self.hashes.entries}))
