"""Reports the cost of training on a TPU slice: compiles the real step for it, without a TPU.

The TPU compiler (libtpu) runs without TPUs. It compiles the training step with its shapes and
shardings, and hlo.py reads the result: bytes on each chip, traffic between chips, copies of tables.
Nothing is executed: times are those of a roofline, from peak rates.
"""

import bisect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import ml_collections
from jax.sharding import NamedSharding

from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import report
from lmn_jax.models import registry
from lmn_jax.planning import hlo
from lmn_jax.planning.slices import CHIPS, Chip, slice_of
from lmn_jax.training import program as programs
from lmn_jax.training import setup as setups
from lmn_jax.training.program import Batch, State
from lmn_jax.training.trainer import compile_program

log = logging.getLogger(__name__)
MIB, GIB = 2**20, 2**30
SHOWN = 12  # kinds of collectives in the table, by most traffic


def plan(config: ml_collections.ConfigDict, store: Store, topology: str) -> str:
  """Returns tables of the cost of a training step on a slice, and the largest sizes that fit.

  Args:
    config: the whole experiment. store: its data. topology: as for `slice_of`.

  Raises:
    UserError: the config, the slice or the store is wrong.
  """
  chip = CHIPS[topology.split(':')[0]]
  setup = setups.set_up(config, store, slice_of(topology))
  data, model = setup.mesh.shape['data'], setup.mesh.shape['model']
  lines = [
    f'{config.model.name} on {store.path.name}, batches of {config.batch_size:,}, on {topology}: '
    f'{setup.mesh.size} chips, mesh data {data} x model {model}; for each chip:',
    '',
  ]
  state, batch, cost = step(config, setup, chip)
  if cost is None:
    lines.append(f'the step does not fit into {chip.hbm} GiB')
  else:
    lines += [*memory(state, batch, cost, chip), '', *roofline(config.batch_size, cost, chip)]
    lines += ['', *traffic(state, cost)]
  lines += ['', most_examples(config, setup, chip, cost)]
  if 'slots_per_axis' in config.model:
    lines.append(most_slots(config, setup, chip, cost))
  return '\n'.join(lines)


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
  if cost is not None and cost.total > chip.hbm * GIB:
    cost = None
  return trainer.abstract, batch, cost


