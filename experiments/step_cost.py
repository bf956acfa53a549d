"""The cost of one training step by size of the memory: time and memory, beside other libraries.

    python experiments/step_cost.py [--sizes=14,16,18,20,22] [--passes=3] [--json=PATH]
    python experiments/step_cost.py --peers-python=PATH    # one that has torch, product-key-memory
    python experiments/step_cost.py --task=model           # the whole LMN, at 2^16 and 2^20 slots

The task `memory` is a product-key memory alone: 512 unit-normal queries of width 64, new in each
step, through a linear map and a LayerNorm of each half to the 32 best of n slots by two-axis keys;
the softmax-weighted sum of their values, width 64, against a unit-normal target; forward, backward,
update; float32. `model` is the step of configs/lmn_douyin.py on random batches. Contestants:

    lmn_jax  the update of this library, as training calls it; --optimizer is that of the values
    dense    the same step in JAX, with the values as an ordinary parameter under Adam
    pkm, bag, rows  PyTorch, see torch_pkm.py; `tuned` in the ratios is the better of bag and rows

Each measurement is a process, so that its peak of memory can be read. In every pass all take turns,
with the defaults of the allocator of glibc (`default`), keeping freed memory (`kept`, which avoids
page faults of large arrays), and that in huge pages (`huge`). Reported is the median over the
passes of their median step; ratios and goals take the fastest setting of each contestant.

Columns: ms, its lowest and highest pass, best and worst step; state_mib, values with their
accumulators; temporaries_mib, of the compiled step; start_rss_mib, before the state is created,
init_peak_rss_mib, the peak of its creation; peak_ratio, the peak (of the device if it has memory of
its own, else of the process) by state_mib, added_ratio without start_rss_mib; compile_s; others,
the cores that other processes kept busy: if it is well above 0, measure again. gb_per_s is the
least traffic of a step by its time: with U distinct rows read, D floats of value and A of
accumulators in each, 4 U (D + 2 (D + A)) bytes: values read in the forward pass, then both read and
written. --profile=DIR writes a trace of some steps of each JAX contestant, for Perfetto or XProf.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lmn_jax import config as configs
from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.basic import Schema
from lmn_jax.layers.losses import Recall, memory_loss, total_loss
from lmn_jax.layers.product_keys import product_top_k
from lmn_jax.models import registry
from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables import optimizers, table
from lmn_jax.tables.spec import TableSpec
from lmn_jax.training import program
from lmn_jax.training.trainer import Trainer, compile_program
from lmn_jax.training.writer import peak_rss

WARMUP = 5  # steps that are not timed
LEAST_STEPS = 5
PEERS = ('pkm', 'bag', 'rows')
CONTESTANTS = ('lmn_jax', 'dense', *PEERS)
TASKS = {'memory': '14,16,18,20,22', 'model': '16,20'}  # the measured sizes, log2 of slots
TUNED = ('bag', 'rows')

# Settings of the allocator of glibc: the defaults; without mmap for large arrays and without
# returning memory, so that pages are faulted in once; and the same in huge pages, so that reads of
# distant rows need fewer look-ups of addresses.
KEPT = {
  'MALLOC_MMAP_MAX_': '0',
  'MALLOC_TRIM_THRESHOLD_': str(2**35),
  'MALLOC_TOP_PAD_': str(2**28),
  'MALLOC_ARENA_MAX': '1',
}
ALLOCATORS = {
  'default': {},
  'kept': KEPT,
  'huge': KEPT | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
}

# Vocabulary of the store of the stand-in: ids and the unknown id.
SIZES = {
  'user': 1001, 'item': 501, 'user.age': 6, 'user.gender': 3, 'user.city': 31,
  'item.category': 41, 'context.query': 121,
}  # fmt: skip
SCHEMA = Schema(
  tuple(SIZES.items()), ('user.age', 'user.gender', 'user.city'), ('item.category',),
  ('context.query',),
)  # fmt: skip


def model_batch(rng: np.random.Generator, B: int, L: int) -> dict[str, np.ndarray]:
  """A batch for LMN, with full histories."""

  def ids(name, *shape):
    return rng.integers(0, SIZES[name], shape).astype(np.int32)

  batch = {name: ids(name, B) for name in SIZES}
  return batch | {
    'history': ids('item', B, L),
    'history.category': ids('item.category', B, L),
    'length': np.full(B, L, np.int32),
    'label': rng.integers(0, 2, B).astype(np.float32),
    'weight': np.ones(B, np.float32),
  }


def memory_batch(rng: np.random.Generator, B: int, D: int) -> dict[str, np.ndarray]:
  """Queries and targets [B, D]."""

  def normal():
    return rng.standard_normal((B, D), np.float32)

  return {'query': normal(), 'target': normal()}


# The memory loss is SmoothL1, x^2 / 2 for |x| < 1: with both sides divided by SCALE, and times
# LOSS_WEIGHT, it is the square of any difference below SCALE. Powers of two, so nothing is rounded.
SCALE = 64.0
LOSS_WEIGHT = 2 * SCALE**2


class ProductKeyMemory(Model):
  """A memory alone, as a model, so that a program can be built from it.

  Attributes:
    slots_per_axis: N; the memory has N * N slots. top_k: K, slots read for each query.
  """

  slots_per_axis: int = 128
  top_k: int = 32
  objective = 'memory'

  def tables(self):
    return {'memory': TableSpec(self.slots_per_axis**2, self.width, self.width**-0.5, 'memory')}

  @nn.compact
  def __call__(self, batch, read, carry=None, train=False):
    B, D = batch['query'].shape
    E = D // 2
    q_BD = nn.Dense(D, use_bias=False, name='query')(batch['query'])
    q_B2E = nn.LayerNorm(1e-5, name='query_norm')(q_BD.reshape(B, 2, E))
    keys_H2NE = self.param('keys', nn.initializers.normal(E**-0.5), (1, 2, self.slots_per_axis, E))
    slots_B1K, scores_B1K = product_top_k(q_B2E.reshape(B, 1, D), keys_H2NE, self.top_k)
    out_BV = read('memory', slots_B1K[:, 0], nn.softmax(scores_B1K[:, 0], axis=-1))
    recall = Recall(
      out_BV[:, None] / SCALE, batch['target'][:, None] / SCALE, jnp.ones((B, 1), jnp.float32)
    )
    memory, mean = memory_loss(recall)
    losses = {'memory': LOSS_WEIGHT * memory}
    return Outputs(out_BV, losses, {'loss/memory_of_mean': mean})


class Setup(NamedTuple):
  """A model with the parts of its trainer. batches: on the host, one for each step."""

  config: Any
  model: Model
  batches: list[dict[str, np.ndarray]]


def memory_setup(slots: int, optimizer: str, steps: int, B=512, K=32, D=64) -> Setup:
  """The product-key memory alone.

  Args:
    slots: a square number. optimizer: of the values, a `config.optimizer.memory.name`.
    steps: number of batches. B, K, D: queries, slots read for each, width of queries and of values.
  """
  config = configs.base('lmn')
  config.optimizer.memory.update(name=optimizer, rate=1e-3)
  model = ProductKeyMemory(schema=Schema(()), width=D, slots_per_axis=math.isqrt(slots), top_k=K)
  rng = np.random.default_rng(0)
  return Setup(config, model, [memory_batch(rng, B, D) for _ in range(steps)])


def model_setup(slots: int, optimizer: str) -> Setup:
  """LMN at the sizes of configs/lmn_douyin.py; a few batches are used in turns."""
  config = configs.base('lmn')
  config.model.update(
    dict(slots_per_axis=math.isqrt(slots), top_k=16, positions=1, query='axes', softmax=True)
  )
  config.optimizer.memory.name = optimizer
  model = registry.build(config.model.to_dict(), SCHEMA)
  rng = np.random.default_rng(0)
  batches = [model_batch(rng, config.batch_size, config.history_length) for _ in range(8)]
  return Setup(config, model, batches)


class Dense(NamedTuple):
  """The state of the dense step: values are a parameter [R, D]."""

  params: Any
  opt: Any
  rows_RD: jax.Array
  rows_opt: Any


def trainer_of(setup: Setup, mesh: Mesh) -> Trainer:
  """The functions of the library for a setup."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), setup.batches[0])
  return compile_program(program.make(setup.config, setup.model, shapes, mesh))


