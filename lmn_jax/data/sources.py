"""What a store is made of: the files of the log, each known by its place and its content.

A file is known by its path below the fixed part of its pattern, its size and its sha256: neither
another folder, another name of the folder, nor other times make another log. To read every file for
that each time would take long, so the hash of a file is kept with what the file system says of it,
and trusted while that is the same; it says nothing reliable of a file that was written just now.
"""

import json
import time
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import ml_collections

from lmn_jax.data.readers import paths, registry
from lmn_jax.data.readers.reader import Reader
from lmn_jax.errors import UserError
from lmn_jax.files import sha256

MADE = 4  # raise when the same log and config make another store; those made before still open
# The coarsest clock of a file system; a file that changed since then may change again unseen.
SETTLED_NS = 2 * 10**9
PATTERNS = (
  'times_source', 'users_source', 'items_source', 'source', 'valid_source', 'test_source'
)  # fmt: skip
# What neither the log is nor how it is read: where a store is kept, and how much memory that takes.
APART = ('name', 'memory_limit')


class Look(NamedTuple):
  """What the file system says of a file; any change of its content changes it."""

  size: int
  mtime_ns: int
  ctime_ns: int
  inode: int


def _reader(data: ml_collections.ConfigDict) -> Reader:
  return registry.reader_of(data.source, data.format, 'config.data.source')


def look(data: ml_collections.ConfigDict) -> dict[tuple[str, str], tuple[Path, Look]]:
  """The files of a log, in the order in which they are read.

  Args:
    data: `config.data(...)`.

  Returns:
    (field, path below the fixed part of the field's pattern) -> the file and what is said of it.

  Raises:
    UserError: a file is missing.
  """
  found = {}
  for field in PATTERNS:
    if not data[field]:
      continue
    files_of = _reader(data).signature if field == 'source' else paths.named
    for name, path in files_of(data[field], f'config.data.{field}').items():
      said = path.stat()
      found[field, name] = path, Look(said.st_size, said.st_mtime_ns, said.st_ctime_ns, said.st_ino)
  return found


class Hashes:
  """sha256 of files.

  Attributes:
    known: path -> what was said of the file when it was hashed, and the hash; JSON-able.
  """

  def __init__(self, known: dict[str, list] | None = None):
    self.known = known or {}

  def of(self, path: Path, said: Look) -> str:
    """The hash of a file, read only if it is not known. said: of the file, now."""
    name = str(path.absolute())
    state, found = [*said], self.known.pop(name, [None, ''])
    if found[0] != state:
      began = time.time_ns()
      found = [state, sha256(path)]
      if began - max(said.mtime_ns, said.ctime_ns) < SETTLED_NS:
        return found[1]
    self.known[name] = found
    return found[1]


def signature(data: ml_collections.ConfigDict, hashes: Hashes | None = None) -> dict[str, Any]:
  """Describes the source as JSON: equal signatures make equal stores.

  Args:
    data: `config.data(...)`. hashes: those that are known, and take those that are made.

  Returns:
    'made': how stores are made; 'files': name, size and sha256 of every file, in the order in which
    they are read; 'config.data': every field that makes a difference.

  Raises:
    UserError: a file is missing.
  """
  hashes = hashes or Hashes()
  files = [
    {'name': f'{field}/{name}', 'size': said.size, 'sha256': hashes.of(path, said)}
    for (field, name), (path, said) in look(data).items()
  ]
  fields = json.loads(data.to_json_best_effort())
  reader = _reader(data)
  named = ('source',) if reader.by_name else ()
  for field in {*APART, *PATTERNS} - {*named}:
    del fields[field]
  fields['format'] = data.format or reader.name
  return {'made': MADE, 'files': files, 'config.data': fields}


def changed(signature: dict[str, Any], data: ml_collections.ConfigDict) -> str:
  """In words, how a log has changed since a store was made; '' if not, or if there is no log.

  No file is read: that some have other names or sizes is seen, another content of that size not.

  Args:
    signature: of the store, of any version. data: `config.data(...)`.
  """
  try:
    now = look(data)
  except (UserError, OSError):
    return ''
  before = [(PurePath(file['name']).name, file['size']) for file in signature.get('files', ())]
  after = [(path.name, said.size) for path, said in now.values()]
  if not before or sorted(before) == sorted(after):
    return ''
  return f'{_sum(before)} then, {_sum(after)} now'


def _sum(files: list[tuple[str, int]]) -> str:
  return f'{len(files)} file{"s" if len(files) > 1 else ""} of {sum(x for _, x in files):,} bytes'
