"""Scores of a click model: of pairs, and the best of all items."""

import jax
import ml_collections
import numpy as np

from lmn_jax.data import item_index
from lmn_jax.data.named_histories import MAIN, array_of
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation.top_items import better, seen_pairs
from lmn_jax.inference.queries import Queries, Scores, filled
from lmn_jax.inference.stored_users import StoredUsers
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup

CANDIDATES = 512  # of each user, scored together


class ClickScorer:
  """Log-odds of a click model, over batches in the layout of batches.py; it keeps no states.

  With K labels pairs have K scores, and the best items are those of the main label. Cold items are
  candidates like those of the vocabulary.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    store: Store,
    setup: Setup,
    state: State,
    table: None = None,
  ):
    """See `scorers.make_scorer`."""
    reads = setup.sources['train'].reads
    self._users = StoredUsers(store, reads)
    self._named = {
      name: (StoredUsers(store, reads, name), length) for name, length in reads.histories
    }
    self._store, self._setup, self._state = store, setup, state
    self._length, self._size = config.history_length, config.eval_batch_size
    self._excludes = config.exclude_seen

  def pairs(self, queries: Queries) -> Scores:
    """Returns log-odds of each pair, in batches of config.eval_batch_size."""
    N, scores = len(queries.record), []
    for rows in filled(N, self._size):
      batch = self._user_batch(queries, rows) | self._item_batch(queries.item[rows])
      scores.append(self._predict(meshes.place(self._setup.mesh, batch)))
    return Scores(np.concatenate(jax.device_get(scores))[:N], self._events(queries))

  def best(self, queries: Queries, K: int) -> Scores:
    """Returns the K best items: blocks of candidates for a few users, about a batch of pairs."""
    V, C, mesh = self._store.vocabulary['item'], self._store.cold_items, self._setup.mesh
    end = V + 1 + C if C else V  # of the indices
    Q, data = max(1, min(CANDIDATES, end - 1)), mesh.shape['data']
    U = data * max(1, self._size // (data * Q))
    N, blocks = len(queries.record), []
    for rows in filled(N, U):
      met = self._met(queries, rows) if self._excludes else []
      user, seen = seen_pairs(met)
      users = meshes.place(mesh, self._user_batch(queries, rows))
      top = np.full((U, K), -np.inf, np.float32), np.zeros((U, K), np.int32)
      for begin in range(1, max(2, end), Q):
        place_Q = np.arange(begin, begin + Q)
        item_Q = np.minimum(place_Q, end - 1).astype(np.int32)
        open_UQ = np.broadcast_to((place_Q < end) & (place_Q != V), (U, Q)).copy()
        block = slice(*np.searchsorted(seen, (begin, begin + Q)))
        open_UQ[user[block], seen[block] - begin] = False
        items = meshes.place(mesh, self._item_batch(np.broadcast_to(item_Q, (U, Q))))
        logit = self._predict(users | items)
        main_UQ = logit if len(self._store.labels) == 1 else logit[..., 0]
        top = better(*top, main_UQ, item_Q, open_UQ)
      blocks.append(jax.device_get(top))
    score, item = (np.concatenate(x)[:N] for x in zip(*blocks, strict=True))
    return Scores(score, self._events(queries), item)

  def _user_batch(self, queries, rows):
    """Returns all of a batch but its items."""
    record, L = queries.record[rows], self._length
    if queries.history is None:
      request = queries.requests()[rows]
      newest, length = self._users.newest(record, queries.end[rows], L, request)
    else:  # of such a store, neither event features nor times are read
      newest = {'history': queries.history.newest(rows, L, self._store.vocabulary['item'])}
      length = np.minimum(queries.end[rows], L)
    labels = () if len(self._store.labels) == 1 else (len(self._store.labels),)
    batch = dict(
      user=self._users.rows(record).astype(np.int32),
      label=np.zeros((len(rows), *labels), np.float32),
      weight=np.ones(len(rows), np.float32),
      **newest,
      length=length.astype(np.int32),
      total=queries.end[rows].astype(np.int32),
      user_index=record.astype(np.int32),
    )
    batch |= self._users.features(record) | {key: x[rows] for key, x in queries.context.items()}
    batch |= self._named_histories(queries, rows)
    for key, codes in self._store.items.items():
      for name in (MAIN, *self._named):
        items = batch[array_of(name, 'history')]
        batch[array_of(name, key.replace('item.', 'history.', 1))] = codes.take(items, axis=0)
    return self._with_rows(batch)

  def _named_histories(self, queries, rows):
    """Returns the arrays of the named histories: their events before the time of each row, or all.

    Rows have no histories of their own in such a store, see named_histories.py.
    """
    batch, record, request = {}, queries.record[rows], queries.requests()[rows]
    for name, (users, L) in self._named.items():
      time = queries.time
      end = users.counts(record) if time is None else users.before(record, time[rows])
      newest, length = users.newest(record, end, L, request)
      sizes = dict(length=length.astype(np.int32), total=end.astype(np.int32))
      batch |= {array_of(name, key): x for key, x in (newest | sizes).items()}
    return batch

  def _item_batch(self, item):
    codes = {key: x.take(item, axis=0) for key, x in self._store.items.items()}
    return self._with_rows({'item': item.astype(np.int32)} | codes)

  def _with_rows(self, batch):
    """Returns a batch with rows in place of the indices of cold items."""
    if not self._store.cold_items:
      return batch
    return item_index.with_rows(batch, self._store.vocabulary['item'], self._store.has_item_vectors)

  def _met(self, queries, rows):
    if queries.history is None:
      return self._users.histories(queries.record[rows], queries.end[rows])
    return queries.history.events(rows)

  def _predict(self, batch):
    return self._setup.trainer.predict(self._state, batch)

  def _events(self, queries):
    return np.minimum(queries.end, self._length).astype(np.int64)
