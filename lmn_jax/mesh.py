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


def place(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this host's share of a batch on the devices as global arrays, sharded over `data`."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }
