"""The columns of a store on the devices, from which they cut their batches themselves.

In place of batches, the host then sends the plan of each step, a few kB. Columns are cut into equal
slices along the axis `data` of the mesh; item features are on every device.

    resident = Resident(source, mesh)
    columns = resident.put()
    batch = jax.jit(resident.cut)(columns, source.plan(step))  # within meshes.use_mesh(mesh)
"""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lmn_jax.data import cuts
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.store_columns import Column
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError

CUTS = {BatchSource: cuts.ClickCut, LaneSource: cuts.LaneCut}
SHARED = ('events', 'users', 'items')  # columns that all splits of a store have in common
MOST = 2**31 - 1  # devices count with int32


class Resident:
  """The columns of a source on the devices.

  Attributes:
    cut: (columns, plan) -> the global batch, called under jit within `meshes.use_mesh(mesh)`.
      Those of equal settings are equal, also as static arguments.
    shapes: name -> shape, dtype and sharding of each column.
    bytes: of the columns on one device.
  """

  def __init__(
    self, source: BatchSource | LaneSource, mesh: Mesh, shared: dict[str, jax.Array] | None = None
  ):
    """Computes the shapes; nothing is sent.

    Args:
      source: of the batches.
      mesh: of the devices.
      shared: columns that the residents of other splits have sent, see `residents`.

    Raises:
      UserError: a column is too long for indices of 32 bits.
    """
    self._mesh, self._shared = mesh, {} if shared is None else shared
    self._columns = source.columns()
    slices = mesh.shape['data']
    self.cut = CUTS[type(source)].of(source, cuts.Slices(slices))
    for name, column in self._columns.items():
      _check(f'{source.store.path}: {name}', column, slices)
    self.shapes = {
      name: jax.ShapeDtypeStruct(
        (column.slices(slices) * column.words(slices),),
        np.int32,
        sharding=NamedSharding(mesh, meshes.REPLICATED if column.everywhere else meshes.BATCH),
      )
      for name, column in self._columns.items()
    }
    self.bytes = sum(self.bytes_of(name) for name in self.shapes)

  def bytes_of(self, name: str) -> int:
    """Bytes of a column on one device."""
    return 4 * self._columns[name].words(self._mesh.shape['data'])

  def put(self) -> dict[str, jax.Array]:
    """Sends the columns to the devices; those that splits share are sent once, see `residents`."""
    columns = {}
    for name in self.shapes:
      columns[name] = self._shared[name] if name in self._shared else self._send(name)
      if _is_shared(name):
        self._shared[name] = columns[name]
    return columns

  def _send(self, name: str) -> jax.Array:
    column, shape, slices = self._columns[name], self.shapes[name], self._mesh.shape['data']
    words = column.words(slices)
    # The transfer is intended; with several hosts JAX counts it as an implicit one.
    with jax.transfer_guard_host_to_device('allow'):
      return jax.make_array_from_callback(
        shape.shape,
        shape.sharding,
        lambda index: column.cut((index[0].start or 0) // words, slices),
      )


def residents(sources: Mapping[str, BatchSource | LaneSource], mesh: Mesh) -> dict[str, Resident]:
  """The residents of the splits of one store: columns that they share are sent once.

  The shared columns stay on the devices as long as one of the residents exists.

  Args:
    sources: by split; they read the same store with the same length. mesh: of the devices.
  """
  shared: dict[str, jax.Array] = {}
  return {split: Resident(source, mesh, shared) for split, source in sources.items()}


def bytes_of(several: Iterable[Resident]) -> int:
  """Bytes on one device of the columns of residents of one store."""
  total, shared = 0, set()
  for resident in several:
    new = resident.shapes.keys() - shared
    total += sum(map(resident.bytes_of, new))
    shared |= set(filter(_is_shared, new))
  return total


def _is_shared(name: str) -> bool:
  """Whether all splits of a store have a column in common, such as the events of any history."""
  return name.rpartition(':')[2] in SHARED


def _check(name: str, column: Column, slices: int) -> None:
  """Raises UserError for a column with places that do not fit int32."""
  places = max(column.slices(slices) * column.own(slices), column.words(slices))
  if places > MOST:
    raise UserError(
      f'{name} has {column.records:,} records of {column.width} values, {places:,} places, and '
      f"devices count up to {MOST:,}; set config.store_on='host'"
    )
