"""Config files: their names, their models, and the logs that their docstrings describe."""

import dataclasses
import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmn_jax import config as configs
from lmn_jax import config_files, main
from lmn_jax.data import prepare, sources
from lmn_jax.data.batches import BatchSource
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_evaluation, report
from lmn_jax.models import registry
from lmn_jax.models.ctr.base import CTRModel
from lmn_jax.training import loop
from lmn_jax.training import setup as setups
from tests.runs import forget_flags, mesh_of
from tests.shared_sets import ROOT

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def get_config(name, *arguments):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def write_atomic(folder, users=3, ratings=10):
  """Writes a small MovieLens in RecBole's files; returns the path of the ratings."""
  rows = [
    f'{u}\t{100 + (u + k) % 7}\t{1 + (u * k) % 5}\t{1000 + 10 * k}'
    for u in range(users)
    for k in range(ratings)
  ]
  head = 'user_id:token\titem_id:token\trating:float\ttimestamp:float'
  (folder / 'x.inter').write_text('\n'.join([head, *rows]))
  films = [f'{100 + i}\tFilm {i}\t{1990 + i}\tDrama War' for i in range(7)]
  head = 'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq'
  (folder / 'x.item').write_text('\n'.join([head, *films]))
  return folder / 'x.inter'


# Configs with a model as argument, by task, and the models that have another config.
OTHER_CONFIG = {'douyin': 'lmn', 'movielens_next': 'dman'}
MODELS_OF = {
  'click': ('lmn_movielens', 'sam_movielens', 'sam_longctr', 'sam_long', 'douyin', 'kuairand'),
  'next_item': ('movielens_next', 'dman_xlong', 'next_beauty', 'next_movielens_100k'),
}


@pytest.mark.parametrize(
  'name, model',
  [
    (name, model)
    for task, names in MODELS_OF.items()
    for name in names
    for model in (registry.CLICK if task == 'click' else registry.NEXT_ITEM)
    if model != OTHER_CONFIG.get(name)
  ],
)
def test_every_model_may_be_the_argument(name, model):
  config = get_config(name, model)
  assert config.model.name == model
  setups.check(config)


@pytest.mark.parametrize('name, model', OTHER_CONFIG.items())
def test_a_model_with_another_config_is_refused(name, model):
  with pytest.raises(UserError, match='has a config of its own; use --config=') as error:
    get_config(name, model)
  assert get_config(str(error.value).split('=')[1]).model.name == model


@pytest.mark.parametrize(
  'arguments, resolved',
  [
    (['--config=lmn_douyin'], [f'--config={CONFIGS}/lmn_douyin.py']),
    (['--config=douyin:din', '--x=1'], [f'--config={CONFIGS}/douyin.py:din', '--x=1']),
    (['--config', 'douyin:a.b:C'], ['--config', f'{CONFIGS}/douyin.py:a.b:C']),
    (['-config=lmn_douyin'], [f'-config={CONFIGS}/lmn_douyin.py']),
    (['--config=a/b.py:din'], ['--config=a/b.py:din']),
    (['--config=./lmn_douyin'], ['--config=./lmn_douyin']),
    (['--config=mine.py'], ['--config=mine.py']),
    (['--config.steps=3', '--config'], ['--config.steps=3', '--config']),
  ],
)
def test_a_name_of_a_config_becomes_its_path(arguments, resolved):
  assert config_files.resolved(['lmn-jax', *arguments]) == ['lmn-jax', *resolved]


def test_unknown_names_of_configs(tmp_path, monkeypatch):
  assert config_files.names() == sorted(path.stem for path in CONFIGS.glob('*.py'))
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="'lmn_douyn' is unknown; did you mean 'lmn_douyin'"):
    config_files.path_of('lmn_douyn')
  (tmp_path / 'mine.py').touch()
  with pytest.raises(UserError, match="'mine' is not a config of .*; use --config=mine.py"):
    config_files.path_of('mine')
  (
    tmp_path / 'lmn_douyin.py'
  ).touch()  # a name selects a config of the package, whatever this folder has
  assert config_files.path_of('lmn_douyin') == f'{CONFIGS}/lmn_douyin.py'


