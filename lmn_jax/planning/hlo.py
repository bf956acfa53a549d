"""What a compiled program does, read from the text and the counts its compiler gives."""

import math
import re
from typing import NamedTuple

import jax

COLLECTIVES = 'all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter'
MOVE = re.compile(rf'= (\(?[a-z][^%]*?) (?:({COLLECTIVES})(-start)?|(copy))\(')
ARRAY = re.compile(r'([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]')


class Move(NamedTuple):
  """A collective or a copy, as one device sees it.

  kind: such as 'all-gather'. shape: of the result, such as 'f32[8,16]'. bytes: of the result.
  devices: how many take part. where: the operation of the program it serves, or ''.
  """

  kind: str
  shape: str
  bytes: int
  devices: int
  where: str

  @property
  def received(self) -> float:
    """The least bytes that a device takes in from others."""
    n = self.devices
    share = {
      'all-reduce': 2 * (n - 1) / n,  # scattered sums, then the sums of the others
      'reduce-scatter': n - 1,  # the result is one part of n
      'collective-permute': 1,
      'copy': 0,
    }
    return float(self.bytes * share.get(self.kind, (n - 1) / n))


def moves(text: str, devices: int) -> list[Move]:
  """The collectives and copies of a compiled program, each once.

  Args:
    text: the program as its compiler prints it. devices: of the mesh.
  """
  found, seen = [], set()
  for line in text.splitlines():
    match = MOVE.search(line)
    if not match:
      continue
    kind, arrays = match[2] or match[4], list(ARRAY.finditer(match[1]))
    # A collective that is drawn out over several steps is printed in each of them.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel and (kind, channel[1]) in seen:
      continue
    seen.add((kind, channel and channel[1]))
    if match[3] and kind != 'all-reduce':
      # The type of a '-start': operands, results, and counters of the transfer.
      arrays = [x for x in arrays if x[0] != 'u32[]']
      arrays = arrays[len(arrays) // 2 :]
    where = re.search(r'op_name="(?:jit\([^"/]*\)/)?([^"]*)"', line)
    shape, size = ' '.join(x[0] for x in arrays), sum(map(_bytes, arrays))
    found.append(Move(kind, shape, size, _group(line, devices), where[1] if where else ''))
  return found


def _bytes(array: re.Match) -> int:
  """Bytes of an array such as 'f32[8,16]'; a 'pred' takes one an element, a 'token' none."""
  bits = int(array[2] or 8 * (array[1] == 'pred'))
  return math.prod(int(d) for d in array[3].split(',') if d) * bits // 8


def _group(line: str, devices: int) -> int:
  """How many devices exchange with each other, in any of the three notations; all if none."""
  if axes := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    # 'axis':(1)4 is a part of an axis, 4 long.
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[axis]) for axis, part in used)
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return listed[1].count(',') + 1
  return devices


class Cost(NamedTuple):
  """What one device holds and does for a program.

  arguments, temporaries, code: bytes; results without a place among the arguments count as
  temporaries. flops, traffic: operations, and bytes read and written as the compiler counts
  them: a row read out of a table counts as the tile of 8 rows it lies in, and what stays in the
  chip's own scratch memory counts too. moves: collectives and copies.
  """

  arguments: int
  temporaries: int
  code: int
  flops: float
  traffic: float
  moves: list[Move]

  @property
  def total(self) -> int:
    """Bytes of memory in all."""
    return self.arguments + self.temporaries + self.code


def compile_for(function, *arguments) -> Cost | None:
  """Compiles a jitted function for the devices that its arguments' shardings name.

  Args:
    function: jitted. *arguments: pytrees of shapes with shardings.

  Returns:
    Its cost, or None if the compiler finds that memory does not suffice.
  """
  devices = jax.tree.leaves(arguments)[0].sharding.mesh.devices
  try:
    lowered = function.trace(*arguments).lower(lowering_platforms=(devices.flat[0].platform,))
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None
  memory, counts = compiled.memory_analysis(), compiled.cost_analysis()
  return Cost(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.generated_code_size_in_bytes,
    counts.get('flops', 0.0),
    counts.get('bytes accessed', 0.0),
    moves(compiled.as_text(), devices.size),
  )
