"""Cold items in evaluation, `--mode=predict`, `Bundle.ask` and the HTTP service: one score, which
depends on what is known of the item and not on a row of its own."""

import csv
import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmn_jax import config as configs
from lmn_jax.evaluation import report as reports
from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.inference import predict
from lmn_jax.serving.users.store import open_store
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from lmn_jax.training.tasks import TASKS
from tests.fake_service import running
from tests.runs import mesh_of, untrained

COLUMNS = ('user', 'item', 'time', 'label')
SIZES = dict(batch_sizes=(1, 4), candidate_sizes=(16,))


def log_rows():
  """Items 0 to 9 in training, until the time 104, then 8 to 15; users w meet new items alone."""
  rng, rows = np.random.default_rng(4), []
  for n in range(160):
    late = n >= 104
    user = f'w{n % 2}' if late and n % 3 == 0 else f'u{rng.integers(6)}'
    item = rng.integers(*((10, 16) if user[0] == 'w' else (8, 16) if late else (0, 10)))
    rows.append(dict(user=user, item=f'i{item:02d}', time=str(n), label=str(rng.integers(2))))
  return rows


def write(path, rows, columns):
  with path.open('w', newline='') as file:
    csv.DictWriter(file, columns, extrasaction='ignore').writeheader()
    csv.DictWriter(file, columns, extrasaction='ignore').writerows(rows)
  return str(path)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir, store) of a run with initial weights; i15 is unknown, i16 in no row."""
  folder, rng = tmp_path_factory.mktemp('run'), np.random.default_rng(5)
  names = [f'i{k:02d}' for k in range(17) if k != 15]
  items = [dict(item=x, genre=f'g{k % 3}', cost=k * k) for k, x in enumerate(names) if k != 11]
  image = {x: rng.normal(size=3).tolist() for x in names[1:]}
  table = pa.table({'item': [*image], 'image': list(image.values())})
  pq.write_table(table, folder / 'image.parquet')
  config = configs.base('din', steps=2)
  config.update(history_length=4, batch_size=8, eval_batch_size=8)
  config.model.update(width=4, scale=1.0, hidden=(8,), id_dropout=0.5)
  config.data.update(
    source=write(folder / 'log.csv', log_rows(), COLUMNS), name='cold', cold_items=True,
    items_source=write(folder / 'items.csv', items, ('item', 'genre', 'cost')),
    item_features=('genre', 'cost'), rows_per_part=60, history='all',
  )  # fmt: skip
  config.data.numeric = {'cost': 'log'}
  config.data.item_vectors = {'image': f'{folder / "image.parquet"}:image'}
  config.data.split.update(valid=0.15, test=0.2)
  return untrained(config, folder)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def evaluated(run):
  """The rows of the test with their scores, in the order of the log, and the report."""
  config, workdir, store = run
  report = trained_run.evaluate_best(config, workdir, store, workdir / 'test.parquet')
  rows = pq.read_table(workdir / 'test.parquet').to_pylist()
  return sorted(rows, key=lambda row: row['time']), report


def predicted(run, rows, columns, top_k=None):
  config, workdir, store = run
  output = workdir / 'scores.parquet'
  source = write(workdir / 'rows.csv', rows, columns)
  counts = predict.predict(config, workdir, store, predict.Request(source, output, top_k))
  table = pq.read_table(output)
  output.unlink()
  return table.to_pylist(), counts


def test_a_cold_item_has_a_score_by_its_features_and_not_by_a_row(run):
  config, workdir, store = run
  rows, report = evaluated(run)
  V, split = store.vocabulary['item'], 'test'
  assert store.raw_items().to_pylist()[V + 1 :] == ['i10', 'i11', 'i12', 'i13', 'i14', 'i16']
  setup, best = trained_run.best_of(config, workdir, store)
  table = best.state.tables['item']

  def scores(rows_RD):
    tables = best.state.tables | {'item': table._replace(rows_RD=rows_RD)}
    return trained_run.score_split(setup, best.state._replace(tables=tables), split)

  before = scores(table.rows_RD)
  by_others = before != scores(table.rows_RD.at[1:].add(1.0))
  by_unknown = before != scores(table.rows_RD.at[0].add(1.0))
  users, index, alone = store.raw_users().to_pylist(), [], []
  for part in store.parts:
    span = slice(*part.bounds[split])
    index += part.examples['item'][span].tolist()
    alone += [users[x + part.first][0] == 'w' for x in part.examples['user'][span]]
  index, alone = np.array(index), np.array(alone)
  cold = index > V
  assert (cold & alone).sum() > 5 and (~cold).sum() > 2
  # With cold items alone, no other row of the table is read.
  assert not by_others[(cold | (index == 0)) & alone].any()
  # Some units of the head are 0 whatever they read.
  assert by_others[~alone].mean() > 0.6 < by_unknown[cold].mean()

  metrics = report['test']['cold_items']
  assert metrics['rows'] == cold.sum() and metrics['share'] == cold.mean()
  label = np.concatenate([p.examples['label'][slice(*p.bounds[split])] for p in store.parts])
  clicks, rest = before[cold & (label > 0)], before[cold & (label == 0)]
  pairs = np.sign(clicks[:, None] - rest[None]).mean() / 2 + 0.5
  assert metrics['auc'] == pytest.approx(pairs)
  report |= dict(model='din', columns=['auc', 'gauc'], protocol='')
  assert f'cold items, {cold.mean():.1%}' in reports.table_of(report)

  answers, counts = predicted(run, rows, COLUMNS[:3])
  np.testing.assert_allclose([x['score'] for x in answers], [x['score'] for x in rows], 1e-5, 1e-5)
  names = {f'i{k}' for k in range(10, 15)}
  assert [x['cold_item'] for x in answers] == [row['item'] in names for row in rows]
  known = {f'i{k:02d}' for k in range(10)}
  assert [x['known_item'] for x in answers] == [row['item'] in known for row in rows]
  assert counts['cold_items'] == cold.sum() and counts['unknown_items'] == np.sum(index == 0)
  assert f'{cold.sum()} rows of cold items, scored by features and vectors' in predict.line_of(
    counts | dict(seconds=1.0)
  )


def test_a_shared_row_that_nothing_trains_is_doubted(run):
  config, _, store = run
  config = config.copy_and_resolve_references()
  doubts = TASKS['click'].doubts
  assert not doubts(config, store)
  config.model.id_dropout = 0.0
  (line,) = doubts(config, store)
  assert line.startswith('6 cold items have the row of the unknown item, which no training example')


@pytest.mark.slow
def test_predict_export_and_service_agree_on_cold_items(run, tmp_path):
  config, workdir, store = run
  items = ['i03', 'i10', 'i14', 'i16', 'i15', 'i11']
  pairs = [dict(user=user, item=item) for user in ('u1', 'w0') for item in items]
  answers, _ = predicted(run, pairs, COLUMNS[:2])
  expected = np.array([x['score'] for x in answers]).reshape(2, -1)
  assert len(np.unique(expected[0])) == len(items)
  best, _ = predicted(run, [dict(user='w0')], ('user',), top_k=20)
  assert {x['item'] for x in best if x['cold_item']} >= {'i16'}  # which nobody has met

  export.export(config, workdir, store, tmp_path / 'export', 'float32')
  bundle = Bundle(tmp_path / 'export', **SIZES)
  asked = [bundle.ask(user, items, bundle.known_history(user)) for user in ('u1', 'w0')]
  assert asked[0].unknown == ['i15'] and asked[0].cold == ['i10', 'i14', 'i16', 'i11']
  values = [result.values for result in bundle.score(asked)]
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
  request = bundle.ask('w0', None, bundle.known_history('w0'))
  ((top, _),) = bundle.recommend([request], [20], [()])
  assert [x for x, _ in top] == [x['item'] for x in best]
  np.testing.assert_allclose([x for _, x in top], [x['score'] for x in best], 1e-5, 1e-5)

  # Events of cold items differ by their features, wherever they come from.
  histories = [[item, 'i03'] for item in ('i10', 'i14', 'i15')]
  asked = [bundle.ask('new', items, history) for history in histories]
  scores = [result.values for result in bundle.score(asked)]
  assert len({tuple(x) for x in scores}) == 3
  users = open_store(f'{tmp_path}/users.sqlite', 99)
  opened = functools.partial(Bundle, **SIZES)
  with running(tmp_path / 'export', users, open_bundle=opened) as client:
    client.ready()
    for n, (history, values) in enumerate(zip(histories, scores, strict=True)):
      events = [{'item': item} for item in history]
      client.post('/v1/update', {'user': f'n{n}', 'events': events})
      for body in ({'user': 'other', 'history': history}, {'user': f'n{n}'}):
        answer = client.post('/v1/score', body | {'candidates': items}).json()
        np.testing.assert_allclose(answer['scores'], values, rtol=1e-5, atol=1e-5)
        assert answer['cold_candidates'] == ['i10', 'i14', 'i16', 'i11']
        assert answer['unknown_candidates'] == ['i15']
    answer = client.post('/v1/score', {'user': 'other', 'candidates': ['i03']}).json()
    assert 'cold_candidates' not in answer
