"""Texts: a value has the same id or token in all inputs; SQL and Python agree."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmn_jax import config
from lmn_jax.data import input_rows, interactions, prepare, texts, vocabulary
from lmn_jax.data.store import Store
from tests.stores import event, make_store

MISSING = tuple(config.data().missing)
WORDS = texts.words(MISSING)
SIGNS = ' \t\n\xa0\u3000\u200b\x1c\x850018.-+eNnaAuUlL\\<>/#|é\u0130\u212a'
pieces = st.lists(st.sampled_from([*SIGNS, '.0', *MISSING]), max_size=6).map(''.join)
raws = st.one_of(
  pieces,
  st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=6),
  st.floats().map(str),
  st.integers().map(str),
  st.builds(lambda n, zeros: f'{n}.{"0" * zeros}', st.integers(), st.integers(0, 3)),
)


@pytest.fixture(scope='module')
def db():
  with duckdb.connect() as connection:
    yield connection


@settings(max_examples=60)
@given(raw=st.lists(raws, min_size=1, max_size=30))
def test_sql_and_python_agree(db, raw):
  db.register('raws', pa.table({'place': pa.array(range(len(raw))), 'raw': raw}))
  rows = db.execute(
    f"""SELECT raw, {texts.value_sql('raw', MISSING)}, {texts.tokens_sql('raw', '|', MISSING)},
    {texts.list_sql('raw', MISSING)} FROM raws ORDER BY place"""
  ).fetchall()
  for text, value, tokens, list_text in rows:
    assert texts.value(text, WORDS) == (value or '')
    assert texts.tokens(text, '|', WORDS) == (tokens if list_text else [])
    assert texts.value(value or '', WORDS) == (value or ''), 'the value of a value is itself'


@given(number=st.integers(-(2**53) + 1, 2**53 - 1))
def test_all_spellings_of_a_whole_number_are_one_value(number):
  spellings = {
    number, float(number), np.int64(number), np.float64(number), f'{number}.0', f'{number}.000',
    f' {number}\t', f'\u00a0{number}.0\r\n',
  }  # fmt: skip
  assert {texts.value(raw, WORDS) for raw in spellings} == {str(number)}


@pytest.mark.parametrize(
  'raw,value',
  [
    *((x, '') for x in ('None', 'none', 'NULL', 'Null', 'NaN', ' nan ', r'\N', '<NA>', 'n/a')),
    (None, ''),
    (float('nan'), ''),
    (True, 'true'),
    ('007', '007'),
    ('007.0', '007'),
    ('+8', '+8'),
    ('8.50', '8.50'),
    (8.5, '8.5'),
    (np.float32(0.1), '0.1'),
    ('1e3', '1e3'),
    ('-0.0', '-0'),
    ('a b', 'a b'),
    ('Nana', 'Nana'),
  ],
)
def test_the_value_of_a_raw_text(raw, value):
  assert texts.value(raw, WORDS) == value


def test_the_missing_words_are_configurable():
  assert texts.value('NA', texts.words(('', 'null'))) == 'NA'
  assert texts.value('-1.0', texts.words(('-1',))) == '', 'words follow the rule of values'


LOG = """user,item,time,label,slot,tags,age
 u1,1,1,1,1.0,"a, b",20
u1\t,1.0,2,0,1,"b ,NA, a",20.0
\u00a0u2,2,3,1, 2 ,"3, 4.0",30
None,2,4,1,2.0,,30
null,2,5,1,2.00,null,30
NaN,2,6,1,3,"a",30
\\N,2,7,1,3,"a",30
u2,None,8,1,None,"a",30
u2,2,9,1,2,"3.0,,4",30
"""


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Returns (config.data, the store, its folder) of LOG."""
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'log.csv').write_text(LOG)
  data = config.data(
    source=str(folder / 'log.csv'), context_features=('slot', 'tags', 'age'), history='all',
    multi={'tags': ','}, numeric={'age': 'bins:2'},
    split=dict(protocol='global_time', valid=0, test=0),
  )  # fmt: skip
  return data, prepare.prepare(data, folder / 'stores'), folder


def test_a_vocabulary_has_each_value_once(prepared):
  _, store, _ = prepared
  ids = {name: store.raw_ids(name).to_pylist()[1:] for name in store.vocabulary}
  assert ids['user'] == ['u1', 'u2'] and ids['item'] == ['1', '2']
  assert ids['context.slot'] == ['1', '2'] and ids['context.tags'] == ['3', '4', 'a', 'b']
  notes = store.manifest['notes']
  assert (notes['rows_without_user'], notes['rows_without_item']) == (4, 1)
  assert notes['missing_words'] == {
    'user': {'NaN': 1, 'None': 1, '\\N': 1, 'null': 1},
    'item': {'None': 1},
  }


def coded(data, store, folder, text):
  """Returns (records, items, context) of the rows of an input file."""
  (folder / 'pairs.csv').write_text(text)
  columns = dict.fromkeys(('user', 'item', *data.context_features), '')
  with (
    interactions.connect(folder / 'r.duckdb', '1GB', folder / 'a') as reading,
    interactions.connect(folder / 'i.duckdb', '1GB', folder / 'b') as lookup,
  ):
    rows = input_rows.RawRows(
      data, str(folder / 'pairs.csv'), columns, store.clock, reading, folder
    )
    raw = rows.chunk(0, rows.count).texts
    coder = input_rows.Coder(data, store, lookup)
    return coder.records(raw['user']), coder.items(raw['item']), coder.context(raw)


def test_input_rows_are_read_as_the_log_is(prepared, tmp_path):
  data, store, _ = prepared
  spellings = 'user,item,slot,tags,age\n u1 ,1.0,1.0,"b, a",19.0\nu1,1,1,"b,a,None", 19\n'
  records, items, context = coded(data, store, tmp_path, spellings)
  assert len(set(records)) == len(set(items)) == 1 and items[0] > 0 <= records[0]
  for key, codes in context.codes.items():
    assert (codes[0] == codes[1]).all() and (codes.flat[0] > 0), key
  assert context.unknown == {'context.slot': 0, 'context.tags': 0, 'context.age': 0}
  new = 'user,item,slot,tags,age\nu1,1,7,"a,new",x\nNone,1,NA,,\nu1,1,1,a,20\n'
  (tmp_path / 'new').mkdir()
  records, _, context = coded(data, store, tmp_path / 'new', new)
  assert records.tolist()[1] == -1
  assert context.unknown == {'context.slot': 1, 'context.tags': 1, 'context.age': 1}


def test_ids_of_stores_of_earlier_versions_are_matched(tmp_path):
  """Their features have the spelling of the log: 8 matches '8.0'."""
  rows = [event(k, 'u', f'i{k % 2}', k, slot=('8.0', ' b')[k % 2]) for k in range(6)]
  store = make_store(
    tmp_path / 'store', rows, context_features=('slot',),
    split=dict(protocol='global_time', valid=0, test=0),
  )  # fmt: skip
  assert isinstance(store, Store) and store.spelt
  assert store.raw_ids('context.slot').to_pylist() == [None, ' b', '8.0']
  with duckdb.connect() as db:
    vocabulary.create_lookup(db, 'slot', store.raw_ids('context.slot'), store.spelt)
    assert db.execute('SELECT id, code FROM lookup_slot ORDER BY code').fetchall() == [
      (None, 0), ('b', 1), ('8', 2),
    ]  # fmt: skip
