"""Reports the cost of training on a TPU slice: compiles the real step for it, without a TPU.

The TPU compiler (libtpu) runs without TPUs. It compiles the training step with its shapes and
shardings; hlo.py and traffic.py read the result: bytes on each chip, traffic with its memory and
between chips. Nothing is executed: times are computed from peak rates and the compiler's cycles.
"""

import logging
import math
import time
from collections import defaultdict
from typing import NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import report
from lmn_jax.models import registry
from lmn_jax.planning import hlo
from lmn_jax.planning.slices import CHIPS, Chip, slice_of
from lmn_jax.tables.table import by_row
from lmn_jax.training import program as programs
from lmn_jax.training import setup as setups
from lmn_jax.training.program import Batch, State
from lmn_jax.training.trainer import compile_program

log = logging.getLogger(__name__)
MIB, GIB = 2**20, 2**30
SHOWN = 12  # lines of a table that is ordered by traffic


class Plan(NamedTuple):
  """A training step, compiled for a slice.

  store, topology: their names. state, batch: shapes on the mesh of the setup. cost: None if the
  memory of a chip does not suffice. seconds: that the compilation took.
  """

  config: ml_collections.ConfigDict
  store: str
  topology: str
  setup: setups.Setup
  state: State
  batch: Batch
  cost: hlo.Cost | None
  seconds: float

  @property
  def chip(self) -> Chip:
    """The chips of the slice."""
    return CHIPS[self.topology.split(':')[0]]


def plan(config: ml_collections.ConfigDict, store: Store, topology: str) -> Plan:
  """Compiles a training step for a slice.

  Args:
    config: the whole experiment. store: its data. topology: as for `slice_of`.

  Raises:
    UserError: the config, the slice or the store is wrong.
  """
  setup = setups.set_up(config, store, slice_of(topology))
  log.info('compiling the step for %s: one to four minutes of a CPU core', topology)
  start = time.perf_counter()
  state, batch, cost = step(config, setup, CHIPS[topology.split(':')[0]])
  seconds = time.perf_counter() - start
  return Plan(config, store.path.name, topology, setup, state, batch, cost, seconds)


def text_of(p: Plan) -> str:
  """Returns tables of the cost of a step: memory, time, traffic."""
  data, model = p.setup.mesh.shape['data'], p.setup.mesh.shape['model']
  lines = [
    f'{p.config.model.name} on {p.store}, batches of {p.config.batch_size:,}, on {p.topology}: '
    f'{p.setup.mesh.size} chips, mesh data {data} x model {model}; for each chip:',
    '',
  ]
  if p.cost is None:
    lines.append(f'the step does not fit into {p.chip.hbm} GiB')
  else:
    lines += [*memory(p.state, p.batch, p.cost, p.chip), '']
    lines += [*work(p), '', *reads_and_writes(p.cost), '', *table_traffic(p.state, p.cost), '']
    lines += collectives(p.cost)
  return '\n'.join([*lines, *advice(p.config.batch_size, p.setup.mesh)])


def step(
  config: ml_collections.ConfigDict, setup: setups.Setup, chip: Chip
) -> tuple[State, Batch, hlo.Cost | None]:
  """Returns the shapes of state and batch on the mesh of a setup, and the cost of a step.

  The cost is None if the memory of a chip does not suffice.
  """
  batch = {
    name: jax.ShapeDtypeStruct(
      (config.batch_size, *x.shape[1:]), x.dtype, sharding=NamedSharding(setup.mesh, meshes.BATCH)
    )
    for name, x in setup.sources['train'][0].items()
  }
  model = registry.build(config.model.to_dict(), setup.model.schema, config.task)
  trainer = compile_program(programs.make(config, model, batch, setup.mesh))
  cost = hlo.compile_for(trainer.update, trainer.abstract, batch)
  return trainer.abstract, batch, None if memory_share(cost, chip) > 1 else cost


