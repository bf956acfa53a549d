"""Cold items in the store and in batches: what is known of them stays, and they have no row."""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import event, make_store

from lmn_jax import config as configs
from lmn_jax.data import item_index
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.resident import Resident
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.training import setup
from tests.runs import mesh_of

ITEMS = [
  dict(item='a', genre='x', cost='1'),
  dict(item='b', genre='y'),
  dict(item='e', genre='x', cost='3'),  # in one row of training
  dict(item='d', genre='y', cost='4'),  # in the test alone
  dict(item='f', genre='z', cost='5'),  # in no row, of a genre that training never saw
  dict(item='g'),  # in the test, and nothing is known
]
FIELDS = dict(item_features=('genre', 'cost'), numeric={'cost': 'standard'}, min_count=2)


def log(items, split):
  return [event(k, 'u', item, k, split=split) for k, item in enumerate(items, 100 * split)]


def small_store(folder, cold_items, vectors=None):
  rows = log('aabbe', 0) + log('ab', 1) + log('dgeac', 2)
  fields = FIELDS | dict(split=dict(protocol='column'), cold_items=cold_items)
  if vectors:
    table = pa.table({'item': [*vectors], 'image': list(vectors.values())})
    pq.write_table(table, folder / 'image.parquet')
    fields['item_vectors'] = {'image': f'{folder / "image.parquet"}:image'}
  return make_store(folder / f'store {cold_items}', rows, items=ITEMS, **fields)


def raw_column(store, part, split):
  """Raw items of the examples of a split."""
  index = store.parts[0].examples[part][slice(*store.parts[0].bounds[split])]
  return store.raw_items().take(pa.array(index)).to_pylist()


