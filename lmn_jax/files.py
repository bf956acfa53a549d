"""Files and folders: locks, JSON and text written as a whole, and the seal of a folder.

A lock lets one process at a time use a folder. It is the kernel's (flock), so it ends with the
process that holds it, however that ends; the text in the file is for the message alone. Many
processes read a store at once: they share its lock, and the one that removes the store takes it.

A seal holds the size and the CRC-32 of every file, so that damage is found. CRC-32 finds what disks
and copies do, at twice the speed of a cryptographic hash; it does not protect against forgery.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmn_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
  """Holds the lock that a file stands for.

  Args:
    path: the file, made if it is missing and never removed.
    wait: whether to wait for another holder.

  Raises:
    UserError: another process holds it, and `wait` is False.
  """
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      who = file.read().strip() or 'another process'
      raise UserError(
        f'{path.parent} is in use by {who}; wait until it has ended, or use another folder'
      ) from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def share_lock(path: Path) -> int:
  """Marks a file as in use by this process, beside others; its end, or `os.close`, takes it back.

  Who has it for himself has it for a moment, and is waited for.

  Args:
    path: of a file that is there.

  Returns:
    The descriptor that holds the lock.
  """
  file = os.open(path, os.O_RDONLY)
  fcntl.flock(file, fcntl.LOCK_SH)
  return file


def take_lock(path: Path) -> int:
  """Has a file for this process alone; the end of the process, or `os.close`, gives it back.

  Raises:
    UserError: another process uses it.
  """
  file = os.open(path, os.O_RDWR)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(file)
    raise UserError(f'{path.parent} is in use by another process') from None
  return file


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON as a whole or not at all; does nothing but on process 0.

  Args:
    path: file to write or replace; its folder is made.
    value: anything `jsonable` takes.
  """
  if jax.process_index() != 0:
    return
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + '\n')


def jsonable(value: Any) -> Any:
  """Plain JSON of mappings, sequences, numpy and JAX values, paths.

  Args:
    value: what to convert. Numbers that are not finite become 'nan', 'inf', '-inf': JSON has none.

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


def write_text(path: Path, text: str) -> None:
  """Writes a temporary sibling, then renames it, so that no reader sees a half-written file."""
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
  try:
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp makes files for the owner alone; results are for whoever may read the folder.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


SEAL = 'seal.json'


def seal(folder: Path, but: tuple[str, ...] = ()) -> None:
  """Writes seal.json, with the size and the CRC-32 of every file of a folder as it is now.

  Args:
    folder: to seal. but: names of files that may change afterwards.
  """
  sealed = {
    str(path.relative_to(folder)): [path.stat().st_size, _crc(path)]
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.name not in (SEAL, *but)
  }
  (folder / SEAL).write_text(json.dumps(sealed))


def flaw(folder: Path) -> str:
  """In words, how a folder differs from its seal: the first file that does; '' if none does."""
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
      return f'{name} has {path.stat().st_size} bytes and had {size}'
    if _crc(path) != crc:
      return f'{name} is not what was written (CRC-32)'
  return ''


def _crc(path: Path) -> int:
  found = 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      found = zlib.crc32(block, found)
  return found
