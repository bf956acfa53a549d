"""The cost of numbers, event features and times in a training step.

    python experiments/event_cost.py [--models=din,sam,sasrec,twin] [--length=200]
    python experiments/event_cost.py --task=next_item --models=sasrec,hstu,gru4rec --batch=64

Random batches with full histories; a batch is on the device, so input is not included. In every
pass all take turns; reported are the median of the passes' medians, its ratio to `ids`, and the
temporary memory of the compiled step. The variants, each beside the one before:

  ids       ids and a category of the item (next items: ids)
  numbers   and two numbers of the item (clicks only)
  events    and two coded features and a number of each event
  buckets   and config.model.time='buckets'
  bias      as `events`, with config.model.time='bias', of models that have it
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from step_cost import show

from lmn_jax import config as configs
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.layers.basic import Number, Schema
from lmn_jax.models import registry
from lmn_jax.training import program
from lmn_jax.training.trainer import compile_program

SIZES = {'user': 10_001, 'item': 5_001, 'item.category': 101, 'event.kind': 6, 'event.page': 51}
CODES = ('event.kind', 'event.page')
OF_ITEMS = tuple(Number(f'item.{name}', 'log', 1.0, 2.0) for name in ('price', 'age'))
DWELL = Number('event.dwell', 'log', 1.0, 2.0)
VARIANTS = ('ids', 'numbers', 'events', 'buckets', 'bias')


def schema_of(variant: str, task: str) -> Schema:
  """The fields of a variant."""
  schema = Schema(tuple(SIZES.items()))
  if task == 'click':
    schema = schema._replace(item=('item.category',))
  if variant == 'ids':
    return schema
  numbers = OF_ITEMS if task == 'click' else ()
  if variant == 'numbers':
    return schema._replace(numbers=numbers)
  return schema._replace(numbers=(*numbers, DWELL), event=CODES)


def make_batch(task: str, B: int, L: int) -> dict[str, np.ndarray]:
  """A batch with the fields of all variants; a program uses those that its model reads."""
  rng = np.random.default_rng(0)

  def ids(name, *shape):
    return rng.integers(1, SIZES[name], shape).astype(np.int32)

  time_BL = np.sort(rng.integers(0, 10**8, (B, L + 1)), axis=1).astype(np.int32)
  events = {key: ids(key, B, L) for key in CODES}
  events |= {'event.dwell': rng.exponential(9, (B, L)).astype(np.float32), 'user': ids('user', B)}
  if task == 'next_item':
    return events | {
      'item': ids('item', B, L), 'target': ids('item', B, L), 'first': np.ones(B, bool),
      'time': time_BL[:, :-1], 'time_gap': np.diff(time_BL, axis=1).astype(np.float32),
    }  # fmt: skip
  numbers = {
    f'{of}.{name}': rng.exponential(9, shape).astype(np.float32)
    for name in ('price', 'age')
    for of, shape in (('item', B), ('history', (B, L)))
  }
  return events | numbers | {
    'item': ids('item', B), 'item.category': ids('item.category', B),
    'history': ids('item', B, L), 'history.category': ids('item.category', B, L),
    'length': np.full(B, L, np.int32), 'label': rng.integers(0, 2, B).astype(np.float32),
    'weight': np.ones(B, np.float32),
    'time_gap': (time_BL[:, -1:] - time_BL[:, :-1]).astype(np.float32),
  }  # fmt: skip


def config_of(name: str, variant: str, args: argparse.Namespace) -> ml_collections.ConfigDict:
  """The experiment of a model and a variant."""
  config = configs.base(name, args.task)
  config.model.width = args.width
  if variant in ('buckets', 'bias'):
    config.model.time = variant
  return config


def turn(name: str, variant: str, args: argparse.Namespace) -> tuple[Callable[[], float], float]:
  """(a function that returns the median milliseconds of some steps, MiB of temporaries)."""
  config, mesh = config_of(name, variant, args), meshes.make_mesh(1, jax.devices()[:1])
  model = registry.build(config.model.to_dict(), schema_of(variant, args.task), args.task)
  batch = meshes.place(mesh, make_batch(args.task, args.batch, args.length))
  trainer = compile_program(program.make(config, model, batch, mesh))
  state = trainer.init(0)
  step = trainer.update.lower(state, batch).compile()

  def measured() -> float:
    nonlocal state
    durations = []
    for _ in range(args.calls + 1):
      began = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
      durations.append(time.perf_counter() - began)
    return 1e3 * statistics.median(durations[1:])

  return measured, step.memory_analysis().temp_size_in_bytes / 2**20


def measure(args: argparse.Namespace) -> list[dict]:
  """A row for each model and variant."""
  models, rows = registry.MODELS[args.task], []
  for name in args.models:
    variants = [
      x for x in VARIANTS
      if (x != 'bias' or models[name].has_time_bias) and (x, args.task) != ('numbers', 'next_item')
    ]  # fmt: skip
    turns = {variant: turn(name, variant, args) for variant in variants}
    passes = [{x: measured() for x, (measured, _) in turns.items()} for _ in range(args.passes)]
    ms = {x: statistics.median(line[x] for line in passes) for x in variants}
    rows += [
      {'model': name, 'variant': x, 'ms': round(ms[x], 2), 'to_ids': round(ms[x] / ms['ids'], 2),
       'temporaries_mib': round(turns[x][1], 1)}
      for x in variants
    ]  # fmt: skip
  return rows


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--task', default='click', choices=registry.MODELS)
  names = ['din', 'sam', 'sasrec', 'twin']
  parser.add_argument('--models', type=lambda x: x.split(','), default=names)
  sizes = {'batch': 256, 'length': 200, 'width': 16, 'passes': 5, 'calls': 10}
  for name, value in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  for name in args.models:
    one_of('--models', name, registry.MODELS[args.task])
  show(measure(args), args)


if __name__ == '__main__':
  main()
