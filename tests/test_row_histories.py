"""Rows with their own histories: as examples, in the metrics, and in predictions."""

import collections
import csv

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lmn_jax import config as configs
from lmn_jax.data import counts, prepare
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_evaluation, click_metrics
from lmn_jax.inference import predict
from lmn_jax.inference.predict import Request
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from tests.runs import mesh_of, untrained

COLUMNS = ('user', 'item', 'time', 'label', 'past')


def log_rows():
  rng, rows = np.random.default_rng(0), []
  for k in range(300):
    past = ' '.join(f'i{j}' for j in rng.integers(30, size=rng.integers(0, 7)))
    rows.append((f'u{rng.integers(12)}', f'i{rng.integers(30)}', k, int(rng.random() < 0.5), past))
  return rows


def write(path, rows, columns=COLUMNS):
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([columns, *rows])
  return path


@pytest.fixture(scope='module', params=[0, 3])
def run(request, tmp_path_factory):
  """Returns (config, workdir, store), with whole histories or at most 3 events."""
  folder = tmp_path_factory.mktemp('histories')
  config = configs.base('pooling', steps=2)
  config.update(history_length=6, batch_size=8, eval_batch_size=16)
  config.data.update(
    source=str(write(folder / 'log.csv', log_rows())), name='log', row_history='past',
    max_history=request.param, rows_per_part=150,
  )  # fmt: skip
  config.data.split.update(protocol='global_time', valid=0.2, test=0.3)
  config.model.update(width=4, scale=1.0, hidden=(8,))
  return untrained(config, folder)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  monkeypatch.setattr(predict, 'ROWS', 24)


def table_of(path):
  return (
    pa.csv.read_csv(path).to_pylist() if path.suffix == '.csv' else pq.read_table(path).to_pylist()
  )


def scored(run, source, output, top_k=None):
  config, workdir, store = run
  result = predict.predict(config, workdir, store, Request(str(source), output, top_k))
  return table_of(output), predict.line_of(result)


def by_row(rows):
  key = ('user', 'item', 'time')
  return sorted((*(row[name] for name in key), row['events'], row['score']) for row in rows)


@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_prediction_and_evaluation_give_the_same_scores(run, tmp_path, ending):
  """Both use the history of the row, not the newest history of the user."""
  config, workdir, store = run
  trained_run.evaluate_best(config, workdir, store, tmp_path / 'evaluated.csv')
  evaluated = table_of(tmp_path / 'evaluated.csv')
  rows = log_rows()[-len(evaluated) :]
  source = tmp_path / f'rows.{ending}'
  if ending == 'csv':
    write(source, rows)
  else:
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    columns['past'] = [text.split() for text in columns['past']]
    pq.write_table(pa.table(columns), source)
  scores, line = scored(run, source, tmp_path / f'scores.{ending}')
  assert [x[:4] for x in by_row(scores)] == [x[:4] for x in by_row(evaluated)]
  np.testing.assert_allclose(
    [x[4] for x in by_row(scores)], [x[4] for x in by_row(evaluated)], rtol=1e-5, atol=1e-6
  )
  assert len({row['events'] for row in scores}) > 3 and 'as_of' not in scores[0]
  assert "each scored on the history in its 'past'" in line


def test_a_user_has_one_id_in_the_metrics_and_in_the_scores(run, tmp_path):
  config, workdir, store = run
  report = trained_run.evaluate_best(config, workdir, store, tmp_path / 'evaluated.csv')
  evaluated = table_of(tmp_path / 'evaluated.csv')
  names = collections.Counter(row['user'] for row in evaluated)
  assert set(names) <= {f'u{k}' for k in range(12)}
  assert store.manifest['counts']['users'] > 2 * len(names)  # records
  label, score = (np.array([row[name] for row in evaluated]) for name in ('label', 'score'))
  user = np.array([int(row['user'][1:]) for row in evaluated])
  gauc, users = click_metrics.gauc(label, score, user)
  assert report['test']['overall']['gauc_users'] == users
  assert report['test']['overall']['gauc'] == pytest.approx(gauc, abs=1e-6)
  shown = click_evaluation.count_training(store)['label'].user_shown
  assert (shown > 0).sum() == len({row[0] for row in log_rows()[:150]})


def test_the_best_items_are_computed_from_the_histories_of_rows(run, tmp_path):
  rows = [('u1', 'i1 i2 i3'), ('u1', ''), ('nobody', 'i4 unknown')]
  source = write(tmp_path / 'users.csv', rows, ('user', 'past'))
  best, _ = scored(run, source, tmp_path / 'best.csv', top_k=40)
  max_history = run[0].data.max_history
  for (user, past), events in zip(rows, (3, 0, 2), strict=True):
    items = [row for row in best if (row['user'], row['past'] or '') == (user, past)]
    assert {row['events'] for row in items} == {min(events, max_history or events)}
    assert not {row['item'] for row in items} & set(past.split())
    assert len(items) == run[2].vocabulary['item'] - 1 - len(set(past.split()) - {'unknown'})


def test_times_without_histories_are_refused(run, tmp_path):
  """The store does not have the user's history at an arbitrary time."""
  source = write(tmp_path / 'rows.csv', [('u1', 'i1', 5)], ('user', 'item', 'time'))
  message = "times 'time' but not the column of histories 'past' .*; add it, or remove the times"
  with pytest.raises(UserError, match=message):
    scored(run, source, tmp_path / 'scores.csv')
  source = write(tmp_path / 'pairs.csv', [('u1', 'i1')], ('user', 'item'))
  scores, line = scored(run, source, tmp_path / 'scores.csv')
  newest = [row for row in log_rows() if row[0] == 'u1'][-1][4].split()
  assert scores[0]['events'] == len(newest[-(run[0].data.max_history or 6) :])
  assert 'the newest event' in line


def test_users_are_counted_once(run):
  table = dict(line.split('  ', 1) for line in counts.table_of(run[2]).splitlines()[:-1])
  histories = {(row[0], row[4]) for row in log_rows()}
  assert table['users'].strip() == '12, 12 in the vocabulary'
  assert int(table['row histories']) == len(histories)
  assert int(table['row histories without an event']) == len(
    [1 for _, past in histories if not past]
  )
  assert '12 users, ' in counts.line_of(run[2])


def test_max_history_limits_the_events_of_each_history(tmp_path):
  log = write(tmp_path / 'log.csv', log_rows())
  data = configs.data(source=str(log), row_history='past', max_history=3)
  store = prepare.prepare(data, tmp_path / 'stores')
  sizes = [min(3, len(past.split())) for *_, past in {(row[0], row[4]) for row in log_rows()}]
  assert sorted(np.concatenate([part.users['count'] for part in store.parts])) == sorted(sizes)
