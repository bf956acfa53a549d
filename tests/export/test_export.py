"""Exports score like the checkpoint, without the model's code, and are checked when opened."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lmn_jax import config as configs
from lmn_jax.errors import UserError
from lmn_jax.export import contents, export, functions, quantize, stored_rows
from lmn_jax.export.runtime import ids as ids_of
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.ids import Ids
from lmn_jax.export.runtime.manifest import FolderError
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.serving import hot_swap
from lmn_jax.serving.users.store import open_store
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from tests.examples import SCHEMA, make_batch, make_config, make_trainer
from tests.fake_service import running
from tests.runs import but_slow, mesh_of, tiny_config, tiny_next, untrained

SIZES = dict(batch_sizes=(1, 4), candidate_sizes=(8, 16))


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    yield


@pytest.fixture(scope='module')
def clicks(tmp_path_factory, one_device):
  """Returns (config, workdir, store, Bundle) of LMN."""
  config = tiny_config('lmn', scale=1.0)
  config.data.min_count = 14  # some items are unknown
  config, workdir, opened = untrained(config, tmp_path_factory.mktemp('clicks'))
  export.export(config, workdir, opened, workdir / 'export', 'float32')
  return config, workdir, opened, Bundle(workdir / 'export', **SIZES)


@pytest.fixture(scope='module')
def nexts(tmp_path_factory, one_device):
  """Returns (config, workdir, store, Bundle) of DMAN."""
  config, workdir, opened = untrained(
    tiny_next('dman', scale=1.0), tmp_path_factory.mktemp('nexts')
  )
  export.export(config, workdir, opened, workdir / 'export', 'float32')
  return config, workdir, opened, Bundle(workdir / 'export', **SIZES)


def examples_of(opened, L):
  """Yields test examples in raw ids: user, item, context and the history strictly before."""
  raw = {name: opened.raw_ids(name).to_pylist() for name in opened.vocabulary}
  for number, part in enumerate(opened.parts):
    users = opened.user_ids(number).to_pylist()
    for k in range(*part.bounds['test']):
      user, end = part.examples['user'][k], part.examples['end'][k]
      first = part.users['offset'][user]
      events = part.history['item'][first + max(0, end - L) : first + end]
      yield (
        users[user],
        raw['item'][part.examples['item'][k]] or 'strange',
        {'query': raw['context.query'][part.examples['context.query'][k]] or ''},
        [raw['item'][row] or 'strange' for row in events],
      )


def test_scores_equal_those_of_the_checkpoint(clicks):
  config, workdir, opened, bundle = clicks
  setup, best = trained_run.best_of(config, workdir, opened)
  expected = trained_run.score_split(setup, best.state, 'test')
  examples = [
    bundle.ask(user, [item], history, context)
    for user, item, context, history in examples_of(opened, config.history_length)
  ]
  assert any(x.unknown for x in examples) and any(x.events for x in examples)
  values = [float(scores.values[0]) for scores in bundle.score(examples)]
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_any_number_of_candidates_scores_like_single_candidates(clicks):
  """Padding and splitting of candidates do not change scores."""
  *_, bundle = clicks
  users = ['no one', bundle.ids('user').raw(3)]
  items = [bundle.ids('item').raw(1 + k % 50) for k in range(21)]
  examples = [bundle.ask(user, items[:n]) for user, n in zip(users, (21, 3), strict=True)]
  results = bundle.score(examples)
  assert [len(scores.values) for scores in results] == [21, 3]
  for user, scores in zip(users, results, strict=True):
    for item, value in zip(items, scores.values, strict=False):
      (alone,) = bundle.score([bundle.ask(user, [item])])
      np.testing.assert_allclose(value, alone.values[0], rtol=1e-5, atol=1e-6)


def test_scores_with_an_embedding_bag_of_another_process(clicks):
  """`values` computes the sums from the rows in the folder."""
  *_, bundle = clicks
  rows = np.load(bundle.folder / 'tables/memory.npy')

  class Values:
    calls = 0

    def __call__(self, ids_TK, weights_TK):
      self.calls += 1
      return np.einsum('tk,tkd->td', weights_TK, rows[ids_TK]), self.calls > 1

    def lost(self):
      return ['shard 1']

  remote = Bundle(bundle.folder, **SIZES, values=Values())
  assert remote.lost() == ['shard 1'] and bundle.lost() == []
  assert 'memory' not in remote._programs.tables
  items = [bundle.ids('item').raw(k) for k in (1, 5, 9)]
  examples = [bundle.ask(bundle.ids('user').raw(1), items)]
  (scores,), (expected,) = remote.score(examples), bundle.score(examples)
  np.testing.assert_allclose(scores.values, expected.values, rtol=1e-5, atol=1e-6)
  assert not scores.degraded and remote.score(examples)[0].degraded
  assert remote.recommend(examples, [2], [[]])[0][1]


def test_recommend_returns_the_best_of_all_items(clicks):
  *_, bundle = clicks
  ids = bundle.ids('item')
  items = [ids.raw(row) for row in range(1, len(ids))]
  example = bundle.ask(bundle.ids('user').raw(2), items)
  (scores,) = bundle.score([example])
  excluded = [items[int(np.argmax(scores.values))], 'strange']
  order = [k for k in np.argsort(-scores.values, kind='stable') if items[k] not in excluded]
  ((pairs, degraded),) = bundle.recommend(
    [bundle.ask(raw_user(bundle, 2), None)], [7], [excluded], exclude_seen=False
  )
  assert [item for item, _ in pairs] == [items[k] for k in order[:7]] and not degraded
  np.testing.assert_allclose([x for _, x in pairs], scores.values[order[:7]], rtol=1e-5)
  ((every_item, _),) = bundle.recommend([example], [10_000], [[]], exclude_seen=False)
  assert sorted(item for item, _ in every_item) == sorted(items)


def raw_user(bundle, row):
  return bundle.ids('user').raw(row)


def test_states_updated_in_pieces_score_like_the_whole_history(nexts):
  """Also through packed states, and with the scores of the checkpoint."""
  config, workdir, opened, bundle = nexts
  setup, best = trained_run.best_of(config, workdir, opened)
  model = StatefulModel(setup.model, setup.trainer, setup.mesh, config.history_length, 8)
  items = opened.raw_ids('item').to_pylist()
  rng = np.random.default_rng(0)
  user, record_row = opened.user_ids(0)[0].as_py(), opened.parts[0].users['row'][0]
  history = rng.integers(1, len(items), 3 * config.history_length + 2)
  candidates = np.arange(1, 20)[None]
  states = model.update(best.state, model.empty(np.array([record_row])), [{'item': history}])
  (expected,) = model.score(best.state, states, candidates)

  state = bundle.state(user)
  for piece in np.split(history, [1, 3, 9]):
    state = bundle.unpack(bundle.pack(state))
    state = bundle.updated(state, [items[row] for row in piece])
  updated = bundle.ask(user, [items[row] for row in candidates[0]], state=state)
  whole = bundle.ask(user, [items[row] for row in candidates[0]], [items[row] for row in history])
  assert updated.events == whole.events == len(history)
  for scores in bundle.score([updated, whole]):
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5, atol=1e-5)
  ((pairs, _),) = bundle.recommend([updated], [5], [[]], exclude_seen=False)
  every = np.arange(1, len(items))[None]
  (scores,) = model.score(best.state, states, every)
  assert [item for item, _ in pairs] == [items[1 + k] for k in np.argsort(-scores)[:5]]
  with pytest.raises(RequestError, match='and states of this export'):
    bundle.unpack(bundle.pack(state)[:-1])


def test_unknown_users_and_items_of_a_next_item_model(nexts):
  *_, bundle = nexts
  known = bundle.ids('item').raw(1)
  new, with_event = bundle.ask('no one', [known, 'strange']), bundle.ask('no one', ['?'], [known])
  assert not new.user_known and new.unknown == ['strange'] and new.events == 0
  first, second = bundle.score([new, with_event])
  np.testing.assert_array_equal(first.values, [0, np.nan])
  assert np.isnan(second.values).all()
  # An unknown event counts as an event, of the unknown item.
  assert bundle.ask('no one', [known], ['strange']).events == 1


@pytest.mark.parametrize('which', ['clicks', 'nexts'])
def test_no_program_is_compiled_after_warm(which, request):
  *_, old = request.getfixturevalue(which)
  bundle = Bundle(old.folder, **SIZES)
  bundle.warm()
  programs = bundle.compiled()
  assert programs
  items = [bundle.ids('item').raw(1 + k % bundle.items) for k in range(39)]
  for n in (1, 9, 39):
    for users in (1, 3, 9):
      bundle.score([bundle.ask(f'user {k}', items[:n], items[: k + 5]) for k in range(users)])
  bundle.recommend([bundle.ask('no one', None, items[:7])], [3], [[]])
  assert bundle.compiled() == programs


def test_the_loader_needs_jax_and_numpy_only(clicks, tmp_path):
  """A process that cannot import lmn_jax or Flax computes the same scores."""
  *_, bundle = clicks
  folder = tmp_path / 'a copy'
  shutil.copytree(bundle.folder.resolve(), folder)
  code = f"""
