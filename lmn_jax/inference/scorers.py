"""Scores of users and items of a store, by a trained model: of pairs, and the best of all items.

A row is scored on the first `end` events of its user's history in the store: those strictly before
the time of the row, or all. A click model reads the newest L of them, a next-item model all. It
goes on from the states of `--mode=states` where they are kept and all that a state holds lies
before the row; of events that came after the store's the times are not kept, so a row among them is
scored on the store's events alone. A user of the store that training did not see has embedding row
0 and their history; one that the store does not have row 0, unknown features and no history.

Candidates are all items of the vocabulary but row 0 and, where config.exclude_seen says so, what
the user has met: the items of these events, and of those that the state holds. Items that tie are
in the order of their rows.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from lmn_jax.data.input_rows import Histories
from lmn_jax.data.lanes import users_of
from lmn_jax.data.packing import place_of
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking
from lmn_jax.evaluation.top_items import better, met_pairs, top_items
from lmn_jax.inference import state_table
from lmn_jax.inference.user_states import make_server
from lmn_jax.tables import reader
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup

CANDIDATES = 512  # of each user scored together by a click model
SEEN = 2**16  # pairs of a user and an item they have met, sent to the devices together
KEPT = -1  # instead of a number of events: as the state that is kept
MOST_EVENTS = 2**40  # of a user
Ints = Int[np.ndarray, '_']


class Asked(NamedTuple):
  """N rows. name: raw user ids, null where missing. record: of the store, -1 for none.

  end: events of the user's history in the store that a row may know, the oldest. time: of the rows,
  None where they are as of now. item: embedding rows, none where the best are asked.
  context: 'context.f' -> codes, of click models. history: the rows' own, in place of the store's;
  `end` is then how many events each has.
  """

  name: pa.ChunkedArray
  record: Ints
  end: Ints
  time: Ints | None
  item: Ints | None
  context: dict[str, np.ndarray]
  history: Histories | None = None


class Scored(NamedTuple):
  """score: float32 [N], or [N, K] with items, best first; -inf where there is no candidate more.

  item: int32 [N, K], rows. events: int64 [N], of the histories that the scores are made of.
  among: how many rows lie among events that states hold and the store does not.
  """

  score: Float[np.ndarray, 'N ...']
  events: Ints
  item: Int[np.ndarray, 'N K'] | None = None
  among: int = 0


def filled(N: int, size: int) -> Iterator[Ints]:
  """Indices of 0 .. N - 1 in blocks of one size; the last is filled up with the last index."""
  for begin in range(0, N, size):
    yield np.minimum(np.arange(begin, begin + size), N - 1)


class People:
  """The users of a store and their histories, by record."""

  def __init__(self, store: Store):
    self._store, self._users = store, users_of(store)

  def rows(self, record: Ints) -> Ints:
    """Embedding rows; 0 where there is no record."""
    return np.where(record < 0, 0, self._users.row[record])

  def counts(self, record: Ints) -> Ints:
    """How many events each user has."""
    return np.where(record < 0, 0, self._users.count[record])

  def before(self, record: Ints, time: Ints) -> Ints:
    """How many events each user has strictly before a time, as an example's `end` counts them."""
    found, order = np.zeros(len(record), np.int64), np.argsort(record, kind='stable')
    owner, first = np.unique(record[order], return_index=True)
    for n, own in zip(owner, np.split(order, first[1:]), strict=True):
      found[own] = np.searchsorted(self._events(n, 'time'), time[own])
    return found

  def newest_time(self, record: Ints) -> Ints:
    """The time of each user's newest event; OLDEST where there is none."""
    return np.array(
      [max(self._events(n, 'time')[-1:], default=state_table.OLDEST) for n in record], np.int64
    )

  def histories(self, record: Ints, end: Ints) -> list[np.ndarray]:
    """The items' rows of each user's first `end` events, oldest first."""
    return [self._events(n, 'item')[:k] for n, k in zip(record, end, strict=True)]

  def _events(self, record, name):
    """A column of a user's history."""
    if record < 0:
      return np.zeros(0, np.int64)
    users, begin = self._users, self._users.offset[record]
    return self._store.parts[users.part[record]].history[name][begin : begin + users.count[record]]

  def newest(self, record: Ints, end: Ints, L: int) -> tuple[Int[np.ndarray, 'B L'], Ints]:
    """The newest L of the first `end` events, left-aligned and padded with V, and their number."""
    users, V = self._users, self._store.vocabulary['item']
    length = np.minimum(end, L)
    first = users.offset[record] + end - length
    history, place = np.full((len(record), L), V, np.int32), np.arange(L)
    for own, events in self._by_part(record, 'history', 'item'):
      if len(events):
        history[own] = events.take(first[own, None] + place, mode='clip')
    history[place >= length[:, None]] = V
    return history, length

  def features(self, record: Ints) -> dict[str, np.ndarray]:
    """Codes of the profile, 'user.f' -> [B] or [B, M]; of the unknown where there is no record."""
    found = {}
    for key in self._store.features['user']:
      V, M = self._store.vocabulary[key], self._store.widths[key]
      codes = np.full((len(record), M), V, np.int32) if M else np.zeros(len(record), np.int32)
      if M:
        codes[:, 0] = 0
      for own, column in self._by_part(record, 'users', key):
        first = self._store.parts[self._users.part[record[own[0]]]].first
        codes[own] = column[record[own] - first]
      found[key] = codes
    return found

  def _by_part(self, record, kind, name):
    """Where in `record` users of a part stand, and the part's column."""
    part = np.where(record < 0, -1, self._users.part[record])
    for number in np.unique(part[part >= 0]):
      yield np.flatnonzero(part == number), getattr(self._store.parts[number], kind)[name]