def test_movielens_from_atomic_files(tmp_path):
  config = get_config('lmn_movielens')
  config.data.source = str(write_atomic(tmp_path))
  config.data.format = 'recbole'
  config.data.split.valid = 0.2
  store = prepare.prepare(config.data, tmp_path / 'stores')
  assert store.examples == {'train': 18, 'valid': 6, 'test': 6}
  assert store.features['item'] == ('item.release_year', 'item.class')
  assert store.widths['item.class'] == 2
  clicks = sum((u * k) % 5 >= 3 for u in range(3) for k in range(10))
  assert sum(store.manifest['counts']['clicks'].values()) == clicks


def test_movielens_columns_follow_the_source():
  data = get_config('lmn_movielens').data
  assert (data.item, data.label, data.items_source) == ('movie_id', 'user_rating', '')
  assert (data.item_features, dict(data.multi)) == (('movie_genres',), {'movie_genres': ' '})
  data.source = 'there/ml-100k.inter'
  assert (data.item, data.label, data.items_source) == ('item_id', 'rating', 'there/ml-100k.item')
  assert data.to_dict()['multi'] == {'class': ' '}
  data.label = 'stars'  # once set, it no longer depends on the source
  data.source = 'tfds:movielens/1m-ratings'
  assert (data.item, data.label) == ('movie_id', 'stars')


def test_the_final_fit_of_movielens_validates_once():
  config = get_config('lmn_movielens')
  config.steps = 77
  assert config.eval_every == config.save_every == 77 and config.patience == 0


def test_lmn_custom_reads_the_log_of_its_docstring(tmp_path, monkeypatch):
  data = tmp_path / 'data'
  data.mkdir()
  rows = [f'u{k % 4},i{k % 6},{1_700_000_000 + k},{k % 3 == 0:d},red shoes' for k in range(40)]
  (data / 'log.csv').write_text('\n'.join(['user,item,time,label,query', *rows]))
  users = [f'u{u},{20 + u},Paris' for u in range(4)]
  (data / 'users.csv').write_text('\n'.join(['user,age,city', *users]))
  items = [f'i{i},shoes,red|summer' for i in range(6)]
  (data / 'items.csv').write_text('\n'.join(['item,category,tags', *items]))
  monkeypatch.chdir(tmp_path)
  config = get_config('lmn_custom')
  setups.check(config)
  store = prepare.prepare(config.data, tmp_path / 'stores')
  assert store.examples == {'train': 32, 'valid': 4, 'test': 4}
  assert store.features == {
    'user': ('user.age', 'user.city'),
    'item': ('item.category', 'item.tags'),
    'context': ('context.query',),
  }
  assert store.widths['item.tags'] == 2 and store.manifest['counts']['users'] == 4


RIVALS = set(registry.CLICK) - {'pooling', 'din', 'lmn'}


@pytest.mark.parametrize('model', sorted(RIVALS))
def test_configs_of_one_log_differ_only_in_the_model(model):
  config, din = get_config('douyin', model), get_config('douyin', 'din')
  assert config.model.name == model
  shared = {field.name for field in dataclasses.fields(CTRModel)} & set(din.model)
  assert {'width', 'scale', 'hidden'} <= shared
  for name in ('douyin', 'movielens'):
    if name == 'movielens':
      config, din = get_config('lmn_movielens', model), get_config('lmn_movielens', 'din')
    setups.check(config)
    for field in shared - {'name'}:
      assert config.model[field] == din.model[field], field
    # The rate is tuned for each model.
    config.optimizer.embedding.rate = din.optimizer.embedding.rate
    rival, base = ({k: v for k, v in x.to_dict().items() if k != 'model'} for x in (config, din))
    assert rival == base


def write_films(folder, form, users=30, ratings=20):
  """Writes a log of films as `::` ratings or one line for each user; returns (file, log)."""
  rng = np.random.default_rng(0)
  log = {u: rng.permutation(60)[:ratings] for u in range(1, users + 1)}
  if form == 'ratings.dat':
    lines = [
      f'{u}::{i}::3::{9000 - u + k}' for u, films in log.items() for k, i in enumerate(films)
    ]
    lines = sorted(lines)  # not ordered by time
  else:
    lines = ['user_id\tgender\tmovie_ids_in_time_order']
    lines += [f'{u}\tF\t{",".join(map(str, films))}' for u, films in log.items()]
  (folder / form).write_text('\n'.join(lines))
  return folder / form, log