def dense_functions(setup: Setup, trainer: Trainer) -> tuple[Callable, Callable]:
  """(init, update) with the values as a parameter, from the initial weights of the trainer.

  The gradient of the values is an array of their size, and the optimizer updates every row.
  """
  config, model = setup.config, setup.model
  dense_tx = optimizers.make(config.optimizer, 'dense', config.steps)
  rows_tx = optimizers.make(config.optimizer, 'memory', config.steps)
  V = model.tables()['memory'].rows

  def init(seed):
    state = trainer.init(seed)
    rows_RD = state.tables['memory'].rows_RD
    return Dense(state.params, dense_tx.init(state.params), rows_RD, rows_tx.init(rows_RD))

  def step(state, batch):
    def loss_fn(params, rows_RD):
      def read(name, ids_TK, weights_TK):
        return jnp.einsum('tk,tkd->td', weights_TK, table.gather(rows_RD, ids_TK, V))

      outputs = model.apply({'params': params}, batch, read, train=True)
      return total_loss(outputs.losses, model.objective, config.loss)

    loss, grads = jax.value_and_grad(loss_fn, (0, 1))(state.params, state.rows_RD)
    moved, opt = dense_tx.update(grads[0], state.opt, state.params)
    rows_moved, rows_opt = rows_tx.update(grads[1], state.rows_opt, state.rows_RD)
    params = optax.apply_updates(state.params, moved)
    return Dense(params, opt, state.rows_RD + rows_moved, rows_opt), {'loss': loss}

  return jax.jit(init), jax.jit(step, donate_argnums=0)


