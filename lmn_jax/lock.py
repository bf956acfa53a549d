"""One process at a time in a folder: two that write the same files would spoil them.

The lock is the kernel's (flock), so it ends with the process that holds it, however that ends; what
the file says is for the message alone. A store is used by many at once: they share its lock, and
who would remove it takes it.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lmn_jax import hosts
from lmn_jax.errors import UserError


@contextlib.contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
  """Holds the lock that a file stands for.

  Args:
    path: the file, made if it is missing and never removed.
    wait: whether to wait for another holder. If not, the lock is of a run, which its hosts share:
      the first of them holds it.

  Raises:
    UserError: another process holds it, and `wait` is False.
  """
  if hosts.index() > 0 and not wait:
    yield
    return
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


def share(path: Path) -> int:
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


def take(path: Path) -> int:
  """Has a file for this process alone, as `share`.

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
