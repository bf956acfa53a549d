"""Moves read from lines that XLA prints, and the cost of a program on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmn_jax.planning import hlo
from tests.runs import mesh_of

# These tests read the compiler's output.
pytestmark = pytest.mark.usefixtures('uncached')

# Lines that the TPU and CPU compilers print, shortened.
GATHER = (
  '  %all-gather.25 = f32[8,64,16]{1,2,0:T(8,128)S(1)} all-gather(%param_0.2), channel_id=17, '
  "replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}, "
  'metadata={op_name="jit(update)/jvp(LMN)/gather" stack_frame_id=123}, backend_config={}'
)
CASES = {
  'a gather on an axis of the mesh': (
    GATHER,
    ('all-gather', 'f32[8,64,16]', 8 * 64 * 16 * 4, 8, 'jvp(LMN)/gather'),
    8 * 64 * 16 * 4 * 7 / 8,
  ),
  'a sum of several arrays in listed groups': (
    '  %all-reduce.8 = (f32[2,16]{1,0:T(2,128)}, /*index=1*/bf16[32]{0:T(128)}, f32[]{:T(128)}) '
    'all-reduce(%a, /*index=1*/%b, %c), channel_id=61, replica_groups={{0,1,2,3},{4,5,6,7}}, '
    'to_apply=%add',
    ('all-reduce', 'f32[2,16] bf16[32] f32[]', 128 + 64 + 4, 4, ''),
    2 * 196 * 3 / 4,
  ),
  'a reduce-scatter in numbered groups': (
    '  %rs = s32[16]{0} reduce-scatter(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add',
    ('reduce-scatter', 's32[16]', 64, 2, ''),
    64,
  ),
  'an exchange on a part of an axis': (
    '  ROOT %all-to-all.3 = pred[8,1,128]{2,1,0} all-to-all(%r), channel_id=136, '
    "replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_0':(1)2,'axis_1'}, dimensions={0}",
    ('all-to-all', 'pred[8,1,128]', 1024, 8, ''),
    1024 * 7 / 8,
  ),
  'an asynchronous gather': (
    '  %ag = (f32[4,2]{1,0}, f32[32,2]{1,0}) all-gather-start(%x), channel_id=1, '
    'replica_groups={}, dimensions={0}',
    ('all-gather', 'f32[32,2]', 256, 16, ''),
    256 * 15 / 16,
  ),
  'an asynchronous permutation': (
    '  %cp = (s32[448]{0}, s32[448]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), '
    'channel_id=9, source_target_pairs={{0,1},{1,2}}',
    ('collective-permute', 's32[448]', 1792, 16, ''),
    1792,
  ),
  'an asynchronous sum': (
    '  %ar = (f32[8]{0}, f32[2]{0}) all-reduce-start(%x, %y), channel_id=2, replica_groups={{0,1}}',
    ('all-reduce', 'f32[8] f32[2]', 40, 2, ''),
    40,
  ),
  'a copy': (
    '  %copy.8 = f32[8192,96]{1,0:T(8,128)S(1)} copy(%param.32), metadata={op_name="state.tables"}',
    ('copy', 'f32[8192,96]', 8192 * 96 * 4, 16, 'state.tables'),
    0,
  ),
}
OTHERS = (
  '  %copy-start.9 = (f32[8,9]{1,0}, f32[8,9]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%copy.906)',
  '  %fusion.3 = f32[8,64,16]{1,2,0} fusion(%all-gather.25, %copy.8), calls=%all-reduce.1',
  '  %all-gather-done = f32[32,2]{1,0} all-gather-done(%ag)',
  '%all-reduce.1 (param_0: f32[8]) -> f32[8] {',
)


@pytest.mark.parametrize('case', CASES)
def test_a_move(case):
  text, expected, received = CASES[case]
  (move,) = hlo.moves(text, 16)
  assert move == expected
  assert move.received == pytest.approx(received)


def test_other_lines_are_not_moves():
  assert hlo.moves('\n'.join(OTHERS), 16) == []


def test_a_collective_in_several_steps_counts_once():
  again = GATHER.replace('%all-gather.25', '%all-gather.26').replace('S(1)', '')
  other = GATHER.replace('channel_id=17', 'channel_id=18')
  copies = [CASES['a copy'][0]] * 2  # they have no channel
  moves = hlo.moves('\n'.join([GATHER, again, other, *copies]), 8)
  assert [move.kind for move in moves] == ['all-gather', 'all-gather', 'copy', 'copy']


def test_a_program_on_eight_devices():
  """One sum over the data axis, of known size, and memory that is easily computed."""
  mesh = mesh_of(4, 2)
  rows, replicated = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  x = jax.ShapeDtypeStruct((32, 64), np.float32, sharding=rows)
  weight = jax.ShapeDtypeStruct((64, 16), np.float32, sharding=replicated)
  function = jax.jit(lambda x, w: jnp.sum(x @ w, axis=0), out_shardings=replicated)
  cost = hlo.compile_for(function, x, weight)
  assert cost.arguments == 8 * 64 * 4 + 64 * 16 * 4
  assert cost.temporaries >= 16 * 4
  assert cost.total == cost.arguments + cost.temporaries + cost.code
  assert cost.flops >= 2 * 8 * 64 * 16 and cost.accessed > cost.arguments
  assert cost.traffic.nbytes > cost.arguments
  collectives = [move for move in cost.moves if move.kind != 'copy']
  assert [(move.kind, move.bytes, move.devices) for move in collectives] == [('all-reduce', 64, 4)]


def test_a_program_that_does_not_fit_has_no_cost():
  class Function:
    def __init__(self, message):
      self.message = message

    def trace(self, *arguments):
      raise jax.errors.JaxRuntimeError(self.message)

  x = jax.ShapeDtypeStruct((8,), np.float32, sharding=NamedSharding(mesh_of(8), P()))
  assert hlo.compile_for(Function('RESOURCE_EXHAUSTED: Ran out of memory on HBM'), x) is None
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    hlo.compile_for(Function('INTERNAL: of the compiler'), x)