def test_implicit_movielens_columns_follow_the_source():
  data = get_config('sam_movielens').data
  assert (data.format, data.user, data.item, data.time) == ('', 'user_id', 'movie_id', 'timestamp')
  data.source = 'there/ratings.dat'
  assert (data.format, data.user, data.item, data.time) == ('', 'user', 'item', 'time')
  data.source = 'there/sequences.tsv'
  assert (data.format, data.item, data.time) == ('sequences', 'movie_ids_in_time_order', '')
  data.item = 'films'  # once set, it no longer depends on the source
  data.source = 'tfds:movielens/1m-ratings'
  assert (data.format, data.item, data.time) == ('', 'films', 'timestamp')


@pytest.mark.parametrize('form', ['ratings.dat', 'sequences.tsv'])
def test_negatives_of_movielens_are_films_not_rated_by_then(tmp_path, form):
  config = get_config('sam_movielens')
  file, log = write_films(tmp_path, form)
  config.data.source = str(file)
  store = prepare.prepare(config.data, tmp_path / 'stores')
  assert store.examples == {'train': 960, 'valid': 120, 'test': 120}
  films, users = store.raw_ids('item').to_pylist(), store.user_ids(0).to_pylist()
  (part,) = store.parts
  columns = (part.examples[name] for name in ('user', 'item', 'label', 'end'))
  for user, item, label, end in zip(*columns, strict=True):
    past = list(log[int(users[user])])[: end + 1]  # with the click
    if item:  # films that are not in training have no row
      assert (int(films[item]) == past[-1]) if label else (int(films[item]) not in past)
  assert store.manifest['counts']['negatives'] == 600


@pytest.mark.skipif(not ROOT.is_dir(), reason=f'no folder {ROOT.name} of public sets beside this')
def test_popularity_on_implicit_movielens(tmp_path):
  config = get_config('sam_movielens')
  config.data.source = str(ROOT / 'movielens-1m/sequences.tsv')
  store = prepare.prepare(config.data, tmp_path)
  assert store.manifest['counts']['negatives'] == 999_611
  examples = click_evaluation.examples_of(store, 'test')
  baselines = click_evaluation.report_baselines(
    click_evaluation.count_training(store), examples, config.buckets
  )
  assert 0.77 < baselines['popularity']['overall']['auc'] < 0.79


# Columns of the three sets of LongCTR, one of each kind: of impressions, users and items; names,
# tokens, lists of them, embeddings of covers.
LONGCTR = {
  'KuaiVideo_x2': (
    dict(is_like=pa.int8()), dict(user_id=pa.int64()),
    dict(image_emb_dim64=pa.list_(pa.float32(), 64)),
  ),
  'MicroVideo1.7M_x2': (
    dict(timestamp=pa.int64()), dict(user_id=pa.int64()),
    dict(cate_id=pa.int64(), image_emb_dim64=pa.list_(pa.float64())),
  ),
  'Ebnerd_small_x1': (
    dict(device_type=pa.float64()), dict(user_id=pa.string(), gender=pa.string()),
    dict(category=pa.string(), subcategory=pa.list_(pa.string()), premium=pa.bool_(),
         published=pa.timestamp('us'), img_emb=pa.list_(pa.float64())),
  ),
}  # fmt: skip
FEATURES = {
  'KuaiVideo_x2': dict(),
  'MicroVideo1.7M_x2': dict(item_features=('cate_id',)),
  'Ebnerd_small_x1': dict(
    item_features=('category', 'subcategory', 'premium'), user_features=('gender',),
    context_features=('device_type',), multi={'subcategory': '|'},
  ),
}  # fmt: skip


