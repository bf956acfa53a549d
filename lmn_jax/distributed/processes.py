"""One program on several hosts: how they find each other, agree, wait for each other, and end.

Each host runs the same process; JAX calls them processes, and host 0 writes all that is written
once. With one host nothing here does anything, and JAX is not even imported.

A host that fails puts its message where the others see it: each has a thread that waits for such a
message and ends the process. Without it they would wait in a collective that never comes to an end.
"""

import contextlib
import json
import multiprocessing
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from lmn_jax.errors import UserError

T = TypeVar('T')

# A host that says nothing for so long is dead; the others are then ended by JAX. JAX's default of
# 100 s holds a slice for longer than a restart takes.
HEARTBEAT_SECONDS = 40
# For all hosts to come. Virtual environments may be made on the way, logs are not yet read.
START_SECONDS = 300
# A host may wait for another one that prepares a large log. What ends a wait is the other's
# message or the missing heartbeat, not the clock.
WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000
# For the others to have read the message of a failure, before host 0, which keeps it, ends.
FAREWELL_SECONDS = 5
FAILED = 'lmn_jax/failed'
NOTICE = 'lmn_jax/notice'
LOST = re.compile(r'[Gg]loo|NCCL|UNAVAILABLE|[Cc]onnection (closed|reset|refused)|[Hh]eartbeat')


class Place(NamedTuple):
  """Where a process stands among others; all None: JAX asks the TPU slice it runs on.

  coordinator: HOST:PORT of host 0. count: of processes. index: of this one. device: the only one
  of the node's accelerators it uses, or None for all of them.
  """

  coordinator: str | None
  count: int | None
  index: int | None
  device: int | None = None


class _Joined(NamedTuple):
  """client: of JAX's coordination service. count, index: of processes. threads: for messages."""

  client: Any
  count: int
  index: int
  threads: tuple[threading.Thread, ...]


class _Stop:
  """step: the last before which this host asked whether to stop. at: where all do, once agreed."""

  def __init__(self):
    self.lock, self.step, self.at = threading.Lock(), -1, None


_joined: _Joined | None = None
_stop = _Stop()
_ending = threading.Lock()  # never released: one thread ends the process
_waits = 0


def find(
  coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Place | None:
  """Where this process stands, of its flags or else its environment; None if it is alone.

  Args:
    coordinator: HOST:PORT of process 0, or 'auto' on a TPU slice; None takes LMN_COORDINATOR.
    processes: how many; None takes LMN_PROCESSES. process: which; None takes LMN_PROCESS.
    environ: the environment; a Slurm step of several tasks is found in it, and a TPU slice of
      several hosts under Kubernetes.

  Raises:
    UserError: for what does not belong together, or lies out of its bounds.
  """
  given = {'coordinator': coordinator, 'processes': processes, 'process': process}
  for name, value in given.items():
    told = environ.get(f'LMN_{name.upper()}', '')
    if value is None and told:
      if name != 'coordinator' and not told.isdecimal():
        raise UserError(f'LMN_{name.upper()}={told!r} must be a whole number from 0 on')
      given[name] = told if name == 'coordinator' else int(told)
  coordinator, processes, process = given.values()
  if coordinator == 'auto':
    return Place(None, None, None)
  if any(value is not None for value in given.values()):
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if missing:
      raise UserError(
        f'{" and ".join(missing)} missing: --coordinator=HOST:PORT, --processes=N and --process=K '
        'belong together (--coordinator=auto, on a TPU slice, stands alone)'
      )
    if not re.fullmatch(r'.+:\d+', coordinator):
      raise UserError(
        f'--coordinator={coordinator!r} must be HOST:PORT, with the port free on process 0, or auto'
      )
    if not 0 <= process < processes:
      raise UserError(f'--process={process} must be in 0..{processes - 1} of --processes')
    return Place(coordinator, processes, process) if processes > 1 else None
  if int(environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
    return _of_slurm(environ)
  workers = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES', '')
  if ',' in workers and environ.get('JAX_PLATFORMS') != 'cpu':
    return Place(None, None, None)
  return None


def _of_slurm(environ: Mapping[str, str]) -> Place:
  """The place of a task of a step. JAX's own would show each task one device only."""
  # node01 | node01,node02 | node[01-16,20] | rack[1-2]n[01-04]: the first of them.
  first = re.sub(r'\[(\w+)[^\]]*\]', r'\1', re.match(r'(?:\[[^\]]*\]|[^,\[])+', environ[
    'SLURM_STEP_NODELIST'
  ])[0])  # fmt: skip
  # As JAX chooses it: two jobs on one node have two ports.
  port = 61440 + int(environ['SLURM_JOB_ID']) % 4096
  tasks = int(environ['SLURM_STEP_NUM_TASKS'])
  shared = tasks > int(environ['SLURM_STEP_NUM_NODES'])
  return Place(
    f'{first}:{port}',
    tasks,
    int(environ['SLURM_PROCID']),
    int(environ['SLURM_LOCALID']) if shared else None,
  )


def start(place: Place | None) -> None:
  """Joins the others; call it before any device is asked for. Returns when all have come.

  If they do not come in time, the process ends with a line and status 2.

  Raises:
    UserError: if no coordinator is found.
  """
  global _joined
  if place is None:
    return
  import jax

  # JAX looks for it on CPU only.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It would catch SIGTERM, which then ends nothing.
  jax.config.update('jax_enable_preemption_service', False)
  if jax.config.jax_platforms == 'cpu':
    _silence_gloo()
  found = place.coordinator is not None
  local = found and place.coordinator.rpartition(':')[0] in ('127.0.0.1', 'localhost')
  # JAX would abort the process, with a stack of C++.
  patience = threading.Timer(START_SECONDS, _give_up, (place,))
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      *place[:3],
      local_device_ids=None if place.device is None else [place.device],
      cluster_detection_method='deactivate' if found else None,
      initialization_timeout=START_SECONDS + 60,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      # Else a rehearsal would listen to the whole network.
      coordinator_bind_address=place.coordinator if local else None,
    )
  except ValueError as error:
    raise UserError(
      f'--coordinator={place.coordinator or "auto"}: {_short(error)} Auto is for TPU slices; '
      'elsewhere give --coordinator=HOST:PORT, --processes=N and --process=K'
    ) from error
  finally:
    patience.cancel()
  # The service's client has no public name; Orbax and multihost_utils take it from here too.
  from jax._src.distributed import global_state

  if global_state.num_processes == 1:
    return  # a slice of one host
  _joined = _Joined(
    global_state.client, global_state.num_processes, global_state.process_id,
    tuple(threading.Thread(target=x, name=x.__name__, daemon=True) for x in (_watch, _heed)),
  )  # fmt: skip
  for thread in _joined.threads:
    thread.start()


def _give_up(place: Place) -> NoReturn:
  """Ends a process that has waited in vain."""
  who = f'process {place.index} of {place.count}' if place.count else 'this host'
  where = f' at {place.coordinator}' if place.coordinator else ''
  print(
    f'error: {who} waited {START_SECONDS} s for all to meet{where}; start all of them, with an '
    'address that each can reach, and see what the others say',
    file=sys.stderr, flush=True,
  )  # fmt: skip
  os._exit(2)


def _silence_gloo() -> None:
  """Keeps standard output to the results: Gloo, in C++, tells there of its connections."""
  sys.stdout.flush()
  ours = os.dup(1)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)
  sys.stdout = os.fdopen(ours, 'w')