class ClickScorer:
  """Log-odds of a click model over batches as batches.py makes them; its users have no states."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    store: Store,
    setup: Setup,
    state: State,
    table: None = None,
  ):
    self._people, self._store, self._exp, self._state = People(store), store, setup, state
    self._length, self._size = config.history_length, config.eval_batch_size
    self._excludes = config.exclude_seen

  def _users(self, asked, own):
    """All of a batch but the items."""
    record, L = asked.record[own], self._length
    if asked.history is None:
      history, length = self._people.newest(record, asked.end[own], L)
    else:
      history = asked.history.newest(own, L, self._store.vocabulary['item'])
      length = np.minimum(asked.end[own], L)
    batch = dict(
      user=self._people.rows(record).astype(np.int32),
      label=np.zeros(len(own), np.float32),
      weight=np.ones(len(own), np.float32),
      history=history,
      length=length.astype(np.int32),
      total=asked.end[own].astype(np.int32),
      user_index=record.astype(np.int32),
    )
    batch |= self._people.features(record) | {key: x[own] for key, x in asked.context.items()}
    for key, codes in self._store.items.items():
      batch[f'history.{key.removeprefix("item.")}'] = codes.take(history, axis=0)
    return batch

  def _items(self, item):
    codes = {key: x.take(item, axis=0) for key, x in self._store.items.items()}
    return {'item': item.astype(np.int32)} | codes

  def _met(self, asked, own):
    if asked.history is None:
      return self._people.histories(asked.record[own], asked.end[own])
    return asked.history.events(own)

  def _predict(self, batch):
    return self._exp.trainer.predict(self._state, batch)

  def _events(self, asked):
    return np.minimum(asked.end, self._length).astype(np.int64)

  def pairs(self, asked: Asked) -> Scored:
    """Log-odds of each pair, in batches of config.eval_batch_size."""
    N, found = len(asked.record), []
    for own in filled(N, self._size):
      batch = self._users(asked, own) | self._items(asked.item[own])
      found.append(self._predict(meshes.place(self._exp.mesh, batch)))
    return Scored(np.concatenate(jax.device_get(found))[:N], self._events(asked))

  def best(self, asked: Asked, K: int) -> Scored:
    """The K best of all items: blocks of candidates for a few users, about a batch of pairs."""
    V, mesh = self._store.vocabulary['item'], self._exp.mesh
    Q, data = max(1, min(CANDIDATES, V - 1)), mesh.shape['data']
    U = data * max(1, self._size // (data * Q))
    N, found = len(asked.record), []
    for own in filled(N, U):
      met = self._met(asked, own) if self._excludes else []
      whose, seen = met_pairs(met)
      users = meshes.place(mesh, self._users(asked, own))
      top = np.full((U, K), -np.inf, np.float32), np.zeros((U, K), np.int32)
      for begin in range(1, max(2, V), Q):
        item_Q = np.minimum(np.arange(begin, begin + Q), V - 1).astype(np.int32)
        open_UQ = np.broadcast_to(np.arange(begin, begin + Q) < V, (U, Q)).copy()
        at = slice(*np.searchsorted(seen, (begin, begin + Q)))
        open_UQ[whose[at], seen[at] - begin] = False
        items = meshes.place(mesh, self._items(np.broadcast_to(item_Q, (U, Q))))
        top = better(*top, self._predict(users | items), item_Q, open_UQ)
      found.append(jax.device_get(top))
    score, item = (np.concatenate(x)[:N] for x in zip(*found, strict=True))
    return Scored(score, self._events(asked), item)


class NextItemScorer:
  """Products of a user's vector, after their newest event, and items' rows; 0 without an event."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    store: Store,
    setup: Setup,
    state: State,
    table: state_table.StateTable | None,
  ):
    self._people, self._exp, self._state, self._table = People(store), setup, state, table
    self._length, self._lanes = config.history_length, config.eval_batch_size
    self._excludes = config.exclude_seen
    self._server = make_server(
      setup.model, setup.trainer, setup.mesh, config.history_length, self._lanes, config.latest
    )
    # Enough for the user who has met most: one shape for all.
    most = max(len(part.history['item']) and part.users['count'].max() for part in store.parts)
    self._seen = max(SEEN, int(most) + config.history_length)

  def _pasts(self, asked):
    """(where each row's past stands among the pasts, (vectors, events, what was met), rows among).

    A past is of a user, up to an event: rows that share one are computed once.
    """
    coded = pc.dictionary_encode(asked.name).combine_chunks()
    # Behind the users stands one without events, of the rows without a user.
    names = [*coded.dictionary.to_pylist(), None]
    user = coded.indices.fill_null(len(names) - 1).to_numpy().astype(np.int64)
    record = np.full(len(names), -1, np.int64)
    record[user] = asked.record
    end, among = self._ends(asked, names, user)
    past, at = np.unique(user * MOST_EVENTS + end - KEPT, return_inverse=True)
    size, found = state_table.CHUNK * self._lanes, []
    for begin in range(0, len(past), size):
      whose, upto = np.divmod(past[begin : begin + size], MOST_EVENTS)
      states, met = self._states(names, whose, record[whose], upto + KEPT)
      events = states.segments * self._length + states.held
      found.append((self._server.vectors(self._state, states), events, met))
    vector, events, met = zip(*found, strict=True)
    pasts = np.concatenate(vector), np.concatenate(events), [one for x in met for one in x]
    return at, pasts, among

  def _ends(self, asked, names, user):
    """How many events of the store each row knows, KEPT where the user's state; and rows among."""
    if self._table is None:
      return asked.end, 0
    newest = np.array(self._table.newest(names), np.int64)[user]
    held = newest > state_table.OLDEST
    if asked.time is None:
      return np.where(held, KEPT, asked.end), 0
    kept = held & (newest < asked.time)
    rest = np.flatnonzero(held & ~kept)
    among = asked.time[rest] > self._people.newest_time(asked.record[rest])
    return np.where(kept, KEPT, asked.end), int(np.sum(among))

  def _states(self, names, user, record, end):
    """States of pasts, in the order of users and ends, and the items that each has met."""
    kept, walked = np.flatnonzero(end == KEPT), np.flatnonzero(end != KEPT)
    met = self._people.histories(record, np.where(end == KEPT, self._people.counts(record), end))
    states = self._server.empty(self._people.rows(record))
    if len(kept):
      own, _ = self._table.get([names[n] for n in user[kept]], _taken(states, kept))
      _put(states, kept, own)
      for n, items, held in zip(kept, own.recent, own.held, strict=True):
        met[n] = np.concatenate([met[n], items[:held]])
    # Each user is walked once: a past goes on from the one before it.
    turn = place_of(np.unique(user[walked], return_counts=True)[1])
    for k in range(turn.max(initial=-1) + 1):
      own = walked[turn == k]
      last, read = (own - 1, end[own - 1]) if k else (own, np.zeros_like(own))
      news = [met[n][begin:] for n, begin in zip(own, read, strict=True)]
      _put(states, own, self._server.update(self._state, _taken(states, last), news))
    return states, met

  def vectors(self, asked: Asked) -> tuple[Float[np.ndarray, 'N D'], Ints]:
    """The vector of each row's user, whose product with an item's row is the score, and events."""
    at, (vector_UD, events, _), _ = self._pasts(asked)
    return vector_UD[at], events[at]

  def pairs(self, asked: Asked) -> Scored:
    """Scores of pairs, and NaN for an item that training did not see."""
    at, (vector_UD, events, _), among = self._pasts(asked)
    found, N, mesh = [], len(at), self._exp.mesh
    for own in filled(N, self._lanes):
      batch = dict(vector=vector_UD[at[own]], item=asked.item[own].astype(np.int32))
      found.append(self._products(self._state, meshes.place(mesh, batch)))
    score = np.concatenate(jax.device_get(found))[:N]
    return Scored(np.where(asked.item > 0, score, np.float32(np.nan)), events[at], among=among)

  @functools.cached_property
  def _products(self) -> Any:
    mesh, specs = self._exp.mesh, self._exp.model.tables()

    @jax.jit
    def products(state, batch):
      with meshes.known(mesh):
        rows_BD = reader.Reader(state.tables, specs, mesh)('item', batch['item'])
        return jnp.einsum('bd,bd->b', batch['vector'], rows_BD)

    return products

  def best(self, asked: Asked, K: int) -> Scored:
    """The K best of all items for each row, asked once for a past."""
    at, (vector_UD, events, met), among = self._pasts(asked)
    rows_RD, V, P = self._state.tables['item'].rows_RD, self._exp.model.items, self._seen
    Q, found, begin = ranking.QUERIES, [], 0
    lists = [np.unique(items) if self._excludes else items[:0] for items in met]
    upto = np.cumsum([len(items) for items in lists])
    while begin < len(lists):
      # As many pasts as there is room for, and what was met.
      before = upto[begin - 1] if begin else 0
      end = min(begin + Q, int(np.searchsorted(upto, before + P, side='right')))
      whose, seen = met_pairs(lists[begin:end])
      fill = P - len(seen)
      whose_P = np.pad(whose, (0, fill)).astype(np.int32)
      seen_P = np.pad(seen, (0, fill), constant_values=V).astype(np.int32)
      query_QD = np.pad(vector_UD[begin:end], ((0, Q - (end - begin)), (0, 0)))
      top = jax.device_get(top_items(rows_RD, query_QD, whose_P, seen_P, self._exp.mesh, V, K))
      found.append([x[: end - begin] for x in top])
      begin = end
    score, item = (np.concatenate(x) for x in zip(*found, strict=True))
    return Scored(score[at], events[at], item[at], among)


