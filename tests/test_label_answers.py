"""With several labels, and with labels that are numbers, `--mode=predict`, the export and the HTTP
service give equal answers."""

import functools

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmn_jax import config as configs
from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.export.stored_rows import restored
from lmn_jax.inference import predict
from lmn_jax.training import setup as setups
from tests.fake_service import running
from tests.runs import mesh_of, tiny_config, untrained

ITEMS, USERS = 9, 12
SIZES = dict(batch_sizes=(2,), candidate_sizes=(8,))
LABELS = ('click', 'order')
HEADS = dict(label_head='mmoe', experts=2, tower=(4,))


def write_log(path):
  """A log with clicks, orders that are missing in some rows, and dwell times near 5,000."""
  rng = np.random.default_rng(0)
  with path.open('w') as file:
    file.write('user,item,time,click,order,dwell\n')
    for k in range(400):
      order, dwell = rng.choice(['', '0', '1']), 5000 + 300 * rng.normal()
      user, item = rng.integers(USERS), rng.integers(ITEMS)
      file.write(f'u{user},i{item},{k},{int(rng.random() < 0.6)},{order},{dwell:.2f}\n')
  return str(path)


def exported(folder, name, data, precision='float32', **model):
  """(config, workdir, store) of a run with initial weights and an export."""
  config = tiny_config(name, scale=1.0, **model)
  config.data = configs.data(name='log', source=write_log(folder / 'log.csv'), **data)
  config.update(history_length=4, criterion='')
  run = config, workdir, store = untrained(config, folder)
  report = export.export(config, workdir, store, workdir / 'export', precision)
  assert set(report['metrics']) == {'float32', precision}
  return run


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    yield


@pytest.fixture(scope='module')
def two_labels(tmp_path_factory):
  """(Bundle, result of `predicted`) of a model with two labels."""
  folder = tmp_path_factory.mktemp('labels')
  run = exported(folder, 'pooling', dict(labels=LABELS), **HEADS)
  return Bundle(folder / 'run/export', **SIZES), predicted(run)


@pytest.fixture(scope='module')
def numbers(tmp_path_factory):
  """The same of a model of dwell times."""
  folder = tmp_path_factory.mktemp('numbers')
  dwell = dict(label='dwell', label_kind='number', history='all')
  run = exported(folder, 'pooling', dwell, loss='huber')
  return Bundle(folder / 'run/export', **SIZES), predicted(run)


def predicted(run):
  """Scores and probabilities [users, items] of `--mode=predict` by column."""
  config, workdir, store = run
  items = store.raw_ids('item').to_pylist()[1:]
  pairs = [f'u{user},{item}\n' for user in range(USERS) for item in items]
  (workdir / 'pairs.csv').write_text('user,item\n' + ''.join(pairs))
  output = workdir / 'scores.parquet'
  predict.predict(config, workdir, store, predict.Request(str(workdir / 'pairs.csv'), output))
  table = pq.read_table(output)
  columns = [name for name in table.column_names if name.startswith(('score', 'probability'))]
  return {name: table[name].to_numpy().reshape(USERS, -1) for name in columns}


def asked_of(bundle):
  """(users, items, requests of all users for all items)."""
  items = [bundle.ids('item').raw(row) for row in range(1, bundle.items + 1)]
  users = [f'u{user}' for user in range(USERS)]
  return users, items, [bundle.ask(user, items, bundle.exported(user)) for user in users]


def close(values, expected):
  np.testing.assert_allclose(np.array(values, np.float64), expected, rtol=1e-5, atol=1e-6)


def test_an_export_scores_every_label(two_labels):
  bundle, expected = two_labels
  _, _, asked = asked_of(bundle)
  assert bundle.labels.names == LABELS and bundle.labels.log_odds
  assert bundle.manifest['format'] == 2
  scores = bundle.score(asked)
  for name in LABELS:
    close([x.labels[name] for x in scores], expected[f'score.{name}'])
  close([x.values for x in scores], expected['score.click'])
  assert np.ptp(expected['score.click'] - expected['score.order'], axis=1).min() > 0.01
  assert bundle.score([bundle.ask('u1', [])])[0].labels['order'].shape == (0,)


def test_the_best_items_are_those_of_a_label_or_of_a_sum(two_labels):
  bundle, expected = two_labels
  _, items, asked = asked_of(bundle)
  total = expected['probability.click'] + 5 * expected['probability.order']
  orders = [
    (None, expected['score.click']), ('order', expected['score.order']),
    ({'click': 1, 'order': 5}, total), ({'order': -2.0}, -2 * expected['probability.order']),
  ]  # fmt: skip
  firsts = set()
  for by, scores in orders:
    answers = bundle.recommend(asked, [3] * USERS, [[]] * USERS, exclude_seen=False, by=by)
    for (pairs, _), values in zip(answers, scores, strict=True):
      close([score for _, score in pairs], np.sort(values)[::-1][:3])
      close([values[items.index(item)] for item, _ in pairs], np.sort(values)[::-1][:3])
    firsts.add(tuple(pairs[0][0] for pairs, _ in answers))
  assert len(firsts) == 4