def shard(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """Returns the shape of the part of an array on one chip."""
  return x.sharding.shard_shape(x.shape)


def bytes_on_chip(tree) -> int:
  """Returns the bytes of the arrays of a tree on one chip, without padding of their layout."""
  return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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


def roofline(batch_size: int, cost: hlo.Cost, chip: Chip) -> list[str]:
  """Returns the lines of a table: the work of a chip, and its time at peak rates."""
  received = sum(move.received for move in cost.moves)
  milliseconds = {
    'operations': cost.flops / chip.flops / 1e9,
    'memory traffic': cost.traffic / chip.bandwidth / 1e6,
    'from other chips': received / chip.links / 1e6,
  }
  amounts = (
    f'{cost.flops / 1e9:,.2f} G',
    f'{cost.traffic / 1e6:,.1f} MB',
    f'{received / 1e6:,.1f} MB',
  )
  rows = [
    (name, amount, f'{ms:.3f}')
    for (name, ms), amount in zip(milliseconds.items(), amounts, strict=True)
  ]
  longest = max(milliseconds, key=milliseconds.get)
  ms = milliseconds[longest]
  return [
    *report.aligned([('work of a step', 'amount', 'ms at peak'), *rows]),
    f'roofline: {ms:.3f} ms a step, bound by {longest}; {batch_size / ms * 1e3:,.0f} examples/s',
  ]


def traffic(state: State, cost: hlo.Cost) -> list[str]:
  """Returns the lines of a table: collectives by traffic, and copies of the largest table."""
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
  name = max(state.tables, key=lambda name: math.prod(shard(state.tables[name].rows_RD)))
  printed = f'f32[{",".join(map(str, shard(state.tables[name].rows_RD)))}]'
  copies = [move.bytes for move in cost.moves if (move.kind, move.shape) == ('copy', printed)]
  return [
    *report.aligned([('collective', 'times', 'MB received'), *rows]),
    f'copies of the rows of {name}, {printed}: {len(copies)}, {sum(copies) / 1e6:,.1f} MB',
  ]


def share_of(
  config: ml_collections.ConfigDict, setup: setups.Setup, chip: Chip, field: str, size: int
) -> float:
  """Returns the share of a chip's memory with a field changed; inf if it does not fit."""
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict({field: size})
  cost = step(changed, setup, chip)[2]
  share = math.inf if cost is None else cost.total / GIB / chip.hbm
  log.info(
    '%s=%d takes %s of the memory', field, size, f'{share:.1%}' if cost else 'more than 100%'
  )
  return share


def most_examples(
  config: ml_collections.ConfigDict, setup: setups.Setup, chip: Chip, cost: hlo.Cost | None
) -> str:
  """Returns a line on the largest batch: an estimate, because large ones compile for minutes."""
  small, large = config.batch_size, config.batch_size * 8
  if cost is None:
    return f'batch_size: {small:,} does not fit'
  share = cost.total / GIB / chip.hbm
  above = share_of(config, setup, chip, 'batch_size', large)
  if above > 1:
    return f'batch_size: {small:,} fits, {large:,} does not'
  most = small + (1 - share) * (large - small) / max(above - share, 1e-9)
  data = setup.mesh.shape['data']
  return (
    f'batch_size: about {int(most) // data * data:,} would fit, extrapolated from {small:,} '
    f'({share:.1%} of the memory) and {large:,} ({above:.1%})'
  )


def most_slots(
  config: ml_collections.ConfigDict, setup: setups.Setup, chip: Chip, cost: hlo.Cost | None
) -> str:
  """Returns a line on the largest number of slots; both sizes in it were compiled."""
  start, field = config.model.slots_per_axis, 'model.slots_per_axis'
  # Slot ids are int32.
  sizes = [2**k for k in range(16) if 2**k >= config.model.top_k] + [math.isqrt(2**31 - 1)]
  sizes = sorted({start, *sizes})

  def share(size: int) -> float:
    if size != start:
      return share_of(config, setup, chip, field, size)
    return math.inf if cost is None else cost.total / GIB / chip.hbm

  fits, part = largest(sizes, start, share, 2)
  if fits is None:
    return f'{field}: not even {sizes[0]:,} fits'
  above = [f', {size:,} does not' for size in sizes if size > fits][:1]
  return f'{field}: {fits:,} fits ({part:.1%} of the memory){"".join(above)}'


def largest(
  sizes: Sequence[int], start: int, share: Callable[[int], float], degree: int
) -> tuple[int | None, float]:
  """Finds the largest size that fits into the memory, with few calls of `share`.

  Args:
    sizes: ascending. start: the size to try first. share: size -> share of the memory, ascending,
      about a + b * size**degree; inf for a size that does not fit.
    degree: see share.

  Returns:
    The size, or None if the smallest does not fit, and its share.
  """
  low, high, middle = -1, len(sizes), sizes.index(start)
  points = [(0, 0.0)]  # (size**degree, share) of the sizes that fit
  while True:
    size_share = share(sizes[middle])
    if size_share <= 1:
      low = middle
      points.append((sizes[middle] ** degree, size_share))
    else:
      high = middle
    if high - low == 1:
      return (sizes[low], points[-1][1]) if low >= 0 else (None, math.inf)
    middle = (low + high) // 2
    if len(points) > 1:
      (x0, y0), (x1, y1) = points[-2:]
      full = x1 + (1 - y1) * (x1 - x0) / max(y1 - y0, 1e-12)
      middle = bisect.bisect_right(sizes, full, key=lambda size: size**degree) - 1
    middle = min(max(middle, low + 1), high - 1)
