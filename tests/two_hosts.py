"""Checks batches of a store on meshes with several orders of devices, on two hosts.

test_processes.py starts it twice:

python -m tests.two_hosts STORE COORDINATOR PROCESS
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from lmn_jax.data.batches import BatchSource
from lmn_jax.data.resident import Resident
from lmn_jax.distributed import joining
from lmn_jax.distributed import mesh as meshes
from lmn_jax.distributed.discovery import Place
from lmn_jax.training.trainer import compile_cut

AUTO = (AxisType.Auto, AxisType.Auto)


def main(store: str, coordinator: str, process: str) -> None:
  joining.start(Place(coordinator, 2, int(process)))
  devices = np.array(jax.devices())
  woven = devices.reshape(2, 4).T.reshape(-1)
  assert [device.process_index for device in woven] == [0, 1] * 4
  orders = {
    'in order': meshes.make_mesh(),
    'woven': Mesh(woven.reshape(8, 1), ('data', 'model'), axis_types=AUTO),
    'a model axis within hosts': meshes.make_mesh(4),
    'a model axis over hosts': meshes.make_mesh(8),
    'both': Mesh(woven.reshape(4, 2), ('data', 'model'), axis_types=AUTO),
  }
  for name, mesh in orders.items():
    rows = meshes.share(mesh, 32)
    everywhere = NamedSharding(mesh, meshes.REPLICATED)
    for shuffle in (False, True):
      arguments = (store, 'train', 32, 8, 3, shuffle)
      placed = meshes.place(mesh, BatchSource(*arguments, rows)[1])
      source = BatchSource(*arguments)
      resident = Resident(source, mesh)
      plan = meshes.replicated(mesh, source.plan(1))
      for batch in (placed, compile_cut(resident.cut, mesh)(resident.put(), plan)):
        gathered = jax.jit(lambda x: x, out_shardings=everywhere)(batch)
        for key, column in source[1].items():
          np.testing.assert_array_equal(gathered[key], column, err_msg=f'{name} {key}')
    print(f'{name}: {len(rows)} of 32')
  joining.stop()


if __name__ == '__main__':
  main(*sys.argv[1:])
