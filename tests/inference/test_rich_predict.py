"""Predictions with fields of every kind equal the evaluation, and states equal whole histories."""

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from lmn_jax.errors import UserError
from lmn_jax.export import export
from lmn_jax.inference import predict, state_table, update_states
from lmn_jax.inference.embeddings import embeddings
from lmn_jax.inference.state_table import fingerprint
from lmn_jax.inference.user_states import stateful_model
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.item_rows import fold_item_fields
from tests.rich_runs import COLUMNS, L, log_rows, rich_config, rich_run, write
from tests.runs import but_slow, mesh_of, untrained

CLICKS = [
  ('din', dict(time='bias')), ('sam', dict(time='buckets')), ('lmn', dict(time='buckets')),
  ('histories', dict(encoders={'all': 'din', 'some': 'pooling'}, time='buckets')),
]  # fmt: skip
NEXTS = [
  ('dman', dict(time='buckets', slots=3, item_fields=True)), ('hstu', dict(time='bias')),
  ('sasrec', dict(time='bias')), ('gru4rec', {}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def predicted(run, rows, columns=COLUMNS, top_k=None):
  config, workdir, store = run
  source, output = write(workdir / 'rows.csv', rows, columns), workdir / 'scores.parquet'
  report = predict.predict(config, workdir, store, predict.Request(source, output, top_k))
  scores = pq.read_table(output).to_pylist()
  output.unlink()
  return scores, report


def evaluated(run):
  """The rows of the test split with their scores, by (user, time)."""
  config, workdir, store = run
  trained_run.evaluate_best(config, workdir, store, workdir / 'test.parquet')
  rows = pq.read_table(workdir / 'test.parquet').to_pylist()
  return {(row['user'], str(row['time'])): row for row in rows}


@pytest.mark.parametrize('name, fields', but_slow(CLICKS, {3}))
def test_scores_of_clicks_equal_the_evaluation(name, fields, tmp_path):
  run = rich_run(tmp_path, name, 'click', **fields)
  expected = evaluated(run)
  rows = [row for row in log_rows() if (row['user'], row['time']) in expected]
  assert len(rows) == len(expected) > 15
  scores, _ = predicted(run, rows)
  values = [expected[row['user'], row['time']]['score'] for row in rows]
  np.testing.assert_allclose([row['score'] for row in scores], values, rtol=1e-5, atol=1e-6)
  assert np.std(values) > 0.01
  if name == 'histories':
    with pytest.raises(UserError, match='an export has one history of each user, so train another'):
      export.export(*run, tmp_path / 'export', 'float32')


@pytest.mark.slow
@pytest.mark.parametrize('name, fields', NEXTS)
def test_ranks_of_next_items_equal_the_evaluation(name, fields, tmp_path):
  run = rich_run(tmp_path, name, 'next_item', **fields)
  expected = evaluated(run)
  rows = [row for row in log_rows() if (row['user'], row['time']) in expected]
  assert len(rows) == len(expected) > 6
  ranks = {key: row['rank'] for key, row in expected.items()}
  items = run[2].vocabulary['item'] - 1
  best, _ = predicted(run, rows, tuple(x for x in COLUMNS if x != 'item'), items)
  place = {(row['user'], row['time'], row['item']): row['rank'] for row in best}
  for row in rows:
    assert place[row['user'], row['time'], row['item']] == ranks[row['user'], row['time']]
  assert len(set(ranks.values())) > 2


def events_by_hand(store, rows):
  """The events of rows, as segment_states.py has them."""
  code = {
    name: {x: k for k, x in enumerate(store.raw_ids(name).to_pylist()) if x is not None}
    for name in ('item', 'event.kind', 'event.marks', 'event.price')
  }
  V, M = store.vocabulary['event.marks'], store.widths['event.marks']
  edges = store.manifest['bins']['event.price']

  def marks(row):
    codes = (
      [code['event.marks'].get(x, 0) for x in row['marks'].split('|')] if row['marks'] else [0]
    )
    return codes + [V] * (M - len(codes))

  def bin_of(row):
    return str(sum(edge < float(row['price']) for edge in edges)) if row['price'] else ''

  return {
    'item': np.array([code['item'].get(row['item'], 0) for row in rows], np.int32),
    'event.kind': np.array([code['event.kind'].get(row['kind'], 0) for row in rows], np.int32),
    'event.marks': np.array([marks(row) for row in rows], np.int32).reshape(-1, M),
    'event.price': np.array([code['event.price'].get(bin_of(row), 0) for row in rows], np.int32),
    'event.dwell': np.array([float(row['dwell'] or 'nan') for row in rows], np.float32),
    'time': np.array([int(row['time']) - store.clock.first for row in rows], np.int32),
  }


@pytest.mark.parametrize('name, fields', but_slow(NEXTS[:3], {0}))
def test_states_with_new_events_equal_those_of_whole_histories(name, fields, tmp_path):
  """The time from the last event of a full segment ends at the first event of the next one."""
  run = config, workdir, store = rich_run(tmp_path, name, 'next_item', **fields)
  clicks, last = [row for row in log_rows() if row['label'] == '1'], store.clock.last
  new = [
    row | {'time': str(last + 1 + 100 * k), 'user': ('u0', 'u1', 'new')[k % 3]}
    for k, row in enumerate(clicks[:21])
  ]
  for events in ('', write(tmp_path / 'new.csv', new)):
    update_states.update_states(config, workdir, store, events)
  users = ['u0', 'u1', 'u2', 'new']
  trained, best = trained_run.best_of(config, workdir, store)
  setup, weights = fold_item_fields(trained, best.state)
  model = stateful_model(config, setup)
  rows = [[row for row in clicks + new if row['user'] == user] for user in users]
  known = {x: k for k, x in enumerate(store.raw_ids('user').to_pylist())}
  empty = model.empty(np.array([known.get(user, 0) for user in users]))
  whole = model.update(weights, empty, [events_by_hand(store, x) for x in rows])
  assert whole.held.sum() and len(rows[0]) > 3 * L
  table = state_table.open_complete(config, workdir, store, setup, fingerprint(best.state))
  states, _ = table.get(users, empty)
  table.close()
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

  # Scores at a time, and without times at that of the newest event.
  items = store.raw_ids('item').to_pylist()[1:6]
  for time in (int(new[-1]['time']) + 777, None):
    columns = ('user', 'item', 'time') if time else ('user', 'item')
    pairs = [dict(user=u, item=i, time=str(time)) for u in users for i in items]
    scores, _ = predicted(run, pairs, columns)
    request = np.full(len(users), (time or int(new[-1]['time'])) - store.clock.first)
    candidates = np.tile(np.arange(1, 6), (len(users), 1))
    expected = model.score(weights, whole, candidates, request)
    np.testing.assert_allclose(
      [row['score'] for row in scores], expected.ravel(), rtol=1e-5, atol=1e-5
    )
  table = embeddings(config, workdir, store, 'user')
  assert np.isfinite(np.array(table['vector'].to_pylist())).all()


def test_new_events_without_times_are_refused_if_times_are_read(tmp_path):
  config = rich_config(tmp_path, 'hstu', 'next_item', time='bias')
  config.data.time = ''
  config, workdir, store = untrained(config, tmp_path)
  log = write(tmp_path / 'new.csv', log_rows()[:3])
  with pytest.raises(UserError, match=r"new.csv: the log of the store has no times, .*time='none'"):
    update_states.update_states(config, workdir, store, log)
  # The newest position is in place of the time of rows.
  scores, report = predicted((config, workdir, store), log_rows()[:5], ('user', 'item'))
  assert report['now'] is None and all(np.isfinite(row['score']) for row in scores)


def test_new_events_too_far_from_the_log_are_refused(tmp_path):
  config, workdir, store = rich_run(tmp_path, 'hstu', 'next_item', time='bias')
  log = write(tmp_path / 'new.csv', [log_rows()[0] | dict(time=str(2**32 - 2**28), label='1')])
  with pytest.raises(UserError, match='seconds from the earliest one of the log, and gaps'):
    update_states.update_states(config, workdir, store, log)
