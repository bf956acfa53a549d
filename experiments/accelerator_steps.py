"""The measurements of accelerator.py: a training step, the loop around it, and the rates of a card.

A time is the median over GROUPS groups of calls. Nothing is waited for within a group, and all of
it at its end. One process measures; several hosts are not supported.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_rows import Row, config_of, fields_of
from jax.experimental.compilation_cache import compilation_cache
from next_item_speed import targets
from step_cost import memory_setup, mib, trainer_of

from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.planning import instructions, traffic
from lmn_jax.training import setup as setups
from lmn_jax.training.feed import Dispatch, Feed
from lmn_jax.training.program import State

GROUPS = 5
BUFFERED = 16  # batches that the loader may have read before the first is taken
COUNTED = 4  # batches whose targets are counted


class Rates(NamedTuple):
  """Measured rates of a device. copy: bytes a second, read and written. matmul: FLOP/s by dtype."""

  copy: float
  matmul: dict[str, float]


class Timing(NamedTuple):
  """Settings. seconds: of one measurement. small: whether at sizes for a CPU."""

  seconds: float
  small: bool


@contextlib.contextmanager
def compilations_stored(folder: Path, small: bool) -> Iterator[None]:
  """Within it every compiled program is stored in a folder, and read from there if it is there.

  small: whether to compile without most optimizations, in a third of the time.
  """
  settings = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
    'jax_disable_most_optimizations': small,
  }
  before = {name: jax.config.values[name] for name in settings}
  try:
    _set_cache(settings)
    yield
  finally:
    _set_cache(before)


def _set_cache(settings: dict[str, Any]) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # it is opened at the first compilation, and not again


def median_ms(call: Callable[[], Any], seconds: float) -> float:
  """Milliseconds of a call, in about `seconds` altogether. call: returns what is waited for.

  Calls that are longer than a group are in fewer groups, at least one.
  """
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  each = max(1, round(seconds / GROUPS / (time.perf_counter() - start)))
  times = []
  while len(times) < GROUPS and (not times or time.perf_counter() - start < 2 * seconds):
    began = time.perf_counter()
    for _ in range(each):
      waited = call()
    jax.block_until_ready(waited)
    times.append((time.perf_counter() - began) * 1e3 / each)
  return statistics.median(times)


def rates(timing: Timing) -> Rates:
  """The rates of the first device: a copy beyond any cache, and a product of square matrices.

  float32 is multiplied at the default precision of JAX, which on an NVIDIA GPU is TF32.
  """
  size, N = (2**22, 512) if timing.small else (2**28, 8192)
  x = jnp.ones(size, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  copy = 2 * x.nbytes / median_ms(lambda: add(x), timing.seconds) * 1e3
  multiply, matmul = jax.jit(jnp.matmul), {}
  for dtype in (jnp.float32, jnp.bfloat16):
    x_NN = jnp.ones((N, N), dtype)
    ms = median_ms(lambda x_NN=x_NN: multiply(x_NN, x_NN), timing.seconds)
    matmul[jnp.dtype(dtype).name] = 2 * N**3 / ms * 1e3
  return Rates(copy, matmul)


def share_of_bound(
  moved: float, flops: float, ms: float, rates: Rates, dtype: str
) -> dict[str, Any]:
  """The bound of a step that takes longer, 'bytes' or 'flops', and its share of the time.

  Args:
    moved: bytes that the step reads and writes, by planning/traffic.py.
    flops: by XLA, which counts the body of a loop once: with loops the share may be larger.
    ms: of a step on the device. dtype: of its products.
  """
  seconds = {'bytes': moved / rates.copy, 'flops': flops / rates.matmul[dtype]}
  bound = max(seconds, key=seconds.get)
  return {
    'gb': digits(moved / 1e9),
    'gflop': digits(flops / 1e9),
    'bound': bound,
    'share': digits(seconds[bound] * 1e3 / ms),
  }


class Program(NamedTuple):
  """A compiled program. steps: that a call takes."""

  compiled: jax.stages.Compiled
  steps: int


class Sender:
  """Sends steps to the devices by a feed, as training/loop.py does.

  Attributes:
    state: the newest. capacity: steps of a dispatch.
  """

  def __init__(self, setup: setups.Setup, feed: Feed, state: State):
    """state: donated to the first dispatch."""
    self._setup, self._feed, self.state = setup, feed, state
    self.capacity = feed.capacity
    self._skipped, self._pending = meshes.replicated(setup.mesh, np.float32(0)), None

  def next(self, count: int) -> Dispatch:
    """The inputs of the next steps, on the devices."""
    return self._feed.next(count)

  def send(self, dispatch: Dispatch) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Sends a dispatch; returns the state after it, and what the loop checks: loss and skipped."""
    self.state, self._skipped, metrics = self._feed.train(
      self._setup.trainer, self.state, dispatch, self._skipped
    )
    return self.state, (metrics['loss'], metrics['skipped'])

  def send_next(self) -> Any:
    """Sends a full dispatch of the next steps, then checks the one before."""
    state, checked = self.send(self.next(self.capacity))
    if self._pending is not None:
      jax.device_get(self._pending)
    self._pending = checked
    return state, checked

  def lowered(self, dispatch: Dispatch) -> jax.stages.Lowered:
    """The program of `send`, for a full dispatch."""
    setup, resident = self._setup, self._setup.residents.get('train')
    if resident is None and self.capacity == 1:
      return setup.trainer.update.lower(self.state, dispatch.inputs, self._skipped)
    columns = {} if resident is None else resident.shapes
    # A full dispatch is sent without a count.
    return setup.trainer.steps.lower(self.state, columns, dispatch.inputs, None, self._skipped)


