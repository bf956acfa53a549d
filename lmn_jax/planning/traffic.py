"""Counts the bytes that a compiled program reads from and writes to the device's main memory.

XLA's own count, 'bytes accessed', is no measure of a step that reads rows of large tables: for a
fusion it may count a whole table, or a tile of 8 rows, for each row, and it includes the memory on
the chip. The count of this module is, for each instruction that runs:

- gather, dynamic-slice, slice: the parts that are read, and the result.
- scatter, dynamic-update-slice: the updates, and the parts that are written; the parts are read,
  too, if the scatter combines. Both work in place, as XLA compiles them: where they cannot, XLA
  inserts a copy, and this is counted.
- fusion: each operand once, and the result. If a fusion only reads parts of an operand, or only
  writes parts of it in place, these parts.
- others: operands and results, whole. Kernels (custom calls) too, whatever they read.
- while: its condition and body, times the number of iterations. The number is read from the
  program; a loop whose number is not in it counts once, and is listed.
- conditional: its most expensive branch.

A part has the padding of the array's layout in the dimensions that it spans: a row of 96 floats
takes 512 bytes where rows are padded to 128 lanes. A row that is read twice counts twice. Arrays in
memory on the chip count nothing.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lmn_jax.planning.instructions import Array, Computation, Instruction, Module

# They move nothing: names of values, or values that are part of the program.
FREE = frozenset(
  'parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id domain '
  'opt-barrier add-dependency'.split()
)
FREE_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound')
SLICES = ('dynamic-slice', 'slice')
TARGET = r'custom_call_target="([^"]*)"'
GIVEN = ('parameter', 'get-tuple-element')
IN_PLACE = ('scatter', 'dynamic-update-slice')


class Part(NamedTuple):
  """What an instruction reads or writes of an array in the main memory.

  opcode: of the instruction; in a fusion, of what reads or writes. whole: whether it is the whole
  array. bytes: with padding.
  """

  opcode: str
  array: Array
  whole: bool
  bytes: int


class Run(NamedTuple):
  """An instruction that a step runs.

  opcode: of the instruction. where: the operation of the traced program that causes it. times: in a
  step. parts: its traffic, each time. cycles: that the compiler expects it to take, 0 if it does
  not say. background: it runs beside others (an asynchronous copy or collective).
  """

  opcode: str
  where: str
  times: int
  parts: tuple[Part, ...]
  cycles: int
  background: bool

  @property
  def nbytes(self) -> int:
    """Bytes in a step."""
    return self.times * sum(part.bytes for part in self.parts)


class Traffic(NamedTuple):
  """The instructions that a step runs, and the loops (`where`) counted as one iteration."""

  runs: list[Run]
  unknown_loops: list[str]

  @property
  def nbytes(self) -> int:
    """Bytes read and written in a step."""
    return sum(run.nbytes for run in self.runs)

  @property
  def instructions(self) -> int:
    """Instructions that run one after another in a step."""
    return sum(run.times for run in self.runs if not run.background)

  def seconds(self, bandwidth: float, clock: float) -> float:
    """Returns the time of the instructions one after another.

    Each takes the time of its bytes or of the compiler's cycles, whichever is longer. Those in the
    background take none. Gathers and scatters have no cycles: they count as if they reached the
    peak of the memory, which small rows do not.

    Args:
      bandwidth: of the memory, bytes/s. clock: cycles/s.
    """
    return math.fsum(
      max(run.nbytes / bandwidth, run.times * run.cycles / clock)
      for run in self.runs
      if not run.background
    )


def count(module: Module) -> Traffic:
  """Returns the traffic of a program, of one device; the docstring of this file has the rules."""
  loops: list[str] = []
  runs = list(_runs(module, module.computations[module.entry], 1, loops))
  return Traffic(runs, loops)


def _runs(module: Module, computation: Computation, times: int, loops: list[str]) -> Iterator[Run]:
  for x in computation.instructions.values():
    if x.opcode == 'while':
      n = trip_count(module, computation, x)
      if n is None:
        loops.append(x.where)
      for part in ('condition', 'body'):
        inner = module.computations[x.attribute(rf'{part}=%([\w.\-]+)')]
        yield from _runs(module, inner, times * (1 if n is None else n), loops)
    elif x.opcode == 'call':
      yield from _runs(module, module.computations[x.called], times, loops)
    elif x.opcode == 'conditional':
      yield from _most_expensive(module, x, times, loops)
    elif x.opcode not in FREE and x.attribute(TARGET) not in FREE_CALLS:
      parts = tuple(p for p in _parts(module, computation, x) if p.bytes and not p.array.space)
      cycles = int(x.attribute(r'"estimated_cycles":"(\d+)"') or 0)
      background = x.opcode.endswith(('-start', '-done'))
      yield Run(x.opcode, x.where, times, parts, cycles, background)


def _most_expensive(module: Module, x: Instruction, times: int, loops: list[str]) -> list[Run]:
  """Returns what runs in the branch with most bytes."""
  listed = x.attribute(r'branch_computations=\{([^}]*)\}') or ' '.join(
    re.findall(r'(?:true|false)_computation=(%[\w.\-]+)', x.text)
  )
  branches = []
  for name in re.findall(r'%([\w.\-]+)', listed):
    inner: list[str] = []
    branches.append((list(_runs(module, module.computations[name], times, inner)), inner))
  runs, inner = max(branches, key=lambda branch: sum(run.nbytes for run in branch[0]))
  loops.extend(inner)
  return runs


def _parts(module: Module, computation: Computation, x: Instruction) -> Iterator[Part]:
  """Returns what an instruction reads of its operands, and what it writes."""
  if not x.opcode.endswith('-done'):  # the operands of a '-start' are read then
    for i, name in enumerate(x.operands):
      for array in computation.instructions[name].arrays:
        yield from _read(module, computation, x, i, array)
  if not x.opcode.endswith('-start'):
    yield from _written(module, computation, x)


def _read(
  module: Module, computation: Computation, x: Instruction, i: int, array: Array
) -> Iterable[Part]:
  """Returns what an instruction reads of its i-th operand."""
  whole = Part(x.opcode, array, True, array.nbytes)
  if x.opcode in ('fusion', 'async-start'):
    called = module.computations[x.called]
    return _read_inside(module, called, called.parameters()[i].name, array)
  if i >= _tables(x):
    return [whole]
  if x.opcode == 'gather':
    starts = computation.instructions[x.operands[1]].arrays[0]
    return [Part(x.opcode, array, False, _gathered(x, array, starts))]
  if x.opcode in SLICES:
    return [Part(x.opcode, array, False, array.bytes_of(x.arrays[0].dims))]
  if x.opcode == 'slice-start':
    return [Part('slice', array, False, array.bytes_of(x.arrays[1].dims))]
  if x.opcode == 'scatter' and not _overwrites(module.computations[x.called]):
    return [_update(computation, x, i)]
  return []


def _tables(x: Instruction) -> int:
  """Returns how many of the first operands are read or written in parts."""
  if x.opcode == 'scatter':
    return len(x.operands) // 2  # tables, indices, updates of each table
  return int(x.opcode in ('gather', 'slice-start', 'dynamic-update-slice', *SLICES))


def _read_inside(module: Module, fused: Computation, name: str, array: Array) -> list[Part]:
  """Returns what a fusion reads of a parameter: parts, if no instruction in it needs all."""
  parts, users, results = [], fused.users(), _results(fused)
  todo = [name]
  while todo:
    alias = todo.pop()
    for x in users[alias]:
      if x.opcode == 'bitcast':
        todo.append(x.name)
        continue
      if x.opcode in IN_PLACE and x.name not in results and alias in x.operands[: _tables(x)]:
        return [Part('fusion', array, True, array.nbytes)]  # a new array is made from it
      for i, operand in enumerate(x.operands):
        if operand == alias:
          source = fused.instructions[alias].arrays[0]
          parts += _read(module, fused, x, i, source)
  if any(part.whole for part in parts):
    return [Part('fusion', array, True, array.nbytes)]
  return [part._replace(array=array) for part in parts]


def _written(module: Module, computation: Computation, x: Instruction) -> Iterable[Part]:
  """Returns what an instruction writes."""
  if x.opcode == 'fusion':
    return _written_by_fusion(module, module.computations[x.called], x.arrays)
  if x.opcode in IN_PLACE:
    return [_update(computation, x, i) for i in range(_tables(x))]
  return [Part(x.opcode, array, True, array.nbytes) for array in x.arrays]


def _written_by_fusion(
  module: Module, fused: Computation, arrays: tuple[Array, ...]
) -> Iterator[Part]:
  """Yields what a fusion writes.

  Args:
    fused: its computation. arrays: its results, as they are stored.
  """
  names = _results(fused)
  shares = [(array,) for array in arrays] if len(names) == len(arrays) else [arrays]
  for name, share in zip(names, shares, strict=True):
    x = fused.instructions[name]
    if x.opcode == 'fusion':
      yield from _written_by_fusion(module, module.computations[x.called], share)
      continue
    in_place = x.opcode in IN_PLACE
    for i, array in enumerate(share):
      if in_place:
        yield _update(fused, x, i)._replace(array=array)
      # A table that is made in the fusion, such as one of zeros, is written as a whole, too.
      if not in_place or _source(fused, x.operands[i]).opcode not in GIVEN:
        yield Part('fusion', array, True, array.nbytes)


def _results(fused: Computation) -> list[str]:
  """Returns the names of the instructions whose values are the results of a fusion."""
  root = fused.instructions[fused.root]
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  return [_source(fused, name).name for name in names]


def _source(computation: Computation, name: str) -> Instruction:
  """Returns the instruction whose value has the name, before bitcasts."""
  x = computation.instructions[name]
  while x.opcode == 'bitcast':
    x = computation.instructions[x.operands[0]]
  return x


def _gathered(x: Instruction, array: Array, starts: Array) -> int:
  """Returns the bytes of the slices that a gather reads."""
  rows = 1
  vector = int(x.attribute(r'index_vector_dim=(\d+)'))
  for dim, size in enumerate(starts.dims):
    rows *= 1 if dim == vector else size
  return rows * array.bytes_of(x.numbers('slice_sizes'))


def _update(computation: Computation, x: Instruction, i: int) -> Part:
  """Returns what a scatter or a dynamic-update-slice writes of its i-th table."""
  array = computation.instructions[x.operands[i]].arrays[0]
  if x.opcode == 'dynamic-update-slice':
    update = computation.instructions[x.operands[1]].arrays[0]
    return Part(x.opcode, array, False, array.bytes_of(update.dims))
  update = computation.instructions[x.operands[_tables(x) + 1 + i]].arrays[0]
  window = x.numbers('update_window_dims')
  absent = (*x.numbers('inserted_window_dims'), *x.numbers('input_batching_dims'))
  sizes, rows = [1] * len(array.dims), 1
  present = [dim for dim in range(len(array.dims)) if dim not in absent]
  for dim, at in zip(present, window, strict=True):
    sizes[dim] = update.dims[at]
  for dim, size in enumerate(update.dims):
    rows *= 1 if dim in window else size
  return Part(x.opcode, array, False, rows * array.bytes_of(tuple(sizes)))


def _overwrites(combine: Computation) -> bool:
  """Whether the function of a scatter returns the update, whatever was there."""
  source = _source(combine, combine.root)
  return source.opcode == 'parameter' and source.operands[0] != '0'


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Returns the number of iterations of a while, None if the program does not have it.

  It is the compiler's own if it prints it, otherwise that of a loop that counts from a constant by
  a constant while less than a constant.
  """
  if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  condition = module.computations[loop.attribute(r'condition=%([\w.\-]+)')]
  body = module.computations[loop.attribute(r'body=%([\w.\-]+)')]
  compare = condition.instructions[condition.root]
  if compare.opcode != 'compare' or compare.attribute(r'direction=(\w+)') != 'LT':
    return None
  counter, bound = compare.operands
  index, most = _element(condition, counter), _constant(condition, bound)
  start = computation.instructions[loop.operands[0]]
  if index is None or most is None or start.opcode != 'tuple':
    return None
  first = _constant(computation, start.operands[index])
  after = _plain(body, body.instructions[body.root].operands[index])
  if first is None or after.opcode != 'add':
    return None
  counter, step = after.operands
  step = _constant(body, step)
  if _element(body, counter) != index or not step:
    return None
  return max(0, -(-(most - first) // step))


def _plain(computation: Computation, name: str) -> Instruction:
  """Returns the instruction whose value has the name, before copies."""
  x = computation.instructions[name]
  while x.opcode in ('copy', 'bitcast'):
    x = computation.instructions[x.operands[0]]
  return x


def _element(computation: Computation, name: str) -> int | None:
  """Returns which element of the loop's state a value is."""
  x = _plain(computation, name)
  return int(x.attribute(r'index=(\d+)')) if x.opcode == 'get-tuple-element' else None


def _constant(computation: Computation, name: str) -> int | None:
  x = _plain(computation, name)
  return int(x.operands[0]) if x.opcode == 'constant' else None