def count() -> int:
  """How many hosts have been joined; 1 if none."""
  return 1 if _joined is None else _joined.count


def index() -> int:
  """Which of them this is."""
  return 0 if _joined is None else _joined.index


def check_alone(processes: int) -> None:
  """Refuses to be one of several that JAX sees but that were not started together.

  Args:
    processes: as `jax.process_count()` says. A TPU's own runtime knows its slice.
  """
  if processes != count():
    raise UserError(
      f'this is one of {processes} hosts of a TPU slice, started alone; use ./launch.sh --tpu=NAME '
      '--zone=ZONE, or start it on each of them with --coordinator=auto'
    )


def wait(name: str) -> None:
  """Returns when every host has come here. All hosts call it in the same order."""
  global _waits
  if count() > 1:
    _waits += 1
    _joined.client.wait_at_barrier(f'lmn_jax/{name}/{_waits}', WAIT_MILLISECONDS)


def first_then_others(make: Callable[[], T]) -> T:
  """`make()` on host 0, then on the others at once: what it leaves on a shared disk is reused."""
  if index() == 0:
    made = make()
    wait('made')
    return made
  wait('made')
  return make()


def agree(
  what: str, value: dict, differences: Callable[[dict, dict], list[str]], remedy: str
) -> None:
  """Refuses to go on unless all hosts have the same value.

  Args:
    what: its name, such as 'config'. value: JSON-able. differences: (host 0's, this one's) ->
      phrases. remedy: what to do.

  Raises:
    UserError: on a host whose value is not that of host 0, naming the first difference.
  """
  if count() == 1:
    return
  key = f'lmn_jax/agree/{what}'
  if index() == 0:
    _joined.client.key_value_set(key, json.dumps(value))
  else:
    changes = differences(
      json.loads(_joined.client.blocking_key_value_get(key, WAIT_MILLISECONDS)), value
    )
    if changes:
      more = f' (and {len(changes) - 1} more)' if len(changes) > 1 else ''
      raise UserError(f'another {what} than on host 0: {changes[0]}{more}; {remedy}')
  wait(what)


