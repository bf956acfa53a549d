"""Instructions parsed from lines that XLA prints."""

import pytest

from lmn_jax.planning import instructions

TEXT = """HloModule jit_f, is_scheduled=true

%fused (param_0.1: f32[1024,96], param_1.2: s32[64]) -> f32[64,96] {
  %param_1.2 = s32[64]{0:T(128)S(1)} parameter(1)
  %param_0.1 = f32[1024,96]{1,0:T(8,128)} parameter(0)
  ROOT %gather.1 = f32[64,96]{1,0:T(8,128)S(1)} gather(%param_0.1, %param_1.2), offset_dims={1}, \
slice_sizes={1,96}, metadata={op_name="jit(f)/while/gather" stack_frame_id=3}
}

ENTRY %main.3 (x.1: f32[1024,96], ids: s32[64]) -> (f32[64,96], s32[]) {
  %x.1 = f32[1024,96]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %ids = s32[64]{0:T(128)S(1)} parameter(1), sharding={replicated}
  %zero = s32[]{:T(128)} constant(0)
  %gather-fusion = f32[64,96]{1,0:T(8,128)S(1)} fusion(%x.1, /*index=1*/%ids), kind=kCustom, \
calls=%fused
  ROOT %tuple = (f32[64,96]{1,0:T(8,128)S(1)}, /*index=1*/s32[]{:T(128)}) tuple(%gather-fusion, \
%zero)
}
"""


def test_a_program():
  module = instructions.parse(TEXT)
  assert list(module.computations) == ['fused', 'main.3'] and module.entry == 'main.3'
  main, fused = module.computations['main.3'], module.computations['fused']
  assert (main.root, fused.root) == ('tuple', 'gather.1')
  assert list(main.instructions) == ['x.1', 'ids', 'zero', 'gather-fusion', 'tuple']
  assert [x.name for x in main.users()['x.1']] == ['gather-fusion']
  fusion, gather = main.instructions['gather-fusion'], fused.instructions['gather.1']
  assert (fusion.opcode, fusion.operands, fusion.called) == ('fusion', ('x.1', 'ids'), 'fused')
  assert {i: x.name for i, x in fused.parameters().items()} == {0: 'param_0.1', 1: 'param_1.2'}
  assert gather.numbers('slice_sizes') == (1, 96) and gather.numbers('dims') == ()
  assert gather.where == 'while/gather' and fusion.where == ''
  assert main.instructions['zero'].operands == ('0',)
  assert [str(x) for x in main.instructions['tuple'].arrays] == ['f32[64,96]', 's32[]']


@pytest.mark.parametrize(
  'text, kind, dims, size, space',
  [
    ('f32[8,64,16]{1,2,0:T(8,128)S(1)}', 'f32', (8, 64, 16), 8 * 16 * 128 * 4, 1),
    ('f32[1000,96]{1,0:T(8,128)}', 'f32', (1000, 96), 1000 * 128 * 4, 0),
    ('f32[1000,96]{0,1:T(8,128)}', 'f32', (1000, 96), 1024 * 96 * 4, 0),
    ('f32[1000,96]{1,0}', 'f32', (1000, 96), 1000 * 96 * 4, 0),
    ('bf16[3,4]', 'bf16', (3, 4), 24, 0),
    ('pred[1000]{0:T(1024)(128)(4,1)S(1)}', 'pred', (1000,), 1024, 1),
    ('s32[]{:T(128)S(6)}', 's32', (), 4, 6),
    ('s4[6]{0}', 's4', (6,), 3, 0),
    ('f8e4m3fn[4]{0}', 'f8e4m3fn', (4,), 4, 0),
  ],
)
def test_an_array(text, kind, dims, size, space):
  (array,) = instructions.arrays_of(text)
  assert (array.kind, array.dims, array.nbytes, array.space) == (kind, dims, size, space)


def test_a_part_has_the_padding_that_it_spans():
  """Rows of 96 take 128 lanes; columns of a table that is stored by column take no padding."""
  (by_row,) = instructions.arrays_of('f32[1000,96]{1,0:T(8,128)}')
  assert by_row.bytes_of((1, 96)) == 128 * 4
  assert by_row.bytes_of((1, 95)) == 95 * 4
  (by_column,) = instructions.arrays_of('f32[1000,96]{0,1:T(8,128)}')
  assert by_column.bytes_of((1, 96)) == 96 * 4


def test_nested_types_and_tokens():
  text = '((f32[8]{0}, s32[2]{0}), f32[8,2]{1,0:T(8,128)S(1)}, token[], u32[]{:S(2)})'
  assert list(map(str, instructions.arrays_of(text))) == ['f32[8]', 's32[2]', 'f32[8,2]', 'u32[]']
