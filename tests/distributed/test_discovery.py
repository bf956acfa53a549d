"""Places of processes in flags, in LMN_* variables, under Slurm and on TPU slices."""

import pytest

from lmn_jax.distributed.discovery import Place, find
from lmn_jax.errors import UserError

SLURM = {
  'SLURM_JOB_ID': '4097', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NUM_NODES': '2',
  'SLURM_STEP_NODELIST': 'n1,n2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
}  # fmt: skip
ENVIRONMENT = {'LMN_COORDINATOR': 'a:1', 'LMN_PROCESSES': '3', 'LMN_PROCESS': '2'}


@pytest.mark.parametrize(
  'flags, environ, place',
  [
    ((None, None, None), {}, None),
    (('a:1', 2, 0), {}, Place('a:1', 2, 0)),
    (('a:1', 1, 0), {}, None),
    ((None, None, None), ENVIRONMENT, Place('a:1', 3, 2)),
    (('b:2', None, 0), ENVIRONMENT, Place('b:2', 3, 0)),
    (('auto', None, None), {}, Place(None, None, None)),
    ((None, None, None), {'LMN_COORDINATOR': 'auto'}, Place(None, None, None)),
    ((None, None, None), SLURM, Place('n1:61441', 2, 1)),
    ((None, None, None), SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),
    # The batch script itself is not a step.
    ((None, None, None), {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, None),
    (
      (None, None, None),
      SLURM | {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_LOCALID': '1'},
      Place('n1:61441', 4, 1, device=1),
    ),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a,b'}, Place(None, None, None)),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a'}, None),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, None),
  ],
)
def test_place_from_flags_or_environment(flags, environ, place):
  assert find(*flags, environ) == place


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('node01', 'node01'),
    ('node01,node02', 'node01'),
    ('node[001-016,020],x1', 'node001'),
    ('node[001,007-015]', 'node001'),
    ('rack[1-2]n[01-04]', 'rack1n01'),
    ('gpu-a[3-4]-ib,gpu-b1', 'gpu-a3-ib'),
  ],
)
def test_first_node_of_a_slurm_node_list(nodes, first):
  place = find(None, None, None, SLURM | {'SLURM_STEP_NODELIST': nodes})
  assert place.coordinator == f'{first}:61441'


@pytest.mark.parametrize(
  'flags, environ, message',
  [
    (('a:1', None, None), {}, '--processes and --process missing: give --coordinator=HOST:PORT, '),
    ((None, 2, 0), {}, '--coordinator missing: give '),
    (('a', 2, 0), {}, "--coordinator='a' must be HOST:PORT"),
    (('a:1', 2, 2), {}, '--process=2 must be in 0..1 of --processes'),
    (('a:1', 2, -1), {}, '--process=-1 must be in 0..1 of --processes'),
    (
      (None, None, None),
      ENVIRONMENT | {'LMN_PROCESS': 'x'},
      "LMN_PROCESS='x' must be a whole number",
    ),
  ],
)
def test_incomplete_or_wrong_places_are_refused(flags, environ, message):
  with pytest.raises(UserError, match=message):
    find(*flags, environ)
