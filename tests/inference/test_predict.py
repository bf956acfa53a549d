"""Scores of files against batches built by hand, all items sorted, and an uninterrupted run."""

import csv
import functools
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from jax.sharding import NamedSharding

from lmn_jax import config as configs
from lmn_jax.data import input_rows, interactions
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_metrics, scored_rows
from lmn_jax.evaluation.part_files import Parts
from lmn_jax.evaluation.top_items import seen_pairs, top_items
from lmn_jax.inference import click_scorer, next_item_scorer, predict, state_table
from lmn_jax.inference.predict import Request
from lmn_jax.inference.update_states import update_states
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from tests.runs import but_slow, mesh_of, untrained

ITEMS, L, NEW_USER, NEW_ITEM = 24, 4, '990', '77'
COLUMNS = ('user', 'item', 'time', 'label', 'city', 'genre', 'query', 'tags', 'price')


@functools.cache
def log_rows():
  """Returns rows of a log: users 10 to 25; users 24 and 25 and item 77 are in its end only."""
  rng, rows = np.random.default_rng(0), []
  for user in range(10, 26):
    for k in range(4 + user % 9):
      item = int(rng.integers(ITEMS))
      tags = '|'.join(rng.choice(['a', 'b', 'c', 'd'], rng.integers(0, 4)))
      time = 1000 * k + user + (10**6 if user > 23 else 0)
      rows.append(
        (user, item, time, rng.integers(2), f'c{user % 3}', f'g{item % 5}|h{item % 2}',
         f'q{rng.integers(6)}', tags, round(float(rng.normal()), 3))
      )  # fmt: skip
  rows += [(12, NEW_ITEM, 10**6 + 5, 1, 'c0', 'g9', 'q1', 'a', 0.5)]
  return rows


def saved(folder, task):
  """Returns (config, workdir, store): a run whose only checkpoint has initial weights."""
  config = configs.base({'click': 'pooling', 'next_item': 'gru4rec'}[task], task, steps=2)
  config.update(history_length=L, batch_size=8, eval_batch_size=16, seed=3)
  path = folder / 'log.csv'
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([COLUMNS, *log_rows()])
  config.data.update(
    source=str(path), name='log', user_features=('city',), item_features=('genre',),
    context_features=('query', 'tags', 'price'), rows_per_part=40,
  )  # fmt: skip
  config.data.multi = {'genre': '|', 'tags': '|'}
  config.data.numeric = {'price': 'bins:4'}
  config.model.update(width=4, scale=1.0)
  if task == 'click':
    config.model.hidden = (8,)
    config.data.split.update(valid=0.2, test=0.2)
  else:
    config.data.split.protocol = 'leave_one_out'
  return untrained(config, folder)


@pytest.fixture(scope='module')
def clicks(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('clicks'), 'click')


@pytest.fixture(scope='module')
def nexts(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('nexts'), 'next_item')


@pytest.fixture(params=['click', 'next_item'])
def run(request):
  return request.getfixturevalue({'click': 'clicks', 'next_item': 'nexts'}[request.param])


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(predict, 'ROWS', 24)


def rows_to_score():
  """Returns rows of every kind: (user, item, query, tags, price, note)."""
  rng = np.random.default_rng(1)
  users = [*range(10, 26), NEW_USER, '']
  rows = [
    (u, i, f'q{rng.integers(9)}', rng.choice(['', 'a', 'b|a', 'x|d']), p, f'{u}, "{i}"')
    for u in users
    for i, p in zip([*rng.integers(ITEMS, size=2), NEW_ITEM, 'unheard'], PRICES, strict=True)
  ]
  order = rng.permutation(len(rows))
  return [tuple(map(str, rows[n])) for n in order] + [('12', '', 'q1', 'a', '1e9', '')]


PRICES = ('0', '-1.5', 'abc', '')
FIELDS = ('user', 'item', 'query', 'tags', 'price', 'note')


def write(path, rows, fields=FIELDS):
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([fields, *rows])
  return str(path)


def scored(run, source, output, top_k=None):
  """Returns (the output as a table, the report)."""
  config, workdir, store = run
  report = predict.predict(config, workdir, store, Request(source, output, top_k))
  assert not list(output.parent.glob('*.parts')) and not (workdir / '.predict').exists()
  return pq.read_table(output), report


NEVER = 10**12


def history(user, store, time=NEVER):
  """Returns the item rows of a user's clicks in the log strictly before a time, by time."""
  code = {x: k for k, x in enumerate(store.raw_ids('item').to_pylist())}
  rows = sorted((r for r in log_rows() if str(r[0]) == user and r[3]), key=lambda r: r[2])
  return [code.get(str(r[1]), 0) for r in rows if r[2] < time]


