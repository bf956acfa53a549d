"""Vectors of items and users: read, checked, and stored by embedding row."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.errors import UserError

ITEMS = ('a', 'b', 'c', 'd')


def log(folder):
  """Writes a log of four items, each met in training, and returns its config."""
  rows = [f'u{k % 3},{ITEMS[k % 4]},{k},{k % 2}' for k in range(60)]
  (folder / 'log.csv').write_text('\n'.join(['user,item,time,label', *rows, '']))
  return configs.data(name='vectors', source=str(folder / 'log.csv'), history='all')


LISTS = pa.list_(pa.float32())


def parquet(folder, ids, values, name='image', kind=LISTS):
  path = folder / 'vectors.parquet'
  pq.write_table(pa.table({'item': ids, name: pa.array(values, kind)}), path)
  return f'{path}:{name}'


def broken(folder):
  (folder / 'vectors.parquet').write_bytes(b'PAR1 no file PAR1')
  return f'{folder / "vectors.parquet"}:image'


def numpy_file(folder, matrix, ids, written=None):
  np.save(folder / 'vectors.npy', matrix)
  if isinstance(ids, np.ndarray):
    np.save(folder / 'ids.npy', ids)
    return f'{folder / "vectors.npy"}:{folder / "ids.npy"}'
  (folder / 'ids.txt').write_bytes(written or '\n'.join(ids).encode())
  return f'{folder / "vectors.npy"}:{folder / "ids.txt"}'


def prepared(folder, value, kind='item'):
  data = log(folder)
  data[f'{kind}_vectors'] = {'image': value}
  return prepare.prepare(data, folder / 'stores')


def by_id(store, kind='item'):
  """Raw id -> vector."""
  raw = store.raw_ids(kind).to_pylist()
  return dict(zip(raw, store.vectors[f'{kind}.image'].tolist(), strict=False))


@pytest.mark.parametrize('kind', [pa.list_(pa.float32()), pa.list_(pa.float64(), 2)])
def test_a_parquet_file(tmp_path, kind, caplog):
  value = parquet(tmp_path, ['d', ' b ', 'x', 'a'], [[1, 2], [3, 4], [5, 6], None], kind=kind)
  store = prepared(tmp_path, value)
  assert store.vectors['item.image'].dtype == np.float32
  assert by_id(store) == {None: [0, 0], 'a': [0, 0], 'b': [3, 4], 'c': [0, 0], 'd': [1, 2]}
  assert store.vectors['item.image'].shape == (6, 2) and not store.vectors['item.image'][-1].any()
  entry = store.manifest['vectors']['item.image']
  assert (entry['width'], entry['missing'], entry['unused']) == (2, 2, 1)
  assert "item_vectors.image: 2 of 4 items have no vector, the first 'a'" in caplog.text


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_a_matrix_with_a_file_of_ids(tmp_path, dtype):
  matrix = np.arange(8, dtype=dtype).reshape(4, 2) / 8
  store = prepared(tmp_path, numpy_file(tmp_path, matrix, [*ITEMS]))
  expected = {None: [0, 0]} | dict(zip(ITEMS, matrix.tolist(), strict=True))
  assert by_id(store) == expected
  assert store.vectors['item.image'].dtype == (np.float16 if dtype == np.float16 else np.float32)


def test_vectors_of_users(tmp_path):
  store = prepared(tmp_path, numpy_file(tmp_path, np.eye(3), ['u0', 'u1', 'u2']), 'user')
  assert by_id(store, 'user')['u1'] == [0, 1, 0]


def test_more_vectors_than_are_read_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr('lmn_jax.data.vectors.ROWS', 3)
  ids = [f'x{k}' for k in range(20)] + [*ITEMS]
  values = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
  nulls = [None if k % 5 == 2 else x.tolist() for k, x in enumerate(values)]
  for value in (numpy_file(tmp_path, values, ids), parquet(tmp_path, ids, nulls)):
    vectors = by_id(prepared(tmp_path, value))
    for k in range(20, 24):
      lacks = value.endswith('image') and nulls[k] is None
      assert vectors[ids[k]] == ([0] * 5 if lacks else values[k].tolist())


def test_a_store_follows_the_content_and_not_the_place(tmp_path):
  value = parquet(tmp_path, ['a', 'b'], [[1.0], [2.0]])
  first = prepared(tmp_path, value)
  (tmp_path / 'vectors.parquet').rename(tmp_path / 'moved.parquet')
  moved = prepared(tmp_path, value.replace('vectors', 'moved'))
  assert moved.fingerprint == first.fingerprint
  other = prepared(tmp_path, parquet(tmp_path, ['a', 'b'], [[1.0], [3.0]]))
  assert other.fingerprint != first.fingerprint
  without = prepare.prepare(log(tmp_path), tmp_path / 'stores')
  assert not without.vectors and 'vectors' not in without.manifest


def bad_parquet(ids, values, **more):
  return lambda folder: parquet(folder, ids, values, **more)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (lambda folder: 'vectors.parquet', 'must be FILE.parquet:COLUMN, or FILE.npy:IDS'),
    (lambda folder: 'vectors.csv:image', 'must be FILE.parquet:COLUMN, or FILE.npy:IDS'),
    (lambda folder: f'{folder}/no.parquet:image', 'does not exist'),
    (lambda folder: f'{folder}/v*.parquet:image', 'must be one file'),
    (lambda folder: broken(folder), 'cannot be read: '),
    (lambda folder: numpy_file(folder, np.eye(2), ['a', 'b'], b'a\n\xff'), 'cannot be read: '),
    (bad_parquet(['a'], [[1.0]], name='other'), None),
    (bad_parquet(['a', 'b'], [[1.0, 2.0], [1.0]]), 'row 2: the vector .* has 1 numbers, and the'),
    (bad_parquet(['a', 'b'], [[], []]), 'row 1: the vector .* has 0 numbers'),
    (bad_parquet(['a', 'b'], [[1.0], [None]]), 'row 2: a vector .* is not finite'),
    (bad_parquet(['a', 'b'], [[np.inf], [1.0]]), 'row 1: a vector .* is not finite'),
    (bad_parquet(['x'], [[1.0]]), 'no item of the vocabulary has a vector'),
    (bad_parquet(['a'], [None]), 'no item of the vocabulary has a vector'),
    (bad_parquet(['a', 'b', ' a'], [[1.0]] * 3), "rows 1 and 3 have the same id 'a'"),
    (bad_parquet(['a'], [['x']], kind=pa.list_(pa.string())), 'needs lists of numbers'),
    (bad_parquet(['a'], [1.0], kind=pa.float32()), 'needs lists of numbers'),
    (lambda folder: numpy_file(folder, np.eye(2), ['a']), 'has 2 rows, and .* 1 ids'),
    (lambda folder: numpy_file(folder, np.eye(2, dtype=int), ['a', 'b']), 'matrix .* of floats'),
    (lambda folder: numpy_file(folder, np.ones(2), ['a', 'b']), 'matrix .* of floats'),
    (lambda folder: numpy_file(folder, np.eye(2), np.ones(2)), 'texts or whole numbers'),
    (lambda folder: numpy_file(folder, np.eye(2), np.array(['a', 1], object)), 'not a .npy file'),
  ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, value, message):
  value = value(tmp_path)
  if message is None:
    value, message = value.replace(':other', ':image'), "'image' is unknown"
  with pytest.raises(UserError, match=message) as caught:
    prepared(tmp_path, value)
  assert '\n' not in str(caught.value)


def test_a_vector_cannot_have_the_name_of_a_feature(tmp_path):
  data = log(tmp_path)
  data.item_features, data.item_vectors = ('image',), {'image': 'x.parquet:image'}
  with pytest.raises(UserError, match='has the name of a feature'):
    prepare.prepare(data, tmp_path / 'stores')
