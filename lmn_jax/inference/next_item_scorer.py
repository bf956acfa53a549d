"""Scores of a next-item model: of pairs, and the best of all items."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float

from lmn_jax.data.packing import place_of
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking
from lmn_jax.evaluation.top_items import seen_pairs, top_items
from lmn_jax.inference import state_table
from lmn_jax.inference.queries import Ints, Queries, Scores, filled
from lmn_jax.inference.stored_users import StoredUsers
from lmn_jax.inference.user_states import stateful_model
from lmn_jax.tables import reader
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup

SEEN = 2**16  # pairs of a user and an item they have met, sent to the devices together
KEPT = -1  # in place of a number of events: the state of the table
MOST_EVENTS = 2**40  # of a user


class NextItemScorer:
  """Products of a user's vector, after their newest event, and item rows; 0 without an event."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    store: Store,
    setup: Setup,
    state: State,
    table: state_table.StateTable | None,
  ):
    """See `scorers.make_scorer`."""
    setup, state = fold_item_fields(setup, state)
    self._reads = setup.sources['train'].reads
    self._users = StoredUsers(store, self._reads)
    self._setup, self._state, self._table = setup, state, table
    self._length, self._lanes = config.history_length, config.eval_batch_size
    self._excludes = config.exclude_seen
    self._model = stateful_model(config, setup)
    # Enough for the user who has met most items: one shape for all.
    most = max(len(part.history['item']) and part.users['count'].max() for part in store.parts)
    self._seen = max(SEEN, int(most) + config.history_length)

  def vectors(self, queries: Queries) -> tuple[Float[np.ndarray, 'N D'], Ints]:
    """Returns the vector of each row's user, and the number of events that it is made of."""
    at, (vector_UD, events, _), _ = self._pasts(queries)
    return vector_UD[at], events[at]

  def pairs(self, queries: Queries) -> Scores:
    """Returns scores of pairs; NaN for an item that training did not see."""
    at, (vector_UD, events, _), among = self._pasts(queries)
    scores, N, mesh = [], len(at), self._setup.mesh
    for rows in filled(N, self._lanes):
      batch = dict(vector=vector_UD[at[rows]], item=queries.item[rows].astype(np.int32))
      scores.append(self._products(self._state, meshes.place(mesh, batch)))
    score = np.concatenate(jax.device_get(scores))[:N]
    return Scores(np.where(queries.item > 0, score, np.float32(np.nan)), events[at], among=among)

  def best(self, queries: Queries, K: int) -> Scores:
    """Returns the K best items for each row; those of rows with the same past are found once."""
    at, (vector_UD, events, met), among = self._pasts(queries)
    rows_RD, V, P = self._state.tables['item'].rows_RD, self._setup.model.items, self._seen
    Q, blocks, begin = ranking.QUERIES, [], 0
    lists = [np.unique(items) if self._excludes else items[:0] for items in met]
    upto = np.cumsum([len(items) for items in lists])
    while begin < len(lists):
      # As many pasts as there is room for them and for the items met.
      before = upto[begin - 1] if begin else 0
      end = min(begin + Q, int(np.searchsorted(upto, before + P, side='right')))
      user, seen = seen_pairs(lists[begin:end])
      fill = P - len(seen)
      user_P = np.pad(user, (0, fill)).astype(np.int32)
      seen_P = np.pad(seen, (0, fill), constant_values=V).astype(np.int32)
      query_QD = np.pad(vector_UD[begin:end], ((0, Q - (end - begin)), (0, 0)))
      top = jax.device_get(top_items(rows_RD, query_QD, user_P, seen_P, self._setup.mesh, V, K))
      blocks.append([x[: end - begin] for x in top])
      begin = end
    score, item = (np.concatenate(x) for x in zip(*blocks, strict=True))
    return Scores(score[at], events[at], item[at], among)

  def _pasts(self, queries):
    """Returns (index of each row's past, (vectors, numbers of events, items met), rows among).

    A past is a user up to one of their events and, if times are read, the time of the request; rows
    with the same past share its vector.
    """
    coded = pc.dictionary_encode(queries.user).combine_chunks()
    # After the users comes one without events, for rows without a user.
    names = [*coded.dictionary.to_pylist(), None]
    user = coded.indices.fill_null(len(names) - 1).to_numpy().astype(np.int64)
    record = np.full(len(names), -1, np.int64)
    record[user] = queries.record
    end, among = self._ends(queries, names, user)
    past, request, at = self._distinct(user * MOST_EVENTS + end - KEPT, queries)
    size, chunks = state_table.CHUNK * self._lanes, []
    for begin in range(0, len(past), size):
      users, upto = np.divmod(past[begin : begin + size], MOST_EVENTS)
      states, met = self._states(names, users, record[users], upto + KEPT)
      events = states.segments * self._length + states.held
      times = None if request is None else request[begin : begin + size]
      chunks.append((self._model.vectors(self._state, states, times), events, met))
    vector, events, met = zip(*chunks, strict=True)
    items = [row for chunk in met for row in chunk]
    return at, (np.concatenate(vector), np.concatenate(events), items), among

  def _distinct(self, past, queries):
    """Returns the distinct pasts, sorted, the seconds of their requests, and each row's index.

    The seconds are None if no times are read.
    """
    if not self._reads.time:
      past, at = np.unique(past, return_inverse=True)
      return past, None, at
    seconds = self._users.seconds(queries.requests())
    pairs, at = np.unique(np.stack([past, seconds]), axis=1, return_inverse=True)
    return *pairs, at.ravel()

  def _ends(self, queries, names, user):
    """Returns how many events of the store each row reads, or KEPT; and the rows among."""
    if self._table is None:
      return queries.end, 0
    newest = np.array(self._table.newest(names), np.int64)[user]
    held = newest > state_table.OLDEST
    if queries.time is None:
      return np.where(held, KEPT, queries.end), 0
    usable = held & (newest < queries.time)
    rest = np.flatnonzero(held & ~usable)
    among = queries.time[rest] > self._users.newest_time(queries.record[rest])
    return np.where(usable, KEPT, queries.end), int(np.sum(among))

  def _states(self, names, user, record, end):
    """Returns states of pasts, sorted by user and end, and the items that each has met."""
    stored, computed = np.flatnonzero(end == KEPT), np.flatnonzero(end != KEPT)
    met = self._users.histories(record, np.where(end == KEPT, self._users.counts(record), end))
    states = self._model.empty(self._users.rows(record))
    if len(stored):
      kept_states, _ = self._table.get([names[n] for n in user[stored]], _select(states, stored))
      _replace(states, stored, kept_states)
      recent, held_events = kept_states.recent['item'], kept_states.held
      for n, items, held in zip(stored, recent, held_events, strict=True):
        met[n] = np.concatenate([met[n], items[:held]])
    # Each history is read once: a past continues from the user's past before it.
    turn = place_of(np.unique(user[computed], return_counts=True)[1])
    for k in range(turn.max(initial=-1) + 1):
      rows = computed[turn == k]
      last, begins = (rows - 1, end[rows - 1]) if k else (rows, np.zeros_like(rows))
      spans = zip(*(x.tolist() for x in (record[rows], begins, end[rows])), strict=True)
      events = [self._users.events(*span) for span in spans]
      _replace(states, rows, self._model.update(self._state, _select(states, last), events))
    return states, met

  @functools.cached_property
  def _products(self) -> Any:
    mesh, specs = self._setup.mesh, self._setup.model.tables()

    @jax.jit
    def products(state, batch):
      with meshes.use_mesh(mesh):
        rows_BD = reader.Reader(state.tables, specs, mesh)('item', batch['item'])
        return jnp.einsum('bd,bd->b', batch['vector'], rows_BD)

    return products


def _select(states, rows):
  return jax.tree.map(lambda x: x[rows], states)


def _replace(states, rows, values):
  """Replaces some of the states, in place."""
  for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(values), strict=True):
    old[rows] = new
