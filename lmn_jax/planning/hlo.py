"""Reads the memory, collectives and copies of a compiled program from its text and counts."""

import math
import re
from typing import NamedTuple

import jax

from lmn_jax.planning import instructions, traffic
from lmn_jax.planning.traffic import Traffic

COLLECTIVES = 'all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter'
MOVE = re.compile(rf'= (\(?[a-z][^%]*?) (?:({COLLECTIVES})(-start)?|(copy))\(')


class Move(NamedTuple):
  """A collective or a copy, on one device.

  kind: such as 'all-gather'. shape: of the result, such as 'f32[8,16]'. bytes: of the result.
  devices: number that take part. where: the operation of the program that causes it, or ''.
  """

  kind: str
  shape: str
  bytes: int
  devices: int
  where: str

  @property
  def received(self) -> float:
    """The least number of bytes that a device receives from others."""
    n = self.devices
    share = {
      'all-reduce': 2 * (n - 1) / n,  # reduce-scatter, then all-gather
      'reduce-scatter': n - 1,  # the result is one part of n
      'collective-permute': 1,
      'copy': 0,
    }
    return float(self.bytes * share.get(self.kind, (n - 1) / n))


def moves(text: str, devices: int) -> list[Move]:
  """Returns the collectives and copies of a compiled program, each once.

  Args:
    text: of the program, from the compiler. devices: number in the mesh.
  """
  result, seen = [], set()
  for line in text.splitlines():
    match = MOVE.search(line)
    if not match:
      continue
    kind, arrays = match[2] or match[4], list(instructions.arrays_of(match[1]))
    # A collective in several steps is printed in each of them.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel and (kind, channel[1]) in seen:
      continue
    seen.add((kind, channel and channel[1]))
    if match[3] and kind != 'all-reduce':
      # The type of a '-start': operands, results, and counters of the transfer.
      arrays = [x for x in arrays if str(x) != 'u32[]']
      arrays = arrays[len(arrays) // 2 :]
    where = re.search(r'op_name="(?:jit\([^"/]*\)/)?([^"]*)"', line)
    shape = ' '.join(map(str, arrays))
    size = sum(math.prod(x.dims) * x.bits // 8 for x in arrays)
    result.append(Move(kind, shape, size, _group(line, devices), where[1] if where else ''))
  return result


def _group(line: str, devices: int) -> int:
  """Returns the number of devices in a group of a collective; all without `replica_groups`."""
  if axes := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    # 'axis':(1)4 is a part of an axis with 4 devices.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return listed[1].count(',') + 1
  return devices


class Cost(NamedTuple):
  """The memory and work of a program on one device.

  arguments, temporaries, code: bytes; results that do not alias arguments count as temporaries.
  flops, accessed: operations, and 'bytes accessed', by XLA's count, which is not the traffic of the
  memory: see traffic.py. moves: collectives and copies. traffic: what the program reads and writes.
  """

  arguments: int
  temporaries: int
  code: int
  flops: float
  accessed: float
  moves: list[Move]
  traffic: Traffic

  @property
  def total(self) -> int:
    """Bytes of memory in total."""
    return self.arguments + self.temporaries + self.code


def compile_for(function, *arguments) -> Cost | None:
  """Returns the cost of a jitted function, compiled for the devices of its arguments' shardings.

  None if the compiler reports that memory does not suffice.

  Args:
    function: jitted. *arguments: pytrees of shapes with shardings.
  """
  devices = jax.tree.leaves(arguments)[0].sharding.mesh.devices
  try:
    lowered = function.trace(*arguments).lower(lowering_platforms=(devices.flat[0].platform,))
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None
  memory, counts, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  return Cost(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.generated_code_size_in_bytes,
    counts.get('flops', 0.0),
    counts.get('bytes accessed', 0.0),
    moves(text, devices.size),
    traffic.count(instructions.parse(text)),
  )
