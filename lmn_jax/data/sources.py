"""The signature of a log: its files, by name and content, and the config fields that matter.

A file is identified by its path relative to the fixed folder of its pattern, its size and its
sha256, so a log may be moved to another folder or touched without becoming another log. Reading
every file for its hash takes long. A hash is therefore kept with the status of its file, and reused
while the status is the same. It is not kept for a file that was written just now, which may change
again within the resolution of the file system's clock.
"""

import json
import time
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import ml_collections

from lmn_jax.data import vectors
from lmn_jax.data.readers import paths, registry
from lmn_jax.data.readers.reader import Reader
from lmn_jax.errors import UserError
from lmn_jax.files import sha256

# Increase it when the same log and config give another store. Earlier stores still open.
BUILD_VERSION = 4
SETTLED_NS = 2 * 10**9  # the coarsest resolution of a file system's clock
PATTERNS = (
  'times_source', 'users_source', 'items_source', 'source', 'valid_source', 'test_source'
)  # fmt: skip
# Fields that do not change the content of a store.
IGNORED = ('name', 'memory_limit')


class FileStatus(NamedTuple):
  """The status of a file in the file system; any change of its content changes the status."""

  size: int
  mtime_ns: int
  ctime_ns: int
  inode: int


def _reader(data: ml_collections.ConfigDict) -> Reader:
  return registry.reader_of(data.source, data.format, 'config.data.source')


def stat_files(data: ml_collections.ConfigDict) -> dict[tuple[str, str], tuple[Path, FileStatus]]:
  """Returns the files of a log, in the order in which they are read.

  Args:
    data: `config.data(...)`.

  Returns:
    (field, path relative to the fixed folder of the field's pattern) -> the file and its status.

  Raises:
    UserError: if a file is missing.
  """
  by_field = {}
  for field in PATTERNS:
    if data[field]:
      files_of = _reader(data).signature if field == 'source' else paths.files_by_name
      by_field[field] = files_of(data[field], f'config.data.{field}')
  by_field |= {f'vectors/{source.key}': source.files() for source in vectors.sources_of(data)}
  return {
    (field, name): (path, _status(path))
    for field, files in by_field.items()
    for name, path in files.items()
  }


def _status(path: Path) -> FileStatus:
  stat = path.stat()
  return FileStatus(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Hashes:
  """sha256 of files.

  Attributes:
    entries: path -> the status of the file when it was hashed, and the hash; can be written as
      JSON.
  """

  def __init__(self, entries: dict[str, list] | None = None):
    self.entries = entries or {}

  def sha256(self, path: Path, status: FileStatus) -> str:
    """Returns the hash of a file; reads it only if there is no entry with its present status."""
    name = str(path.absolute())
    state, entry = [*status], self.entries.pop(name, [None, ''])
    if entry[0] != state:
      began = time.time_ns()
      entry = [state, sha256(path)]
      if began - max(status.mtime_ns, status.ctime_ns) < SETTLED_NS:
        return entry[1]
    self.entries[name] = entry
    return entry[1]


def signature(data: ml_collections.ConfigDict, hashes: Hashes | None = None) -> dict[str, Any]:
  """Describes the log as JSON: equal signatures give equal stores.

  Args:
    data: `config.data(...)`. hashes: entries of files hashed before; gets those of this log.

  Returns:
    'made': BUILD_VERSION; 'files': name, size and sha256 of every file, in the order in which they
    are read; 'config.data': every field that changes the store.

  Raises:
    UserError: if a file is missing.
  """
  hashes = hashes or Hashes()
  files = [
    {'name': f'{field}/{name}', 'size': status.size, 'sha256': hashes.sha256(path, status)}
    for (field, name), (path, status) in stat_files(data).items()
  ]
  fields = json.loads(data.to_json_best_effort())
  reader = _reader(data)
  identifying = ('source',) if reader.by_name else ()
  for field in {*IGNORED, *PATTERNS} - {*identifying}:
    del fields[field]
  fields['format'] = data.format or reader.name
  for source in vectors.sources_of(data):  # the paths do not change a store
    kind, _, name = source.key.partition('.')
    fields[f'{kind}_vectors'][name] = '' if source.is_numpy else source.part
  return {'made': BUILD_VERSION, 'files': files, 'config.data': fields}


def describe_change(signature: dict[str, Any], data: ml_collections.ConfigDict) -> str:
  """Describes how a log has changed since a store was made; '' if it has not, or is not there.

  No file is read: other names and sizes are noticed, other content of the same size is not.

  Args:
    signature: of the store, of any version. data: `config.data(...)`.
  """
  try:
    files = stat_files(data)
  except (UserError, OSError):
    return ''
  before = [(PurePath(file['name']).name, file['size']) for file in signature.get('files', ())]
  after = [(path.name, status.size) for path, status in files.values()]
  if not before or sorted(before) == sorted(after):
    return ''
  return f'{_total(before)} then, {_total(after)} now'


def _total(files: list[tuple[str, int]]) -> str:
  return f'{len(files)} file{"s" if len(files) > 1 else ""} of {sum(x for _, x in files):,} bytes'
