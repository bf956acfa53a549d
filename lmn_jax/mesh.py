"""The mesh and every PartitionSpec, declared once.

Axes: `data` (examples) and `model` (table rows). Table rows lie over both axes, dense parameters
on every device.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmn_jax.errors import UserError

BATCH = P('data')
ROWS = P(('data', 'model'))
REPLICATED = P()


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices, `model` of them along the model axis and the rest along data.

  Args:
    model: devices along the model axis.
    devices: those to use; by default the ones JAX runs on. Others are compiled for (plan.py).

  Raises:
    UserError: if `model` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if model < 1 or count % model:
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    raise UserError(
      f'config.mesh.model={model} does not divide the number of devices, {count}; use '
      f'{" or ".join(map(str, divisors))}'
    )
  # Auto axes: make_mesh's default is Explicit since jax 0.9, which linen is not written for.
  axes = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((count // model, model), ('data', 'model'), axes, devices=devices)


def share(mesh: Mesh, size: int) -> np.ndarray:
  """The rows of a global batch of `size` that lie on this host's devices: int64, ascending.

  Neither the host's number nor the number of hosts says which: the order of a TPU's devices in the
  mesh follows its wires, and along a model axis hosts hold the same rows. All rows, if the devices
  are only compiled for (plan.py).
  """
  lies = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,))
  if not lies:
    return np.arange(size)
  return np.unique(np.concatenate([np.arange(size)[index] for index in lies.values()]))


def place(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this host's `share` of a batch on the devices as global arrays, sharded over `data`."""
  sharding = NamedSharding(mesh, BATCH)
  # Here the transfer is meant; among several hosts JAX takes it for an implicit one.
  with jax.transfer_guard_host_to_device('allow'):
    return {
      name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
    }
