"""With fields of every kind, evaluation, `--mode=predict`, `Bundle.ask` and the HTTP service give
equal scores."""

import functools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.histories import KnownEvent
from lmn_jax.inference import predict
from lmn_jax.serving.users.store import open_store
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from tests.fake_service import running
from tests.rich_runs import log_rows, rich_run, write
from tests.runs import mesh_of

CASES = [
  ('click', 'din', dict(time='bias')), ('click', 'sam', dict(time='buckets')),
  ('click', 'lmn', dict(time='buckets')), ('click', 'sasrec', dict(time='bias')),
  ('next_item', 'dman', dict(time='buckets', slots=3, item_fields=True)),
  ('next_item', 'hstu', dict(time='bias')), ('next_item', 'sasrec', dict(time='buckets')),
]  # fmt: skip
FAST = {'din'}
SIZES = dict(batch_sizes=(1, 4), candidate_sizes=(16,))
EVENT, CONTEXT = ('item', 'time', 'kind', 'marks', 'dwell', 'price'), ('hour', 'query', 'price')


def requests_of(config, store, rows):
  """A request for each row as the arguments of `Bundle.ask`: all of it in raw values."""
  clicks = [row for row in log_rows() if row['label'] == '1']
  items = store.raw_ids('item').to_pylist()[1:]
  for row in rows:
    before = [
      {name: event[name] for name in EVENT if event[name]}
      for event in clicks
      if event['user'] == row['user'] and int(event['time']) < int(row['time'])
    ]
    context = {name: row[name] for name in CONTEXT if row[name]}
    yield dict(
      user=row['user'], candidates=items, history=before, time=int(row['time']),
      context=context if config.task == 'click' else {},
    )  # fmt: skip


def predicted(config, workdir, store, rows):
  """Scores [N, items] of `--mode=predict`."""
  items = store.raw_ids('item').to_pylist()[1:]
  source, output = workdir / 'rows.csv', workdir / 'scores.parquet'
  write(source, [row | {'item': item} for row in rows for item in items])
  predict.predict(config, workdir, store, predict.Request(str(source), output))
  scores = np.array(pq.read_table(output)['score'].to_pylist())
  output.unlink()
  return scores.reshape(len(rows), -1)


@pytest.mark.parametrize(
  'task, name, fields',
  [pytest.param(*x, marks=() if x[1] in FAST else pytest.mark.slow) for x in CASES],
)
def test_evaluation_predict_export_and_service_give_equal_scores(
  task, name, fields, tmp_path, monkeypatch
):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  run = config, workdir, store = rich_run(tmp_path, name, task, **fields)
  trained_run.evaluate_best(config, workdir, store, workdir / 'test.parquet')
  table = pq.read_table(workdir / 'test.parquet').to_pylist()
  evaluated = {(row['user'], str(row['time'])): row for row in table}
  rows = [row for row in log_rows() if (row['user'], row['time']) in evaluated]
  scores = predicted(*run, rows)
  assert len(rows) > 6 and np.ptp(scores, axis=0).max() > 0.1
  items = store.raw_ids('item').to_pylist()[1:]
  for row, values in zip(rows, scores, strict=True):
    answer = evaluated[row['user'], row['time']]
    if task == 'click':
      value = values[items.index(row['item'])] if row['item'] in items else answer['score']
      np.testing.assert_allclose(value, answer['score'], rtol=1e-5, atol=1e-5)
    else:
      value = values[items.index(row['item'])]
      assert answer['rank'] == np.sum(values >= value)

  export.export(config, workdir, store, workdir / 'export', 'float32')
  bundle = Bundle(workdir / 'export', **SIZES)
  requests = list(requests_of(config, store, rows))
  asked = [bundle.ask(**request) for request in requests]
  assert {key for x in asked for key in x.missing} >= {'event.kind', 'event.dwell'}
  for result, expected in zip(bundle.score(asked), scores, strict=True):
    np.testing.assert_allclose(result.values, expected, rtol=1e-5, atol=1e-5)

  # The histories that the export knows, and a new user's in the store of users.
  last = {row['user']: row for row in rows if row['user'] in ('u0', 'u1')}
  now = store.clock.last + 1000
  known = [row | {'time': str(now)} for row in last.values()]
  newest = predicted(*run, known)
  users = open_store(f'{tmp_path}/users.sqlite', 99)
  opened = functools.partial(Bundle, **SIZES)
  with running(workdir / 'export', users, open_bundle=opened) as client:
    client.ready()

    def scored(**body):
      answer = client.post('/v1/score', body)
      assert answer.status_code == 200, answer.text
      return np.array(answer.json()['scores'])

    for request, expected in zip(requests, scores, strict=True):
      np.testing.assert_allclose(scored(**request), expected, rtol=1e-5, atol=1e-5)
    for row, expected in zip(known, newest, strict=True):
      user, context = row['user'], {name: row[name] for name in CONTEXT if row[name]}
      common = dict(candidates=items, context=context if task == 'click' else {}, time=now)
      result = scored(user=user, **common)
      np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
      (result,) = bundle.score([bundle.ask(user, history=bundle.known_events(user), **common)])
      np.testing.assert_allclose(result.values, expected, rtol=1e-5, atol=1e-5)
    request = max(requests, key=lambda x: len(x['history']))
    assert len(request['history']) > 2 * config.history_length
    for events in (request['history'][:5], request['history'][5:]):
      update = client.post('/v1/update', {'user': 'new', 'events': events})
      assert update.json()['events_taken'] == len(events), update.text
    new = {name: x for name, x in request.items() if name != 'history'} | {'user': 'new'}
    (expected,) = bundle.score([bundle.ask(**new, history=request['history'])])
    np.testing.assert_allclose(scored(**new), expected.values, rtol=1e-5, atol=1e-5)
    # An update of a user of the export stores their events there with features.
    user, event = known[0]['user'], {'item': items[0], 'time': now - 10, 'dwell': 3}
    client.post('/v1/update', {'user': user, 'events': [event]})
    assert json.loads(users.events(user, 2)[0].features)
    history = [*bundle.known_events(user), KnownEvent(items[0], now - 10, {'dwell': 3})]
    (expected,) = bundle.score([bundle.ask(user, items, history, time=now)])
    answer = scored(user=user, candidates=items, time=now)
    np.testing.assert_allclose(answer, expected.values, rtol=1e-5, atol=1e-5)
