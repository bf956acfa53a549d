"""The instructions of a compiled program, parsed from XLA's text of it."""

import math
import re
from typing import NamedTuple

ARRAY = re.compile(r'(([a-z]+)(\d*)[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?')
TILE = re.compile(r'T\(([\d,*]+)\)')
SPACE = re.compile(r'S\((\d+)\)')
NAME = r'[\w.\-]+'
HEADER = re.compile(rf'(ENTRY )?%({NAME}) \(.*\) -> .*\{{$')
LINE = re.compile(rf'\s+(ROOT )?%({NAME}) = ')
OPERAND = re.compile(rf'%({NAME})')


class Array(NamedTuple):
  """An array of a program, on one device.

  kind: such as 'f32'. bits: of an element. dims: sizes. order: the dimensions from the minor one,
  as they are stored. tile: minor sizes are padded to a multiple of these, () for none. space: of
  the memory: 0 for the device's main memory, others are on the chip.
  """

  kind: str
  bits: int
  dims: tuple[int, ...]
  order: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  def __str__(self) -> str:
    return f'{self.kind}[{",".join(map(str, self.dims))}]'

  def sizes(self, part: tuple[int, ...]) -> int:
    """Returns the elements that a part of the array takes, with the padding that it spans.

    Args:
      part: sizes of a slice. A dimension that it spans whole counts with the array's padding.
    """
    padded = list(part)
    for dim, multiple in zip(self.order, reversed(self.tile), strict=False):
      if part[dim] == self.dims[dim]:
        padded[dim] = -(-part[dim] // multiple) * multiple
    return math.prod(padded)

  def bytes_of(self, part: tuple[int, ...]) -> int:
    """Returns the bytes of a slice; see `sizes`."""
    return self.sizes(part) * self.bits // 8

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array, with padding."""
    return self.bytes_of(self.dims)


class Instruction(NamedTuple):
  """An instruction of a computation.

  arrays: of its result, those of a tuple in order, nested ones too. operands: names. text: of the
  attributes.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern in the attributes, None if it does not occur."""
    match = re.search(pattern, self.text)
    return match and match[1]

  def numbers(self, name: str) -> tuple[int, ...]:
    """Returns an attribute such as slice_sizes={1,96}; () if it does not occur."""
    listed = self.attribute(rf'\b{name}=\{{([\d,]*)\}}')
    return tuple(int(x) for x in listed.split(',') if x) if listed else ()

  @property
  def called(self) -> str | None:
    """The computation that a fusion or a call runs."""
    return self.attribute(rf'(?:calls|to_apply)=%({NAME})')

  @property
  def where(self) -> str:
    """The operation of the traced program that causes it, '' if unknown."""
    return self.attribute(r'op_name="(?:jit\([^"/]*\)/)?([^"]*)"') or ''


class Computation(NamedTuple):
  """Instructions by name, in order; root: the name of the one whose value is the result."""

  instructions: dict[str, Instruction]
  root: str

  def parameters(self) -> dict[int, Instruction]:
    """Returns the parameters by number."""
    return {int(x.operands[0]): x for x in self.instructions.values() if x.opcode == 'parameter'}

  def users(self) -> dict[str, list[Instruction]]:
    """Returns the instructions that have each instruction as an operand."""
    users = {name: [] for name in self.instructions}
    for x in self.instructions.values():
      if x.opcode not in ('parameter', 'constant'):
        for name in dict.fromkeys(x.operands):
          users[name].append(x)
    return users


class Module(NamedTuple):
  """The computations of a program by name; entry: the name of the first."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Parses the text of a compiled program, from `jax.stages.Compiled.as_text`."""
  computations, entry, instructions, root = {}, '', {}, ''
  for line in text.splitlines():
    if header := HEADER.match(line):
      name, instructions, root = header[2], {}, ''
      entry = name if header[1] else entry
    elif line == '}':
      computations[name] = Computation(instructions, root)
    elif begin := LINE.match(line):
      instruction = _instruction(begin[2], line[begin.end() :])
      instructions[instruction.name] = instruction
      root = instruction.name if begin[1] else root
  return Module(computations, entry)


def arrays_of(text: str) -> tuple[Array, ...]:
  """Returns the arrays of a type, such as '(f32[8,16]{1,0:T(8,128)}, s32[])'; tokens are none."""
  return tuple(_array(match) for match in ARRAY.finditer(text) if match[1] != 'token')


def _array(match: re.Match) -> Array:
  dims = tuple(int(d) for d in match[4].split(',') if d)
  order, _, rest = (match[5] or '').partition(':')
  tile, space = TILE.search(rest), SPACE.search(rest)
  return Array(
    match[1],
    int(match[3] or 8 * (match[2] == 'pred')),
    dims,
    tuple(int(d) for d in order.split(',') if d) or tuple(reversed(range(len(dims)))),
    tuple(int(x) for x in tile[1].split(',')) if tile and '*' not in tile[1] else (),
    int(space[1]) if space else 0,
  )


def _instruction(name: str, text: str) -> Instruction:
  """Parses 'TYPE OPCODE(OPERANDS), ATTRIBUTES'."""
  end = _closing(text, 0) if text[0] == '(' else text.index(' ')
  begin = text.index('(', end)
  opcode, close = text[end:begin].strip(), _closing(text, begin)
  inside = text[begin + 1 : close - 1]
  operands = (inside,) if opcode in ('parameter', 'constant') else tuple(OPERAND.findall(inside))
  return Instruction(name, opcode, arrays_of(text[:end]), operands, text[close:])


def _closing(text: str, begin: int) -> int:
  """Returns the place after the parenthesis that closes the one at `begin`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, begin):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  raise ValueError(f'no closing parenthesis: {text[:80]!r}')