def shard(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """Returns the shape of the part of an array on one chip."""
  return x.sharding.shard_shape(x.shape)


def bytes_on_chip(tree) -> int:
  """Returns the bytes of the arrays of a tree on one chip, without padding of their layout."""
  return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_share(cost: hlo.Cost | None, chip: Chip) -> float:
  """Returns the share of a chip's memory that a step takes; inf if it does not fit."""
  return math.inf if cost is None else cost.total / GIB / chip.hbm


def memory(state: State, batch: Batch, cost: hlo.Cost, chip: Chip) -> list[str]:
  """Returns the lines of a table: bytes on a chip, by use."""
  tables, inputs = bytes_on_chip(state.tables), bytes_on_chip(batch)
  dense = bytes_on_chip(state._replace(tables={}))
  parts = {
    'tables and their optimizer': tables,
    'dense parameters and theirs': dense,
    'batch': inputs,
    'padding of all these': cost.arguments - tables - dense - inputs,
    'temporaries': cost.temporaries,
    'program': cost.code,
    'together': cost.total,
  }
  rows = [(k, f'{x / MIB:,.1f}', f'{x / GIB / chip.hbm:.1%}') for k, x in parts.items()]
  return report.aligned([('memory', 'MiB', f'of {chip.hbm} GiB'), *rows])


def work(p: Plan) -> list[str]:
  """Returns the lines of two tables: the work of a chip with its time at peak rates, and the step.

  The second has the columns of experiments/accelerator.py. device_ms is an estimate: instructions
  one after another, see `Traffic.seconds`, at least the bound. bound: the longest time at peak
  rates. share: the bound's time / device_ms. per_s: examples or lanes. cold_s: of compiling here.
  """
  cost, chip, traffic = p.cost, p.chip, p.cost.traffic
  received = sum(move.received for move in cost.moves)
  peaks = {
    'operations': (f'{cost.flops / 1e9:,.2f} G', cost.flops / chip.flops / 1e9),
    'memory traffic': (f'{traffic.nbytes / 1e6:,.1f} MB', traffic.nbytes / chip.bandwidth / 1e6),
    'from other chips': (f'{received / 1e6:,.1f} MB', received / chip.links / 1e6),
  }
  bound = max(peaks, key=lambda name: peaks[name][1])
  least = peaks[bound][1]
  ms = max(least, traffic.seconds(chip.bandwidth * 1e9, chip.clock * 1e9) * 1e3)
  rows = [(name, amount, f'{time:.3f}') for name, (amount, time) in peaks.items()]
  accessed = f'{cost.accessed / 1e6:,.1f} MB', f'({cost.accessed / chip.bandwidth / 1e6:.3f})'
  rows.insert(2, ("XLA's bytes accessed, not used", *accessed))
  examples = p.config.batch_size * p.setup.sources['train'].examples_per_row
  row = (f'{ms:.4g}', f'{examples / ms * 1e3:,.0f}', bound, f'{least / ms:.1%}')
  lines = [
    *report.aligned([('work of a step', 'amount', 'ms at peak'), *rows]),
    '',
    *report.aligned(
      [('step, estimated', 'device_ms', 'per_s', 'bound', 'share', 'cold_s'),
       (f'{traffic.instructions:,} instructions', *row, f'{p.seconds:.0f}')]
    ),
  ]  # fmt: skip
  if loops := traffic.unknown_loops:
    where = ', '.join(dict.fromkeys(name or 'unnamed' for name in loops))
    lines.append(f'loops of unknown length, counted once: {len(loops)} ({where})')
  return lines


def reads_and_writes(cost: hlo.Cost) -> list[str]:
  """Returns the lines of a table: the traffic with the memory by array and operation."""
  amounts, times = defaultdict(int), defaultdict(int)
  for run in cost.traffic.runs:
    for part in run.parts:
      # The last names of the operation, which say more than those of the modules around it.
      where = '/'.join(run.where.split('/')[-2:])
      key = f'{part.opcode}{" of" if part.whole else " in"} {part.array} {where}'.strip()
      amounts[key] += part.bytes * run.times
      times[key] += run.times
  ordered = sorted(amounts, key=amounts.get, reverse=True)
  shown = [(key, times[key], amounts[key]) for key in ordered[:SHOWN]]
  if others := ordered[SHOWN:]:
    shown.append(('others', sum(map(times.get, others)), sum(map(amounts.get, others))))
  rows = [(name, f'{n:,}', f'{amount / 1e6:,.3f}') for name, n, amount in shown]
  return report.aligned([('memory traffic (of: the whole array, in: parts)', 'times', 'MB'), *rows])


def table_traffic(state: State, cost: hlo.Cost) -> list[str]:
  """Returns the lines of a table: the traffic with the arrays of the largest table.

  Arrays are known by their shape. Copies to the chip's memory and back are of the whole array.
  """
  name = max(state.tables, key=lambda name: math.prod(shard(state.tables[name].rows_RD)))
  R = state.tables[name].rows_RD.shape[0]
  leaves = [x for x in jax.tree.leaves(state.tables[name]) if by_row(x, R)]
  kinds = {'float32': 'f32', 'bfloat16': 'bf16', 'int32': 's32', 'bool': 'pred'}
  shapes = [f'{kinds[str(x.dtype)]}[{",".join(map(str, shard(x)))}]' for x in leaves]
  parts, whole = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
  for run in cost.traffic.runs:
    for part in run.parts:
      if (shape := str(part.array)) in parts:
        amounts = whole if part.whole or run.opcode == 'slice-start' else parts
        amounts[shape] += part.bytes * run.times
  rows = [(x, f'{parts[x] / 1e6:,.3f}', f'{whole[x] / 1e6:,.3f}') for x in parts]
  return report.aligned([(f'traffic with the table {name}', 'MB of rows', 'MB of all'), *rows])


def collectives(cost: hlo.Cost) -> list[str]:
  """Returns the lines of a table: collectives by traffic."""
  received = defaultdict(list)
  for move in cost.moves:
    if move.kind != 'copy':
      first, *more = move.shape.split(' ')
      received[f'{move.kind} {first}{f" and {len(more)} more" if more else ""}'].append(
        move.received
      )
  ordered = sorted(received.items(), key=lambda item: -sum(item[1]))
  shown = ordered[:SHOWN]
  if ordered[SHOWN:]:
    shown.append(('others', [x for _, values in ordered[SHOWN:] for x in values]))
  rows = [(name, str(len(values)), f'{sum(values) / 1e6:,.3f}') for name, values in shown]
  return report.aligned([('collective', 'times', 'MB received'), *rows])


def advice(batch_size: int, mesh: Mesh) -> list[str]:
  """Returns a line if a smaller model axis divides the work among more chips; see docs, mesh."""
  chips, model, data = mesh.size, mesh.shape['model'], mesh.shape['data']
  least = next(m for m in range(1, model + 1) if chips % m == 0 and batch_size % (chips // m) == 0)
  if least == model:
    return []
  return [
    '',
    f'config.mesh.model={model}: every chip computes {batch_size // data:,} examples of a step; '
    f'with {least} it computes {batch_size * least // chips:,} and holds as many rows: use {least}',
  ]