def mib(size: float) -> float:
  return round(size / 2**20, 1)


def tree_bytes(tree: Any) -> int:
  """Bytes of all leaves, arrays or their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def rows_read(model: Model, params: Any, batch: Any) -> int:
  """U, the distinct rows of the memory that a batch reads."""
  read = []

  def note(name, ids, weights):
    read.append(np.asarray(ids))
    return jnp.zeros((ids.shape[0], model.width))

  model.apply({'params': params}, batch, note)
  return np.unique(np.concatenate(read)).size


def least_bytes(U: int, slots: int, D: int, state_bytes: int) -> int:
  """4 U (D + 2 (D + A)); state_bytes: of all rows with their accumulators, 4 slots (D + A)."""
  return 4 * U * D + 2 * U * state_bytes // slots


def timed(step: Callable, state: Any, batches: list, steps: int, seconds: float):
  """Runs `steps` steps, or LEAST_STEPS in `seconds`: (state, metrics, ms of each).

  Waits for every step, because the next one depends on it.
  """
  times, metrics = [], {}
  for i in range(WARMUP + steps):
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batches[i % len(batches)]))
    if i >= WARMUP:
      times.append((time.perf_counter() - began) * 1e3)
    if len(times) >= LEAST_STEPS and sum(times) > seconds * 1e3:
      break
  return state, metrics, times


def cost_of_step(
  init: Callable, step: Callable, batches: list, steps: int, seconds: float
) -> tuple[Any, jax.stages.Compiled, dict]:
  """(state, compiled step, costs) of a step in this process, which did nothing before.

  Args:
    init: seed -> state. step: jitted, (state, batch) -> (state, metrics).
    batches: on the devices. steps, seconds: of `timed`.
  """
  start = peak_rss()
  state = jax.block_until_ready(init(0))
  init_peak = peak_rss()
  began = time.perf_counter()
  compiled = step.lower(state, batches[0]).compile()
  compile_s = time.perf_counter() - began
  state, metrics, times = timed(compiled, state, batches, steps, seconds)
  device = jax.devices()[0]
  on_device = (device.memory_stats() or {}).get('peak_bytes_in_use')
  return state, compiled, {
    'ms': round(statistics.median(times), 2),
    'ms_best': round(min(times), 2),
    'ms_worst': round(max(times), 2),
    'steps': len(times),
    'temporaries_mib': mib(compiled.memory_analysis().temp_size_in_bytes),
    'start_rss_mib': mib(start),
    'init_peak_rss_mib': mib(init_peak),
    'peak_rss_mib': mib(peak_rss()),
    'peak_device_mib': mib(on_device) if on_device else None,
    'compile_s': round(compile_s, 2),
    'loss': round(float(metrics['loss']), 4),
    'device': device.device_kind,
    'version': f'jax {jax.__version__}',
  }  # fmt: skip


def measure(who: str, task: str, log2: int, args: argparse.Namespace) -> dict:
  """The costs of a step of a JAX contestant at 2^log2 slots, in this process."""
  slots, mesh = 2**log2, meshes.make_mesh()
  if task == 'model':
    setup = model_setup(slots, args.optimizer or 'adagrad')
  else:
    # Adam for all; --optimizer is for lmn_jax alone.
    optimizer = args.optimizer if who == 'lmn_jax' else None
    setup = memory_setup(slots, optimizer or 'adam', WARMUP + args.steps, args.batch)
  trainer = trainer_of(setup, mesh)
  placed = [meshes.place(mesh, batch) for batch in setup.batches]
  setup.batches.clear()  # copies on the host, which would be part of the peak
  init, step = trainer.init, trainer.update
  if who == 'dense':
    init, step = dense_functions(setup, trainer)
  state, compiled, cost = cost_of_step(init, step, placed, args.steps, args.seconds)

  rows = state.tables if who == 'lmn_jax' else (state.rows_RD, state.rows_opt)
  state_bytes = tree_bytes(rows)
  peak, start = cost['peak_rss_mib'], cost['start_rss_mib']
  on_device, held = cost['peak_device_mib'], state_bytes / 2**20
  speed = None
  if task == 'memory':
    U = rows_read(setup.model, state.params, placed[-1])
    speed = least_bytes(U, slots, setup.model.width, state_bytes) / cost['ms'] / 1e6
  if args.profile:
    with jax.profiler.trace(str(Path(args.profile) / f'{who}-{log2}')):
      for batch in placed[:LEAST_STEPS]:
        state, _ = jax.block_until_ready(compiled(state, batch))
  return cost | {
    'state_mib': mib(state_bytes),
    'peak_ratio': round((on_device or peak) / held, 2),
    'added_ratio': round((on_device or peak - start) / held, 2),
    'gb_per_s': round(speed, 2) if speed else None,
  }


def environment(setting: str, base: dict[str, str]) -> dict[str, str]:
  """The environment of a measurement: `base` with one setting of the allocator."""
  clean = {name: value for name, value in base.items() if name not in ALLOCATORS['huge']}
  return clean | ALLOCATORS[setting]


def command(who: str, log2: int, args: argparse.Namespace) -> list[str]:
  """The command of one process."""
  shared = [f'--steps={args.steps}', f'--seconds={args.seconds}', f'--batch={args.batch}']
  if who in PEERS:
    script = Path(__file__).with_name('torch_pkm.py')
    return [args.peers_python, '-W', 'ignore', str(script), who, f'--slots={2**log2}', *shared]
  return [
    sys.executable, __file__, f'--one={who}', f'--task={args.task}', f'--sizes={log2}',
    f'--optimizer={args.optimizer}', f'--profile={args.profile}', *shared,
  ]  # fmt: skip


def why_not(who: str, python: str) -> str:
  """The reason why a contestant cannot run in `python`, '' if it can."""
  module = {'pkm': 'product_key_memory', 'bag': 'torch', 'rows': 'torch'}.get(who)
  if not module:
    return ''
  done = subprocess.run([python, '-W', 'ignore', '-c', f'import {module}'], capture_output=True)
  return f'{who} left out: {python} cannot import {module}' if done.returncode else ''


def too_large(who: str, log2: int, D: int = 64) -> str:
  """The reason why a size is not tried, '' if it fits: values, gradient, two moments, twice."""
  need, have = 8 * 4 * 2**log2 * D, os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if who != 'dense' or need <= have:
    return ''
  return f'dense left out at 2^{log2}: needs {need / 2**30:.0f} GiB of {have / 2**30:.0f}'


def busy_seconds() -> float | None:
  """Busy seconds of all CPUs of this machine, None off Linux."""
  stat = Path('/proc/stat')
  if not stat.exists():
    return None
  user, nice, system, _, _, *interrupts = map(int, stat.read_text().split('\n', 1)[0].split()[1:8])
  return (user + nice + system + sum(interrupts)) / os.sysconf('SC_CLK_TCK')


def run_one(who: str, log2: int, setting: str, args: argparse.Namespace):
  """The result of `run_process` for a contestant at a size."""
  return run_process(command(who, log2, args), setting)


def run_process(
  words: list[str], setting: str
) -> tuple[subprocess.CompletedProcess[str], float | None]:
  """Runs a command with a setting of the allocator; (process, busy cores of others)."""
  busy, began, before = busy_seconds(), time.perf_counter(), os.times()
  env = environment(setting, dict(os.environ))
  done = subprocess.run(words, env=env, capture_output=True, text=True)
  if busy is None:
    return done, None
  ended = os.times()
  children = ended.children_user + ended.children_system
  children -= before.children_user + before.children_system
  others = (busy_seconds() - busy - children) / (time.perf_counter() - began)
  return done, round(max(others, 0.0), 2)


def run_all(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
  """Measures in turns; (lines, missing ones with reasons). Prints both on stderr."""
  lines, missing = [], []

  def miss(reason):
    missing.append(reason)
    print(reason, file=sys.stderr)

  taking_part = []
  for who in args.only:
    if reason := why_not(who, args.peers_python):
      miss(reason)
    else:
      taking_part.append(who)
  runs = []
  for log2 in args.sizes:
    for who in taking_part:
      if reason := too_large(who, log2):
        miss(reason)
      else:
        runs.append((log2, who))
  # Contestants change fastest, so that other load of the machine affects all of them.
  runs = [(log2, setting, who) for log2, who in runs for setting in args.settings]
  runs.sort(key=lambda run: (args.sizes.index(run[0]), args.settings.index(run[1])))
  for turn in range(args.passes):
    for log2, setting, who in runs:
      done, others = run_one(who, log2, setting, args)
      if done.returncode:
        message = (done.stderr.strip().splitlines() or [''])[-1]
        miss(f'{who}, {setting} failed at 2^{log2}: status {done.returncode} {message}')
        continue
      line = {'who': who, 'log2': log2, 'setting': setting, 'pass': turn, 'others': others}
      lines.append(line | json.loads(done.stdout.splitlines()[-1]))
      print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
  return lines, missing


def over_passes(lines: list[dict]) -> list[dict]:
  """A row for each contestant, size and setting: medians of times, the largest of peaks."""
  groups: dict[tuple, list[dict]] = {}
  for line in lines:
    groups.setdefault((line['log2'], line['who'], line['setting']), []).append(line)

  def over(fold, group, key):
    values = [line[key] for line in group if line.get(key) is not None]
    return round(fold(values), 2) if values else None

  rows = []
  for (log2, who, setting), group in sorted(groups.items(), key=lambda item: item[0][0]):
    row = {'log2': log2, 'who': who, 'setting': setting, 'passes': len(group)}
    row |= {
      'ms': over(statistics.median, group, 'ms'),
      'ms_low': over(min, group, 'ms'),
      'ms_high': over(max, group, 'ms'),
      'ms_best': over(min, group, 'ms_best'),
      'ms_worst': over(max, group, 'ms_worst'),
    }
    for key in (
      'state_mib', 'temporaries_mib', 'start_rss_mib', 'init_peak_rss_mib', 'peak_rss_mib',
      'peak_device_mib', 'peak_ratio', 'added_ratio', 'others',
    ):  # fmt: skip
      row[key] = over(max, group, key)
    for key in ('compile_s', 'gb_per_s'):
      row[key] = over(statistics.median, group, key)
    rows.append(row | {'device': group[0]['device'], 'version': group[0]['version']})
  return rows


def credited(rows: list[dict]) -> dict[tuple[str, int], dict]:
  """By (contestant, log2) the row of its fastest setting; `tuned` is the better of the tuned."""
  best: dict[tuple[str, int], dict] = {}
  for row in sorted(rows, key=lambda row: row['ms']):
    for name in (row['who'], *(['tuned'] if row['who'] in TUNED else [])):
      best.setdefault((name, row['log2']), row)
  return best


RIVALS = ('dense', 'pkm', 'tuned')


def ratios(rows: list[dict]) -> list[dict]:
  """For each size our time, and for each other contestant on the device its time by ours."""
  best, lines = credited(rows), []
  for (who, log2), ours in sorted(best.items()):
    if who != 'lmn_jax':
      continue
    line = {'log2': log2, 'ms': ours['ms'], 'setting': ours['setting']}
    for rival in RIVALS:
      other = best.get((rival, log2))
      same = other and other['device'] == ours['device']
      line[rival] = round(other['ms'] / ours['ms'], 2) if same else None
    lines.append(line)
  return lines


class Goal(NamedTuple):
  """found: the result, None if not measured. wanted: the goal. at_least: whether it is a minimum.

  The fields are keys of the JSON report.
  """

  text: str
  found: float | None
  wanted: float
  at_least: bool

  def verdict(self) -> str:
    if self.found is None:
      return 'not measured'
    good = self.found >= self.wanted if self.at_least else self.found <= self.wanted
    return 'met' if good else 'NOT MET'


def goals(rows: list[dict]) -> list[Goal]:
  """The goals of the memory step, with the results."""
  best = credited(rows)
  by_size = {line['log2']: line for line in ratios(rows)}
  at20 = by_size.get(20, {})
  ours = {log2: row for (who, log2), row in best.items() if who == 'lmn_jax'}
  growth = round(ours[22]['ms'] / ours[14]['ms'], 2) if {14, 22} <= ours.keys() else None
  largest = ours.get(22, {})
  return [
    Goal('2^20: times faster than product-key-memory with Adam', at20.get('pkm'), 15, True),
    Goal('2^20: times faster than hand-tuned PyTorch', at20.get('tuned'), 2, True),
    Goal('time at 2^22 by time at 2^14', growth, 2, False),
    Goal('2^22: peak memory by values + accumulators', largest.get('peak_ratio'), 1.1, False),
    Goal('the same without what the process held before', largest.get('added_ratio'), 1.1, False),
  ]


def markdown(rows: list[dict]) -> str:
  """Dicts with the same keys as a table, without empty columns."""
  names = [name for name in (rows[0] if rows else ()) if any(r[name] is not None for r in rows)]
  if not names:
    return ''
  cells = [names] + [['-' if r[n] is None else str(r[n]) for n in names] for r in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  cells.insert(1, ['-' * width for width in widths])
  return '\n'.join(
    '| ' + ' | '.join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + ' |'
    for line in cells
  )


def show(rows: list[dict], args: argparse.Namespace) -> None:
  """Prints rows as a table; writes them to --json, if set, with their origin."""
  print(markdown(rows))
  if args.json:
    report = {
      'arguments': vars(args),
      'rows': rows,
      'cores': os.cpu_count(),
      'device': jax.devices()[0].device_kind,
      'version': f'jax {jax.__version__}',
      'python': sys.version.split()[0],
    }
    Path(args.json).write_text(json.dumps(report, indent=1))


def summary(args: argparse.Namespace, lines: list[dict], missing: list[str]) -> dict:
  """The report; ratios and goals are of the task `memory`."""
  rows = over_passes(lines)
  report = {
    'task': args.task,
    'batch': args.batch,
    'optimizer': args.optimizer,
    'passes': args.passes,
    'cores': os.cpu_count(),
    'table': rows,
    'missing': missing,
  }
  if args.task == 'memory':
    verdicts = [goal._asdict() | {'verdict': goal.verdict()} for goal in goals(rows)]
    report |= {'ratios': ratios(rows), 'goals': verdicts}
  return report


def names(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
  """The type of a flag: names out of `choices`, with commas."""

  def read(text):
    chosen = [x for x in text.split(',') if x]
    if strange := sorted(set(chosen) - set(choices)):
      raise argparse.ArgumentTypeError(f'{", ".join(strange)}: not among {", ".join(choices)}')
    return chosen

  return read


def even_sizes(text: str) -> list[int]:
  """The type of a flag: even whole numbers with commas, because 2^log2 must be a square."""
  sizes = [int(x) for x in text.split(',')]
  if odd := [x for x in sizes if x % 2]:
    raise argparse.ArgumentTypeError(f'{odd[0]}: 2^{odd[0]} is no square')
  return sizes


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--task', choices=TASKS, default='memory')
  parser.add_argument('--sizes', type=even_sizes, help='log2 of slots, such as 14,16')
  parser.add_argument('--only', type=names(CONTESTANTS), default=list(CONTESTANTS))
  parser.add_argument('--settings', type=names(tuple(ALLOCATORS)), default=list(ALLOCATORS))
  parser.add_argument('--optimizer', default='', help='of the values; memory: adam, model: adagrad')
  parser.add_argument('--batch', type=int, default=512, help='queries of the task memory')
  parser.add_argument('--passes', type=int, default=3)
  parser.add_argument('--steps', type=int, default=60, help='most steps timed in a process')
  parser.add_argument('--seconds', type=float, default=5.0, help='of timing in a process')
  parser.add_argument('--peers-python', default=sys.executable)
  parser.add_argument('--json', default='', help='write the report here')
  parser.add_argument('--profile', default='', help='folder for traces')
  parser.add_argument('--one', choices=('lmn_jax', 'dense'), help='measure in this process')
  args = parser.parse_args(arguments)
  args.sizes = args.sizes or even_sizes(TASKS[args.task])
  if args.task == 'model':
    args.only = ['lmn_jax']
  return args


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  if args.one:
    print(json.dumps(measure(args.one, args.task, args.sizes[0], args)))
    return
  report = summary(args, *run_all(args))
  if args.json:
    Path(args.json).write_text(json.dumps(report, indent=1) + '\n')
  print(json.dumps(report, indent=1))
  for part in ('table', 'ratios', 'goals'):
    if report.get(part):
      print('\n' + markdown(report[part]))
  for reason in report['missing']:
    print(reason)


if __name__ == '__main__':
  main()
