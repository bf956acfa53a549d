"""Finds the place of this process among the others: in its flags or in its environment."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from lmn_jax.errors import UserError


class Place(NamedTuple):
  """The place of a process among the others. All None: JAX asks the TPU slice.

  coordinator: HOST:PORT of process 0. count: number of processes. index: number of this process.
  device: the only accelerator of the node that this process uses, or None for all of them.
  """

  coordinator: str | None
  count: int | None
  index: int | None
  device: int | None = None


def find(
  coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Place | None:
  """Returns the place that the flags or else the environment name; None for a single process.

  Args:
    coordinator: HOST:PORT of process 0, or 'auto' on a TPU slice; None reads LMN_COORDINATOR.
    processes: number of processes; None reads LMN_PROCESSES.
    process: number of this process; None reads LMN_PROCESS.
    environ: the environment. It also names a Slurm step of several tasks, and a TPU slice of
      several hosts under Kubernetes.

  Raises:
    UserError: a value is missing or out of its bounds.
  """
  values = {'coordinator': coordinator, 'processes': processes, 'process': process}
  for name, value in values.items():
    text = environ.get(f'LMN_{name.upper()}', '')
    if value is None and text:
      if name != 'coordinator' and not text.isdecimal():
        raise UserError(f'LMN_{name.upper()}={text!r} must be a whole number of at least 0')
      values[name] = text if name == 'coordinator' else int(text)
  if values['coordinator'] == 'auto':
    return Place(None, None, None)
  if any(value is not None for value in values.values()):
    return _checked(**values)
  if int(environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
    return _slurm_place(environ)
  workers = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES', '')
  if ',' in workers and environ.get('JAX_PLATFORMS') != 'cpu':
    return Place(None, None, None)
  return None


def _checked(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
  """Returns the place that three values name; None for a single process."""
  values = {'coordinator': coordinator, 'processes': processes, 'process': process}
  missing = [f'--{name}' for name, value in values.items() if value is None]
  if missing:
    raise UserError(
      f'{" and ".join(missing)} missing: give --coordinator=HOST:PORT, --processes=N and '
      '--process=K together, or on a TPU slice --coordinator=auto alone'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise UserError(
      f'--coordinator={coordinator!r} must be HOST:PORT, with the port free on process 0, or auto'
    )
  if not 0 <= process < processes:
    raise UserError(f'--process={process} must be in 0..{processes - 1} of --processes')
  return Place(coordinator, processes, process) if processes > 1 else None


def _slurm_place(environ: Mapping[str, str]) -> Place:
  """Returns the place of a task of a Slurm step.

  JAX can find it too, but then shows each task one device only.
  """
  # The first node of node01 | node01,node02 | node[01-16,20] | rack[1-2]n[01-04].
  nodes = environ['SLURM_STEP_NODELIST']
  first = re.match(r'(?:\[[^\]]*\]|[^,\[])+', nodes)[0]
  first = re.sub(r'\[(\w+)[^\]]*\]', r'\1', first)
  # JAX chooses the port in the same way: two jobs on one node have two ports.
  port = 61440 + int(environ['SLURM_JOB_ID']) % 4096
  tasks = int(environ['SLURM_STEP_NUM_TASKS'])
  shared = tasks > int(environ['SLURM_STEP_NUM_NODES'])
  return Place(
    f'{first}:{port}',
    tasks,
    int(environ['SLURM_PROCID']),
    int(environ['SLURM_LOCALID']) if shared else None,
  )
