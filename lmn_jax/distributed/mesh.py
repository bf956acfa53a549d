"""The mesh and every PartitionSpec, each declared once.

Axes: `data` (examples) and `model` (table rows). Table rows are sharded over both axes, dense
parameters are replicated.
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
STACKED = P(None, 'data')  # batches of several steps
ROWS = P(('data', 'model'))
REPLICATED = P()
PLATFORMS = ('cpu', 'gpu', 'tpu')


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of all devices, `model` of them along the model axis and the rest along data.

  Args:
    model: devices along the model axis.
    devices: devices to use; by default those JAX runs on. plan.py compiles for others.

  Raises:
    UserError: `model` does not divide the number of devices; or JAX has no devices of
      JAX_PLATFORMS, or of another platform than PLATFORMS.
  """
  devices = own_devices() if devices is None else devices
  count = len(devices)
  if model < 1 or count % model:
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    raise UserError(
      f'config.mesh.model={model} does not divide the number of devices, {count}; use '
      f'{" or ".join(map(str, divisors))}'
    )
  # Auto axes: linen does not support Explicit ones, the default of make_mesh since jax 0.9.
  axes = (AxisType.Auto, AxisType.Auto)
  mesh = jax.make_mesh((count // model, model), ('data', 'model'), axes, devices=devices)
  platform_of(mesh)  # refuses another platform before anything is computed
  return mesh


def own_devices() -> list[jax.Device]:
  """Returns the devices that JAX runs on.

  Raises:
    UserError: JAX has none of the platform that JAX_PLATFORMS names.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter without a message
    cause = (str(error) or 'JAX finds no device').splitlines()[0].split(' (set JAX')[0]
    raise UserError(
      f'JAX_PLATFORMS={jax.config.jax_platforms!r}: {cause}; set it to cpu, or install JAX for the '
      'platform (docs/how_to/accelerators.md)'
    ) from None


def use_mesh(mesh: Mesh) -> AbstractContextManager:
  """Returns a context within which traced functions use this mesh: see `each_device`."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def use_platform(name: str) -> AbstractContextManager:
  """Returns a context within which functions are traced for one device of a platform."""
  device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=name)
  axes = (AxisType.Auto, AxisType.Auto)
  mesh = jax.sharding.AbstractMesh((1, 1), ('data', 'model'), axes, abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu', for which traced functions are compiled.

  It is the platform of the devices of the mesh in use (`use_mesh`), which may be devices that this
  process does not have (plan.py); without a mesh, the one that JAX runs on.

  Raises:
    UserError: it is another platform.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return _known(jax.default_backend() if device is None else device.platform)


def platform_of(mesh: Mesh) -> str:
  """Returns 'cpu', 'gpu' or 'tpu', the platform of the devices of a mesh.

  Raises:
    UserError: it is another platform.
  """
  return _known(mesh.devices.flat[0].platform)


def _known(name: str) -> str:
  """Returns the platform of a name of JAX."""
  name = {'cuda': 'gpu', 'rocm': 'gpu'}.get(name, name)
  if name not in PLATFORMS:
    raise UserError(
      f'JAX runs on the platform {name!r}; lmn_jax runs on {", ".join(PLATFORMS)}; set '
      'JAX_PLATFORMS=cpu, or install JAX for a GPU or TPU'
    )
  return name


def each_device(fn: Callable, over: Any, out: Any) -> Callable:
  """Returns `fn` run by every device on its own shard; without a mesh (`use_mesh`), `fn` itself.

  It avoids what XLA would otherwise do: gather a batch on every device to sort it, or sum over
  devices in each iteration of a loop. Gradients of replicated arrays are summed once.

  Args:
    fn: of arrays, with no dependence between examples.
    over: PartitionSpecs of its arguments. out: of its results.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return fn
  return jax.shard_map(fn, in_specs=over, out_specs=out, check_vma=False)


def share(mesh: Mesh, size: int) -> np.ndarray:
  """Returns the rows of a global batch of `size` on this host's devices: int64, ascending.

  They do not follow from the host's number and the number of hosts: the order of TPU devices in the
  mesh depends on their links, and along a model axis hosts hold the same rows. Returns all rows if
  no device is of this host (plan.py).
  """
  slices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,))
  if not slices:
    return np.arange(size)
  return np.unique(np.concatenate([np.arange(size)[index] for index in slices.values()]))


def place(mesh: Mesh, batch: Any, spec: P = BATCH) -> Any:
  """Returns global arrays, sharded over `data`, from this host's `share` of them.

  Args:
    mesh: of the devices. batch: arrays. spec: BATCH, or STACKED for the batches of several steps.
  """
  sharding = NamedSharding(mesh, spec)
  # The transfer is intended; with several hosts JAX counts it as an implicit one.
  with jax.transfer_guard_host_to_device('allow'):
    if jax.process_count() == 1:  # all arrays in one call: half the time of a call for each
      return jax.device_put(batch, sharding)
    return jax.tree.map(
      lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def replicated(mesh: Mesh, values: Any) -> Any:
  """Returns numbers or arrays, the same on all hosts, as arrays on every device."""
  sharding = NamedSharding(mesh, REPLICATED)
  with jax.transfer_guard_host_to_device('allow'):
    if jax.process_count() == 1:
      return jax.device_put(values, sharding)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda _, x=x: np.asarray(x)),
      values,
    )


def gather(mesh: Mesh, share: np.ndarray) -> np.ndarray:
  """Returns a column of a global batch, on every host, from each host's `share` of it."""
  if jax.process_count() == 1:
    return share
  return jax.device_get(_everywhere(place(mesh, share), NamedSharding(mesh, REPLICATED)))


@functools.partial(jax.jit, static_argnums=1)
def _everywhere(x, sharding):
  return jax.lax.with_sharding_constraint(x, sharding)


LANES = 128  # lanes of a TPU; narrower rows are padded, or stored column by column


def rows_format(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding | Format:
  """Returns the sharding, and on TPU the layout, of an array with an entry for each table row.

  By default a TPU stores rows of, say, 96 columns column by column, which wastes no lanes, and then
  copies the whole table to row order and back in every step. Narrow rows keep the default: padded
  they would take more than twice their memory.
  """
  sharding = NamedSharding(mesh, ROWS)
  if platform_of(mesh) != 'tpu' or len(shape) != 2 or 2 * shape[1] < LANES:
    return sharding
  return Format(Layout((0, 1)), sharding)
