"""What is kept of each user between two requests, brought up to date by new events, scored from.

A user's state is what its model carries of the segments that are full and past, and the events
since, T at most. An event joins these; when they are T and one more comes, the segment is read once
and carried on. So

    update(states, new events)        costs what the new events cost
    score(states, candidates)         costs a segment

however long the history is, and both give what reading the whole of it from the first event gives:
the segments are those of `lanes.LaneSource`. A model of windows carries nothing and keeps the
newest T events.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.inference.segment_states import UserStates, all_steps, take_in
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.tables import reader
from lmn_jax.training.program import State
from lmn_jax.training.trainer import Trainer


class Server(NamedTuple):
  """The functions of a model over user states; none changes what it is given.

  empty: embedding rows [N] -> UserStates of users without events.
  update: (State, UserStates, item rows of each user's new events, oldest first) -> UserStates.
  score: (State, UserStates, candidates int [N, C]) -> float32 [N, C]; higher is likelier. Of a user
  without events all are 0: nothing is known.
  Both raise a UserError for an item row out of bounds: events 0 (unknown) to V - 1, candidates 1 to
  V - 1.
  vectors: (State, UserStates) -> float32 [N, D], whose products with the items' rows are scores.
  """

  empty: Callable[[np.ndarray], UserStates]
  update: Callable[[State, UserStates, Sequence[np.ndarray]], UserStates]
  score: Callable[[State, UserStates, np.ndarray], Float[np.ndarray, 'N C']]
  vectors: Callable[[State, UserStates], Float[np.ndarray, 'N D']]


def make_server(
  model: NextItemModel, trainer: Trainer, mesh: Mesh, length: int, lanes: int, latest: bool = False
) -> Server:
  """Builds the functions.

  Args:
    model: of the weights. trainer: whose `stream` is used. mesh: of the devices.
    length: T, config.history_length. lanes: users read together, of which N is made up with empty
      ones; the devices of the data axis divide it.
    latest: config.latest: the model knows no more than the newest window.
  """
  T, V, specs = length, model.items, model.tables()
  shapes = jax.eval_shape(model.carry, {'item': jax.ShapeDtypeStruct((lanes, T), jnp.int32)})

  def empty(row):
    N = len(row)
    none = np.zeros(N, np.int64)
    carry = jax.tree.map(lambda x: np.zeros((N, *x.shape[1:]), x.dtype), shapes)
    return UserStates(
      np.asarray(row, np.int32), none, none.copy(), np.full((N, T), V, np.int32), carry
    )

  @jax.jit
  def rate(state, vector_B1D, candidate_BC):
    with meshes.known(mesh):
      rows_BCD = reader.Reader(state.tables, specs, mesh)('item', candidate_BC)
      return jnp.einsum('bd,bcd->bc', vector_B1D[:, 0], rows_BCD)

  def batches(states, users, asked=False):
    """Lanes full of users: (who, the batch and what it carries on the devices).

    asked: whether the vectors after the newest events are asked.
    """
    for begin in range(0, len(users), lanes):
      own = users[begin : begin + lanes]

      def lane(x, own=own):
        return np.concatenate([x[own], np.zeros((lanes - len(own), *x.shape[1:]), x.dtype)])

      batch = dict(
        item=lane(states.recent), first=lane(states.segments) == 0, user=lane(states.row)
      )
      if asked:
        batch['asked'] = np.maximum(lane(states.held) - 1, 0).astype(np.int32)[:, None]
      yield own, meshes.place(mesh, batch), meshes.place(mesh, jax.tree.map(lane, states.carry))

  def fold(state, states, users):
    """Reads the full segments of users, which then hold no event."""
    for own, batch, carry in batches(states, users):
      _, carry = trainer.stream(state, carry, batch)
      for old, new in zip(jax.tree.leaves(states.carry), jax.tree.leaves(carry), strict=True):
        old[own] = np.asarray(jax.device_get(new))[: len(own)]
    states.segments[users] += 1
    states.held[users], states.recent[users] = 0, V

  def update(state, states, events):
    for items in events:
      check_items('event', items, 0, V)
    carries = model.whole and not latest
    return all_steps(take_in(states, events, functools.partial(fold, state) if carries else None))

  def score(state, states, candidates):
    check_items('candidate', candidates, 1, V)
    C = candidates.shape[1]
    found = np.zeros(candidates.shape, np.float32)
    users = np.flatnonzero(states.held > 0)
    for own, batch, carry in batches(states, users, asked=True):
      vector_B1D, _ = trainer.stream(state, carry, batch)
      candidate_BC = np.full((lanes, C), V, np.int32)
      candidate_BC[: len(own)] = candidates[own]
      rated_BC = rate(state, vector_B1D, meshes.place(mesh, candidate_BC))
      found[own] = np.asarray(jax.device_get(rated_BC))[: len(own)]
    return found

  def vectors(state, states):
    found = np.zeros((len(states.row), specs['item'].width), np.float32)
    for own, batch, carry in batches(states, np.flatnonzero(states.held > 0), asked=True):
      vector_B1D, _ = trainer.stream(state, carry, batch)
      found[own] = np.asarray(jax.device_get(vector_B1D))[: len(own), 0]
    return found

  return Server(empty, update, score, vectors)


def check_items(what: str, items: np.ndarray, least: int, V: int) -> None:
  """Refuses item rows out of bounds, which a device would clamp to others.

  Raises:
    UserError: naming the first, and the bounds.
  """
  items = np.asarray(items)
  if items.dtype.kind not in 'iu' and items.size:
    raise UserError(f'{what}: item rows must be whole numbers, not {items.dtype}')
  outside = items[(items < least) | (items >= V)]
  if outside.size:
    raise UserError(
      f'{what}: item row {outside.flat[0]} is not in the catalogue, {least} to {V - 1}'
    )
