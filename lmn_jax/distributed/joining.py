"""Joins the processes of a command at its start, and leaves them at its end."""

import os
import sys
import threading
from typing import NoReturn

from lmn_jax.distributed import failure, preemption, processes
from lmn_jax.distributed.discovery import Place
from lmn_jax.errors import UserError

# JAX ends the other processes when one has sent no heartbeat for this time. JAX's default of 100 s
# holds a slice for longer than a restart takes.
HEARTBEAT_SECONDS = 40
# Within this time all processes must join. Hosts may build virtual environments before; no log is
# read yet.
START_SECONDS = 300

_threads: list[threading.Thread] = []


def start(place: Place | None) -> None:
  """Joins the other processes. Call it before JAX looks for devices.

  Returns when all have joined. If they do not join in time, the process ends with one line and
  status 2.

  Raises:
    UserError: no coordinator is found.
  """
  if place is None:
    return
  import jax

  # JAX uses it on CPU only.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # JAX's own service would catch SIGTERM, which then ends nothing.
  jax.config.update('jax_enable_preemption_service', False)
  if jax.config.jax_platforms == 'cpu':
    _silence_gloo()
  # JAX would abort the process, with a C++ stack trace.
  limit = threading.Timer(START_SECONDS, _give_up, (place,))
  limit.daemon = True
  limit.start()
  try:
    _connect(place)
  finally:
    limit.cancel()
  # Private, because JAX publishes neither the client of its coordination service (key-value store
  # and barriers) nor the number of processes before devices are set up: jax.process_count() and
  # jax.experimental.multihost_utils work on the devices, which a host that fails never reaches.
  from jax._src.distributed import global_state

  if global_state.num_processes == 1:
    return  # a slice of one host
  processes.enter(global_state.client, global_state.num_processes, global_state.process_id)
  for run in (failure.watch, preemption.agree_on_stop):
    _threads.append(threading.Thread(target=run, name=run.__name__, daemon=True))
    _threads[-1].start()


def _connect(place: Place) -> None:
  """Calls jax.distributed.initialize for a place."""
  import jax

  explicit = place.coordinator is not None
  local = explicit and place.coordinator.rpartition(':')[0] in ('127.0.0.1', 'localhost')
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.count,
      place.index,
      local_device_ids=None if place.device is None else [place.device],
      cluster_detection_method='deactivate' if explicit else None,
      initialization_timeout=START_SECONDS + 60,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      # The default listens on all network interfaces, also for processes of a single machine.
      coordinator_bind_address=place.coordinator if local else None,
    )
  except ValueError as error:
    raise UserError(
      f'--coordinator={place.coordinator or "auto"}: {failure.first_line(error)} auto is for TPU '
      'slices; elsewhere give --coordinator=HOST:PORT, --processes=N and --process=K'
    ) from error


def _give_up(place: Place) -> NoReturn:
  """Ends a process that the others did not join in time."""
  name = f'process {place.index} of {place.count}' if place.count else 'this host'
  where = f' at {place.coordinator}' if place.coordinator else ''
  print(
    f'error: {name} waited {START_SECONDS} s for all processes to join{where}; start all of them, '
    'with an address that each host can reach, and read the messages of the others',
    file=sys.stderr, flush=True,
  )  # fmt: skip
  os._exit(2)


def _silence_gloo() -> None:
  """Keeps standard output for results: Gloo, in C++, prints its connections there."""
  sys.stdout.flush()
  results = os.dup(1)
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1)
  os.close(null)
  sys.stdout = os.fdopen(results, 'w')


def stop() -> None:
  """Waits until every process is done, and leaves the others."""
  if processes.count() == 1:
    return
  import jax

  processes.wait('end')
  if processes.index() == 0:
    failure.end_watch()
    preemption.end_agreement()
  # A thread that is still in JAX's C++ code while Python ends aborts the process.
  for thread in _threads:
    thread.join()
  _threads.clear()
  processes.leave()
  jax.distributed.shutdown()
