"""Every format of log, every mistake of a user, and bounded memory."""

import collections
import gzip
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import ml_collections
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_sets import ROOT, configs

from lmn_jax import config
from lmn_jax.data import interactions, sources
from lmn_jax.data.readers import registry, text_files
from lmn_jax.data.readers.reader import Source
from lmn_jax.errors import UserError

LOG = 'user,item,time,label\na,x,3,1\nb,y,1,0\na,y,2,1\n'


def staged(folder: Path, data: ml_collections.ConfigDict):
  """Stages a log into a new database in memory; returns the database and the notes."""
  db = interactions.connect(Path(':memory:'), data.memory_limit, folder / 'spill')
  return db, interactions.stage(data, db, folder / 'scratch')


def rows(db: duckdb.DuckDBPyConnection, columns: str = '"user", item, time, label') -> list[tuple]:
  return db.execute(f'SELECT {columns} FROM interactions ORDER BY "row"').fetchall()


def table(db: duckdb.DuckDBPyConnection, name: str) -> list[tuple]:
  return db.execute(f'SELECT * FROM {name} ORDER BY 1').fetchall()


def write(path: Path, text: str | bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


EXPECTED = [('a', 'x', 3, 1.0), ('b', 'y', 1, 0.0), ('a', 'y', 2, 1.0)]


@pytest.mark.parametrize(
  'name,text,fields',
  [
    ('log.csv', LOG, {}),
    ('log.csv', '\ufeff' + LOG.replace('\n', '\r\n'), {}),
    ('log.csv', LOG.replace('\n', '\r'), {}),
    ('log.csv', LOG.replace('\n', '\r\n', 2).replace('2,1\n', '2,1\r'), {}),  # mixed line ends
    ('log.csv', LOG.rstrip(), {}),
    ('log.csv', LOG.replace('\n', ',\n'), {}),  # a last column without a name
    ('log.csv', LOG.replace(',', ';'), {'delimiter': ';'}),
    ('log.csv', LOG.replace('a,', '"a",'), {}),
    ('log.csv', LOG.partition('\n')[2], {'header': False, 'fields': LOG.split('\n')[0].split(',')}),
    ('log.csv.gz', gzip.compress(LOG.encode(), mtime=0), {}),
    ('log.csv', LOG.encode('utf-16'), {'encoding': 'utf-16'}),
    ('log.tsv', LOG.replace(',', '\t'), {}),
    ('log.txt', LOG.replace(',', '\t'), {'format': 'tsv'}),
    (
      'log.inter',
      LOG.replace(',', '\t').replace('user', 'user:token').replace('time', 'time:float'),
      {},
    ),
    ('log.dat', 'a::x::5::3\nb::y::1::1\na::y::4::2\n', {'label': 'rating', 'label_threshold': 4}),
    (
      'log.jsonl',
      '{"user":"a","item":"x","time":3,"label":1,"no":{"deep":[1]}}\n'
      '{"user":"b","item":"y","time":1,"label":0}\n{"user":"a","item":"y","time":2,"label":1}\n',
      {},
    ),
  ],
)
def test_all_text_formats_give_the_same_rows(tmp_path, name, text, fields):
  db, notes = staged(tmp_path, config.data(source=write(tmp_path / name, text), **fields))
  assert rows(db) == EXPECTED
  assert rows(db, '"row", history, example, split') == [
    (0, True, True, None),
    (1, False, True, None),
    (2, True, True, None),
  ]
  assert (notes['rows_read'], notes['rows'], notes['time']['form']) == (3, 3, 'number')
  assert not list((tmp_path / 'scratch').glob('*')), 'copies are removed after reading'


def test_windows_line_ends_need_no_copy(tmp_path):
  # The first chunk ends between the two characters of a line end.
  path = Path(write(tmp_path / 'log.csv', 'x' * (text_files.CHUNK - 1) + '\r\nx\r\n'))
  assert text_files.as_utf8(path, 'utf-8', 'encoding', tmp_path / 'scratch') == path


@given(st.data())
def test_line_ends_within_quotes_are_kept(tmp_path_factory, data):
  """In any mixture; between rows they are made uniform, which DuckDB needs."""
  ends = st.sampled_from(['\n', '\r\n', '\r'])
  piece = ends | st.sampled_from(['a', '"', ',', ' ', 'é', '5" disk'])
  values = data.draw(st.lists(st.lists(piece, max_size=6).map(''.join), min_size=1, max_size=8))
  text = 'user,note,item\n'
  for value in values:
    quoted = '"' + value.replace('"', '""') + '"' if re.search('[",\r\n]', value) else value
    text += f'u,{quoted},i{data.draw(ends)}'
  folder = tmp_path_factory.mktemp('quotes')
  path = Path(write(folder / 'log.csv', text))
  source = Source(str(path), 'config.data.source', registry.READERS['csv'])
  with duckdb.connect() as db:
    (table,) = source.reader.tables(source, db, folder)
    assert db.sql(table.select(['user', 'note', 'item'])).fetchall() == [
      ('u', value or None, 'i') for value in values
    ]


def test_parquet_columns_of_any_type_are_read(tmp_path):
  log = {
    'user': [b'a', b'b', b'a'],
    'item': [1e15 + 2, 2.0, 2.0],
    'time': pa.array([3_000_000, 1_000_000, 2_500_000], pa.timestamp('us')),
    'label': [True, False, True],
    'tags': [['p', 'q'], [], ['p']],
  }
  pq.write_table(pa.table(log), tmp_path / 'log.parquet')
  data = config.data(
    source=str(tmp_path / 'log.parquet'), context_features=('tags',), multi={'tags': '|'}
  )
  db, notes = staged(tmp_path, data)
  assert rows(db, '"user", item, time, label, tags') == [
    ('a', '1000000000000002', 3_000_000, 1.0, 'p|q'),
    ('b', '2', 1_000_000, 0.0, None),
    ('a', '2', 2_500_000, 1.0, 'p'),
  ]
  assert notes['time']['form'] == 'text'
  with pytest.raises(UserError, match="tags.*holds lists.*config.data.multi={'tags'"):
    staged(tmp_path, config.data(source=data.source, context_features=('tags',)))


def test_json_lists_are_joined(tmp_path):
  text = '{"user":1,"item":2,"time":0,"label":1,"tags":["p","q"]}\n'
  source = write(tmp_path / 'log.json', text)
  data = config.data(source=source, item_features=('tags',), multi={'tags': ' '})
  assert table(staged(tmp_path, data)[0], 'items') == [('2', 'p q')]


def test_files_of_a_glob_are_read_in_the_order_of_their_names(tmp_path):
  write(tmp_path / 'b.csv', 'item,user,time,label\nz,c,0,1\n')  # its columns in another order
  write(tmp_path / 'a.csv', LOG)
  db, notes = staged(tmp_path, config.data(source=str(tmp_path / '*.csv')))
  assert rows(db) == [*EXPECTED, ('c', 'z', 0, 1.0)]
  assert notes['files'] == [str(tmp_path / 'a.csv'), str(tmp_path / 'b.csv')]


def test_names_and_values_are_not_executed_as_sql(tmp_path):
  text = 'us"er\';,"it\'em, ""x""",zeit ü,label,C\'x"\nO\'Neil,"a ""b""; --",1,1,"it\'s"\n'
  data = config.data(
    source=write(tmp_path / "o'log.csv", text),
    user='us"er\';',
    item='it\'em, "x"',
    time='zeit ü',
    context_features=('C\'x"',),
    missing=("o'x",),
  )
  db, _ = staged(tmp_path, data)
  assert rows(db, '"user", item, "C\'x"""') == [("O'Neil", 'a "b"; --', "it's")]


@pytest.mark.slow
@given(
  users=st.lists(st.integers(0, 3), min_size=1, max_size=60),
  times=st.lists(st.integers(-2, 2), min_size=60, max_size=60),
  cuts=st.lists(st.integers(0, 60), max_size=2),
)
def test_rows_keep_their_positions_in_the_log(tmp_path_factory, users, times, cuts):
  folder = tmp_path_factory.mktemp('log')
  lines = [f'{u},{k},{t},1\n' for k, (u, t) in enumerate(zip(users, times, strict=False))]
  bounds = [0, *sorted(cuts), len(lines)]
  for k, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
    write(folder / f'{k}.csv', 'user,item,time,label\n' + ''.join(lines[start:end]))
  db, _ = staged(folder, config.data(source=str(folder / '*.csv')))
  expected = [(k, str(u), str(k), times[k]) for k, u in enumerate(users)]
  assert rows(db, '"row", "user", item, time') == expected


def test_parallel_reading_keeps_the_order_of_rows(tmp_path):
  count = 400_000  # more than one buffer and one row group
  lines = ''.join(f'{k % 7}::{k}::5::{k % 3}\n' for k in range(count))
  data = config.data(source=write(tmp_path / 'log.dat', lines), label='rating', label_threshold=4.0)
  db, notes = staged(tmp_path, data)
  wrong = db.execute('SELECT count(*) FROM interactions WHERE item <> "row"::VARCHAR').fetchone()
  assert notes['rows'] == count
  assert wrong == (0,)


@pytest.mark.parametrize(
  'values,fields,form,times',
  [
    (['3', '-1.0', '20'], {}, 'number', [3, -1, 20]),
    (['3.5', '1', '2'], {}, 'number', [3_500_000, 1_000_000, 2_000_000]),
    (['1970-01-02', '1970-01-01T00:00:01.5Z', '1970-01-01 01:00:00+01:00'], {}, 'text',
     [86_400_000_000, 1_500_000, 0]),
    (['1970/1/1 0:01', '1970/01/02 00:00', '1970/1/1 1:00'], {'time_format': '%Y/%m/%d %H:%M'},
     'format', [60_000_000, 86_400_000_000, 3_600_000_000]),
    (['no', 'time', 'here'], {'time': ''}, 'position', [0, 1, 2]),
  ],
)  # fmt: skip
def test_the_form_of_times_is_inferred(tmp_path, values, fields, form, times):
  text = 'user,item,time,label\n' + ''.join(f'a,x,{v},1\n' for v in values)
  db, notes = staged(tmp_path, config.data(source=write(tmp_path / 'log.csv', text), **fields))
  assert notes['time']['form'] == form
  assert [t for (t,) in rows(db, 'time')] == times


def test_behaviours_give_labels_history_and_examples(tmp_path):
  text = 'user,item,time,type\na,x,1,pv\na,y,2,buy\na,z,3,cart\na,x,4,fav\n'
  data = dict(
    source=write(tmp_path / 'log.csv', text),
    label='',
    behaviour='type',
    positive_behaviours=('buy', 'cart'),
    history='all',
    history_behaviours=('pv', 'buy'),
    example_behaviours=('pv', 'buy', 'cart'),
  )
  db, notes = staged(tmp_path, config.data(**data))
  assert rows(db, 'item, label, history, example') == [
    ('x', 0.0, True, True),
    ('y', 1.0, True, True),
    ('z', 1.0, False, True),
  ]
  assert notes['rows_unused'] == 1
  assert notes['behaviours'] == {'pv': 1, 'buy': 1, 'cart': 1, 'fav': 1}
  db, _ = staged(tmp_path, config.data(**data | {'history': 'positive'}))
  assert rows(db, 'item, history') == [('x', False), ('y', True), ('z', False)]
  with pytest.raises(UserError, match="'carts' is unknown; did you mean 'cart'"):
    staged(tmp_path, config.data(**data | {'positive_behaviours': ('carts',)}))
  with pytest.raises(UserError, match='needs config.data.behaviour'):
    staged(tmp_path, config.data(**data | {'behaviour': ''}))


def test_a_column_gives_the_split(tmp_path):
  text = 'user,item,time,label,part\na,x,1,1,train\na,x,2,1,Valid\na,x,3,1,test\n'
  data = dict(source=write(tmp_path / 'log.csv', text), split_column='part')
  data['split'] = {'protocol': 'column', 'valid': 0.1, 'test': 0.1}
  db, _ = staged(tmp_path, config.data(**data))
  assert rows(db, 'split') == [(0,), (1,), (2,)]
  write(tmp_path / 'log.csv', text.replace('Valid', 'later'))
  with pytest.raises(UserError, match="row 2: the split_column column 'part' holds 'later'"):
    staged(tmp_path, config.data(**data))
  with pytest.raises(UserError, match='needs config.data.split_column'):
    staged(tmp_path, config.data(**data | {'split_column': ''}))


def test_duplicates_are_counted_and_dropped_if_configured(tmp_path):
  text = 'user,item,time,label,other\na,x,1,5,p\na,x,1,5,q\na,x,1.0,4,p\nb,x,1,5,p\na,x,1,5,p\n'
  data = dict(source=write(tmp_path / 'log.csv', text), label_threshold=4.0)
  db, notes = staged(tmp_path, config.data(**data))
  assert (notes['duplicate_rows'], notes['rows']) == (2, 5)
  db, notes = staged(tmp_path, config.data(**data, duplicates='drop'))
  assert (notes['duplicate_rows'], notes['rows'], notes['rows_unused']) == (2, 3, 0)
  assert rows(db, '"row"') == [(0,), (2,), (3,)]
  _, notes = staged(tmp_path, config.data(**data, context_features=('other',)))
  assert notes['duplicate_rows'] == 1


def test_rows_without_ids_are_dropped_and_counted(tmp_path):
  text = 'user,item,time,label\nNA,x,bad,1\n,x,1,7\n12.0,x,2,1\n12,nan,3,1\n 12 ,3.0,4,1\n'
  db, notes = staged(tmp_path, config.data(source=write(tmp_path / 'log.csv', text)))
  assert (notes['rows_without_user'], notes['rows_without_item'], notes['rows']) == (2, 1, 2)
  assert rows(db, '"row", "user", item') == [(2, '12', 'x'), (4, '12', '3')]


def test_features_of_the_log_have_their_earliest_value(tmp_path):
  text = 'user,item,time,label,city,kind,page\na,x,2,1,B,k,1\na,y,1,1,A,,2\nb,x,0,0,,late,NA\n'
  data = config.data(
    source=write(tmp_path / 'log.csv', text),
    user_features=('city',),
    item_features=('kind',),
    context_features=('page',),
  )
  db, _ = staged(tmp_path, data)
  assert table(db, 'users') == [('a', 'A'), ('b', None)]
  assert table(db, 'items') == [('x', 'late'), ('y', None)]
  assert rows(db, 'page') == [('1',), ('2',), (None,)]


def test_side_files_may_have_another_encoding_and_format(tmp_path):
  data = config.data(
    source=write(tmp_path / 'log.csv', LOG.replace('user', 'user,city').replace('\na', '\na,Rom')
                 .replace('\nb', '\nb,Köln')),
    users_source=write(tmp_path / 'users.txt', '年::a::7\n老::b::8\n少::a::9\n'.encode('gbk')),
    side_format='movielens',
    side_encoding='gbk',
    users_fields=('age', 'user', 'level'),
    items_source=write(tmp_path / 'items.dat', 'x::k\n::none\nx.0::j\nq::m\n'),
    items_fields=('item', 'kind'),
    user_features=('level', 'city', 'age'),
    item_features=('kind',),
  )  # fmt: skip
  db, notes = staged(tmp_path, data)
  assert table(db, 'users') == [('a', '7', 'Rom', '年'), ('b', '8', 'Köln', '老')]
  assert table(db, 'items') == [('q', 'm'), ('x', 'k'), ('x.0', 'j')]
  assert (notes['duplicate_users'], notes['duplicate_items']) == (1, 0)


def test_sequences_with_a_file_of_times_are_read(tmp_path):
  data = dict(
    format='sequences',
    source=write(tmp_path / 'items.txt', 'u1 a b  c\nu2 b\n\nu3 c a\n'),
    times_source=write(tmp_path / 'times.txt', 'u1 5 5 7\nu2 1\n\nu3 2 3\n'),
    header=False,
    items_separator=' ',
    label='',
  )
  db, notes = staged(tmp_path, config.data(**data))
  expected = [('u1', 'a', 5), ('u1', 'b', 5), ('u1', 'c', 7), ('u2', 'b', 1), ('u3', 'c', 2)]
  assert rows(db, '"user", item, time') == [*expected, ('u3', 'a', 3)]
  assert notes['time']['form'] == 'number'
  for text, message in {
    'u1 5 5\nu2 1\n\nu3 2 3\n': 'user u1 has 2 times, but .* items has user u1 and 3 items',
    'u1 5 5 7\nu3 1\n\nu3 2 3\n': 'user u3 has 1 times, but .* items has user u2 and 1',
    'u1 5 5 7\nu2 1\n': 'user .none. has 0 times, but .* items has user u3 and 2',
    'u1 5 5 7\nu2 1\nu3 2 3\nu4 1\n': 'user u4 has 1 times, but .* items has user .none. and 0',
  }.items():
    write(tmp_path / 'times.txt', text)
    with pytest.raises(UserError, match=message):
      staged(tmp_path, config.data(**data))


def test_sequences_with_a_header_are_read(tmp_path):
  text = 'who\tage\tlist\nu1\t20\ta,b,c\nu2\t\tb\n'
  data = config.data(
    format='sequences',
    source=write(tmp_path / 'log.tsv', text),
    user='who',
    item='list',
    time='',
    label='',
    user_features=('age',),
  )
  db, notes = staged(tmp_path, data)
  assert rows(db) == [('u1', 'a', 0, 1.0), ('u1', 'b', 1, 1.0), ('u1', 'c', 2, 1.0)] + [
    ('u2', 'b', 0, 1.0)
  ]
  assert table(db, 'users') == [('u1', '20'), ('u2', None)]
  assert notes['time']['form'] == 'position'


def long_ctr(folder: Path, seq_len: int = 2, user: int = 1) -> ml_collections.ConfigDict:
  """Writes a longctr folder in which user 0 has the items 5, 6, 7 and user 1 has 8, 9."""
  folder.mkdir(exist_ok=True)
  parts = {'train': [(0, 6, 1, 1), (user, 5, seq_len, 0)], 'valid': [(0, 7, 2, 0)]}
  parts['test'] = [(0, 9, 3, 1)]
  for part, impressions in parts.items():
    names = ('user_index', 'item_index', 'seq_len', 'is_click')
    columns = dict(zip(names, zip(*impressions, strict=True), strict=True))
    pq.write_table(pa.table(columns | {'page': [1] * len(impressions)}), folder / f'{part}.parquet')
  users = {'age': [30, 40], 'full_item_seq': [[5, 6, 7], [8, 9]]}
  pq.write_table(pa.table(users), folder / 'user_info.parquet')
  items = {'item_index': [5, 6, 7, 8, 9], 'cate': [[1], [1, 2], [], [3], [3]]}
  pq.write_table(pa.table(items), folder / 'item_info.parquet')
  return config.data(
    source=str(folder),
    user_features=('age',),
    item_features=('cate',),
    context_features=('page',),
    multi={'cate': ','},
  )


def test_a_longctr_folder_is_read(tmp_path):
  db, notes = staged(tmp_path, long_ctr(tmp_path / 'set'))
  events = db.execute(
    'SELECT "user", item, time, label, example, split, page FROM interactions WHERE history '
    'ORDER BY ALL'
  ).fetchall()
  assert events == [
    ('0', '5', 0, 1.0, False, 0, None),
    ('0', '6', 1, 1.0, False, 1, None),
    ('0', '7', 2, 1.0, False, 2, None),
    ('1', '8', 0, 1.0, False, 0, None),
    ('1', '9', 1, 1.0, False, 0, None),
  ]
  examples = 'SELECT "user", item, time, label, split, page FROM interactions WHERE example'
  assert db.execute(f'{examples} AND NOT history ORDER BY "row"').fetchall() == [
    ('0', '6', 1, 1.0, 0, '1'),
    ('1', '5', 2, 0.0, 0, '1'),
    ('0', '7', 2, 0.0, 1, '1'),
    ('0', '9', 3, 1.0, 2, '1'),
  ]
  assert table(db, 'users') == [('0', '30'), ('1', '40')]
  assert table(db, 'items')[:3] == [('5', '1'), ('6', '1,2'), ('7', None)]
  assert notes['time']['form'] == 'position'


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'seq_len': 3}, 'train.parquet: seq_len=3 of user_index=1 is not within 0..2'),
    ({'seq_len': -1}, 'seq_len=-1 of user_index=1 is not within 0..2'),
    ({'user': 2, 'seq_len': 0}, 'user_index=2 is not a row of user_info.parquet'),
    ({'user': -1}, 'user_index=-1 is not a row of user_info.parquet'),
  ],
)
def test_longctr_users_and_lengths_out_of_range_are_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    staged(tmp_path, long_ctr(tmp_path / 'set', **fields))


