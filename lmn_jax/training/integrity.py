"""Detects damaged checkpoints by their seals before they are read, and moves them aside.

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
from lmn_jax.training.step_folders import last_good, step_folder, steps_of

log = logging.getLogger(__name__)

ASIDE = 'spoilt'  # folder beside the checkpoints, for those that do not match their seal
# Errors of a disk that the user can correct, and the texts of them in TensorStore's errors.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
DISK_TEXTS = tuple(map(os.strerror, DISK))


def set_aside(folder: Path) -> None:
  """Moves the damaged steps that are newer than the newest sound one aside, and logs them.

  Args:
    folder: of the checkpoints, `workdir/checkpoints`; damaged ones move to `workdir/spoilt`.

  Raises:
    UserError: there are steps, and all are damaged: whether to start again is the user's decision.
  """
  if processes.index() == 0:
    for path, damage in _newest_damaged(folder):
      place = folder.parent / ASIDE / path.name
      place.parent.mkdir(exist_ok=True)
      shutil.rmtree(place, ignore_errors=True)
      path.rename(place)
      log.warning('checkpoint %s is damaged: %s; moved to %s', path, damage, place)
  processes.wait('sound')


def _newest_damaged(folder):
  """Returns (folder, damage) of the steps that are newer than the newest sound one."""
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
      f'{path} is damaged: {damage}; no other checkpoint is sound, so the run cannot continue: '
      f'restore {folder} from a copy, or delete it to start again'
    )
  return damaged


def check_sound(path: Path) -> None:
  """Checks that the folder of a step matches its seal; host 0 reads it for all.

  Raises:
    UserError: it is damaged; it names the first file that differs from the seal.
  """
  damage = flaw(path) if processes.index() == 0 else ''
  if damage:
    raise UserError(
      f'{path} is damaged: {damage}; restore it from a copy, or delete that folder to use the best '
      'of the other checkpoints'
    )
  processes.wait('checked')


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
  """Within, errors of the disk that Orbax raises become a UserError.

  Args:
    folder: of the checkpoints.

  Raises:
    UserError: the disk is full, read-only or broken.
  """
  try:
    yield
  except Exception as error:
    message = ' '.join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    cause = os.strerror(code) if code in DISK else next((x for x in DISK_TEXTS if x in message), '')
    if not cause:
      raise
    raise UserError(
      f'{folder}: {cause}; {last_good(folder)}. Free space or repair the disk; the same command '
      'then continues'
    ) from error