def compile_twice(lower: Callable[[], jax.stages.Lowered], first: Callable[[], Any]):
  """(compiled, {cold_s, second_s}): seconds from the trace to the executable.

  The second time the program is read from the cache of `compilations_stored`, and it is run.

  Args:
    lower: traces the program. first: calls it.
  """
  began = time.perf_counter()
  compiled = lower().compile()
  cold_s = time.perf_counter() - began
  jax.clear_caches()
  began = time.perf_counter()
  jax.block_until_ready(first())
  return compiled, {'cold_s': cold_s, 'second_s': time.perf_counter() - began}


def loop_ms(sender: Sender, seconds: float) -> float:
  """Milliseconds of a step in the loop of training; dispatches are full ones."""
  # Batches that were read during compilation are used before the time starts.
  began = time.perf_counter()
  for _ in range(math.ceil(BUFFERED / sender.capacity)):
    ready = sender.send_next()
    if time.perf_counter() - began > seconds:
      break
  jax.block_until_ready(ready)
  return median_ms(sender.send_next, seconds) / sender.capacity


def counted(row: Row, setup: setups.Setup) -> float:
  """What a step processes: examples, or events with a next item, the mean over a few batches."""
  if row.task == 'click':
    return row.batch
  source, V = setup.sources['train'], setup.model.items
  return statistics.mean(targets(source[step], V) for step in range(COUNTED))


class Stores:
  """Stores of generated logs, each built once. prepare_s: of the newest `of`, 0 for a second."""

  def __init__(self, folder: Path):
    self._folder, self._stores = folder, {}
    self.prepare_s = 0.0

  def of(self, data: Any) -> Store:
    key, began = data.to_json_best_effort(), time.perf_counter()
    if key not in self._stores:
      self._stores[key] = prepare(data, self._folder)
    self.prepare_s = round(time.perf_counter() - began, 2)
    return self._stores[key]


