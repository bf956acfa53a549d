"""TPU slices that a program can be compiled for without having one, and the peak rates of chips."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lmn_jax.errors import UserError, one_of

PLANAR = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
SOLID = '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16'

# Names of GPUs, of NVIDIA's and AMD's.
GPU = re.compile(r'(?i)(gpu|cuda|rocm|nvidia|[abhl]\d{1,3}|v100|t4|gb\d|mi\d)')


class Chip(NamedTuple):
  """A TPU chip.

  hbm: memory, GiB. bandwidth: of the memory, GB/s. flops: peak in bfloat16, TFLOP/s. links: from
  other chips, GB/s over all links. clock: GHz. slices: shapes of the slices that exist.
  """

  hbm: int
  bandwidth: int
  flops: int
  links: int
  clock: float
  slices: str


# Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, where links are counted both ways; links
# of v4: Jouppi et al., TPU v4, 2023. The clock is the peak over 2 operations for each
# multiply-adder: 8, 4 and 8 units of 128 x 128 for v4, v5e and v5p, 4 of 256 x 256 for v6e.
CHIPS = {
  'v4': Chip(32, 1200, 275, 300, 1.05, SOLID),
  'v5e': Chip(16, 819, 197, 200, 1.5, PLANAR),
  'v5p': Chip(95, 2765, 459, 600, 1.75, SOLID),
  'v6e': Chip(32, 1600, 918, 400, 1.75, PLANAR),
}


def slice_of(topology: str) -> list[jax.Device]:
  """Returns the devices of a slice such as 'v5e:16x16', to compile for. JAX runs on the CPU.

  Raises:
    UserError: the slice is unknown, or the compiler is not installed.
  """
  if not topology:
    raise UserError('--mode=plan needs a TPU slice; for example --topology=v5e:16x16')
  if GPU.match(topology):
    raise UserError(
      f'--topology={topology!r}: only TPU slices are planned, such as v5e:16x16; on a GPU run '
      'experiments/accelerator.py'
    )
  slices = [f'{name}:{shape}' for name, chip in CHIPS.items() for shape in chip.slices.split()]
  one_of('--topology', topology, slices)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      '--mode=plan needs the TPU compiler, libtpu, which is not installed; '
      f'pip install "jax[tpu]=={jax.__version__}"'
    )
  jax.config.update('jax_platforms', 'cpu')
  # By default libtpu queries the cloud for this host, writes logs in a folder of all users, and
  # excludes other processes, as is necessary on TPUs.
  for name, value in {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_LOG_DIR': 'disabled',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
  }.items():  # fmt: skip
    os.environ.setdefault(name, value)
  options = {}
  if topology.startswith('v4:'):
    options['chip_config_name'] = 'megacore'  # one device for each chip, as on a host of v4
  if topology.endswith(':1x1'):
    options['chips_per_host_bounds'] = (1, 1, 1)
  return topologies.get_topology_desc(topology, platform='tpu', **options).devices
