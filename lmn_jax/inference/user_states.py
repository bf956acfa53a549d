"""A next-item model whose users' states are kept between requests and updated with new events.

A user's state is what the model carries of the full segments of their history, and the events
after these, at most T, with their features and times if the model reads them. A new event is
appended to these; when there are T and one more comes, the segment is read once into the carry: the
time from its last event to the next one is then known. So

    update(states, new events)        costs as much as the new events
    score(states, candidates)         costs one segment

whatever the length of the history. Both give the result of reading the whole history from its first
event, since the segments are those of `lanes.LaneSource`. A model of windows has no carry and keeps
the newest T events.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lmn_jax.data.reads import Reads, event_padding
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.inference.segment_states import (
  Events,
  UserStates,
  all_steps,
  clear,
  no_events,
  segment_of,
  take_in,
)
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.tables import reader
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup
from lmn_jax.training.trainer import Trainer

NOTHING = Reads()


class StatefulModel:
  """The functions of a model over user states; none of them changes its arguments.

  Attributes:
    reads: what the model reads of events besides the items.

  `update` and `score` raise a UserError for an item row out of bounds: events have rows 0 (unknown)
  to V - 1, candidates rows 1 to V - 1.
  """

  def __init__(
    self,
    model: NextItemModel,
    trainer: Trainer,
    mesh: Mesh,
    length: int,
    lanes: int,
    latest: bool = False,
    reads: Reads = NOTHING,
    padding: Events = MappingProxyType({}),
  ):
    """Builds the functions; the first call of each compiles it.

    Args:
      model: the model. trainer: its compiled functions, of which `stream` is used. mesh: the
        devices.
      length: T, config.history_length. lanes: users read together, a multiple of the data axis'
        devices; missing users are filled up with empty ones.
      latest: config.latest: the model knows the newest window only.
      reads: what the model reads of events besides the items. padding: see `event_padding`.
    """
    self._trainer, self._mesh, self._lanes = trainer, mesh, lanes
    self._T, self._V, self._width = length, model.items, model.tables()['item'].width
    self._carries = model.whole and not latest
    self.reads, self._padding = reads, {'item': np.array(model.items, np.int32), **padding}
    item = jax.ShapeDtypeStruct((lanes, length), jnp.int32)
    self._carry = jax.eval_shape(model.carry, {'item': item})
    self._products = _products_of(model, mesh)

  def empty(self, row: np.ndarray) -> UserStates:
    """Returns states of users without events. row: their embedding rows [N]."""
    N = len(row)
    zeros = np.zeros(N, np.int64)
    carry = jax.tree.map(lambda x: np.zeros((N, *x.shape[1:]), x.dtype), self._carry)
    recent = no_events(self._padding, N, self._T)
    return UserStates(np.asarray(row, np.int32), zeros, zeros.copy(), recent, carry)

  def update(self, state: State, states: UserStates, events: Sequence[Events]) -> UserStates:
    """Returns the states after new events.

    Args:
      state: the weights. states: of N users. events: each user's new events, see segment_states.
    """
    for new in events:
      check_items('event', new['item'], 0, self._V)
    fold = functools.partial(self._fold, state) if self._carries else None
    return all_steps(take_in(states, events, fold))

  def score(
    self,
    state: State,
    states: UserStates,
    candidates: np.ndarray,
    request: np.ndarray | None = None,
  ) -> Float[np.ndarray, 'N C']:
    """Returns a score of each candidate; higher is likelier. 0 for a user without events.

    Args:
      state: the weights. states: of N users. candidates: item rows [N, C]. request: as for
        `vectors`.
    """
    check_items('candidate', candidates, 1, self._V)
    scores = np.zeros(candidates.shape, np.float32)
    for users, vector_B1D in self._vectors(state, states, request):
      candidate_BC = np.full((self._lanes, candidates.shape[1]), self._V, np.int32)
      candidate_BC[: len(users)] = candidates[users]
      score_BC = self._products(state, vector_B1D, meshes.place(self._mesh, candidate_BC))
      scores[users] = np.asarray(jax.device_get(score_BC))[: len(users)]
    return scores

  def vectors(
    self, state: State, states: UserStates, request: np.ndarray | None = None
  ) -> Float[np.ndarray, 'N D']:
    """Returns vectors whose products with item rows are scores; 0 for a user without events.

    Args:
      state: the weights. states: of N users. request: int64 [N], the time of each request in
        seconds, as the times of the events; None if the model reads no times.
    """
    vectors = np.zeros((len(states.row), self._width), np.float32)
    for users, vector_B1D in self._vectors(state, states, request):
      vectors[users] = np.asarray(jax.device_get(vector_B1D))[: len(users), 0]
    return vectors

  def _vectors(
    self, state: State, states: UserStates, request: np.ndarray | None
  ) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields indices of users with events, and their vectors on the devices, in batches."""
    active = np.flatnonzero(states.held > 0)
    request = None if request is None else request[active]
    for users, batch, carry in self._batches(states, active, request, last=True):
      vector_B1D, _ = self._trainer.stream(state, carry, batch)
      yield users, vector_B1D

  def _fold(self, state, states, users, request):
    """Reads the full segments of users into their carry, in place; they then hold no event."""
    for indices, batch, carry in self._batches(states, users, request):
      _, carry = self._trainer.stream(state, carry, batch)
      for old, new in zip(jax.tree.leaves(states.carry), jax.tree.leaves(carry), strict=True):
        old[indices] = np.asarray(jax.device_get(new))[: len(indices)]
    clear(states, users, self._padding)

  def _batches(self, states, users, request, last=False):
    """Yields (indices, batch, carry), the latter two on the devices, for users in lanes.

    request: times of the requests of these users, or None. last: whether the batch names the newest
    event, so that only the vector after it is computed.
    """
    for begin in range(0, len(users), self._lanes):
      indices = users[begin : begin + self._lanes]
      missing = self._lanes - len(indices)

      def lanes(x, missing=missing):
        return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

      asked_at = None if request is None else request[begin : begin + self._lanes]
      batch = segment_of(states, indices, asked_at)
      if last:
        batch['asked'] = np.maximum(states.held[indices] - 1, 0).astype(np.int32)[:, None]
      carry = jax.tree.map(lambda x, indices=indices: lanes(x[indices]), states.carry)
      batch = jax.tree.map(lanes, batch)
      yield indices, meshes.place(self._mesh, batch), meshes.place(self._mesh, carry)


