"""Texts: one value is one id and one token, through every door; SQL and Python read alike."""

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
  with duckdb.connect() as found:
    yield found


@settings(max_examples=60)
@given(raw=st.lists(raws, min_size=1, max_size=30))
def test_sql_and_python_read_alike(db, raw):
  db.register('asked', pa.table({'place': pa.array(range(len(raw))), 'raw': raw}))
  found = db.execute(
    f"""SELECT raw, {texts.value_sql('raw', MISSING)}, {texts.tokens_sql('raw', '|', MISSING)},
    {texts.given_sql('raw', MISSING)} FROM asked ORDER BY place"""
  ).fetchall()
  for text, value, tokens, given_text in found:
    assert texts.value(text, WORDS) == (value or '')
    assert texts.tokens(text, '|', WORDS) == (tokens if given_text else [])
    assert texts.value(value or '', WORDS) == (value or ''), 'read once is read for good'


@given(number=st.integers(-(2**53) + 1, 2**53 - 1))
def test_a_whole_number_is_one_value(number):
  spelt = {
    number, float(number), np.int64(number), np.float64(number), f'{number}.0', f'{number}.000',
    f' {number}\t', f'\u00a0{number}.0\r\n',
  }  # fmt: skip
  assert {texts.value(raw, WORDS) for raw in spelt} == {str(number)}


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
def test_what_is_changed_and_what_is_not(raw, value):
  assert texts.value(raw, WORDS) == value


def test_a_word_may_be_an_id():
  assert texts.value('NA', texts.words(('', 'null'))) == 'NA'
  assert texts.value('-1.0', texts.words(('-1',))) == '', 'a word is a value too'


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
def made(tmp_path_factory):
  """(config.data, the store, its folder) of LOG."""
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'log.csv').write_text(LOG)
  data = config.data(
    source=str(folder / 'log.csv'), context_features=('slot', 'tags', 'age'), history='all',
    multi={'tags': ','}, bins={'age': 2}, split=dict(protocol='global_time', valid=0, test=0),
  )  # fmt: skip
  return data, prepare.prepare(data, folder / 'stores'), folder


def test_a_log_has_each_value_once(made):
  _, store, _ = made
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
  """(records, items, context) of rows as --input has them."""
  (folder / 'pairs.csv').write_text(text)
  columns = dict.fromkeys(('user', 'item', *data.context_features), '')
  with (
    interactions.connect(folder / 'r.duckdb', '1GB', folder / 'a') as reading,
    interactions.connect(folder / 'i.duckdb', '1GB', folder / 'b') as looking,
  ):
    rows = input_rows.RawRows(
      data, str(folder / 'pairs.csv'), columns, store.clock, reading, folder
    )
    found = rows.chunk(0, rows.count).texts
    coder = input_rows.Coder(data, store, looking)
    return coder.records(found['user']), coder.items(found['item']), coder.context(found)


def test_rows_to_score_are_read_as_the_log_is(made, tmp_path):
  data, store, _ = made
  spelt = 'user,item,slot,tags,age\n u1 ,1.0,1.0,"b, a",19.0\nu1,1,1,"b,a,None", 19\n'
  records, items, context = coded(data, store, tmp_path, spelt)
  assert len(set(records)) == len(set(items)) == 1 and items[0] > 0 <= records[0]
  for key, codes in context.codes.items():
    assert (codes[0] == codes[1]).all() and (codes.flat[0] > 0), key
  assert context.unknown == {'context.slot': 0, 'context.tags': 0, 'context.age': 0}
  new = 'user,item,slot,tags,age\nu1,1,7,"a,new",x\nNone,1,NA,,\nu1,1,1,a,20\n'
  (tmp_path / 'new').mkdir()
  records, _, context = coded(data, store, tmp_path / 'new', new)
  assert records.tolist()[1] == -1
  assert context.unknown == {'context.slot': 1, 'context.tags': 1, 'context.age': 1}


def test_stores_from_before_have_their_ids_found(tmp_path):
  """Features were spelt as in the log: '8.0' is asked for as 8 and as 8.0."""
  rows = [event(k, 'u', f'i{k % 2}', k, slot=('8.0', ' b')[k % 2]) for k in range(6)]
  store = make_store(
    tmp_path / 'store', rows, context_features=('slot',),
    split=dict(protocol='global_time', valid=0, test=0),
  )  # fmt: skip
  assert isinstance(store, Store) and store.spelt
  assert store.raw_ids('context.slot').to_pylist() == [None, ' b', '8.0']
  with duckdb.connect() as db:
    vocabulary.make_known(db, 'slot', store.raw_ids('context.slot'), store.spelt)
    assert db.execute('SELECT id, code FROM known_slot ORDER BY code').fetchall() == [
      (None, 0), ('b', 1), ('8', 2),
    ]  # fmt: skip
