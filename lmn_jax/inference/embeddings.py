"""Embeddings of a trained model by raw id: users, items, feature values and memory slots."""

from pathlib import Path

import jax
import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data.store import Store
from lmn_jax.errors import one_of
from lmn_jax.inference import state_table
from lmn_jax.inference.next_item_scorer import NextItemScorer
from lmn_jax.inference.queries import Queries
from lmn_jax.inference.stored_users import StoredUsers
from lmn_jax.training import trained_run
from lmn_jax.training.checkpoint import Restored
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.setup import Setup


def embeddings(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, table: str = 'item'
) -> pa.Table:
  """Returns the vectors of the best checkpoint of a run.

  In a next-item model, the score of a pair is the dot product of the user's and the item's vector,
  which has the features of the item if the model reads them.

  Args:
    config: config of a trained run. workdir: folder of the run. store: history store of the run.
    table: a table of the model: 'item', 'user', 'memory' or a feature such as 'item.category'.
      'user' of a next-item model: the vectors after each user's newest event.

  Returns:
    Columns `id`, the raw id as text, or for 'memory' the number of the slot; and `vector`, a
    fixed-size list [D] of float32. Row 0 of a table, for ids unknown in training, has the id null.
    A next-item model has vectors of all users of the store with an event.

  Raises:
    UserError: there is no checkpoint, the run is in use, or the model does not have the table.
  """
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    setup, best = trained_run.best_of(config, workdir, store)
    specs = setup.model.tables()
    if table == 'user' and setup.task.states:
      return _user_vectors(config, workdir, store, setup, best)
    names = [*specs, *(['user'] if setup.task.states else [])]
    spec = specs[one_of('table', table, names)]
    state = fold_item_fields(setup, best.state)[1] if table == 'item' else best.state
    rows_VD = np.asarray(jax.device_get(state.tables[table].rows_RD))[: spec.rows]
    ids = np.arange(spec.rows) if table not in store.vocabulary else store.raw_ids(table)
    return _table(ids, rows_VD)


def _user_vectors(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, setup: Setup, best: Restored
) -> pa.Table:
  """Returns vectors of all users with an event, from their stored states if the run has states."""
  weights = state_table.fingerprint(best.state)
  states = state_table.open_complete(config, workdir, store, setup, weights)
  try:
    scorer = NextItemScorer(config, store, setup, best.state, states)
    users = store.raw_users()
    record = np.arange(len(users))
    now = state_table.newest_time(store, states, setup.sources['train'].reads)
    queries = Queries(users, record, StoredUsers(store).counts(record), None, now, None, {})
    vector_UD, events_U = scorer.vectors(queries)
  finally:
    if states is not None:
      states.close()
  has_events = events_U > 0
  return _table(users.filter(pa.array(has_events)), vector_UD[has_events])


def _table(ids, vector_ND):
  """Returns an Arrow table with the columns `id` and `vector`."""
  assert len(ids) == len(vector_ND)
  vectors = pa.FixedSizeListArray.from_arrays(
    pa.array(np.ascontiguousarray(vector_ND, np.float32).ravel()), vector_ND.shape[1]
  )
  return pa.table({'id': ids, 'vector': vectors})