def test_a_longctr_folder_without_a_part_is_refused(tmp_path):
  data = long_ctr(tmp_path / 'set')
  (tmp_path / 'set' / 'valid.parquet').unlink()
  with pytest.raises(UserError, match='valid.parquet is missing'):
    staged(tmp_path, data)


def test_the_synthetic_log_depends_on_its_seed(tmp_path):
  sizes = dict(users=30, items=60, categories=20, groups=3, impressions=40)
  data = dict(source='synthetic', synthetic=sizes, context_features=('query',))
  data |= dict(user_features=('age', 'city'), item_features=('category',))
  db, notes = staged(tmp_path, config.data(**data))
  assert notes['rows'] == notes['rows_read'] > 30
  assert notes['time']['form'] == 'number'
  assert len(table(db, 'users')) == 30
  assert len(table(db, 'items')) == 60
  first = rows(db)
  assert rows(staged(tmp_path, config.data(**data))[0]) == first
  assert rows(staged(tmp_path, config.data(**data, seed=1))[0]) != first


def tfds_data(folder: Path, **fields) -> ml_collections.ConfigDict:
  defaults = dict(
    source='tfds:tiny_log/ratings',
    tfds_data_dir=str(folder / 'tfds'),
    user='user_id',
    item='movie/id',
    time='timestamp',
    label='user_rating',
    label_threshold=4.0,
    item_features=('movie/genres',),
    multi={'movie/genres': '|'},
    split_column='tfds_split',
    split=dict(protocol='column'),
  )
  return config.data(**defaults | fields)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_tfds_data_set_is_read_by_name(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  from tfds_builder import tiny_log

  db, notes = staged(tmp_path, tfds_data(tmp_path))
  assert 'tensorflow' not in sys.modules
  assert notes['rows_read'] == 6
  expected = [
    (user, str(movie), time, float(rating >= 4), {'train': 0, 'test': 2}[split])
    for split, ratings in tiny_log.RATINGS.items()
    for user, movie, rating, time in ratings
  ]
  assert sorted(rows(db, '"user", item, time, label, split')) == sorted(expected)
  assert table(db, 'items') == [('10', '0'), ('11', '0|1'), ('12', '0|1|2')]
  with pytest.raises(UserError, match="'movie_id' is unknown; did you mean 'movie/id'"):
    staged(tmp_path, tfds_data(tmp_path, item='movie_id'))
  with pytest.raises(UserError, match='tfds:tiny_lag'):
    staged(tmp_path, tfds_data(tmp_path, source='tfds:tiny_lag'))


def test_tfds_without_its_package_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(UserError, match=r"pip install 'lmn_jax\[tfds\]'"):
    staged(tmp_path, tfds_data(tmp_path))


@pytest.mark.parametrize(
  'text,fields,message',
  [
    (
      LOG,
      {'user': 'usr'},
      r"log.csv: column config.data.user='usr' is unknown; did you mean 'user'",
    ),
    (LOG, {'label': 'clicks'}, r"config.data.label \('' if the log has none\)='clicks'"),
    (
      LOG,
      {'context_features': ('pag',)},
      "config.data.context_features='pag' is unknown; available",
    ),
    (LOG, {'format': 'cvs'}, "config.data.format='cvs' is unknown; did you mean 'csv'"),
    (LOG, {'history': 'none'}, "config.data.history='none' is unknown"),
    (LOG, {'duplicates': 'count'}, "config.data.duplicates='count' is unknown"),
    (LOG, {'encoding': 'utf-9'}, "config.data.encoding='utf-9' is unknown"),
    (LOG, {'memory_limit': 'much'}, "config.data.memory_limit='much' is not a size"),
    (LOG, {'header': False}, 'set config.data.fields'),
    (LOG, {'header': False, 'fields': ('user', 'item')}, 'config.data.time .* is unknown'),
    (
      LOG,
      {'header': False, 'fields': list('abcde') + ['user']},
      'config.data.item=.item. is unknown',
    ),
    (
      LOG,
      {'label': 'Rating', 'label_threshold': 4.0, 'item_features': ('Rating',)},
      "item_features: labels are computed from the column 'Rating'",
    ),
    (
      LOG,
      {
        'label': '',
        'behaviour': 'kind',
        'positive_behaviours': ('buy',),
        'context_features': ('kind',),
      },
      "context_features: labels are computed from the column 'kind'",
    ),
    (LOG, {'context_features': ('Label',)}, "'Label' is one of the reserved"),
    (LOG, {'context_features': ('a', 'A')}, "'A' is named twice"),
    (LOG.replace(',', '\t'), {}, "the header is one column, 'user.titem"),
    (LOG, {'time_format': '%Y-%m-%d'}, "row 1: the time column 'time' holds '3'; .*%Y-%m-%d"),
    ('', {}, 'log.csv: the log is empty'),
    ('user,item,time,label\n', {}, 'the log is empty'),
    (LOG.replace('b,y,1', 'b,y,soon'), {}, "log.csv: row 2: the time column 'time' holds 'soon'"),
    (LOG.replace('b,y,1', 'b,y,'), {}, "row 2: the time column 'time' holds None"),
    (LOG.replace('b,y,1', 'b,y,nan'), {}, "row 2: the time column 'time' holds 'nan'"),
    (LOG.replace('b,y,1', 'b,y,1e20'), {}, "row 2: the time column 'time' holds '1e20'"),
    (LOG.replace('a,y,2,1', 'a,y,2,4'), {}, "row 3: .* 'label' holds '4'; .*label_threshold"),
    (LOG.replace('a,y,2,1', 'a,y,2,'), {}, "row 3: the label column 'label' holds None"),
    (LOG.replace('a,y,2,1', 'a,y,2,yes'), {'label_threshold': 1.0}, "holds 'yes'; a number"),
    (LOG.replace('a,y,2,1', 'a,y,2,nan'), {'label_threshold': 1.0}, "holds 'nan'; a number"),
    (LOG.replace('a,', 'NA,').replace('b,', ','), {}, 'no row has both .*3 rows without a user'),
    (LOG.replace(',1\n', ',0\n'), {}, "no row becomes a history event .*config.data.history='all'"),
    (LOG.replace('b,y', 'b,y\0'), {}, "row 2: column 'item' holds a null byte"),
    (LOG.encode().replace(b'b,y', b'b,\xff'), {}, 'log.csv: .*Line: 3 .*utf-8'),
    (LOG.encode().replace(b'b,y', b'b,\xff'), {'encoding': 'gbk'}, 'cannot be read as gbk'),
    (LOG.replace('b,y,1,0', 'b,y,1'), {}, 'log.csv: .*Line: 3 .*Expected Number of Columns: 4'),
    (LOG.replace('b,y', '"b,y'), {}, 'log.csv: .*(unterminated|quote)'),
    ('{"user":1', {'format': 'jsonl'}, 'log.csv: line 1, .* is not valid JSON'),
    ('[1]\n', {'format': 'jsonl'}, 'log.csv: line 1, .* is not a JSON object'),
    (LOG, {'format': 'parquet'}, 'log.csv: No magic bytes .*config.data.format'),
    (LOG, {'format': 'longctr'}, 'is not a folder'),
  ],
)
def test_invalid_input_raises_an_error_of_one_line(tmp_path, text, fields, message):
  source = write(tmp_path / 'log.csv', text)
  with pytest.raises(UserError, match=message) as error:
    staged(tmp_path, config.data(**{'source': source} | fields))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'source': 'no.csv'}, "config.data.source='.*no.csv' does not exist"),
    ({'source': 'no*.csv'}, "config.data.source='.*' matches no file"),
    (
      {'source': 'log.csv', 'users_source': 'no.csv'},
      "config.data.users_source='.*' does not exist",
    ),
    ({'source': 'log.md'}, "no format has the ending '.md'; set config.data.format"),
    ({'source': '', 'format': 'csv'}, 'is a folder, not a file'),
  ],
)
def test_missing_files_are_refused(tmp_path, fields, message):
  write(tmp_path / 'log.csv', LOG)
  paths = {k: str(tmp_path / v) if k.endswith('source') else v for k, v in fields.items()}
  with pytest.raises(UserError, match=message):
    staged(tmp_path, config.data(**paths))
  with pytest.raises(UserError, match=message):
    sources.signature(config.data(**paths))


