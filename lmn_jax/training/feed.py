"""Feeds batches to the devices: from the host, or cut from a store that is on the devices.

In training a `Feed` returns the inputs of the next steps, those of one dispatch. The position in
the data is the number of steps, so a run may continue with another feed.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from lmn_jax.data.batches import loader
from lmn_jax.data.resident import Resident
from lmn_jax.data.train_lengths import BLOCK
from lmn_jax.distributed import mesh as meshes
from lmn_jax.training.program import Batch, State
from lmn_jax.training.trainer import Trainer, compile_cut

# By default the inputs of the steps of a dispatch take at most this many bytes: a device that has
# the store reads a few kB a step, and one that is fed by the host the whole batches.
BYTES = 2**26


class Dispatch(NamedTuple):
  """The inputs of some steps, on the devices.

  inputs: a batch; or plans, or batches, stacked on a first axis. count: of the steps.
  """

  inputs: Batch
  count: int


class Feed:
  """The training batches, by the dispatch. Use as a context manager, or call `close`.

  Attributes:
    capacity: most steps of a dispatch.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    source: Any,
    resident: Resident | None,
    mesh: Mesh,
    step: int,
  ):
    """Begins at a step.

    Args:
      config: the whole experiment; steps_per_dispatch, loader_workers and the sizes that
        `until_event` reads are read.
      source: of the training batches. resident: of the source, if the store is on the devices.
      mesh: of the devices. step: of the first batch.
    """
    self._source, self._resident, self._mesh, self._step = source, resident, mesh, step
    example = source[0] if resident is None else source.plan(0)
    self.capacity = _capacity(config, mesh, example)
    self._columns, self._loader = {}, None
    if resident is None:
      self._loader = loader(source, start=step, workers=config.loader_workers)
    else:
      self._columns = resident.put()

  def next(self, count: int) -> Dispatch:
    """Returns the inputs of the next `count` steps, at most `capacity`."""
    if self._resident is not None:
      plans = self._source.plans(self._step, count)
      inputs = meshes.replicated(self._mesh, _filled(plans, self.capacity))
    elif self.capacity == 1:
      inputs = meshes.place(self._mesh, next(self._loader))
    else:
      batches = list(itertools.islice(self._loader, count))
      stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
      inputs = meshes.place(self._mesh, _filled(stacked, self.capacity), meshes.STACKED)
    self._step += count
    return Dispatch(inputs, count)

  def train(
    self, trainer: Trainer, state: State, dispatch: Dispatch, skipped: jax.Array
  ) -> tuple[State, jax.Array, dict[str, jax.Array]]:
    """Sends the steps of a dispatch; returns the state, `skipped` and the metrics after them.

    The metrics are those of `Trainer.steps`, or of `Trainer.update` for a single batch.
    """
    if self._resident is None and self.capacity == 1:
      state, metrics = trainer.update(state, dispatch.inputs, skipped)
      return state, metrics['skipped'], metrics
    full = dispatch.count == self.capacity
    count = None if full else meshes.replicated(self._mesh, np.int32(dispatch.count))
    return trainer.steps(state, self._columns, dispatch.inputs, count, skipped)

  def batch_of(self, dispatch: Dispatch, k: int) -> Batch:
    """Returns the batch of the k-th step of a dispatch."""
    if self._resident is None and self.capacity == 1:
      return dispatch.inputs
    with jax.transfer_guard('allow'):
      inputs = jax.tree.map(lambda x: x[k], dispatch.inputs)
    if self._resident is None:
      return inputs
    return compile_cut(self._resident.cut, self._mesh)(self._columns, inputs)

  def close(self) -> None:
    """Ends the processes that read batches."""
    if self._loader is not None:
      self._loader.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def _capacity(config, mesh, example):
  """The most steps of a dispatch. example: the inputs of a step."""
  most = min(config.steps, *_every(config))
  if config.steps_per_dispatch:
    return min(most, config.steps_per_dispatch)
  if meshes.platform_of(mesh) == 'cpu':
    return 1  # a step takes far longer than to send it
  return max(1, min(most, BYTES // sum(x.nbytes for x in jax.tree.leaves(example))))


def _filled(stacked, capacity):
  """Repeats the last entry up to the capacity, so that dispatches of any count have one shape."""

  def filled(x):
    return np.concatenate([x, np.repeat(x[-1:], capacity - len(x), axis=0)])

  return jax.tree.map(filled, stacked)


def until_event(config: ml_collections.ConfigDict, step: int, capacity: int) -> int:
  """Returns how many steps follow `step` up to the next line, save, validation or the end.

  If steps differ in the length of the histories, up to the next length at the latest.
  """
  events = [step + size - step % size for size in _every(config)]
  return min(capacity, min(config.steps, *events) - step)


def _every(config):
  """The numbers of steps at whose multiples a dispatch ends."""
  every = config.log_every, config.save_every, config.eval_every
  return every if config.train_length == 'full' else (*every, BLOCK)  # a dispatch has one length


def held_out(
  source: Any, resident: Resident | None, mesh: Mesh
) -> Iterator[tuple[np.ndarray | None, Batch]]:
  """Yields the batches of a held-out split on the devices, each with its `number` on the host.

  Args:
    source: of the split. resident: of the source, if the store is on the devices.
    mesh: of the devices.
  """
  if resident is None:
    for batch in loader(source):
      number = batch.pop('number', None)
      if number is not None:
        number = meshes.gather(mesh, number)
      yield number, meshes.place(mesh, batch)
    return
  columns, cut = resident.put(), compile_cut(resident.cut, mesh)
  for step in range(source.batches):
    plan = source.plan(step)
    batch = cut(columns, meshes.replicated(mesh, plan))
    batch.pop('number', None)
    yield plan.get('number'), batch