def _taken(states, own):
  """Some of the states."""
  return jax.tree.map(lambda x: x[own], states)


def _put(states, own, values):
  """Replaces some of the states, in place."""
  for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(values), strict=True):
    old[own] = new


def kept_states(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, setup: Setup, weights: str
) -> state_table.StateTable | None:
  """The table of users' states of a run; None if it has none, or they were not made to the end.

  Raises:
    UserError: it is of another model.
  """
  if not setup.task.states or not (workdir / state_table.FILE).exists():
    return None
  server = make_server(
    setup.model,
    setup.trainer,
    setup.mesh,
    config.history_length,
    config.eval_batch_size,
    config.latest,
  )
  table = state_table.open_table(workdir, store, server, weights)
  if state_table.whole(store) in table.logs():
    return table
  table.close()
  return None


Scorer = ClickScorer | NextItemScorer
SCORERS = {'click': ClickScorer, 'next_item': NextItemScorer}


def make_scorer(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: Setup,
  state: State,
  table: state_table.StateTable | None,
) -> Scorer:
  """The scorer of the config's task.

  Args:
    config: of the run. store: its data. setup, state: the experiment and its weights.
    table: of next-item models, the users' states; None makes them from the store's histories.
  """
  return SCORERS[config.task](config, store, setup, state, table)
