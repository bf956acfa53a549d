"""The folder of compiled programs: JAX's persistent compilation cache.

A program that was compiled once is loaded by later processes. JAX's key of a program contains its
operations, the versions of JAX and XLA, the flags of XLA, and the kind and number of devices, on
CPU also the instructions that it has: machines of different kinds may share a folder. A user who
can write into the folder can run code in processes that read it, as with the checkpoints beside it.

Of several hosts the first one writes, and all read.
"""

import logging
import os
from pathlib import Path

import filelock
import jax

from lmn_jax.distributed import processes

FOLDER = '.compiled'  # among the stores, in a workdir, or beside an export
OFF = 'off'  # in place of a folder: programs are not stored
# Options of JAX, unless their environment variables are set. The programs of an experiment take
# about a megabyte on CPU; those that are used least recently are removed. Programs that compile in
# less time are not stored: each would cost a file and a search of the folder.
OPTIONS = {
  'jax_compilation_cache_max_size': 2**31,
  'jax_persistent_cache_min_compile_time_secs': 0.1,
}
LOCK, LOCK_S = '.lockfile', 10  # JAX's lock of the folder, and the seconds that JAX waits for it

log = logging.getLogger(__name__)


def enable(folder: Path | None) -> None:
  """Lets JAX store compiled programs in a folder, and load them from it.

  The first call of a process counts. A folder that the user has set in JAX, such as by
  JAX_COMPILATION_CACHE_DIR, is used in place of this one. If the folder cannot be used, a warning
  says why, and programs are compiled as without it.

  Args:
    folder: created if it is missing; None stores nothing.
  """
  if folder is None or jax.config.jax_compilation_cache_dir is not None:
    return
  folder = folder.resolve()  # on GPU the path is part of a program's key
  if processes.index() == 0:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with filelock.FileLock(folder / LOCK, timeout=LOCK_S):
        _remove_incomplete(folder)
    except (OSError, NotImplementedError) as error:  # the latter from disks without locks
      log.warning(
        'compiled programs are not stored: %s: %s; --compilation_cache=FOLDER names another '
        'folder, --compilation_cache=%s none', folder, ' '.join(str(error).split()), OFF,
      )  # fmt: skip
      return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  for name, value in OPTIONS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def _remove_incomplete(folder):
  """Removes the programs that a process was writing when it was killed.

  JAX would fail to read such a program, and to add others, as long as it exists. The caller holds
  the lock of the folder.
  """
  for program in folder.glob('*-cache'):
    if not program.with_name(f'{program.name.removesuffix("-cache")}-atime').exists():
      program.unlink()
