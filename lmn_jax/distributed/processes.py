"""The processes that train together: their number, barriers, and checks that they agree.

Each host runs one process, and process 0 writes all files that exist once. With a single process
every function here returns at once, and JAX is not imported.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lmn_jax.errors import UserError

T = TypeVar('T')

# A host may wait for another one that prepares a large log. A wait ends by the message of a host
# that fails (failure.py) or by a missing heartbeat, never by this limit.
WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000


class _Joined(NamedTuple):
  """client: of JAX's coordination service. count, index: of the processes."""

  client: Any
  count: int
  index: int


_joined: _Joined | None = None
_barriers = 0


def enter(client: Any, count: int, index: int) -> None:
  """Records that this process has joined others; `joining.start` calls it.

  Args:
    client: of JAX's coordination service. count: number of processes. index: of this one.
  """
  global _joined
  _joined = _Joined(client, count, index)


def leave() -> None:
  """Records that this process is alone again; `joining.stop` calls it."""
  global _joined
  _joined = None


def count() -> int:
  """Returns the number of processes that have joined; 1 for a single process."""
  return 1 if _joined is None else _joined.count


def index() -> int:
  """Returns the number of this process among them."""
  return 0 if _joined is None else _joined.index


def client() -> Any:
  """Returns the client of JAX's coordination service; there are several processes."""
  return _joined.client


def check_alone(processes: int) -> None:
  """Checks that all processes that JAX sees were started together.

  Args:
    processes: `jax.process_count()`, for which a TPU runtime asks its slice.

  Raises:
    UserError: this process was started alone, on one host of a slice of several.
  """
  if processes != count():
    raise UserError(
      f'this is one of {processes} hosts of a TPU slice, started alone; use ./launch.sh --tpu=NAME '
      '--zone=ZONE, or start it on each of them with --coordinator=auto'
    )


def wait(name: str) -> None:
  """Returns when every process has called it. All processes call it in the same order."""
  global _barriers
  if count() > 1:
    _barriers += 1
    client().wait_at_barrier(f'lmn_jax/{name}/{_barriers}', WAIT_MILLISECONDS)


def first_then_others(make: Callable[[], T]) -> T:
  """Returns `make()`, called on process 0 first and then on the others at once.

  The others reuse the files that process 0 writes to a shared disk.
  """
  if index() == 0:
    result = make()
    wait('made')
    return result
  wait('made')
  return make()


def agree(
  what: str, value: dict, differences: Callable[[dict, dict], list[str]], remedy: str
) -> None:
  """Checks that all processes have the same value.

  Args:
    what: the name of the value, such as 'config'. value: JSON-able.
    differences: (value of process 0, value of this process) -> phrases. remedy: for the error.

  Raises:
    UserError: the value differs from that of process 0; it names the first difference.
  """
  if count() == 1:
    return
  key = f'lmn_jax/agree/{what}'
  if index() == 0:
    client().key_value_set(key, json.dumps(value))
  else:
    first_value = json.loads(client().blocking_key_value_get(key, WAIT_MILLISECONDS))
    changes = differences(first_value, value)
    if changes:
      more = f' (and {len(changes) - 1} more)' if len(changes) > 1 else ''
      raise UserError(f'the {what} differs from that of host 0: {changes[0]}{more}; {remedy}')
  wait(what)


def check_shared(folder: Path, patience: float = 5.0) -> None:
  """Checks that a folder is the same one on every host; process 0 creates it if it is missing.

  Args:
    folder: of the run.
    patience: seconds within which a file of process 0 must appear; network disks take some.

  Raises:
    UserError: this host does not see the folder of host 0.
  """
  if count() == 1:
    return
  key = 'lmn_jax/shared'
  if index() == 0:
    mark = folder / f'.hosts-{secrets.token_hex(8)}'
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
      client().key_value_set(key, mark.name)
      wait('shared')
    finally:
      mark.unlink()
    return
  mark = folder / client().blocking_key_value_get(key, WAIT_MILLISECONDS)
  deadline = time.monotonic() + patience
  while not mark.exists():
    if time.monotonic() > deadline:
      raise UserError(
        f'--workdir={folder} is not the same folder as on host 0, and checkpoints are written by '
        'all hosts; use a folder on a disk they share'
      )
    time.sleep(0.1)
  wait('shared')
