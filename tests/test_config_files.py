"""The config files that read a log of the user's: each prepares a log as its docstring says."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from lmn_jax import models, prepare, train
from lmn_jax.models.ctr import CTRModel

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def get_config(name, *arguments):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def write_atomic(folder, users=3, ratings=10):
  """RecBole's files of a small MovieLens; returns the path of the ratings."""
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


@pytest.mark.parametrize('model', ['pooling', 'din', 'sam', 'lmn'])
def test_movielens_from_atomic_files(tmp_path, model):
  config = get_config('sam_movielens') if model == 'sam' else get_config('lmn_movielens', model)
  config.data.source = str(write_atomic(tmp_path))
  config.data.format = 'recbole'
  config.data.split.valid = 0.2
  assert config.model.name == model
  train.check(config)
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
  data.label = 'stars'  # set itself, it follows no more
  data.source = 'tfds:movielens/1m-ratings'
  assert (data.item, data.label) == ('movie_id', 'stars')


def test_movielens_final_fit_validates_once():
  config = get_config('lmn_movielens')
  config.steps = 77
  assert config.eval_every == config.save_every == 77 and config.patience == 0


def test_custom_reads_the_log_of_its_docstring(tmp_path, monkeypatch):
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
  train.check(config)
  store = prepare.prepare(config.data, tmp_path / 'stores')
  assert store.examples == {'train': 32, 'valid': 4, 'test': 4}
  assert store.features == {
    'user': ('user.age', 'user.city'),
    'item': ('item.category', 'item.tags'),
    'context': ('context.query',),
  }
  assert store.widths['item.tags'] == 2 and store.manifest['counts']['users'] == 4


RIVALS = set(models.MODELS) - {'pooling', 'din', 'lmn'}


@pytest.mark.parametrize('model', sorted(RIVALS))
def test_a_rival_differs_in_its_model_only(model):
  config, din = get_config(f'{model}_douyin'), get_config('din_douyin')
  assert config.model.name == model
  shared = {field.name for field in dataclasses.fields(CTRModel)} & set(din.model)
  assert {'width', 'scale', 'hidden'} <= shared
  for name in ('douyin', 'movielens'):
    if name == 'movielens':
      config, din = get_config('lmn_movielens', model), get_config('lmn_movielens', 'din')
    train.check(config)
    for field in shared - {'name'}:
      assert config.model[field] == din.model[field], field
    one, other = ({k: v for k, v in x.to_dict().items() if k != 'model'} for x in (config, din))
    assert one == other
