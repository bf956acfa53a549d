"""Embeddings of a trained model by raw id: users, items, values of features, and memory slots."""

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
from lmn_jax.training.setup import Setup


def embeddings(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, table: str = 'item'
) -> pa.Table:
  """Returns the vectors of the best checkpoint of a run.

  The product of a user's and an item's vector of a next-item model is the score of the pair.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data.
    table: a table of the model: 'item', 'user', 'memory' or a feature such as 'item.category'.
      'user' of a next-item model: the vector after the user's newest event.

  Returns:
    Columns `id`, the raw id as text, or for 'memory' the number of the slot; and `vector`, a
    fixed-size list [D] of float32. Row 0 of a table, which stands for ids that training did not
    see, has the id null. Users of a next-item model are those of the store that have an event.

  Raises:
    UserError: no checkpoint, a run in use, or a table that the model does not have.
  """
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    setup, best = trained_run.best_of(config, workdir, store)
    specs = setup.model.tables()
    if table == 'user' and setup.task.states:
      return _user_vectors(config, workdir, store, setup, best)
    names = [*specs, *(['user'] if setup.task.states else [])]
    spec = specs[one_of('table', table, names)]
    rows_VD = np.asarray(jax.device_get(best.state.tables[table].rows_RD))[: spec.rows]
    ids = np.arange(spec.rows) if table not in store.vocabulary else store.raw_ids(table)
    return _table(ids, rows_VD)


def _user_vectors(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, setup: Setup, best: Restored
) -> pa.Table:
  """The vectors of all users who have an event, from their states where the run keeps these."""
  weights = state_table.fingerprint(best.state)
  states = state_table.open_complete(config, workdir, store, setup, weights)
  try:
    scorer = NextItemScorer(config, store, setup, best.state, states)
    user = store.raw_users()
    record = np.arange(len(user))
    queries = Queries(user, record, StoredUsers(store).counts(record), None, None, {})
    vector_UD, events_U = scorer.vectors(queries)
  finally:
    if states is not None:
      states.close()
  read = events_U > 0
  return _table(user.filter(pa.array(read)), vector_UD[read])


def _table(ids, vector_ND):
  assert len(ids) == len(vector_ND)
  vectors = pa.FixedSizeListArray.from_arrays(
    pa.array(np.ascontiguousarray(vector_ND, np.float32).ravel()), vector_ND.shape[1]
  )
  return pa.table({'id': ids, 'vector': vectors})
