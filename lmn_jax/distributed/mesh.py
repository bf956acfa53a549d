"""The mesh and every PartitionSpec, declared once.

Axes: `data` (examples) and `model` (table rows). Table rows lie over both axes, dense parameters
on every device.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
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


def known(mesh: Mesh) -> AbstractContextManager:
  """While it lasts, what is traced finds this mesh: see `each_device`."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def each_device(fn: Callable, over: Any, out: Any) -> Callable:
  """A function that every device of the `known` mesh runs on what it has; `fn` itself without one.

  For what XLA would do on every device for all: bring a batch together to sort it, or sum over
  devices in each round of a loop. Gradients of what lies on every device are summed once.

  Args:
    fn: of arrays, each device's examples by themselves. over, out: its PartitionSpecs.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return fn
  return jax.shard_map(fn, in_specs=over, out_specs=out, check_vma=False)


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


def place(mesh: Mesh, batch: Any) -> Any:
  """Puts this host's `share` of arrays on the devices as global ones, sharded over `data`."""
  sharding = NamedSharding(mesh, BATCH)
  # Here the transfer is meant; among several hosts JAX takes it for an implicit one.
  with jax.transfer_guard_host_to_device('allow'):
    if jax.process_count() == 1:  # all arrays together: half of the time of one by one
      return jax.device_put(batch, sharding)
    return jax.tree.map(
      lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def whole(mesh: Mesh, value: np.generic) -> jax.Array:
  """A number that all hosts have, on every device."""
  with jax.transfer_guard_host_to_device('allow'):
    return jax.make_array_from_callback(
      np.shape(value), NamedSharding(mesh, REPLICATED), lambda _: np.asarray(value)
    )


def gather(mesh: Mesh, share: np.ndarray) -> np.ndarray:
  """The whole of a column of a global batch, on every host, from each host's `share` of it."""
  if jax.process_count() == 1:
    return share
  return jax.device_get(_everywhere(place(mesh, share), NamedSharding(mesh, REPLICATED)))


@functools.partial(jax.jit, static_argnums=1)
def _everywhere(x, sharding):
  return jax.lax.with_sharding_constraint(x, sharding)


LANES = 128  # of a TPU: rows that do not fill them are padded, or stored column by column


def rows_format(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding | Format:
  """How an array with an entry for each row of a table lies: its sharding, and on TPU its layout.

  A TPU would store rows of, say, 96 columns column by column, which wastes no lanes, and then copy
  the whole table to rows and back in every step. Narrow rows are left to it: padded they would take
  more than twice their memory.
  """
  sharding = NamedSharding(mesh, ROWS)
  if mesh.devices.flat[0].platform != 'tpu' or len(shape) != 2 or 2 * shape[1] < LANES:
    return sharding
  return Format(Layout((0, 1)), sharding)
