"""Damage to checkpoints: found by their seals before they are read, and moved out of the way.

seal.json of a step holds the size and the CRC-32 of each of its files (files.py).
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.files import flaw
from lmn_jax.training.step_folders import last_kept, step_folder, steps_of

log = logging.getLogger(__name__)

ASIDE = 'spoilt'  # beside the checkpoints: those that do not fit their seal any more
# Errors of a disk that the user can repair, and how TensorStore, in C++, words them.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
WORDED = tuple(map(os.strerror, DISK))


def set_aside(folder: Path) -> None:
  """Moves the newest steps that are damaged out of the way, until one is sound, and logs them.

  Args:
    folder: of the checkpoints, `workdir/checkpoints`; damaged ones go to `workdir/spoilt`.

  Raises:
    UserError: there are steps, and all are damaged: whether to begin anew is the user's decision.
  """
  if processes.index() == 0:
    for path, damage in _newest_damaged(folder):
      place = folder.parent / ASIDE / path.name
      place.parent.mkdir(exist_ok=True)
      shutil.rmtree(place, ignore_errors=True)
      path.rename(place)
      log.warning('checkpoint %s is spoilt: %s; it is now %s', path, damage, place)
  processes.wait('sound')


def _newest_damaged(folder):
  """(folder, damage) of the steps that are newer than the newest sound one."""
  damaged = []
  for step in reversed(steps_of(folder)):
    path = step_folder(folder, step)
    damage = flaw(path)
    if not damage:
      return damaged
    damaged.append((path, damage))
  if damaged:
    path, damage = damaged[0]
    raise UserError(
      f'{path} is spoilt: {damage}; no other checkpoint is sound, so the run cannot go on: bring '
      f'{folder} back from a copy, or delete it to begin anew'
    )
  return damaged


def check_sound(path: Path) -> None:
  """Refuses the folder of a step that is damaged; host 0 reads it, for all.

  Raises:
    UserError: naming the first file that differs from the seal.
  """
  damage = flaw(path) if processes.index() == 0 else ''
  if damage:
    raise UserError(
      f'{path} is spoilt: {damage}; bring it back from a copy, or delete that folder: the best of '
      'the checkpoints that are left is then used'
    )
  processes.wait('checked')


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
  """Within, errors of the disk that Orbax raises become one line.

  Args:
    folder: of the checkpoints.

  Raises:
    UserError: of a full, a read-only or a broken disk.
  """
  try:
    yield
  except Exception as error:
    message = ' '.join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    cause = os.strerror(code) if code in DISK else next((x for x in WORDED if x in message), '')
    if not cause:
      raise
    raise UserError(
      f'{folder}: {cause}; {last_kept(folder)}. Make room, or see to the disk; the same command '
      'goes on'
    ) from error