def batch_by_hand(store, rows, items, B, times):
  """Returns a batch built from the definition; items [N] or [N, Q], times [N]."""
  ids = {name: store.raw_ids(name).to_pylist() for name in store.vocabulary}
  code = {name: {x: k for k, x in enumerate(names)} for name, names in ids.items()}
  V = {name: len(names) for name, names in ids.items()}
  city = {str(r[0]): r[4] for r in log_rows()}
  tagged, edges = store.widths['context.tags'], store.manifest['bins']['context.price']
  batch = {name: [] for name in ('user', 'history', 'length', 'total')}
  batch |= {name: [] for name in ('user.city', 'context.query', 'context.tags', 'context.price')}
  for (user, _, query, tags, price, _), time in zip(rows, times, strict=True):
    events = history(user, store, time)
    newest = events[-L:]
    batch['user'].append(code['user'].get(user, 0) if user else 0)
    batch['history'].append(newest + [V['item']] * (L - len(newest)))
    batch['length'].append(len(newest))
    batch['total'].append(len(events))
    batch['user.city'].append(code['user.city'].get(city.get(user, 'none'), 0))
    batch['context.query'].append(code['context.query'].get(query, 0))
    tokens = [code['context.tags'].get(x, 0) for x in tags.split('|')] if tags else [0]
    batch['context.tags'].append(tokens + [V['context.tags']] * (tagged - len(tokens)))
    number = price not in ('abc', '')
    bin = str(sum(edge < float(price) for edge in edges)) if number else 'none'
    batch['context.price'].append(code['context.price'].get(bin, 0))
  batch = {name: np.array(x, np.int32) for name, x in batch.items()}
  batch['item'] = np.asarray(items, np.int32)
  batch['user_index'] = batch['user']
  batch['label'] = batch['weight'] = np.ones(len(rows), np.float32)
  batch['item.genre'] = store.items['item.genre'][batch['item']]
  batch['history.genre'] = store.items['item.genre'][batch['history']]
  return {k: np.concatenate([x, np.repeat(x[:1], -len(x) % B, axis=0)]) for k, x in batch.items()}


def slow_logits(run, rows, items, times=None):
  config, workdir, store = run
  setup, best = trained_run.best_of(config, workdir, store)
  B = config.eval_batch_size
  batch = batch_by_hand(store, rows, items, B, times or [NEVER] * len(rows))
  logits = [
    setup.trainer.predict(
      best.state, meshes.place(setup.mesh, {k: x[n : n + B] for k, x in batch.items()})
    )
    for n in range(0, len(batch['user']), B)
  ]
  return np.concatenate(logits)[: len(rows)]


def item_rows(store, rows):
  code = {x: k for k, x in enumerate(store.raw_ids('item').to_pylist())}
  return np.array([code.get(row[1], 0) if row[1] else 0 for row in rows])


def slow_products(run, users, more=(), times=None):
  """Returns scores [N, V] of users with all their events up to a time, and these events."""
  config, workdir, store = run
  setup, best = trained_run.best_of(config, workdir, store)
  model = StatefulModel(setup.model, setup.trainer, setup.mesh, L, config.eval_batch_size)
  code = {x: k for k, x in enumerate(store.raw_ids('user').to_pylist())}
  times = times or [NEVER] * len(users)
  events = [
    np.array(history(u, store, time), np.int64) for u, time in zip(users, times, strict=True)
  ]
  for user, item in more:
    events = [np.append(x, item) if u == user else x for u, x in zip(users, events, strict=True)]
  empty = model.empty(np.array([code.get(u, 0) if u else 0 for u in users]))
  states = model.update(best.state, empty, [{'item': items} for items in events])
  every = np.tile(np.arange(1, setup.model.items), (len(users), 1))
  return np.pad(model.score(best.state, states, every), ((0, 0), (1, 0))), events


def check_flags(table, store, rows, lengths, known_item=True):
  ids = store.raw_ids('user').to_pylist()[1:]
  assert table['known_user'].to_pylist() == [row[0] in ids for row in rows]
  assert table['events'].to_pylist() == lengths
  if known_item:
    assert table['known_item'].to_pylist() == (item_rows(store, rows) > 0).tolist()


