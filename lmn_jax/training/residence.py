"""Decides whether the history store is on the devices or on the host."""

import logging
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from lmn_jax.data import resident
from lmn_jax.data.resident import Resident
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.training.program import State

log = logging.getLogger(__name__)
SHARE = 0.25  # of the memory beside the state: 'auto' leaves the rest to the step
MIB = 2**20


def candidates(
  config: ml_collections.ConfigDict, sources: dict[str, Any], mesh: Mesh
) -> dict[str, Resident]:
  """Returns the store on the devices by split, before its size is checked; {} for the host.

  Args:
    config: the whole experiment; `store_on` is read. sources: batches by split. mesh: of the
      devices.

  Raises:
    UserError: it is 'device', and a number of the store does not fit into 32 bits.
  """
  place = config.store_on
  if place == 'host' or (place == 'auto' and meshes.platform_of(mesh) == 'cpu'):
    return {}
  try:
    return resident.residents(sources, mesh)
  except UserError as error:
    if place == 'device':
      raise UserError(f"config.store_on='device': {error}") from None
    log.warning('the store stays on the host: %s', error)
    return {}


def fits(
  config: ml_collections.ConfigDict, residents: dict[str, Resident], abstract: State, mesh: Mesh
) -> bool:
  """Whether the store fits on the devices beside the state.

  Args:
    config: as for `candidates`. residents: by split. abstract: the state's shapes and shardings.
    mesh: of the devices.

  Raises:
    UserError: it does not, and config.store_on='device'.
  """
  store, memory = resident.bytes_of(residents.values()), memory_of(mesh)
  state = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract)
  )
  free = memory - state
  if store <= (free if config.store_on == 'device' else SHARE * free):
    return True
  sizes = (
    f'the store takes {store / MIB:,.1f} MiB on each device, the state {state / MIB:,.1f}, and a '
    f'device has {memory / MIB:,.1f}'
  )
  if config.store_on == 'device':
    raise UserError(f"config.store_on='device': {sizes}; use 'auto' or 'host', or more devices")
  log.warning('the store stays on the host: %s', sizes)
  return False


def memory_of(mesh: Mesh) -> int:
  """The memory of a device in bytes, of the one of this host that has the least.

  The devices of a CPU share the memory that the machine has available.
  """
  devices = mesh.local_devices
  stats = [device.memory_stats() for device in devices]
  if all(stats):
    return min(x['bytes_limit'] for x in stats)
  lines = Path('/proc/meminfo').read_text().splitlines()
  kilobytes = next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable'))
  return kilobytes * 1024 // len(devices)
