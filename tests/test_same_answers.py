"""`--mode=predict`, the exported folder and the HTTP service give equal answers."""

import csv
import functools

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.inference import predict
from lmn_jax.models.registry import CLICK, NEXT_ITEM
from lmn_jax.training import setup as setups
from tests.fake_service import running
from tests.runs import mesh_of, tiny_config, tiny_next, untrained

FAST = {('click', 'lmn'), ('next_item', 'dman')}
EVERY = [
  pytest.param(task, model, False, marks=() if (task, model) in FAST else pytest.mark.slow)
  for task, models in (('click', CLICK), ('next_item', NEXT_ITEM))
  for model in models
]
BFLOAT16 = [
  pytest.param(task, model, True, marks=pytest.mark.slow)
  for task, model in (
    ('click', 'lmn'), ('click', 'sam'), ('click', 'dien'), ('next_item', 'dman'),
    ('next_item', 'hstu'), ('next_item', 'sdm'),
  )
]  # fmt: skip
USERS, ITEMS, K = 6, 5, 8


def predict_file(config, workdir, store, rows, top_k=None):
  """The output of `--mode=predict` for rows (user, item, query), or (user, query) with top_k."""
  fields = [k for k in range(3) if top_k is None or k != 1]
  source, output = workdir / f'{top_k}.csv', workdir / f'{top_k}.parquet'
  with source.open('w', newline='') as file:
    names = ('user', 'item', 'query')
    csv.writer(file).writerows([row[k] for k in fields] for row in [names, *rows])
  predict.predict(config, workdir, store, predict.Request(str(source), output, top_k))
  return pq.read_table(output).to_pylist()


def assert_same(answers, expected, bf16):
  """Compares lists of (item, score): the scores, and the items wherever scores are distinct.

  In bfloat16, programs of other shapes round the same activations differently.
  """
  assert len(answers) == len(expected)
  tolerance = 0.03 if bf16 else 1e-4
  scores = [np.array([score for _, score in pairs], np.float32) for pairs in (answers, expected)]
  np.testing.assert_allclose(*scores, rtol=tolerance, atol=tolerance if bf16 else 1e-5)
  distinct = np.abs(np.diff(scores[1])) > 2 * tolerance
  for n, (pair, expected_pair) in enumerate(zip(answers, expected, strict=True)):
    # The last pair is skipped: the score after it is not known.
    if n < len(distinct) and distinct[n] and (n == 0 or distinct[n - 1]):
      assert pair[0] == expected_pair[0]


@pytest.mark.parametrize('task, model, bf16', EVERY + BFLOAT16)
def test_predict_export_and_service_give_equal_answers(task, model, bf16, tmp_path, monkeypatch):
  """Scores of pairs and the best items, for users with histories longer than the model's, an
  unknown user, and an id with spaces and a point."""
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  config = (tiny_config if task == 'click' else tiny_next)(model, bf16=bf16)
  config.model.scale = 1.0  # so that scores differ
  config, workdir, store = untrained(config, tmp_path)
  export.export(config, workdir, store, workdir / 'export', 'float32')
  sizes = dict(batch_sizes=(1, 4), candidate_sizes=(8, 64))
  bundle = Bundle(workdir / 'export', **sizes)

  longest = np.argsort(-store.parts[0].users['count'], kind='stable')[: USERS - 3].tolist()
  users = [store.user_ids(0)[n].as_py() for n in longest] + [store.user_ids(0)[7].as_py(), 'no one']
  assert store.parts[0].users['count'][longest[0]] > config.history_length
  users.append(f' {users[0]}.0\t')
  items = store.raw_ids('item').to_pylist()
  candidates = [items[1 + 7 * k % (len(items) - 1)] for k in range(ITEMS)]
  context = {'query': '3'} if task == 'click' else {}
  pairs = predict_file(config, workdir, store, [(u, i, '3') for u in users for i in candidates])
  top = predict_file(config, workdir, store, [(u, None, '3') for u in users], K)
  assert [r['rank'] for r in top] == [*range(1, K + 1)] * USERS

  opened = functools.partial(Bundle, **sizes)
  with running(workdir / 'export', open_bundle=opened) as client:
    client.ready()
    for n, user in enumerate(users):
      expected = [(r['item'], r['score']) for r in pairs[n * ITEMS : (n + 1) * ITEMS]]
      history = bundle.known_history(user)
      (scores,) = bundle.score([bundle.ask(user, candidates, history, context)])
      assert_same(list(zip(candidates, scores.values.tolist(), strict=True)), expected, bf16)
      body = {'user': user, 'context': context}
      answers = client.post('/v1/score', body | {'candidates': candidates}).json()
      assert_same(list(zip(candidates, answers['scores'], strict=True)), expected, bf16)

      expected = [(r['item'], r['score']) for r in top[n * K : (n + 1) * K]]
      ((answers, _),) = bundle.recommend([bundle.ask(user, None, history, context)], [K], [[]])
      assert_same(answers, expected, bf16)
      answers = client.post('/v1/recommend', body | {'k': K}).json()['items']
      assert_same([(x['item'], x['score']) for x in answers], expected, bf16)