@pytest.mark.parametrize(
  'by, message',
  [
    ('buy', "label 'buy' is unknown; labels of the model: click, order"),
    ({'click': 1, 'buy': 2}, "label 'buy' is unknown"),
    ({'click': 0}, 'all weights are 0'),
    ({'click': float('nan')}, 'the weight nan is not a number of float32'),
    ({'click': 10**400}, 'the weight 1000.* is not a number'),
    ({'click': '1'}, "the weight '1' is not a number"),
    ({'click': True}, 'the weight True is not a number'),
  ],
)
def test_a_wrong_order_is_refused(two_labels, by, message):
  bundle, _ = two_labels
  with pytest.raises(RequestError, match=f'by: {message}') as error:
    bundle.recommend([bundle.ask('u1', None)], [3], [[]], by=by)
  assert '\n' not in str(error.value)


def test_an_export_predicts_numbers_in_their_unit(numbers):
  bundle, expected = numbers
  _, items, asked = asked_of(bundle)
  assert list(expected) == ['score'] and 3000 < expected['score'].mean() < 7000
  scores = bundle.score(asked)
  close([x.values for x in scores], expected['score'])
  assert not scores[0].labels and not bundle.labels.log_odds
  ((pairs, _),) = bundle.recommend(asked[1:2], [2], [[]], exclude_seen=False)
  best = np.sort(expected['score'][1])[::-1][:2]
  close([score for _, score in pairs], best)
  close([expected['score'][1][items.index(item)] for item, _ in pairs], best)
  with pytest.raises(RequestError, match="by: label 'dwell' is unknown; .*: it has one only"):
    bundle.recommend(asked[:1], [3], [[]], by='dwell')


def test_the_service_answers_with_numbers(numbers):
  bundle, expected = numbers
  with running(bundle.folder, open_bundle=functools.partial(Bundle, **SIZES)) as client:
    client.ready()
    users, items, _ = asked_of(bundle)
    got = [client.post('/v1/score', {'user': x, 'candidates': items}).json() for x in users]
    close([x['scores'] for x in got], expected['score'])
    assert 'probabilities' not in got[0] and 'labels' not in got[0]


def test_the_service_answers_with_every_label(two_labels):
  bundle, expected = two_labels
  with running(bundle.folder, open_bundle=functools.partial(Bundle, **SIZES)) as client:
    client.ready()
    users, items, _ = asked_of(bundle)
    got = [client.post('/v1/score', {'user': x, 'candidates': items}).json() for x in users]
    for answer in got:
      assert answer['labels']['click'] == {x: answer[x] for x in ('scores', 'probabilities')}
    for label in LABELS:
      close([x['labels'][label]['scores'] for x in got], expected[f'score.{label}'])
      probability = [x['labels'][label]['probabilities'] for x in got]
      close(probability, expected[f'probability.{label}'])
    body = {'user': 'u1', 'k': 2, 'exclude_seen': False}
    total = expected['probability.click'][1] + 5 * expected['probability.order'][1]
    orders = [
      (None, expected['score.click'][1]), ('order', expected['score.order'][1]),
      ({'click': 1, 'order': 5.0}, total),
    ]  # fmt: skip
    for by, values in orders:
      best = client.post('/v1/recommend', body | {'by': by}).json()['items']
      close([x['score'] for x in best], np.sort(values)[::-1][:2])
    for wrong in ('buy', {'order': '1'}, {}, 3, [], ['order'], {'order': 0}):
      refused = client.post('/v1/recommend', body | {'by': wrong})
      assert refused.status_code == 422 and refused.json()['error'].startswith('by: ')


@pytest.mark.slow
def test_rounded_tables_and_the_sums_of_shards_have_every_label(tmp_path):
  run = exported(tmp_path, 'lmn', dict(labels=LABELS), 'int8', **HEADS)
  bundle, expected = Bundle(tmp_path / 'run/export', **SIZES), predicted(run)
  parts = bundle.manifest['tables']['memory']['files']
  rows = np.asarray(restored({part: np.load(bundle.folder / x) for part, x in parts.items()}))

  class Values:
    def __call__(self, ids_TK, weights_TK):
      return np.einsum('tk,tkd->td', weights_TK, rows[ids_TK]), False

    def lost(self):
      return []

  _, _, asked = asked_of(bundle)
  remote = Bundle(bundle.folder, **SIZES, values=Values()).score(asked)
  for scores, of_shards, *exact in zip(
    bundle.score(asked), remote, *(expected[f'score.{x}'] for x in LABELS), strict=True
  ):
    for name, values in zip(LABELS, exact, strict=True):
      close(of_shards.labels[name], scores.labels[name])
      np.testing.assert_allclose(scores.labels[name], values, atol=0.1)