def test_pairs_of_clicks_score_like_batches_built_by_hand(clicks, tmp_path, small_parts):
  rows, store = rows_to_score(), clicks[2]
  assert '24' not in store.raw_ids('user').to_pylist(), 'in the log, and not seen by training'
  assert NEW_ITEM not in store.raw_ids('item').to_pylist() and len(store.parts) > 1
  table, report = scored(clicks, write(tmp_path / 'in.csv', rows), tmp_path / 'out.parquet')
  expected = slow_logits(clicks, rows, item_rows(store, rows))
  assert table['score'].type == pa.float32()
  np.testing.assert_allclose(table['score'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(table['probability'], 1 / (1 + np.exp(-expected)), rtol=1e-5)
  check_flags(table, store, rows, [min(L, len(history(r[0], store))) for r in rows])
  # The order and all columns of the file are kept.
  for k, name in enumerate(FIELDS):
    assert [x or '' for x in table[name].to_pylist()] == [row[k] for row in rows]
  known = {'rows': len(rows), 'no_user': 4, 'no_item': 1, 'unknown_users': 16, 'users': 17}
  assert {k: report[k] for k in known} == known
  line = predict.line_of(report)
  assert line.startswith(
    f'{tmp_path}/out.parquet: 73 rows of 17 users; 16 rows of unknown users (4'
  )
  assert ' of unknown items (1 of them without one); ' in line and line.endswith('rows a second')


@pytest.mark.parametrize('split', ['valid', 'test'])
def test_rows_of_the_log_score_as_in_the_evaluation(clicks, tmp_path, split, small_parts):
  """With the log's times each row has the history of its example, without later events."""
  config, workdir, store = clicks
  setup, best = trained_run.best_of(config, workdir, store)
  logit = trained_run.score_split(setup, best.state, split)
  expected = dict(zip(examples_by_key(store, split), logit, strict=True))
  rows = [r for r in log_rows() if (str(r[0]), r[2]) in expected]
  assert len(rows) == len(expected) > 10
  source = write(tmp_path / 'in.csv', rows[::-1], COLUMNS)
  table, report = scored(clicks, source, tmp_path / 'out.parquet')
  scores = [expected[str(r[0]), r[2]] for r in rows[::-1]]
  np.testing.assert_allclose(table['score'], scores, rtol=1e-6, atol=1e-6)
  assert 'as_of' not in table.column_names and 'as_of' not in report
  assert "; each scored on the events strictly before its 'time'; " in predict.line_of(report)
  # Without times the histories include the rows' own clicks, and `as_of` shows it.
  names = [name for name in COLUMNS if name != 'time']
  bare = [tuple(x for x, name in zip(r, COLUMNS, strict=True) if name in names) for r in rows]
  table, report = scored(clicks, write(tmp_path / 'bare.csv', bare, names), tmp_path / 'b.parquet')
  assert not np.allclose(table['score'].to_numpy()[::-1], scores, atol=1e-3)
  newest = max(r[2] for r in log_rows())
  assert set(table['as_of'].to_pylist()) == {newest}
  assert f'; scored as of {newest}, the newest event; ' in predict.line_of(report)


def examples_by_key(store, split):
  """Yields (raw user, time) of the examples of a split, in the store's order."""
  names = [x for k in range(len(store.parts)) for x in store.user_ids(k).to_pylist()]
  for part in store.parts:
    rows = slice(*part.bounds[split])
    for user, time in zip(part.examples['user'][rows], part.examples['time'][rows], strict=True):
      yield names[part.first + user], int(time)


def timed_rows():
  """Returns rows with times before, at, between and after users' events; see TIMED."""
  rng = np.random.default_rng(2)
  users = ['10', '12', '17', '24', NEW_USER]
  times = [0, 12, 1012, 1013, 4011, 5017, 8017, 10**6 + 24, 10**7]
  rows = [(u, str(rng.integers(ITEMS)), t, 'q1', 'a', '0') for u in users for t in times]
  return [rows[n] for n in rng.permutation(len(rows))]


TIMED = ('user', 'item', 'time', 'query', 'tags', 'price')


@pytest.mark.parametrize('ending', but_slow(['parquet', 'csv'], {0}))
def test_an_evaluation_writes_the_score_of_each_row(run, tmp_path, monkeypatch, ending):
  """The report's metrics are those of the written rows, and ranks those of --top_k."""
  monkeypatch.setattr(scored_rows, 'ROWS', 5)
  config, workdir, store = run
  output = tmp_path / f'test.{ending}'
  (tmp_path / f'test.{ending}.parts').mkdir()  # left by a command that was killed
  overall = trained_run.evaluate_best(config, workdir, store, output)['test']['overall']
  (workdir / trained_run.EVALUATION).unlink()
  assert [*tmp_path.iterdir()] == [output]
  read = {'parquet': pq.read_table, 'csv': pyarrow.csv.read_csv}[ending]
  table = read(output)
  arrays = {name: table[name].to_numpy() for name in table.column_names}
  assert len(table) == overall['rows'] > 5
  by_key = {(str(r[0]), r[2]): r for r in log_rows()}
  rows = [
    by_key[str(user), time] for user, time in zip(arrays['user'], arrays['time'], strict=True)
  ]
  known = [item if item in store.raw_ids('item').to_pylist() else None
           for item in (str(r[1]) for r in rows)]  # fmt: skip
  assert [x if x is None else str(x) for x in table['item'].to_pylist()] == known
  assert arrays['events'].tolist() == [len(history(str(r[0]), store, r[2])) for r in rows]
  if config.task == 'click':
    assert arrays['label'].tolist() == [r[3] for r in rows]
    for score in (arrays['score'], arrays['probability']):
      auc = click_metrics.auc(arrays['label'].astype(np.float32), score.astype(np.float32))
      assert auc == pytest.approx(overall['auc'], abs=1e-9)
    return
  assert np.mean(1 / arrays['rank']) == pytest.approx(overall['mrr'])
  # The same ranks by --top_k as of that time, of items that the users had not met.
  users = [(user, time) for user, time in zip(arrays['user'], arrays['time'], strict=True)]
  source = write(tmp_path / 'users.csv', users, ('user', 'time'))
  table, _ = scored(run, source, tmp_path / 'top.parquet', store.vocabulary['item'])
  rank = {(r['user'], r['time'], r['item']): r['rank'] for r in table.to_pylist()}
  agree = [
    rank[str(r[0]), str(r[2]), str(r[1])] == arrays['rank'][n]
    for n, r in enumerate(rows)
    if known[n]
    and store.raw_ids('item').index(known[n]).as_py() not in history(str(r[0]), store, r[2])
  ]
  assert all(agree) and len(agree) > 3


@pytest.mark.parametrize('top_k', [None, 5])
def test_a_row_with_a_time_is_scored_on_the_events_before(
  run, tmp_path, small_parts, monkeypatch, top_k
):
  """Scores, events and best items are as if the log ended there, for several times of a user."""
  config, workdir, store = run
  monkeypatch.setattr(state_table, 'CHUNK', 1)
  rows, V = timed_rows(), store.vocabulary['item']
  fields = [name for name in TIMED if not (top_k and name == 'item')]
  lines = [[x for x, name in zip(row, TIMED, strict=True) if name in fields] for row in rows]
  source = write(tmp_path / 'in.csv', lines, fields)
  pasts, times = [history(r[0], store, r[2]) for r in rows], [r[2] for r in rows]
  if config.task == 'click':
    every_row = [(r[0], '', *r[3:], '') for r in rows for _ in range(V)]
    every, later = np.tile(np.arange(V), len(rows)), np.repeat(times, V).tolist()
    score_NV = slow_logits(run, every_row, every, later).reshape(-1, V)
  else:
    score_NV, _ = slow_products(run, [r[0] for r in rows], times=times)
  table, _ = scored(run, source, tmp_path / f'{config.task}{top_k}.parquet', top_k)
  most = L if config.task == 'click' else 10**9
  code = {x: k for k, x in enumerate(store.raw_ids('item').to_pylist())}
  output, at = table.to_pylist(), 0
  for n, (row, past) in enumerate(zip(rows, pasts, strict=True)):
    if top_k is None:
      item = code.get(row[1], 0)
      expected = score_NV[n, item] if item or config.task == 'click' else None
      assert output[n]['events'] == min(most, len(past))
      assert output[n]['score'] == (expected and pytest.approx(expected, rel=1e-4, abs=1e-5))
      continue
    order = sorted({*range(1, V)} - {*past}, key=lambda k: -score_NV[n, k])[:top_k]
    best = output[at : at + len(order)]
    at += len(order)
    assert {(r['user'], int(r['time'])) for r in best} == {(row[0], row[2])}
    np.testing.assert_allclose([r['score'] for r in best], score_NV[n, order], rtol=1e-4, atol=1e-5)
    assert {*past}.isdisjoint(code[r['item']] for r in best)
  assert top_k is None or at == len(output)


def test_pairs_of_a_next_item_model_are_scored_on_whole_histories(nexts, tmp_path, small_parts):
  rows, store = rows_to_score(), nexts[2]
  table, report = scored(nexts, write(tmp_path / 'in.csv', rows), tmp_path / 'out.parquet')
  score_NV, events = slow_products(nexts, [row[0] for row in rows])
  item = item_rows(store, rows)
  expected = np.where(item > 0, score_NV[np.arange(len(rows)), item], np.nan)
  assert table['score'].is_null().to_pylist() == (item == 0).tolist()
  np.testing.assert_allclose(table['score'].to_numpy(), expected, rtol=1e-5, atol=1e-5)
  check_flags(table, store, rows, [len(x) for x in events])
  assert max(map(len, events)) > L and 'probability' not in table.column_names
  assert report['unknown_items'] == int(np.sum(item == 0))


@pytest.mark.parametrize('excludes', but_slow([True, False], {0}))
def test_the_best_items_equal_those_of_sorting_all(
  run, tmp_path, small_parts, monkeypatch, excludes
):
  """For K below and above the number of candidates, with and without config.exclude_seen."""
  config, workdir, store = run
  config = config.copy_and_resolve_references()
  config.exclude_seen = excludes
  monkeypatch.setattr(trained_run, 'check_same', lambda *_, **__: None)  # one run for both
  monkeypatch.setattr(click_scorer, 'CANDIDATES', 5)
  monkeypatch.setattr(next_item_scorer, 'SEEN', 1)
  V = store.vocabulary['item']
  rows = [r for r in rows_to_score() if r[1] == 'unheard']
  source = write(tmp_path / 'in.csv', [(r[0], *r[2:]) for r in rows], FIELDS[:1] + FIELDS[2:])
  users = [r[0] for r in rows]
  if config.task == 'click':
    every = np.tile(np.arange(V), len(rows))
    score_NV = slow_logits(run, [r for r in rows for _ in range(V)], every).reshape(-1, V)
  else:
    score_NV, _ = slow_products(run, users)
  names = store.raw_ids('item').to_pylist()
  for K in (3, V + 5):
    table, _ = scored(
      (config, workdir, store), source, tmp_path / f'{K}-{config.task}-{excludes}.parquet', K
    )
    output, at = table.to_pylist(), 0
    for n, user in enumerate(users):
      met = {*history(user, store)} if excludes else set()
      open_ = [k for k in range(1, V) if k not in met]
      order = sorted(open_, key=lambda k: -score_NV[n, k])[:K]
      best = output[at : at + len(order)]
      at += len(order)
      assert [r['rank'] for r in best] == [*range(1, len(order) + 1)]
      assert {r['user'] or '' for r in best} == {user} and {r['note'] for r in best} == {rows[n][5]}
      np.testing.assert_allclose(
        [r['score'] for r in best], score_NV[n, order], rtol=1e-4, atol=1e-5
      )
      items = [names.index(r['item']) for r in best]
      assert len({*items}) == len(items) and met.isdisjoint(items)
      np.testing.assert_allclose(score_NV[n, items], score_NV[n, order], rtol=1e-4, atol=1e-5)
      if config.task == 'next_item' and not history(user, store):
        assert items == open_[:K] and {r['score'] for r in best} == {0}, 'ties are by row'
    assert at == len(output)


@pytest.mark.parametrize('mesh_shape', [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize('block', [2**22, 16 * 7])
def test_top_items_equal_those_of_sorting(mesh_shape, block):
  V, R, D, Q, K = 90, 128, 6, 16, 20
  rng = np.random.default_rng(0)
  rows = rng.integers(-2, 3, (R, D)).astype(np.float32)  # whole numbers: ties, and no rounding
  rows[V:] = 9  # padding rows, with the highest scores
  query = rng.integers(-2, 3, (Q, D)).astype(np.float32)
  query[3] = 0
  met = [rng.integers(0, V, n * 6) for n in range(Q)]
  met[5] = np.arange(10, V)
  whose, seen = seen_pairs(met)
  whose, seen = (np.pad(x, (0, 9), constant_values=y) for x, y in ((whose, 0), (seen, V)))
  mesh = mesh_of(*mesh_shape)
  placed = jax.device_put(rows, NamedSharding(mesh, meshes.ROWS))
  score, ids = top_items(
    placed, query, whose.astype(np.int32), seen.astype(np.int32), mesh, V, K, block
  )
  for n in range(Q):
    expected = query[n] @ rows[:V].T
    order = sorted({*range(1, V)} - {*met[n].tolist()}, key=lambda k: (-expected[k], k))[:K]
    finite = np.isfinite(score[n])
    assert finite.sum() == len(order) and ids[n][finite].tolist() == order
    assert score[n][finite].tolist() == expected[order].tolist()


def test_eight_devices_score_like_one_device(run, tmp_path, monkeypatch):
  config, workdir, store = run
  source = write(tmp_path / 'in.csv', rows_to_score())
  users = write(tmp_path / 'users.csv', [(r[0], *r[2:5]) for r in rows_to_score()[:20]],
                ('user', 'query', 'tags', 'price'))  # fmt: skip
  tables = []
  for devices in (8, 1):
    monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_, n=devices: mesh_of(n))
    tables.append([
      scored(run, source, tmp_path / f'{config.task}{devices}.parquet')[0],
      scored(run, users, tmp_path / f'{config.task}{devices}top.parquet', 4)[0],
    ])  # fmt: skip
  for many, single in zip(*tables, strict=True):
    assert many.drop_columns(['score']).column_names == single.drop_columns(['score']).column_names
    a, b = (x['score'].to_numpy(zero_copy_only=False) for x in (many, single))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert tables[0][1]['item'].to_pylist() == tables[1][1]['item'].to_pylist()


@pytest.mark.parametrize(
  'run, ending, top_k',
  [('click', 'parquet', None), ('click', 'csv', 5), ('next_item', 'csv', None)],
  indirect=['run'],
)
def test_a_killed_prediction_continues(run, tmp_path, monkeypatch, ending, top_k):
  config, workdir, store = run
  monkeypatch.setattr(predict, 'ROWS', 24 * (top_k or 1))
  fields = [k for k in range(6) if k != 1 or not top_k]
  rows = [[row[k] for k in fields] for row in rows_to_score()]
  source = write(tmp_path / 'in.csv', rows, [FIELDS[k] for k in fields])

  def ask(output):
    return predict.predict(config, workdir, store, Request(source, tmp_path / output, top_k))

  assert ask(f'whole.{ending}')['scored'] == 73
  output = tmp_path / f'broken.{ending}'
  add, answer, answered = Parts.add, predict.answer, []

  def killed(self, *arguments):
    if self.done == 2:
      (self.folder / 'part-00002.parquet.writing').write_bytes(b'half')
      raise KeyboardInterrupt
    add(self, *arguments)

  def counted(*arguments):
    answered.append(arguments)
    return answer(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(Parts, 'add', killed)
    with pytest.raises(KeyboardInterrupt):
      ask(output.name)
  assert not output.exists() and len(list((tmp_path / f'{output.name}.parts').iterdir())) == 4
  with monkeypatch.context() as patch:
    patch.setattr(predict, 'answer', counted)
    patch.setattr(predict, 'ROWS', 8)
    with pytest.raises(UserError, match=r'of another prediction: rows 24 -> \d; delete it'):
      ask(output.name)
    patch.setattr(predict, 'ROWS', 24 * (top_k or 1))
    report = ask(output.name)
  assert len(answered) == 2 and report['scored'] == 73 - 48 and report['rows'] == 73
  assert '48 of the rows were scored before' in predict.line_of(report)
  assert output.read_bytes() == (tmp_path / f'whole.{ending}').read_bytes()
  assert not (tmp_path / f'{output.name}.parts').exists()


def test_parts_of_another_input_config_or_model_are_refused(clicks, tmp_path, monkeypatch):
  config, workdir, store = clicks
  rows = rows_to_score()
  source = write(tmp_path / 'in.csv', rows)
  output = tmp_path / 'out.csv'
  with monkeypatch.context() as patch:
    patch.setattr(Parts, 'join', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      predict.predict(config, workdir, store, Request(source, output))

  def refused(message, config=config, source=source):
    with pytest.raises(
      UserError, match=f'{output}.parts has parts of another .*{message}.*delete it'
    ):
      predict.predict(config, workdir, store, Request(source, output))

  other = config.copy_and_resolve_references()
  other.eval_batch_size = 8
  refused('config.eval_batch_size 16 -> 8', other)
  refused('input', source=write(tmp_path / 'other.csv', rows[1:]))
  with monkeypatch.context() as patch:
    patch.setattr(state_table, 'fingerprint', lambda state: 'other weights')
    refused("weights '.*' -> 'other weights'")
  assert predict.predict(config, workdir, store, Request(source, output))['scored'] == 0
  with pytest.raises(UserError, match=f'--output={output} exists; use another path, or delete it'):
    predict.predict(config, workdir, store, Request(source, output))


def test_columns_are_kept_with_their_types(clicks, tmp_path, small_parts):
  """Ids that are numbers equal the ids of the log."""
  rows = [r for r in rows_to_score() if r[1] not in ('unheard', '') and r[0]]
  kept = pa.table({
    'item': pa.array([int(r[1]) for r in rows], pa.int16()),
    'vector': pa.array([[k, 0.5] for k in range(len(rows))], pa.list_(pa.float32())),
    'user': pa.array([float(r[0]) for r in rows]),
    'when': pa.array(np.arange(len(rows)), pa.timestamp('us')),
    'price': pa.array([None if r[4] in ('', 'abc') else float(r[4]) for r in rows]),
    'tags': pa.array([r[3].split('|') if r[3] else None for r in rows], pa.list_(pa.string())),
    'query': pa.array([r[2].encode() for r in rows]),
    'bytes': pa.array([b'\x00\xff', None, b'\r\n'] * len(rows))[: len(rows)],
  })  # fmt: skip
  pq.write_table(kept, tmp_path / 'in.parquet')
  table, _ = scored(clicks, str(tmp_path / 'in.parquet'), tmp_path / 'out.parquet')
  names = kept.column_names
  assert table.select(names).to_pylist() == kept.to_pylist()
  assert table.select(names).schema.types == kept.schema.types
  expected, _ = scored(clicks, write(tmp_path / 'in.csv', rows), tmp_path / 'texts.parquet')
  assert table['score'].equals(expected['score'])
  # Several JSON files, and a CSV output.
  lines = [json.dumps(dict(zip(FIELDS, r, strict=True))) + '\n' for r in rows]
  (tmp_path / 'a.jsonl').write_text(''.join(lines[:30]))
  (tmp_path / 'b.jsonl').write_text(''.join(lines[30:]))
  output = tmp_path / 'out.csv'
  predict.predict(*clicks, Request(str(tmp_path / '*.jsonl'), output))
  with output.open(newline='') as file:
    output_rows = list(csv.DictReader(file))
  assert [tuple(r[name] for name in FIELDS) for r in output_rows] == rows
  assert [np.float32(r['score']) for r in output_rows] == expected['score'].to_pylist()
  assert [r['known_user'] == 'true' for r in output_rows] == expected['known_user'].to_pylist()


def test_raw_values_have_the_codes_of_the_store(clicks, tmp_path):
  config, _, store = clicks
  columns = {
    name: f'config.data.{name}' for name in ('user', 'item', 'time', 'query', 'tags', 'price')
  }
  with (
    interactions.connect(tmp_path / 'x.duckdb', '1GB', tmp_path) as reading,
    interactions.connect(tmp_path / 'y.duckdb', '1GB', tmp_path) as looking,
  ):
    coder, read = input_rows.Coder(config.data, store, looking), {}
    rows = input_rows.RawRows(
      config.data, config.data.source, columns, store.clock, reading, tmp_path
    )
    for begin in range(0, rows.count, 50):
      chunk = rows.chunk(begin, 50)
      codes, _, cut = coder.context(chunk.texts)
      assert cut == 0
      codes['item'] = coder.items(chunk.texts['item'])
      record, time = coder.records(chunk.texts['user']), chunk.texts['time'].to_pylist()
      for n, key in enumerate(zip(record.tolist(), map(int, time), strict=True)):
        read[key] = {name: x[n].tolist() for name, x in codes.items()}
    longer = {name: pa.chunked_array([[x]]) for name, x in
              (('query', 'q1'), ('tags', 'a||b|c|d|a|new'), ('price', None))}  # fmt: skip
    codes, unknown, cut = coder.context(longer)
    assert unknown['context.tags'] == 1 and unknown['context.price'] == 0
    width = store.widths['context.tags']
    assert cut == 1 and codes['context.tags'].shape == (1, width) and codes['context.price'] == [0]
  for part in store.parts:
    names = ('item', *store.features['context'])
    for n in range(len(part.examples['user'])):
      key = part.first + int(part.examples['user'][n]), int(part.examples['time'][n])
      assert read.pop(key) == {name: part.examples[name][n].tolist() for name in names}
  assert not read


@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_rows_of_a_large_file_keep_their_order(clicks, tmp_path, ending):
  """DuckDB reads it in pieces, with several threads."""
  number = np.arange(300_000)
  table = pa.table({'user': number, 'item': number % 7, 'note': np.full(len(number), 'x' * 40)})
  path = tmp_path / f'in.{ending}'
  if ending == 'csv':
    pyarrow.csv.write_csv(table, path)
  else:
    pq.write_table(table, path, row_group_size=20_000)
  with interactions.connect(tmp_path / 'x.duckdb', '1GB', tmp_path) as db:
    db.execute('SET threads = 4')
    expected = dict.fromkeys(('user', 'item', 'note'), 'config.data.user')
    rows = input_rows.RawRows(clicks[0].data, str(path), expected, clicks[2].clock, db, tmp_path)
    assert rows.count == len(number) and rows.names == ['user', 'item', 'note']
    chunks = [rows.chunk(begin, 2**16) for begin in range(0, rows.count, 2**16)]
  users = [chunk.texts['user'].cast(pa.int64()).to_numpy() for chunk in chunks]
  assert [len(x) for x in users] == [2**16] * 4 + [300_000 - 4 * 2**16]
  np.testing.assert_array_equal(np.concatenate(users), number)


def test_scores_continue_from_kept_states(nexts, tmp_path):
  config, workdir, store = nexts
  rows = rows_to_score()
  source = write(tmp_path / 'in.csv', rows)
  users = write(tmp_path / 'users.csv', [(u,) for u in ('12', '555', '13')], ('user',))
  names = store.raw_ids('item').to_pylist()
  new = [('12', 1), ('555', 2), ('12', 3)]
  text = ''.join(f'{u},{names[i]},{10**7 + n},1\n' for n, (u, i) in enumerate(new))
  (tmp_path / 'new.csv').write_text('user,item,time,label\n' + text)
  before, _ = scored(nexts, source, tmp_path / 'before.parquet')
  try:
    update_states(config, workdir, store, '')
    same, _ = scored(nexts, source, tmp_path / 'same.parquet')
    update_states(config, workdir, store, str(tmp_path / 'new.csv'))
    after, _ = scored(nexts, source, tmp_path / 'after.parquet')
    top, _ = scored(nexts, users, tmp_path / 'top.parquet', 30)
  finally:
    (workdir / state_table.FILE).unlink()
  np.testing.assert_allclose(
    same['score'].to_numpy(), before['score'].to_numpy(), rtol=1e-5, atol=1e-6
  )
  score_NV, events = slow_products(nexts, [row[0] for row in rows], new)
  item = item_rows(store, rows)
  expected = np.where(item > 0, score_NV[np.arange(len(rows)), item], np.nan)
  np.testing.assert_allclose(after['score'].to_numpy(), expected, rtol=1e-5, atol=1e-5)
  assert after['events'].to_pylist() == [len(x) for x in events] != before['events'].to_pylist()
  best = {u: {r['item'] for r in top.to_pylist() if r['user'] == u} for u in ('12', '555', '13')}
  assert best['12'].isdisjoint({names[1], names[3]}) and names[2] not in best['555']
  assert len(best['555']) == len(names) - 2


def test_a_row_with_a_time_uses_a_state_of_events_before_it(nexts, tmp_path):
  """A row among newer events is scored on the store's events only, and counted."""
  config, workdir, store = nexts
  names = store.raw_ids('item').to_pylist()
  new = [('12', 1, 10**7), ('12', 3, 10**7 + 5), ('555', 2, 10**7 + 1)]
  text = ''.join(f'{u},{names[i]},{time},1\n' for u, i, time in new)
  (tmp_path / 'new.csv').write_text('user,item,time,label\n' + text)
  times = [1012, 10**7 - 1, 10**7 + 3, 10**7 + 6]
  rows = [(u, names[5], time) for time in times for u in ('12', '555', '13')]
  source = write(tmp_path / 'in.csv', rows, ('user', 'item', 'time'))
  try:
    update_states(config, workdir, store, str(tmp_path / 'new.csv'))
    table, report = scored(nexts, source, tmp_path / 'out.parquet')
    users, _ = scored(nexts, write(tmp_path / 'all.csv', [('12', '1')], ('user', 'item')),
                      tmp_path / 'all.parquet')  # fmt: skip
  finally:
    (workdir / state_table.FILE).unlink()
  expected = []
  for user, _, time in rows:
    held = [event for event in new if event[0] == user]
    more = [(u, item) for u, item, _ in held if all(time > at for *_, at in held)]
    score_NV, _ = slow_products(nexts, [user], more, [time])
    expected.append(score_NV[0, 5])
  np.testing.assert_allclose(table['score'].to_numpy(), expected, rtol=1e-5, atol=1e-5)
  # User 12 at 10**7 - 1 and 10**7 + 3, user 555 at 1012 and 10**7 - 1: a newer event is stored.
  assert report['among'] == 4
  assert "; 4 rows have times among events newer than the store's" in predict.line_of(report)
  assert users['as_of'].to_pylist() == [10**7 + 5]


@pytest.mark.parametrize('top_k', [None, 3])
def test_nothing_is_compiled_after_the_first_part(run, tmp_path, monkeypatch, top_k):
  config, workdir, store = run
  monkeypatch.setattr(predict, 'ROWS', 20 * (top_k or 1))
  fields = [k for k in range(6) if k != 1 or not top_k]
  rows = [[row[k] for k in fields] for row in rows_to_score()]
  source = write(tmp_path / 'in.csv', rows, [FIELDS[k] for k in fields])
  compiled, after = [], []

  def listen(name, *_, **__):
    if name == '/jax/core/compile/backend_compile_duration':
      compiled.append(name)

  add = Parts.add

  def added(self, *arguments):
    add(self, *arguments)
    after.append(len(compiled))

  monkeypatch.setattr(Parts, 'add', added)
  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    scored(run, source, tmp_path / 'out.parquet', top_k)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(after) == 4 and after[0] == after[-1] > 0


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(input=''), '--input is missing; give the rows to score'),
    (dict(input='none.csv'), "--input='none.csv' does not exist"),
    (dict(input='no*.csv'), r"--input='no\*.csv' matches no file"),
    (dict(input='in.txt'), r"--input='in.txt': the ending '.txt' must be one of .csv, .tsv"),
    (dict(output='out.json'), "out.json' must end in .parquet or .csv"),
    (dict(output=''), '--output is missing; it must be a file'),
    (dict(output='none/out.csv'), 'there is no folder .*none; create it first'),
    (dict(output='in.csv'), 'in.csv exists; use another path, or delete it'),
    (dict(top_k=0), '--top_k=0 must be at least 1'),
    (dict(rows=['user,query,tags,price', '1,q,a,1']), "column config.data.item='item' is unknown"),
    (dict(rows=['user,item', '1,2']), "column config.data.context_features='query' is unknown"),
    (dict(rows=['item', '1']), "column config.data.user='user' is unknown; .*available: item"),
    (dict(rows=[]), "in.csv': the file is empty; a header"),
    (dict(rows=['user,item,query,tags,price']), 'in.csv has no rows; at least one is expected'),
    (
      dict(rows=['user,item,query,tags,price,Score', '1,2,q,a,1,1']),
      "a column of the name 'Score'",
    ),
    (
      dict(rows=['user,item,query,tags,price,as_of', '1,2,q,a,1,1']),
      "a column of the name 'as_of'",
    ),
    (
      dict(rows=['user,item,query,tags,price,time', '1,2,q,a,1,5', '1,2,q,a,1,']),
      "in.csv: row 2: the time column 'time' holds None; a whole number near those of the log",
    ),
    (
      dict(rows=['user,item,query,tags,price,time', '1,2,q,a,1,1700000000000']),
      "row 1: .* '1700000000000'; .*remove the column to score all rows on the newest",
    ),
    (dict(rows=['user,item,query,tags,price', '1,2,q'], top_k=None), 'in.csv: '),
    (
      dict(rows=['user,item,query,tags,price', '1,2,q,a,1'], top_k=2),
      "a column of the name 'item'",
    ),
    (dict(other=['user,item,query,tags,note', '1,2,q,a,1']), 'iny.csv: .*price'),
    (
      dict(other=['item,user,query,tags,price', '1,2,q,a,1']),
      'iny.csv: its columns and types differ',
    ),
  ],
)
def test_wrong_requests_raise_an_error_of_one_line(clicks, tmp_path, monkeypatch, changes, message):
  monkeypatch.chdir(tmp_path)
  rows = changes.pop('rows', ['user,item,query,tags,price', '1,2,q,a,1'])
  (tmp_path / 'in.csv').write_text(''.join(f'{row}\n' for row in rows))
  if other := changes.pop('other', None):
    (tmp_path / 'iny.csv').write_text(''.join(f'{row}\n' for row in other))
    changes['input'] = 'in*.csv'
  request = dict(input='in.csv', output='out.csv', top_k=None) | changes
  request['output'] = tmp_path / request['output'] if request['output'] else predict.Path('')
  with pytest.raises(UserError, match=message) as error:
    predict.predict(*clicks, Request(**request))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out.csv').exists() and not (tmp_path / 'out.csv.parts').exists()


def test_an_unreadable_line_in_the_middle_is_named(clicks, tmp_path):
  good = ['1,2,q,a,1'] * 90_000
  text = '\n'.join(['user,item,query,tags,price', *good, '1,2,q,a,1,1,"', *good])
  (tmp_path / 'in.csv').write_text(text)
  with pytest.raises(UserError, match='in.csv: .*9000'):
    predict.predict(*clicks, Request(str(tmp_path / 'in.csv'), tmp_path / 'out.csv'))


def test_several_hosts_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match='--mode=predict runs on one host, and 2 were started'):
    predict.check(Request('in.csv', predict.Path('out.csv')))