def measure_memory(row: Row, timing: Timing, rates: Rates) -> dict[str, Any]:
  """The costs of a product-key memory alone; there is no loop."""
  axis = fields_of(row, timing.small, ())['slots_per_axis']
  setup = memory_setup(axis**2, 'adam', steps=1, B=row.batch, K=row.L)
  mesh = meshes.make_mesh()
  trainer, batch = trainer_of(setup, mesh), meshes.place(mesh, setup.batches[0])
  state, skipped = trainer.init(0), meshes.replicated(mesh, np.float32(0))

  def step():
    nonlocal state
    state, metrics = trainer.update(state, batch, skipped)
    return state, metrics

  compiled, taken = compile_twice(lambda: trainer.update.lower(state, batch, skipped), step)
  taken['device_ms'] = median_ms(step, timing.seconds)
  taken['second_s'] -= taken['device_ms'] / 1e3
  return described(row, taken, Program(compiled, 1), rates, 'float32', row.batch * row.L)


# By column the changes of the config. Training has the last; rows with a goal of the ratio have all
# of them, and device_ms is then of an update on one batch.
FEEDS = {
  'host_ms': dict(store_on='host', steps_per_dispatch=1),
  'resident_ms': dict(store_on='device', steps_per_dispatch=1),
  'loop_ms': dict(store_on='auto', steps_per_dispatch=0),
}


def measure_training(row: Row, timing: Timing, rates: Rates, stores: Stores) -> dict[str, Any]:
  """The costs of a training step of a model, and of the loop around it."""
  config, state, taken, program = config_of(row, timing.small), None, {}, None
  store, prepare_s = stores.of(config.data), stores.prepare_s
  for column in FEEDS if 'ratio' in row.goals else ['loop_ms']:
    config.update(FEEDS[column])
    setup = setups.set_up(config, store)
    resident = setup.residents.get('train')
    with Feed(config, setup.sources['train'], resident, setup.mesh, 0) as feed:
      sender = Sender(setup, feed, setup.trainer.init(0) if state is None else state)
      if program is None:
        program, device = measure_device(sender, timing.seconds)
        taken |= device
      taken[column], state = loop_ms(sender, timing.seconds), sender.state
  dtype = 'bfloat16' if config.model.get('bf16') else 'float32'
  record = described(row, taken, program, rates, dtype, counted(row, setup))
  where = 'device' if setup.residents else 'host'
  return record | {'store': where, 'steps': sender.capacity, 'prepare_s': prepare_s}


def measure_device(sender: Sender, seconds: float) -> tuple[Program, dict[str, float]]:
  """(program, costs) of the same full dispatch again and again."""
  dispatch = sender.next(sender.capacity)
  compiled, taken = compile_twice(lambda: sender.lowered(dispatch), lambda: sender.send(dispatch))
  ms = median_ms(lambda: sender.send(dispatch), seconds)
  taken['second_s'] -= ms / 1e3
  return Program(compiled, sender.capacity), taken | {'device_ms': ms / sender.capacity}


def described(
  row: Row,
  taken: dict[str, float],
  program: Program,
  rates: Rates,
  dtype: str,
  processed: float,
) -> dict[str, Any]:
  """The record of a step. taken: seconds and milliseconds by column. processed: units of a step."""
  device, loop = taken['device_ms'], taken.get('loop_ms')
  compiled = program.compiled
  memory, flops = compiled.memory_analysis(), compiled.cost_analysis().get('flops', 0.0)
  # The loop over the steps of a dispatch has a known length: all of it is counted, unlike FLOPs.
  moved = traffic.count(instructions.parse(compiled.as_text())).nbytes / program.steps
  step = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  peak = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
  times = {name: digits(value) for name, value in taken.items()}
  return times | {
    'ratio': digits(loop / device) if loop else None,
    'per_s': round(processed / (loop or device) * 1e3),
    'unit': row.unit,
    **share_of_bound(moved, flops, device, rates, dtype),
    'step_mib': mib(step - memory.alias_size_in_bytes),
    'peak_mib': mib(peak) if peak else None,
  }


def digits(value: float, n: int = 4) -> float:
  """A number with n significant digits."""
  return round(value, n - 1 - math.floor(math.log10(value))) if value else value
