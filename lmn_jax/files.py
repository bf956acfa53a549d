"""Files and folders: locks, atomic writes, JSON, hashes, and the seal of a folder.

A lock lets one process at a time use a folder. It is a lock of the kernel (flock), so the kernel
releases it when the process that holds it ends, in whatever way. The text in the file only serves
the error message. Processes that read a store share its lock; the process that removes the store
holds the lock alone.

A seal holds the size and the CRC-32 of every file, so that damage is detected. CRC-32 detects the
errors of disks and copies at twice the speed of a cryptographic hash; it does not protect against
forgery.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmn_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
  """Holds the lock of a file for the duration of a `with` block.

  Args:
    path: the file; created if it is missing, never removed.
    wait: whether to wait while another process holds the lock.

  Raises:
    UserError: another process holds the lock, and `wait` is False.
  """
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or 'another process'
      raise UserError(
        f'{path.parent} is in use by {holder}; wait until it has ended, or use another folder'
      ) from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def share_lock(path: Path) -> int:
  """Takes a shared lock of a file; `os.close`, or the end of the process, releases it.

  Waits while another process holds the lock alone, which is for a moment.

  Args:
    path: an existing file.

  Returns:
    The file descriptor that holds the lock.
  """
  file = os.open(path, os.O_RDONLY)
  fcntl.flock(file, fcntl.LOCK_SH)
  return file


def take_lock(path: Path) -> int:
  """Takes the exclusive lock of a file; `os.close`, or the end of the process, releases it.

  Returns:
    The file descriptor that holds the lock.

  Raises:
    UserError: another process uses the file.
  """
  file = os.open(path, os.O_RDWR)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(file)
    raise UserError(f'{path.parent} is in use by another process') from None
  return file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Replaces a file atomically: no reader sees half of it, and an error leaves the old one.

  Args:
    path: the file to create or replace.

  Yields:
    A path in the same folder. The `with` block writes the new file there.
  """
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file atomically, on process 0 only.

  Args:
    path: the file to create or replace; its folder is created if it is missing.
    value: any value that `jsonable` accepts.
  """
  if jax.process_index() != 0:
    return
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + '\n')


def jsonable(value: Any) -> Any:
  """Converts mappings, sequences, numpy and JAX values and paths to plain JSON values.

  Args:
    value: what to convert. Numbers that are not finite become 'nan', 'inf', '-inf', which JSON has
      no form for.

  Returns:
    dicts, lists, strings, numbers, booleans and None.

  Raises:
    TypeError: for any other type.
  """
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  if isinstance(value, Mapping) or hasattr(value, 'items'):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(item) for item in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return jsonable(np.asarray(value).tolist())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f'{type(value).__name__} {value!r} has no JSON form')


def sha256(path: Path) -> str:
  """The sha256 of a file's content, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
  """The sha256 of the sha256 of each file, in order; the names of the files do not matter."""
  digests = b''.join(bytes.fromhex(sha256(path)) for path in paths)
  return hashlib.sha256(digests).hexdigest()


def flatten(
  tree: Any, children: Callable[[Any, str], Mapping | None], path: str = ''
) -> dict[str, Any]:
  """Flattens nested values to dotted path -> value.

  Args:
    tree: the values. children: (value, its path) -> the mapping to descend into; None, or an empty
      one, for a value. path: of `tree`.
  """
  below = children(tree, path)
  if not below:
    return {path: tree}
  return {
    name: value
    for key, child in below.items()
    for name, value in flatten(child, children, f'{path}.{key}' if path else str(key)).items()
  }


SEAL = 'seal.json'


def seal(folder: Path, but: tuple[str, ...] = ()) -> None:
  """Writes seal.json, with the current size and CRC-32 of every file of a folder.

  Args:
    folder: the folder to seal.
    but: names of files that may change afterwards and are not sealed.
  """
  sealed = {
    str(path.relative_to(folder)): [path.stat().st_size, _crc(path)]
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.name not in (SEAL, *but)
  }
  (folder / SEAL).write_text(json.dumps(sealed))


def flaw(folder: Path) -> str:
  """How the first file that differs from a folder's seal differs, in words; '' if none does."""
  try:
    sealed = {
      Path(name): (int(size), int(crc))
      for name, (size, crc) in json.loads((folder / SEAL).read_text()).items()
    }
  except FileNotFoundError:
    return f'it has no {SEAL}'
  except (ValueError, TypeError, AttributeError) as error:
    return f'{SEAL} is damaged ({error})'
  for name, (size, crc) in sealed.items():
    path = folder / name
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes, {size} expected'
    if _crc(path) != crc:
      return f'{name} has another CRC-32 than when it was written'
  return ''


def _crc(path: Path) -> int:
  crc = 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
  return crc
