"""The folder of stores, and which of them is which.

A store lies in `NAME-FINGERPRINT`, NAME of its data and the first digits of what it holds, and is
never changed: what is made of another log lies beside it. Before, there was one `NAME`, built again
when its log changed; it is opened as the others are, and left as it is.

    NAME-0123456789abcdef/   a store
    .NAME.lock               who makes a store of that name
    .NAME.building/          that store, until it is whole
    .NAME.index.json         logs that make a store which is there; hashes of their files
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lmn_jax.data.sources import Hashes
from lmn_jax.data.store import Store, read_manifest
from lmn_jax.errors import UserError

DIGITS = 16  # of the fingerprint in a folder's name


class NoStore(UserError):
  """There is no store of a fingerprint."""


def folder_of(root: Path, name: str, fingerprint: str) -> Path:
  """Where a store belongs."""
  return root / f'{name}-{fingerprint[:DIGITS]}'


def name_of(folder: Path) -> str:
  """The name of the data, of a store's folder."""
  return re.sub(rf'-[0-9a-f]{{{DIGITS}}}$', '', folder.name)


def folders(root: Path, name: str = '') -> list[Path]:
  """The folders that have a manifest, the newest first. name: of the data; '' for all."""
  found = [
    (path.stat().st_mtime_ns, path.parent)
    for path in root.glob('*/manifest.json')
    if name in ('', name_of(path.parent)) and not path.parent.name.startswith('.')
  ]
  return [path for _, path in sorted(found, reverse=True)]


def manifests(root: Path, name: str = '') -> Iterator[tuple[Path, dict]]:
  """The stores that can be read, as `folders`, each with its manifest."""
  for folder in folders(root, name):
    try:
      yield folder, read_manifest(folder)
    except UserError:
      continue  # who looks for that one looks by its name


def is_called(manifest: dict, fingerprint: str) -> bool:
  """Whether a store is the one that a run knows by a fingerprint, of any version."""
  return fingerprint in (manifest.get('fingerprint'), manifest.get('content'))


def locate(root: Path, fingerprint: str) -> Path | None:
  """The folder of the store that a run knows by a fingerprint; None if it is not here."""
  for folder in folders(root):
    if folder.name.endswith(f'-{fingerprint[:DIGITS]}'):
      return folder
  # `fingerprint` before `content`: a store that is the same in its files only is the second choice.
  for key in ('fingerprint', 'content'):
    for folder, manifest in manifests(root):
      if manifest.get(key) == fingerprint:
        return folder
  return None


def find(root: Path, fingerprint: str) -> Store:
  """Opens the store that a run knows by a fingerprint, which it then goes by.

  Raises:
    NoStore: there is none.
    UserError: it is damaged.
  """
  folder = locate(root, fingerprint)
  if folder is None:
    raise NoStore(
      f'no store of the fingerprint {fingerprint[:DIGITS]} lies in {root}; give its folder with '
      '--stores, or make it again of the same log with --mode=prepare'
    )
  store = Store(folder)
  store.fingerprint = fingerprint
  return store


class Index:
  """What is known of the logs of one name; a cache: whatever is lost is found again.

  Attributes:
    hashes: of the logs' files.
  """

  def __init__(self, root: Path, name: str):
    """Reads it. Hold the lock of the name from here until `write`."""
    self._path = root / f'.{name}.index.json'
    try:
      found = json.loads(self._path.read_text())
      self._signatures, self.hashes = dict(found['signatures']), Hashes(dict(found['hashes']))
    except (OSError, ValueError, TypeError, KeyError):
      self._signatures, self.hashes = {}, Hashes()

  def signatures(self, folder: Path) -> list[dict]:
    """Of logs that were found to make this store, beside the one in its manifest."""
    return self._signatures.get(folder.name, [])

  def add(self, folder: Path, signature: dict) -> None:
    """Notes that a log makes this store."""
    self._signatures.setdefault(folder.name, []).append(signature)

  def write(self) -> None:
    """Writes it as a whole or not at all; what is of stores that are gone is left out."""
    kept = {x: y for x, y in self._signatures.items() if (self._path.parent / x).is_dir()}
    writing = self._path.with_name(f'{self._path.name}.writing')
    writing.write_text(json.dumps({'signatures': kept, 'hashes': self.hashes.known}))
    os.replace(writing, self._path)