import sys
class Barred:
  def find_spec(self, name, *_):
    if name.partition('.')[0] in ('lmn_jax', 'flax', 'optax', 'orbax', 'ml_collections', 'pyarrow'):
      raise ImportError(name)
sys.meta_path.insert(0, Barred())
sys.path.insert(0, {str(folder)!r})
from bundle import Bundle
model = Bundle({str(folder)!r}, check=True)
example = model.ask({raw_user(bundle, 1)!r}, [model.ids('item').raw(k) for k in (1, 2, 3)])
print(model.score([example])[0].values.tolist())
"""
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
  assert ran.returncode == 0, ran.stderr
  items = [bundle.ids('item').raw(k) for k in (1, 2, 3)]
  (expected,) = bundle.score([bundle.ask(raw_user(bundle, 1), items)])
  np.testing.assert_allclose(json.loads(ran.stdout), expected.values, rtol=1e-5, atol=1e-6)


def test_an_export_holds_the_users_of_the_log(nexts, clicks):
  """With raw ids, embedding rows and events; for click models the newest events only."""
  for (_, _, opened, bundle), keep in ((nexts, None), (clicks, 8)):
    items = opened.raw_ids('item').to_pylist()
    for number, part in enumerate(opened.parts):
      for k, user in enumerate(opened.user_ids(number).to_pylist()):
        begin, count = part.users['offset'][k], part.users['count'][k]
        rows = part.history['item'][begin : begin + count]
        rows = rows if keep is None else rows[-keep:]
        assert bundle.known_history(user) == [items[row] or '' for row in rows]
        times = part.history['time'][begin : begin + count]
        assert bundle.known_times(user) == (times if keep is None else times[-keep:]).tolist()
        assert bundle.ask(user, []).user_known == (part.users['row'][k] > 0)
  assert bundle.known_history('no one') == bundle.known_times('no one') == []


@pytest.mark.parametrize('which', ['clicks', 'nexts'])
def test_items_that_a_user_has_met_are_not_recommended(which, request):
  """Also items of events before the history that the model reads, and items of the request."""
  _, _, opened, bundle = request.getfixturevalue(which)
  assert bundle.exclude_seen
  every, part = set(range(1, bundle.items + 1)), opened.parts[0]
  counts = part.users['count']
  for k in np.argsort(-counts)[:3]:
    user, begin = opened.user_ids(0)[int(k)].as_py(), part.users['offset'][k]
    met = set(part.history['item'][begin : begin + counts[k]].tolist()) - {0}
    assert counts[k] > bundle.length
    more = next(iter(every - met))
    for history, excluded in (((), met), ([bundle.ids('item').raw(more)], met | {more})):
      example = bundle.ask(user, None, history)
      ((pairs, _),) = bundle.recommend([example], [bundle.items], [[]])
      assert set(bundle.ids('item').find([item for item, _ in pairs])) == every - excluded
      ((pairs, _),) = bundle.recommend([example], [bundle.items], [[]], exclude_seen=False)
      assert len(pairs) == bundle.items


def test_an_export_of_an_earlier_version_is_read(clicks, tmp_path, caplog):
  """It has less data of users, and a warning is logged."""
  *_, opened, bundle = clicks
  folder = tmp_path / 'old'
  shutil.copytree(bundle.folder.resolve(), folder)
  offset, times = (np.load(folder / f'users/{x}.npy') for x in ('offset', 'event_time'))
  newest = np.array([x.max(initial=0) for x in np.split(times, offset[1:-1])])
  for name in ('event_time', 'met', 'met_offset'):
    (folder / f'users/{name}.npy').unlink()
  np.save(folder / 'users/time.npy', newest)
  manifest = json.loads((folder / 'manifest.json').read_text())
  manifest.pop('time', None)
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  (folder / 'seal.json').unlink()
  export.files.seal(folder)
  old = Bundle(folder, **SIZES)
  assert 'export again' in caplog.text
  user = bundle.ids('user').raw(0)
  history = bundle.known_history(user)
  assert old.known_history(user) == history
  assert old.known_times(user) == [None] * (len(history) - 1) + bundle.known_times(user)[-1:]
  ((pairs, _),) = old.recommend([old.ask(user, None)], [99], [[]])
  assert pairs and not {item for item, _ in pairs} & set(history)
  clock = hot_swap.clock_of(old)
  assert (clock.form, clock.unit) == ('number', 'second') == hot_swap.clock_of(bundle)[:2]


FEATURES = dict(
  user_features=('age',), context_features=('tags', 'place'),
  multi={'tags': '|'}, numeric={'age': 'bins:3'},
)  # fmt: skip


def test_feature_values_get_the_codes_of_the_store(tmp_path):
  """Single tokens, lists of tokens and binned numbers, of every row of a log."""
  rng = np.random.default_rng(0)
  rows = [
    dict(
      user=f'u{n % 9}', item=f'i{rng.integers(6)}', time=n, label=int(rng.integers(2)),
      tags=' | '.join(f't{k}' for k in rng.integers(4, size=rng.integers(1, 4))),
      place=f'{rng.integers(5)}{"" if n % 2 else ".0"}' if n % 5 else '',
    )
    for n in range(90)
  ]  # fmt: skip
  ages = {f'u{k}': f'{20.5 + 5 * k}' for k in range(9)} | {'u3': ''}
  (tmp_path / 'log.csv').write_text(
    'user,item,time,label,tags,place\n'
    + ''.join(','.join(map(str, row.values())) + '\n' for row in rows)
  )
  (tmp_path / 'users.csv').write_text('user,age\n' + ''.join(f'{u},{a}\n' for u, a in ages.items()))
  config = tiny_config('pooling')
  config.data = configs.data(
    source=str(tmp_path / 'log.csv'), users_source=str(tmp_path / 'users.csv'),
    user_features=FEATURES['user_features'], context_features=FEATURES['context_features'],
    split=dict(protocol='user_ratio', valid=0.2, test=0.2),
  )  # fmt: skip
  with config.data.unlocked():
    config.data.multi, config.data.numeric = {'tags': '|'}, {'age': 'bins:3'}
  config.eval_batch_size = config.batch_size = 8
  config, workdir, opened = untrained(config, tmp_path)
  export.export(config, workdir, opened, workdir / 'export', 'float32')
  bundle = Bundle(workdir / 'export')
  for number, part in enumerate(opened.parts):
    users = opened.user_ids(number).to_pylist()
    for k, user in enumerate(users):
      assert bundle.code('user.age', ages[user]) == part.users['user.age'][k]
      assert bundle.ask(user, []).features['user.age'] == part.users['user.age'][k]
    codes = sorted(
      (users[u], int(t), *tags.tolist(), int(place))
      for u, t, tags, place in zip(
        *(part.examples[name] for name in ('user', 'time', 'context.tags', 'context.place')),
        strict=True,
      )
    )
    expected = sorted(
      (row['user'], row['time'], *bundle.code('context.tags', row['tags']).tolist(),
       int(bundle.code('context.place', row['place'])))
      for row in rows if row['user'] in users
    )  # fmt: skip
    assert codes == expected
  for key, raw, message in (
    ('user.age', 'old', "user.age='old' is not a number"),
    ('context.tags', 't1|t2|t3|t1', 'at most 3'),
  ):
    with pytest.raises(RequestError, match=message):
      bundle.code(key, raw)
  place = bundle.code('context.place', '3')
  assert place > 0, 'in every spelling'
  for raw in (3, 3.0, '3.0', '3.00', ' 3\t', np.int64(3), np.float32(3)):
    assert bundle.code('context.place', raw) == place
  tags = bundle.code('context.tags', 't1|t2').tolist()
  assert tags[:2] == sorted(tags)[:2] and tags[0] > 0
  for raw in (' t1 | t2', 't1|NULL|t2', ['t1', 't2 ']):
    assert bundle.code('context.tags', raw).tolist() == tags
  example = bundle.ask('u1 ', np.array(['i1', ' i2']), (1, 2.0), {'place': 99, 'tags': 't1|new'})
  assert example.user_known and not example.unknown
  assert example.unknown_features == ['place', 'tags']
  example = bundle.ask(1, [3, None], context={'place': 'None', 'tags': ' '}, profile={'age': 21})
  assert not example.user_known and not example.unknown_features
  assert example.unknown == ['3', 'None']
  with pytest.raises(RequestError, match='a text or a number is expected.*type dict'):
    bundle.ask({}, [])
  with pytest.raises(RequestError, match="'colour' is unknown; user features of the model: age"):
    bundle.ask('u1', [], profile={'colour': 'red'})


@pytest.mark.parametrize('precision', quantize.PRECISIONS)
def test_restored_rows_are_rounded(precision):
  rng = np.random.default_rng(0)
  rows = (rng.normal(size=(50, 6)) * 10.0 ** rng.integers(-6, 3, (50, 1))).astype(np.float32)
  rows[7] = 0
  stored = quantize.stored(rows, precision)
  restored = stored_rows.restored(stored)
  np.testing.assert_array_equal(jax.jit(stored_rows.restored)(stored), restored)
  if precision == 'bfloat16':
    rounded = np.asarray(jnp.asarray(rows).astype(jnp.bfloat16), float)
    np.testing.assert_array_equal(restored, rounded)
  elif precision == 'int8':
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(restored - rows) <= 0.5001 * step) and not np.all(restored == rows)
  else:
    np.testing.assert_array_equal(restored, rows)


@pytest.mark.parametrize('precision', but_slow(['bfloat16', 'int8'], {1}))
def test_scores_and_metrics_use_the_rounded_rows(precision, clicks, tmp_path):
  config, workdir, opened, exact = clicks
  report = export.export(config, workdir, opened, tmp_path / 'export', precision)
  assert set(report['metrics']) == {'float32', precision}
  rounded = Bundle(tmp_path / 'export', **SIZES)
  size = {name: (b.folder / 'tables/memory.npy').stat().st_size for name, b in
          (('exact', exact), ('rounded', rounded))}  # fmt: skip
  assert size['rounded'] < 0.7 * size['exact']
  examples = list(examples_of(opened, config.history_length))
  scores = [
    float(x.values[0])
    for x in rounded.score([rounded.ask(u, [i], h, c) for u, i, c, h in examples])
  ]
  labels = np.concatenate([
    part.examples['label'][slice(*part.bounds['test'])] for part in opened.parts
  ])  # fmt: skip
  above = np.sign(np.subtract.outer(np.array(scores)[labels == 1], np.array(scores)[labels == 0]))
  assert report['metrics'][precision]['test']['auc'] == pytest.approx(np.mean(above + 1) / 2)
  assert report['metric'] == 'auc'
  lines = export.lines_of(report)
  assert f'{precision}: test auc ' in lines and 'MiB' in lines and 'opens in' in lines


@pytest.mark.parametrize(
  ('criterion', 'metric'), [('', 'auc'), ('-log_loss', 'log_loss'), ('my_metrics:mine', 'auc')]
)
def test_the_printed_metric_is_that_of_the_criterion(criterion, metric):
  config = tiny_config('pooling')
  config.criterion = criterion
  assert export.metric_of(config, ('auc', 'log_loss')) == metric


def shapes_of(x):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)


# Models whose code depends on the numbers of users and candidates in its own way.
@pytest.mark.parametrize('name', but_slow(['sam', 'lmn', 'dien', 'mimn', 'ubr4ctr', 'eta'], {0}))
def test_the_exported_function_of_every_click_model_takes_any_size(name):
  """Any number of users and candidates, and any length if the model supports it."""
  batch = make_batch(B=3, L=6)
  batch = {key: x for key, x in batch.items() if key not in ('label', 'weight', 'total')}
  config = make_config(name)
  model, trainer = make_trainer(config, mesh_of(1), make_batch(B=3, L=6))
  state = trainer.init(0)
  dense = traverse_util.flatten_dict({'params': state.params, **state.stats}, sep='/')
  tables = {
    key: {'rows': np.asarray(table.rows_RD)[: model.tables()[key].rows]}
    for key, table in state.tables.items()
  }
  exported, _ = functions.click_functions(model, *shapes_of((dense, tables)), shapes_of(batch))
  score = exported['score']
  call = jax.jit(jax.export.deserialize(bytearray(functions.serialized(score))).call)
  rng = np.random.default_rng(1)
  for B, Q in ((3, 5), (1, 2)):
    inputs = {key: x[:B] for key, x in batch.items()}
    for key in ('item', *SCHEMA.item):
      V = dict(SCHEMA.vocabulary)[key]
      inputs[key] = rng.integers(0, V, (B, Q, *batch[key].shape[1:])).astype(np.int32)
    expected = trainer.predict(state, inputs)
    if model.any_length:
      for key in inputs:
        if key.startswith('history'):
          V = dict(SCHEMA.vocabulary)[key.replace('history.', 'item.').replace('history', 'item')]
          more = ((0, 0), (0, 58), *[(0, 0)] * (inputs[key].ndim - 2))
          inputs[key] = np.pad(inputs[key], more, constant_values=V)
    scores = call(dense, tables, {key: inputs[key] for key in score.shapes[2]})
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_ids_that_share_a_hash_are_distinguished_by_their_text(tmp_path, monkeypatch):
  import pyarrow as pa

  texts = ['', 'a', 'ä', 'a b', '日本', 'b' * 300, '0', '00']
  monkeypatch.setattr(ids_of, 'hash_of', lambda text: len(text) % 3)  # many texts have one hash
  contents.write_ids(tmp_path / 'ids', [pa.array([None, *texts[1:4]]), pa.array(texts[4:])])
  ids = Ids(tmp_path / 'ids')
  assert [ids.raw(row) for row in range(len(ids))] == texts
  assert ids.find([*texts, 'c', '000', '\ud800']).tolist() == [*range(8), -1, -1, -1]
  assert ids.find([]).tolist() == []


@pytest.mark.slow
def test_the_link_changes_from_a_complete_export_to_another(clicks, tmp_path, monkeypatch):
  config, workdir, opened, _ = clicks
  monkeypatch.setattr(export, 'measure', lambda *_: {})
  link = tmp_path / 'export'
  export.export(config, workdir, opened, link, 'float32')
  first = link.resolve()
  export.export(config, workdir, opened, link, 'int8')
  assert link.resolve() != first and first.is_dir()
  # A failed export changes nothing.
  before = sorted(tmp_path.iterdir())
  monkeypatch.setattr(export.files, 'seal', lambda folder: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export.export(config, workdir, opened, link, 'float32')
  assert sorted(tmp_path.iterdir()) == before and link.resolve() != first


def test_wrong_arguments_of_an_export_are_refused(clicks, tmp_path):
  config, workdir, opened, _ = clicks
  (tmp_path / 'mine').mkdir()
  for arguments, message in (
    ((workdir, opened, tmp_path / 'mine', 'float32'), 'exists and is not a symlink to an export'),
    ((workdir, opened, tmp_path / 'new', 'float16'), "--precision='float16' is unknown"),
    ((tmp_path, opened, tmp_path / 'new', 'int8'), 'holds no checkpoint'),
  ):
    with pytest.raises(UserError, match=message):
      export.export(config, *arguments)


def damage(folder, name, change):
  path = folder / name
  content = bytearray(path.read_bytes())
  change(content)
  path.write_bytes(bytes(content))


def test_a_damaged_folder_is_not_opened(clicks, tmp_path):
  *_, bundle = clicks

  def copy(name):
    shutil.copytree(bundle.folder.resolve(), tmp_path / name)
    return tmp_path / name

  short = copy('short')
  damage(short, 'tables/item.npy', lambda x: x.pop())
  with pytest.raises(FolderError, match='tables/item.npy has .* bytes and had'):
    Bundle(short)
  flipped = copy('flipped')
  damage(flipped, 'tables/item.npy', lambda x: x.__setitem__(-1, x[-1] ^ 1))
  with pytest.raises(FolderError, match='CRC-32'):
    Bundle(flipped, check=True)
  missing = copy('missing')
  (missing / 'users/row.npy').unlink()
  with pytest.raises(FolderError, match='row.npy is missing'):
    Bundle(missing)
  newer = copy('newer')
  manifest = json.loads((newer / 'manifest.json').read_text())
  (newer / 'manifest.json').write_text(json.dumps(manifest | {'format': 3}))
  with pytest.raises(
    FolderError, match='an export of format 3, and this program reads the formats 1, 2'
  ):
    Bundle(newer)
  with pytest.raises(FolderError, match='is not an export'):
    Bundle(tmp_path / 'nowhere')
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text/manifest.json').write_text('{')
  (tmp_path / 'text/seal.json').write_text('{}')
  with pytest.raises(FolderError, match='damaged'):
    Bundle(tmp_path / 'text')


@pytest.mark.parametrize('which', ['clicks', 'nexts'])
def test_the_service_scores_like_the_bundle(which, request, tmp_path):
  """A user of the export, with new events, and then from their stored state."""
  _, workdir, _, bundle = request.getfixturevalue(which)
  user = bundle.ids('user').raw(0)
  items = [bundle.ids('item').raw(row) for row in range(1, 9)]
  users = open_store(str(tmp_path / 'users.sqlite'), 1000)

  def scores(client):
    answer = client.post('/v1/score', {'user': user, 'candidates': items}).json()
    return answer['events'], answer['scores']

  def items_of(events):
    return [event.item for event in events]

  def bundle_scores(history):
    example = bundle.ask(user, items, history)
    return example.events, bundle.score([example])[0].values.tolist()

  opened = functools.partial(Bundle, **SIZES)
  with running(workdir / 'export', users, open_bundle=opened) as client:
    client.ready()
    history, new = bundle.known_history(user), [{'item': item} for item in items[:3]]
    assert history
    for events, more in ((history, None), ([*history, *items[:3]], new)):
      if more:
        assert client.post('/v1/update', {'user': user, 'events': more}).json()['events_taken'] == 3
      answer, expected = scores(client), bundle_scores(events)
      assert answer[0] == expected[0]
      np.testing.assert_allclose(answer[1], expected[1], rtol=1e-4, atol=1e-5)
    # Two events of the newest time, and a late one: scores are those of the ordered events.
    newest = max(bundle.known_times(user))
    for when in (newest + 9, newest + 9, newest + 3):
      event = {
        'item': items[when % 8],
        'time': when,
        'id': f'{when} {len(users.events(user, 999))}',
      }
      report = client.post('/v1/update', {'user': user, 'events': [event]}).json()
      assert report['events_taken'] == 1, report
      answer, expected = scores(client), bundle_scores(items_of(users.events(user, 999)))
      assert answer[0] == expected[0]
      np.testing.assert_allclose(answer[1], expected[1], rtol=1e-4, atol=1e-5)
    programs = client.bundle.compiled()
    best = client.post('/v1/recommend', {'user': user, 'k': 4}).json()['items']
    assert len(best) == 4 and not {pair['item'] for pair in best} & {*items[:3], *history}
    assert client.bundle.compiled() == programs