def write_longctr(folder, users=20, items=30, views=40):
  """Writes a folder in LongCTR's layout with the columns of the set of its name; returns it."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  impression_columns, user_columns, item_columns = LONGCTR[folder.name]
  label = 'click' if folder.name.startswith('Ebnerd') else 'is_click'

  def column(kind, n):
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
      size = 64 if pa.types.is_floating(kind.value_type) else 4
      values = column(kind.value_type, size * n).to_pylist()
      return pa.array([values[size * k : size * (k + 1)] for k in range(n)], kind)
    return pa.array(rng.integers(0, 3, n)).cast(kind)

  def write(name, n, columns, others):
    columns = columns | {other: column(kind, n) for other, kind in others.items()}
    pq.write_table(pa.table(columns), folder / f'{name}.parquet')

  for part, n in (('train', 400), ('valid', 100), ('test', 100)):
    ids = dict(user_index=rng.integers(0, users, n), item_index=rng.integers(0, items, n))
    lengths = {'seq_len': rng.integers(0, views + 1, n), label: rng.integers(0, 2, n)}
    write(part, n, ids | lengths, impression_columns)
  histories = rng.integers(0, items, (users, views)).tolist()
  write('user_info', users, dict(full_item_seq=histories), user_columns)
  write('item_info', items, dict(item_index=np.arange(items)), item_columns)
  return folder


def longctr(folder):
  """Returns the config of a set with its features and images, on small generated files."""
  config = get_config('sam_longctr', 'sam' if folder.name.startswith('Ebnerd') else 'sam+image')
  config.data.source = str(write_longctr(folder))
  for field, features in FEATURES[folder.name].items():
    config.data[field] = features
  return config


@pytest.mark.parametrize('name', LONGCTR)
def test_the_sets_of_longctr_are_prepared(tmp_path, name):
  config = longctr(tmp_path / name)
  store = prepare.prepare(config.data, tmp_path / 'stores')
  assert store.path.name.startswith(f'{name}-')
  assert store.examples == {'train': 400, 'valid': 100, 'test': 100}
  assert store.manifest['counts']['events'] == 20 * 40
  expected = FEATURES[name].get('item_features', ())
  assert store.features['item'] == tuple(f'item.{feature}' for feature in expected)
  # Values of every kind of column are read: three tokens each, and the unknown.
  assert all(store.vocabulary[key] > 2 for keys in store.features.values() for key in keys)
  batch = BatchSource(store.path, 'test', 100, 1000)[0]
  impressions = pq.read_table(tmp_path / name / 'test.parquet')
  assert sorted(batch['total']) == sorted(impressions['seq_len'].to_pylist())
  assert sum(batch['label']) == sum(impressions[impressions.column_names[3]].to_pylist())
  assert list(store.vectors) == ([] if name.startswith('Ebnerd') else ['item.image'])
  for vectors in store.vectors.values():
    items = pq.read_table(tmp_path / name / 'item_info.parquet').to_pydict()
    image = dict(zip(map(str, items['item_index']), items['image_emb_dim64'], strict=True))
    ids = store.raw_ids('item').to_pylist()
    assert vectors.shape == (len(ids) + 1, 64) and not vectors[0].any()
    np.testing.assert_array_equal(vectors[1:-1], [image[item] for item in ids[1:]])


@pytest.mark.slow
def test_longctr_trains_and_gives_a_report(tmp_path, monkeypatch):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))
  config = longctr(tmp_path / 'MicroVideo1.7M_x2')
  config.update(dict(history_length=16, batch_size=32, eval_batch_size=64, steps=4, eval_every=4))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  metrics = loop.train(config, tmp_path / 'run', store)
  assert metrics['protocol'].startswith("split as in the log's own column")
  for scores in (metrics['test'], *metrics['baselines']['test'].values()):
    assert 0 < scores['overall']['gauc'] < 1 and scores['overall']['gauc_users'] > 5
  assert re.search(r'^test, 100 rows +auc +gauc', report.table_of(metrics))


def parse(monkeypatch, *arguments):
  """The config of a command line, as the program parses it."""
  argv = config_files.resolved(['lmn-jax', *arguments])
  forget_flags(monkeypatch, argv)
  with warnings.catch_warnings():
    # ml_collections loads config files in a way that Python wants to remove one day.
    warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
    main.parse(argv)
  return main.FLAGS.config


def test_an_argument_of_a_generator_with_the_name_of_a_method_is_a_flag(monkeypatch):
  """`items` is a method of ConfigDict, and the flag must still change the field."""
  flags = '--config.data.synthetic.items=60', '--config.data.synthetic.users=7'
  config = parse(monkeypatch, '--config=lmn_douyin', *flags)
  configs.check(config)
  assert (config.data.synthetic['items'], config.data.synthetic.users) == (60, 7)
  assert sources.signature(config.data) == sources.signature(configs.douyin_data(items=60, users=7))


@pytest.mark.parametrize('value', ['many', '5.5', 'True', "'5'"])
def test_an_argument_of_a_generator_with_the_name_of_a_method_is_checked(value, monkeypatch):
  config = parse(monkeypatch, '--config=lmn_douyin', f'--config.data.synthetic.items={value}')
  with pytest.raises(UserError, match='config.data.synthetic.items=.* must be a whole number'):
    configs.check(config)