def test_a_store_has_what_is_known_of_cold_items(tmp_path, caplog):
  vectors = {'d': [1.0, 2.0], 'a': [3.0, 4.0], 'h': [5.0, 6.0]}
  store = small_store(tmp_path, True, vectors)
  # h has a vector alone, c in the test and g have nothing, so they stay unknown.
  assert store.raw_items().to_pylist() == [None, 'a', 'b', None, 'd', 'e', 'f', 'h']
  assert (store.vocabulary['item'], store.cold_items) == (3, 4)
  assert raw_column(store, 'item', 'test') == ['d', None, 'e', 'a', None]
  assert store.parts[0].history['item'][:5].tolist() == [1, 1, 2, 2, 5]
  genres = dict(enumerate(store.raw_ids('item.genre').to_pylist()))
  genres[len(genres)] = 'padding'
  expected = [None, 'x', 'y', 'padding', 'y', 'x', None, None]
  assert [genres[code] for code in store.items['item.genre'].tolist()] == expected
  nan = np.nan
  np.testing.assert_array_equal(store.items['item.cost'], [nan, 1, nan, nan, 4, 3, 5, nan])
  rows = [[0, 0], [3, 4], [0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [5, 6], [0, 0]]
  assert store.vectors['item.image'].tolist() == rows
  entry = store.manifest['vectors']['item.image']
  assert (entry['missing'], entry['unused']) == (3, 0)
  assert "item_vectors.image: 3 of 6 items have no vector, the first 'b'" in caplog.text
  counts = store.manifest['counts']
  assert counts['cold_items'] == {'train': 0.2, 'valid': 0, 'test': 0.4}
  assert counts['out_of_vocabulary']['item'] == {'train': 0, 'valid': 0, 'test': 0.4}

  without = small_store(tmp_path, False, vectors)
  assert 'cold' not in json.dumps(without.manifest)
  assert not (without.path / 'cold_items.arrow').exists()
  for key, column in without.items.items():
    np.testing.assert_array_equal(column, store.items[key][:4])
  V = store.vocabulary['item']
  for name in ('examples', 'history'):
    column, index = (getattr(x.parts[0], name)['item'] for x in (without, store))
    np.testing.assert_array_equal(column, item_index.rows_of(index, V))


def test_what_cannot_be_cold_is_refused(tmp_path):
  with pytest.raises(UserError, match='cold_items=True needs something that is known of an item'):
    make_store(tmp_path / 'store', log('aab', 0), cold_items=True, split=dict(protocol='column'))
  config = configs.base('sasrec', 'next_item')
  config.data = configs.data(source='log.csv', label='', cold_items=True, item_features=('x',))
  with pytest.raises(UserError, match="cold_items=True is for config.task='click'"):
    setup.check(config)
  config = configs.base('din')
  config.data.source = 'log.csv'
  for rate, message in ((0.1, 'leaves an item nothing'), (1.5, 'must be in'), (-0.1, 'must be in')):
    config.model.id_dropout = rate
    with pytest.raises(UserError, match=f'config.model.id_dropout={rate} {message}'):
      setup.check(config)


@pytest.fixture(scope='module')
def noisy(tmp_path_factory):
  """A store of random rows with cold items in training, too, each with a negative of its kind."""
  rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp('cold')
  names = [f'i{k:02d}' for k in range(40)]
  common = 1 / np.arange(1, 41)  # some items are rare
  chosen = rng.choice(names, 300, p=common / common.sum())
  rows = [event(k, f'u{rng.integers(9)}', item, k // 2) for k, item in enumerate(chosen)]
  items = [dict(item=x, genre=f'g{k % 3}', cost=f'{k}') for k, x in enumerate(names) if k % 5]
  image = {x: rng.normal(size=3).tolist() for x in names[::4]}
  pq.write_table(
    pa.table({'item': [*image], 'image': list(image.values())}), folder / 'image.parquet'
  )
  vectors = {'image': f'{folder / "image.parquet"}:image'}
  return make_store(
    folder / 'store', rows, items=items, **FIELDS | dict(min_count=6), item_vectors=vectors,
    cold_items=True, negatives=2, rows_per_part=120,
  )  # fmt: skip


def test_a_negative_is_cold_where_its_positive_is(noisy):
  V, kinds = noisy.vocabulary['item'], set()
  for part in noisy.parts:
    item, label = part.examples['item'], part.examples['label']
    positive = np.maximum.accumulate(np.where(label > 0, np.arange(len(label)), 0))
    negative, of = item[label == 0], item[positive][label == 0]
    np.testing.assert_array_equal(negative > V, of > V)
    np.testing.assert_array_equal(negative == 0, of == 0)
    assert not np.any((negative == of) & (of > 0)) and not np.any(item == V)
    kinds |= {(int(x) > V) + (int(x) > 0) for x in of}
  assert kinds == {0, 1, 2}


@pytest.mark.parametrize('devices', [1, 2])
def test_batches_have_rows_and_features_of_cold_items(noisy, devices):
  source = BatchSource(noisy.path, 'train', 8, 5, shuffle=True, targets=3, stale_events=2)
  V, cold = noisy.vocabulary['item'], 0
  on_devices, mesh = Resident(source, mesh_of(devices)), mesh_of(devices)
  columns, cut = on_devices.put(), jax.jit(on_devices.cut)
  for step in range(3):
    batch = source[step]
    for name in ('item', 'history'):
      index = batch[f'{name}_index']
      assert batch[name].max() <= V < index.max() <= V + noisy.cold_items
      np.testing.assert_array_equal(batch[name], np.where(index > V, 0, index))
      for key, values in noisy.items.items():
        np.testing.assert_array_equal(batch[key.replace('item.', f'{name}.')], values[index])
      cold += np.sum(index > V)
    with meshes.use_mesh(mesh):
      same = jax.device_get(cut(columns, source.plan(step)))
    assert same.keys() == batch.keys()
    for name, x in batch.items():
      np.testing.assert_array_equal(same[name].view(np.uint32), x.view(np.uint32), err_msg=name)
  assert cold > 10