def check_shared(folder: Path, patience: float = 5.0) -> None:
  """Refuses a folder that is not the same one on every host; makes it where it is missing.

  Args:
    folder: of the run. patience: seconds after which a file of host 0 must be seen; network disks
      take some.

  Raises:
    UserError: on a host that does not see host 0's folder.
  """
  if count() == 1:
    return
  client, key = _joined.client, 'lmn_jax/shared'
  if index() == 0:
    mark = folder / f'.hosts-{secrets.token_hex(8)}'
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
      client.key_value_set(key, mark.name)
      wait('shared')
    finally:
      mark.unlink()
    return
  mark = folder / client.blocking_key_value_get(key, WAIT_MILLISECONDS)
  deadline = time.monotonic() + patience
  while not mark.exists():
    if time.monotonic() > deadline:
      raise UserError(
        f'--workdir={folder} is not the same folder as on host 0, and checkpoints are written by '
        'all hosts; use a folder on a disk they share'
      )
    time.sleep(0.1)
  wait('shared')


def stop() -> None:
  """Leaves, when every host has come to its end."""
  global _joined
  if _joined is None:
    return
  import jax

  wait('end')
  if index() == 0:
    _joined.client.key_value_set(FAILED, 'null')
    give_notice('null')
  # A thread that is left in JAX's C++ while Python ends aborts the process.
  for thread in _joined.threads:
    thread.join()
  _joined = None
  jax.distributed.shutdown()


def give_notice(notice: str = 'stop') -> None:
  """Tells all hosts that one of them is about to be taken: they stop together, see `stop_here`."""
  if count() > 1:
    with contextlib.suppress(Exception):  # another host was first, or this one has been lost
      _joined.client.key_value_set(NOTICE, notice)


def stop_here(step: int) -> bool:
  """Whether all hosts stop after `step` steps, since one of them was given notice.

  Each host asks before each step. They are not at the same step when the notice comes: a host may
  have sent a step that waits for the others. So they stop where the foremost will ask next.
  """
  with _stop.lock:
    _stop.step = step
    return _stop.at is not None and step >= _stop.at


def _heed() -> None:
  """Waits for a notice, and agrees with the other hosts where to stop."""
  client, hosts, me, _ = _joined
  try:
    if client.blocking_key_value_get(NOTICE, WAIT_MILLISECONDS) == 'null':
      return  # `stop`
    with _stop.lock:  # until all have agreed this host begins no further step
      client.key_value_set(f'{NOTICE}/{me}', str(_stop.step))
      steps = [
        int(client.blocking_key_value_get(f'{NOTICE}/{host}', WAIT_MILLISECONDS))
        for host in range(hosts)
      ]
      _stop.at = max(steps) + 1
  except Exception:
    return  # a host is lost: `_watch` ends this one


def end(message: str, status: int) -> NoReturn:
  """Ends this process and all others, each with the same line. The first message counts.

  Args:
    message: one line. status: the exit status of all.
  """
  _ending.acquire()
  client, _, me, _ = _joined
  told = own = {'host': me, 'status': status, 'message': message}
  try:
    client.key_value_set(FAILED, json.dumps(own))
  except Exception:  # another host was first, or host 0, which keeps the message, is gone
    try:
      told = json.loads(client.blocking_key_value_get(FAILED, 1000)) or own
    except Exception:
      told = own
  _leave(told)


def explain(error: BaseException) -> str:
  """One line on an error that is nobody's mistake here."""
  said = f'{type(error).__name__}: {_short(error)}'
  if LOST.search(said):
    return f'another host does not answer, it may have been killed or lost its network ({said})'
  return said


def _short(error: BaseException) -> str:
  """The first line of an error, not longer than a line should be."""
  return (str(error).strip().splitlines() or [''])[0][:300]


def _watch() -> None:
  """Waits for the message of a host that fails, and ends this process with it."""
  client, _, me, _ = _joined
  told = None
  while told is None:
    try:
      told = json.loads(client.blocking_key_value_get(FAILED, WAIT_MILLISECONDS))
      if told is None:
        return  # `stop`: all is well
    except Exception as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        # Host 0, which keeps the messages, has ended without one.
        told = {'host': me, 'status': 1, 'message': f'host 0 is gone ({_short(error)})'}
  _ending.acquire()
  _leave(told)


def _leave(told: dict) -> NoReturn:
  """Prints the message and ends the process at once, without JAX's wait for the others."""
  client, hosts, me, _ = _joined
  print(f'error: host {told["host"]}: {told["message"]}', file=sys.stderr)
  for worker in multiprocessing.active_children():
    worker.kill()
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    client.key_value_set(f'{FAILED}/seen/{me}', '')
    if me == 0:
      # Whom JAX sees host 0 leave, it aborts: the others go first.
      deadline = time.monotonic() + FAREWELL_SECONDS
      for host in range(1, hosts):
        left = int(1000 * (deadline - time.monotonic()))
        client.blocking_key_value_get(f'{FAILED}/seen/{host}', max(left, 1))
      time.sleep(1)
  except Exception:
    pass  # a host that is lost says nothing; it ends all the same
  os._exit(told['status'])
