"""Bytes read and written, of small programs with known counts and of lines that XLA prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.planning import instructions, traffic

# These tests read the compiler's output.
pytestmark = pytest.mark.usefixtures('uncached')
D, N = 96, 50
ROW = D * 4


def shape(*dims, dtype=np.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


def compiled(function, *shapes, **options):
  """Returns the traffic of a function, compiled for the CPU, and XLA's count."""
  program = jax.jit(function, **options).lower(*shapes).compile()
  count = traffic.count(instructions.parse(program.as_text()))
  return count, program.cost_analysis()['bytes accessed']


def parts_of(count, opcode):
  """Returns the bytes of the reads and writes of parts by an operation."""
  return [
    part.bytes * run.times
    for run in count.runs
    for part in run.parts
    if part.opcode == opcode and not part.whole
  ]


IDS = shape(N, dtype=np.int32)


@pytest.mark.parametrize('R', [1000, 100_000])
def test_a_gather_reads_its_rows(R):
  """N rows of D floats, whatever the size of the table; XLA counts the table."""
  count, by_xla = compiled(lambda x, ids: x.at[ids].get(mode='clip'), shape(R, D), IDS)
  assert parts_of(count, 'gather') == [N * ROW]
  assert 2 * N * ROW < count.nbytes < 3 * N * ROW < R * ROW < by_xla


@pytest.mark.parametrize('R', [1000, 100_000])
def test_a_gather_in_a_larger_function(R):
  def function(x, ids):
    return jnp.sum(2 * jnp.tanh(x.at[ids].get(mode='fill', fill_value=0)), axis=0)

  count, _ = compiled(function, shape(R, D), IDS)
  assert parts_of(count, 'gather') == [N * ROW]
  assert count.nbytes < 20 * N * ROW


@pytest.mark.parametrize('combine', ['add', 'set'])
def test_a_scatter_writes_its_rows(combine):
  """The table is donated, as in a step of training. Some compilers for CPUs make it a loop."""
  counts = [
    compiled(
      lambda x, ids, rows: getattr(x.at[ids], combine)(rows, mode='drop'),
      shape(R, D), IDS, shape(N, D), donate_argnums=0,
    )[0]
    for R in (1000, 100_000)
  ]  # fmt: skip
  assert counts[0].nbytes == counts[1].nbytes < 10 * N * ROW
  assert sum(parts_of(counts[0], 'scatter') + parts_of(counts[0], 'dynamic-update-slice')) in (
    N * ROW, 2 * N * ROW
  )  # fmt: skip


def test_a_table_that_is_not_donated_is_copied():
  R = 1000
  count, _ = compiled(
    lambda x, ids, rows: x.at[ids].add(rows, mode='drop'), shape(R, D), IDS, shape(N, D)
  )
  assert 2 * R * ROW < count.nbytes < 2 * R * ROW + 8 * N * ROW


def test_a_matrix_product_reads_its_operands_and_writes_its_result():
  count, by_xla = compiled(lambda x, w: x @ w, shape(64, 128), shape(128, 32))
  assert count.nbytes == by_xla == (64 * 128 + 128 * 32 + 64 * 32) * 4


def test_a_loop_counts_its_iterations():
  """Seven rows are read one by one."""

  def function(x):
    def row(i, total):
      return total + jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.lax.fori_loop(0, 7, row, jnp.zeros(D))

  count, _ = compiled(function, shape(1000, D))
  assert sum(parts_of(count, 'dynamic-slice')) == 7 * ROW
  assert count.unknown_loops == []


def test_a_loop_of_unknown_length_counts_once_and_is_listed():
  def function(x, n):
    return jax.lax.fori_loop(0, n, lambda i, total: total + x[i], jnp.zeros(D))

  count, _ = compiled(function, shape(1000, D), shape(dtype=np.int32))
  assert count.unknown_loops == ['while']
  assert sum(parts_of(count, 'dynamic-slice')) == ROW


def test_a_condition_counts_its_most_expensive_branch():
  def function(x, n):
    return jax.lax.cond(n > 0, lambda x: x @ x, lambda x: x + 1, x)

  product, _ = compiled(lambda x: x @ x, shape(D, D))
  count, _ = compiled(function, shape(D, D), shape(dtype=np.int32))
  assert product.nbytes <= count.nbytes < product.nbytes + 6 * D * ROW


TPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gathered (param_0: f32[4096,96], param_1: s32[1024]) -> f32[512,96] {
  %param_0 = f32[4096,96]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[1024]{0:T(1024)S(1)} parameter(1)
  %call = s32[1024]{0:T(1024)} custom-call(%param_1), \
custom_call_target="AssumeGatherIndicesInBound"
  %slice = s32[512]{0:T(512)} slice(%call), slice={[0:512]}
  ROOT %gather = f32[512,96]{1,0:T(8,128)S(1)} gather(%param_0, %slice), offset_dims={1}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,96}
}

%scattered (param_0: f32[4096,96], param_1: s32[512], param_2: f32[512,96]) -> f32[4096,96] {
  %param_0 = f32[4096,96]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[512]{0:T(512)S(1)} parameter(1)
  %param_2 = f32[512,96]{1,0:T(8,128)S(1)} parameter(2)
  ROOT %scatter = f32[4096,96]{1,0:T(8,128)} scatter(%param_0, %param_1, %param_2), \
update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, \
index_vector_dim=1, to_apply=%add
}