def test_an_invalid_row_is_named_by_its_file_and_row(tmp_path):
  write(tmp_path / 'a.csv', LOG)
  write(tmp_path / 'b.csv', LOG.replace('1,0', '1,9'))
  with pytest.raises(UserError, match='b.csv: row 2: .* holds .9'):
    staged(tmp_path, config.data(source=str(tmp_path / '*.csv')))


PEAK = """
import sys
from pathlib import Path
from lmn_jax import config
from lmn_jax.data import interactions

def peak():
  # Not getrusage, whose peak includes that of the parent process.
  lines = Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))

folder = Path(sys.argv[1])
before = peak()
data = config.data(source=str(folder / 'log.csv'), memory_limit='48MB')
db = interactions.connect(folder / 'db', data.memory_limit, folder / 'spill')
rows = interactions.stage(data, db, folder / 'scratch')['rows']
print(rows, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').is_file(), reason='no /proc to read the peak in')
def test_memory_is_bounded_while_the_log_grows(tmp_path):
  """For eight times the log, peak memory grows by at most 60 MB; without a limit by over 90."""
  peaks = {}
  for count in (100_000, 800_000):
    folder = tmp_path / str(count)
    text = ''.join(
      f'user{k * 7919 % count},item{k * 104_729 % 50_000},{1_500_000_000 + k},{k % 2}\n'
      for k in range(count)
    )
    write(folder / 'log.csv', 'user,item,time,label\n' + text)
    command = [sys.executable, '-c', PEAK, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows_read, peaks[count] = map(int, result.stdout.split())
    assert rows_read == count
  assert peaks[800_000] < peaks[100_000] + 60_000, peaks


SETS = configs(ROOT)
# Users, items and interactions of the data sets whose sizes are published.
SIZES = {
  'movielens-100k': (943, 1682, 100_000),
  'movielens-1m': (6040, 3416, 999_611),
  'amazon-beauty': (22_363, 12_101, 198_502),
  'amazon-musical-instruments': (1429, 900, 10_261),
  'taobao-userbehavior': (43, 3276, 4321),
  'jd-sdm': (26, 97, 99),
  'amazon-books-sample': (60, 100, 100),
}


@pytest.mark.skipif(not ROOT.is_dir(), reason=f'no folder {ROOT.name} of public sets beside this')
@pytest.mark.parametrize('name', SETS)
def test_public_data_sets_are_read_with_a_config_alone(tmp_path, name):
  data = SETS[name]
  db, notes = staged(tmp_path, data)
  ids = db.execute('SELECT count(DISTINCT "user"), count(DISTINCT item) FROM interactions')
  sizes = (*ids.fetchone(), notes['rows_read'])
  assert sizes == SIZES.get(name, sizes)
  assert notes['rows'] + notes['rows_unused'] + notes['rows_without_user'] + notes[
    'rows_without_item'
  ] == notes['rows_read'] - notes['duplicate_rows'] * (data.duplicates == 'drop')
  for kind in ('user', 'item'):
    for feature in data[f'{kind}_features']:
      (values,) = db.execute(f'SELECT count(DISTINCT "{feature}") FROM {kind}s').fetchone()
      assert values > 0, f'no {kind} has the feature {feature!r}'


@pytest.mark.skipif(not ROOT.is_dir(), reason=f'no folder {ROOT.name} of public sets beside this')
def test_every_file_of_the_public_data_sets_is_in_a_config():
  configured = collections.Counter()
  for data in SETS.values():
    for field in ('source', 'times_source', 'users_source', 'items_source'):
      pattern = data[field]
      configured.update(Path(pattern).parent.glob(Path(pattern).name) if pattern else ())
  files = {p for folder in ROOT.iterdir() if folder.is_dir() for p in folder.iterdir()}
  assert files - set(configured) == set()