def stateful_model(config: ml_collections.ConfigDict, setup: Setup) -> StatefulModel:
  """Returns the model of a run over user states, with config.eval_batch_size lanes."""
  source = setup.sources['train']
  return StatefulModel(
    setup.model,
    setup.trainer,
    setup.mesh,
    config.history_length,
    config.eval_batch_size,
    config.latest,
    source.reads,
    event_padding(source.store, source.reads),
  )


def _products_of(model: NextItemModel, mesh: Mesh) -> Callable:
  """Returns a function of vectors [B, 1, D] and candidates [B, C] that gives scores [B, C]."""
  specs = model.tables()

  @jax.jit
  def products(state, vector_B1D, candidate_BC):
    with meshes.use_mesh(mesh):
      rows_BCD = reader.Reader(state.tables, specs, mesh)('item', candidate_BC)
      return jnp.einsum('bd,bcd->bc', vector_B1D[:, 0], rows_BCD)

  return products


def check_items(name: str, items: np.ndarray, least: int, V: int) -> None:
  """Refuses item rows out of bounds, which a device would clamp to other items.

  Raises:
    UserError: the first such row, and the bounds.
  """
  items = np.asarray(items)
  if items.dtype.kind not in 'iu' and items.size:
    raise UserError(f'{name}: item rows must be integers, not {items.dtype}')
  outside = items[(items < least) | (items >= V)]
  if outside.size:
    raise UserError(
      f'{name}: item row {outside.flat[0]} is not in the vocabulary; give rows {least} to {V - 1}'
    )