%doubled (param_0: f32[4096,96], param_1: s32[1024]) -> f32[4096,96] {
  %param_0 = f32[4096,96]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[1024]{0:T(1024)S(1)} parameter(1)
  %rows = f32[512,96]{1,0:T(8,128)} fusion(%param_0, %param_1), kind=kCustom, calls=%gathered
  ROOT %twice = f32[4096,96]{1,0:T(8,128)} add(%param_0, %param_0)
}

%body (state: (s32[], f32[4096,96], s32[1024])) -> (s32[], f32[4096,96], s32[1024]) {
  %state = (s32[]{:T(128)}, f32[4096,96]{1,0:T(8,128)}, s32[1024]{0:T(1024)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copied = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %table = f32[4096,96]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %ids = s32[1024]{0:T(1024)S(1)} get-tuple-element(%state), index=2
  %rows = f32[512,96]{1,0:T(8,128)S(1)} fusion(%table, %ids), kind=kCustom, calls=%gathered, \
backend_config={"estimated_cycles":"1500"}
  %next = s32[]{:T(128)} add(%copied, %one)
  ROOT %after = (s32[]{:T(128)}, f32[4096,96]{1,0:T(8,128)}, s32[1024]{0:T(1024)S(1)}) \
tuple(%next, %table, %ids)
}

%condition (state: (s32[], f32[4096,96], s32[1024])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4096,96]{1,0:T(8,128)}, s32[1024]{0:T(1024)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %three), direction=LT
}

"""
ENTRY = """ENTRY %main (x: f32[4096,96], ids: s32[1024], rows: f32[512,96]) -> f32[4096,96] {{
  %x = f32[4096,96]{{1,0:T(8,128)}} parameter(0)
  %ids = s32[1024]{{0:T(1024)S(1)}} parameter(1)
  %rows = f32[512,96]{{1,0:T(8,128)S(1)}} parameter(2)
  %zero = s32[]{{:T(128)}} constant(0)
{}
}}
"""
PADDED = 128 * 4  # bytes of a row of 96 floats on TPU
CASES = {
  # Indices and result are in the memory on the chip.
  'a gather': (
    '  ROOT %g = f32[512,96]{1,0:T(8,128)S(1)} fusion(%x, %ids), kind=kCustom, calls=%gathered',
    512 * PADDED,
  ),
  'a scatter reads and writes its rows in place': (
    '  ROOT %s = f32[4096,96]{1,0:T(8,128)} fusion(%x, %ids, %rows), kind=kCustom, '
    'calls=%scattered',
    2 * 512 * PADDED,
  ),
  'a fusion that reads rows and the whole table': (
    '  ROOT %d = f32[4096,96]{1,0:T(8,128)} fusion(%x, %ids), kind=kLoop, calls=%doubled',
    2 * 4096 * PADDED,
  ),
  'a loop': (
    '  %state = (s32[]{:T(128)}, f32[4096,96]{1,0:T(8,128)}, s32[1024]{0:T(1024)S(1)}) '
    'tuple(%zero, %x, %ids)\n'
    '  ROOT %w = (s32[]{:T(128)}, f32[4096,96]{1,0:T(8,128)}, s32[1024]{0:T(1024)S(1)}) '
    'while(%state), condition=%condition, body=%body',
    # In each iteration the rows, five integers, and the condition.
    3 * (512 * PADDED + 5 * 4 + 1),
  ),
  'an asynchronous copy to the chip': (
    '  %start = (f32[4096,96]{1,0:T(8,128)S(1)}, f32[4096,96]{1,0:T(8,128)}, u32[]{:S(2)}) '
    'copy-start(%x)\n  ROOT %done = f32[4096,96]{1,0:T(8,128)S(1)} copy-done(%start)',
    4096 * PADDED,
  ),
  'an asynchronous slice': (
    '  %start = ((f32[4096,96]{1,0:T(8,128)}), f32[1024,96]{1,0:T(8,128)}, s32[]{:S(2)}) '
    'slice-start(%x), slice={[0:1024], [0:96]}\n'
    '  ROOT %done = f32[1024,96]{1,0:T(8,128)} slice-done(%start)',
    2 * 1024 * PADDED,
  ),
  'a copy between layouts': (
    '  ROOT %c = f32[4096,96]{0,1:T(8,128)} copy(%x)', 4096 * PADDED + 4096 * 96 * 4
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_lines_of_the_tpu_compiler(case):
  lines, expected = CASES[case]
  count = traffic.count(instructions.parse(TPU + ENTRY.format(lines)))
  assert count.nbytes == expected and count.unknown_loops == []


def test_the_time_of_instructions_one_after_another():
  """Each takes the longer of its bytes and its cycles; copies in the background take none."""
  lines = CASES['a loop'][0]
  count = traffic.count(instructions.parse(TPU + ENTRY.format(lines)))
  assert count.instructions == 3 * 4  # copy, fusion, add, compare
  assert count.seconds(np.inf, 1500.0) == pytest.approx(3)
  assert count.seconds(float(count.nbytes), np.inf) == pytest.approx(1)
  copies = traffic.count(instructions.parse(TPU + ENTRY.format(CASES['an asynchronous slice'][0])))
  assert copies.nbytes > 0 == copies.instructions == copies.seconds(1.0, 1.0)
