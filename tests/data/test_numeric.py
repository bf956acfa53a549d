"""Numbers as features: which texts they are, what is fitted and stored, and every mistake."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import event, make_store, store_of_fields
from test_interactions import rows as rows_of
from test_interactions import staged, table, write

from lmn_jax import config
from lmn_jax.data import interactions, numeric
from lmn_jax.data.input_rows import Coder
from lmn_jax.data.numeric import Numeric, numeric_of
from lmn_jax.errors import UserError

EVERYTHING = dict(protocol='user_ratio', valid=0.0, test=0.0)
HALF = dict(protocol='global_time', valid=0.0, test=0.5)


@pytest.fixture(scope='module')
def db(tmp_path_factory):
  folder = tmp_path_factory.mktemp('db')
  with interactions.connect(folder / 'db', '1GB', folder / 'spill') as db:
    yield db


@given(st.text('0123456789+-.eE', max_size=8) | st.floats().map(repr) | st.text(max_size=5))
def test_numbers_are_those_of_python_within_float32(db, text):
  number = None
  if re.fullmatch(r'[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?', text, re.ASCII):
    number = float(text) if abs(float(text)) <= 3.4028234663852886e38 else None
  expected = None if number is None else float(np.float32(number))
  query = f'SELECT {numeric.value_sql("$1")}, {numeric.invalid_sql("$1", "log")}'
  assert db.execute(query, [text]).fetchall() == [(expected, expected is None)]


def fitted(values, kind):
  """Shift and scale of values without missing ones, by numpy."""
  x = np.array([np.float32(v) for v in values if v is not None], np.float64)
  x = np.sign(x) * np.log1p(np.abs(x)) if kind == 'log' else x
  return float(np.mean(x)), float(np.std(x))


@pytest.mark.parametrize('kind', ['standard', 'log', 'autodis:7'])
def test_shift_and_scale_are_those_of_numpy_over_training_rows(tmp_path, kind):
  rng = np.random.default_rng(0)
  values = [None if x < 0.2 else f'{y:.4f}' for x, y in rng.normal(size=(300, 2)) * [1, 900]]
  ages = {'a': '30', 'b': '-4.5', 'c': None, 'unseen': '1e30'}
  costs = {'x': '5', 'y': '0', 'z': None, 'unseen': '-1e30'}
  rows = [
    event(i, 'abc'[i % 3], 'xyz'[i % 5 % 3], i, history=i % 4 > 0, price=v)
    | {'event.price': v, 'event.gain': f'{i}'}
    for i, v in enumerate(values)
  ]
  store = make_store(
    tmp_path / 's', rows,
    [dict(user=u, age=x) for u, x in ages.items()],
    [dict(item=i, cost=x) for i, x in costs.items()],
    user_features=('age',), item_features=('cost',), context_features=('price',),
    event_features=('price', 'gain'), split=HALF,
    numeric=dict.fromkeys(('age', 'cost', 'price', 'gain'), kind),
  )  # fmt: skip
  train = rows[: store.examples['train']]
  assert 100 < len(train) < 200
  name, _, count = kind.partition(':')
  expected = {
    'user.age': [ages[r['user']] for r in train],
    'item.cost': [costs[r['item']] for r in train],
    'context.price': [r['price'] for r in train],
    'event.price': [r['event.price'] for r in train if r['history']],
    'event.gain': [r['event.gain'] for r in train if r['history']],
  }
  assert list(store.manifest['numeric']) == list(expected)
  for key, entry in store.manifest['numeric'].items():
    shift, scale = fitted(expected[key], name)
    assert (entry['kind'], entry['count']) == (name, int(count or 0))
    assert entry['shift'] == pytest.approx(shift, rel=1e-6)
    assert entry['scale'] == pytest.approx(scale, rel=1e-6)
    assert np.float32(entry['shift']) == entry['shift'] and np.float32(entry['scale'])
  assert store.numbers == {
    'user': ('user.age',), 'item': ('item.cost',), 'context': ('context.price',),
    'event': ('event.price', 'event.gain'),
  }  # fmt: skip
  assert store.vocabulary.keys() == {'user', 'item'} and store.features['user'] == ()
  assert 'event' not in store.features


def test_the_values_of_the_log_are_stored(tmp_path):
  rows = [
    event(0, 'a', 'x', 0, history=False, price='1e3') | {'event.dwell': '7'},
    event(1, 'a', 'y', 1, price='-0.25') | {'event.dwell': '8.5'},
    event(2, 'b', 'x', 2, price=None) | {'event.dwell': None},
  ]
  store = make_store(
    tmp_path / 's', rows, [dict(user='a', age='31')], [dict(item='y', cost='.5')],
    user_features=('age',), item_features=('cost',), context_features=('price',),
    event_features=('dwell',), split=EVERYTHING,
    numeric=dict(age='standard', cost='log', price='standard', dwell='log'),
  )  # fmt: skip
  (part,) = store.parts
  nan = math.nan
  expected = {
    'user.age': (part.users, [31, nan]),
    'item.cost': (store.items, [nan, nan, 0.5, nan]),  # unknown, x, y, padding
    'context.price': (part.examples, [1000, -0.25, nan]),
    'event.dwell': (part.history, [8.5, nan]),
  }
  for key, (columns, values) in expected.items():
    assert columns[key].dtype == np.float32
    np.testing.assert_array_equal(columns[key], np.float32(values), err_msg=key)
    missing = columns[key][np.isnan(columns[key])]
    assert set(missing.view(np.uint32)) <= {np.float32(np.nan).view(np.uint32)}
  unknown = store.manifest['parts'][0]['unknown_features']
  assert unknown['context.price'] == dict(train=1, valid=0, test=0)
  assert unknown['user.age'] == dict(train=1, valid=0, test=0)


@pytest.mark.parametrize(
  'texts, kind, shift',
  [
    (['5'] * 3, 'log', math.log1p(5)),  # 3 x / 3 is not x in floating point
    (['0.1'] * 7, 'standard', 0.1),
    (['1e-44', '3e-44'], 'standard', 2e-44),  # the deviation is below the least normal float32
  ],
)
def test_numbers_that_are_almost_equal_have_the_scale_1(tmp_path, texts, kind, shift):
  rows = [event(i, 'a', 'x', i, price=text) for i, text in enumerate(texts)]
  store = make_store(
    tmp_path / 's', rows, context_features=('price',), numeric={'price': kind}, split=EVERYTHING
  )
  entry = store.manifest['numeric']['context.price']
  assert entry == dict(kind=kind, shift=float(np.float32(shift)), scale=1.0, count=0)


def test_numbers_that_training_does_not_have_are_refused(tmp_path):
  rows = [event(i, 'a', 'x', i, price=None if i < 8 else '3') for i in range(10)]
  with pytest.raises(UserError, match="'context.price': no training row has a value"):
    make_store(
      tmp_path / 's', rows, context_features=('price',), numeric={'price': 'log'}, split=HALF
    )


def test_the_order_of_rows_does_not_change_what_is_fitted(tmp_path):
  store = store_of_fields(tmp_path / 'a')
  again = store_of_fields(tmp_path / 'b', rows_per_part=2**20)
  assert store.manifest['numeric'] == again.manifest['numeric']
  assert store.manifest['numeric'].keys() == {
    'user.age', 'item.cost', 'context.price', 'event.dwell', 'event.price'
  }  # fmt: skip


def test_a_store_without_numbers_has_the_manifest_of_earlier_versions(tmp_path):
  rows = [event(i, 'a', 'x', i, price=f'{i}') for i in range(9)]
  store = make_store(tmp_path / 's', rows, context_features=('price',))
  assert 'numeric' not in store.manifest and 'event' not in store.manifest['features']
  assert store.numbers == {}


@pytest.mark.parametrize(
  'text, expected',
  [
    ('standard', Numeric('standard')),
    ('log', Numeric('log')),
    ('bins:2', Numeric('bins', 2)),
    ('autodis:1024', Numeric('autodis', 1024)),
  ],
)
def test_how_a_number_enters(text, expected):
  assert numeric_of('age', text) == expected


@pytest.mark.parametrize(
  'text, message',
  [
    ('sqrt', "numeric.age='sqrt' is unknown"),
    ('standrd', "did you mean 'standard'"),
    ('standard:3', "numeric.age='standard:3': standard has no number; write 'standard'"),
    ('bins', "numeric.age='bins' must be 'bins:N' with a whole N of at least 2 and at most"),
    ('bins:1', "'bins:1' must be 'bins:N' with a whole N of at least 2"),
    ('bins:2.5', 'whole N'),
    ('autodis:1025', 'at most 1024'),
    ('autodis:٣', 'whole N'),
    (8, "numeric.age=8 must be a text such as 'standard' or 'bins:8'"),
  ],
)
def test_wrong_ways_are_an_error_of_one_line(text, message):
  with pytest.raises(UserError, match=message) as error:
    numeric_of('age', text)
  assert '\n' not in str(error.value)


LOG = 'user,item,time,label,price\na,x,1,1,3\nb,y,2,0,4.5\na,y,3,1,{}\nb,x,4,1,\n'


@pytest.mark.parametrize('kind', ['context', 'event', 'user', 'item'])
@pytest.mark.parametrize('value', ['dear', 'inf', '1e39', '1_000', '0x1'])
def test_a_text_in_place_of_a_number_is_refused_with_its_row_or_skipped(tmp_path, kind, value):
  fields = {f'{kind}_features': ('price',), 'numeric': {'price': 'log'}}
  data = config.data(source=write(tmp_path / 'log.csv', LOG.format(value)), **fields)
  with pytest.raises(UserError) as error:
    staged(tmp_path, data)
  text = str(error.value)
  assert f"log.csv: row 3: the numeric column 'price' holds {value!r}; a number of float32" in text
  assert "config.data.numeric.price='log'" in text and '\n' not in text
  data.bad_lines = 'skip'
  db, notes = staged(tmp_path, data)
  assert rows_of(db) == [('a', 'x', 1, 1.0), ('b', 'y', 2, 0.0), ('b', 'x', 4, 1.0)]
  assert notes['rows_skipped'] == 1


@pytest.mark.parametrize('value, refused', [('inf', False), ('dear', True)])
def test_bins_are_of_any_number(tmp_path, value, refused):
  data = config.data(
    source=write(tmp_path / 'log.csv', LOG.format(value)), context_features=('price',),
    numeric={'price': 'bins:4'},
  )  # fmt: skip
  if refused:
    with pytest.raises(UserError, match="row 3: the numeric column 'price' holds 'dear'"):
      staged(tmp_path, data)
  else:
    staged(tmp_path, data)


def test_a_text_in_place_of_a_number_of_a_side_file(tmp_path):
  data = config.data(
    source=write(tmp_path / 'log.csv', LOG.format('5')),
    items_source=write(tmp_path / 'items.csv', 'item,cost\nx,cheap\ny,2\n'),
    item_features=('cost',), numeric={'cost': 'standard'},
  )  # fmt: skip
  with pytest.raises(UserError, match="items.csv: row 1: the column 'cost' holds 'cheap'; a numbe"):
    staged(tmp_path, data)
  data.bad_lines = 'skip'
  db, notes = staged(tmp_path, data)
  assert table(db, 'items') == [('y', '2')] and notes['rows_skipped_of_items'] == 1
  data.missing = ('', 'cheap')
  db, notes = staged(tmp_path, data)
  assert table(db, 'items') == [('x', None), ('y', '2')]
  assert 'rows_skipped_of_items' not in notes


@pytest.mark.parametrize(
  'fields, message',
  [
    (
      dict(numeric={'prize': 'log'}),
      "config.data.numeric='prize' is unknown; did you mean 'price'",
    ),
    (dict(numeric={'price': 'logs'}), "config.data.numeric.price='logs' is unknown"),
    (
      dict(numeric={'price': 'log'}, multi={'price': '|'}),
      "'price' is in config.data.multi and in config.data.numeric, but a list is no number",
    ),
  ],
)
def test_wrong_fields_are_refused_before_the_log_is_read(tmp_path, fields, message):
  data = config.data(source=str(tmp_path / 'none.csv'), context_features=('price',), **fields)
  with pytest.raises(UserError, match=message):
    staged(tmp_path, data)


def test_rows_to_score_have_the_numbers_of_the_store(tmp_path):
  texts = ['3', '-1e-3', None, '4.75', 'dear', 'inf', '1e39']
  rows = [event(i, 'a', 'x', i, price=x, hour='7') for i, x in enumerate(texts[:4])]
  fields = dict(context_features=('price', 'hour'), numeric={'price': 'log'}, split=EVERYTHING)
  store = make_store(tmp_path / 's', rows, **fields)
  with interactions.connect(tmp_path / 'db', '1GB', tmp_path / 'spill') as db:
    coder = Coder(config.data(**fields), store, db)
    column = pa.chunked_array([texts])
    hours = pa.chunked_array([['7'] * len(texts)])
    context = coder.context({'price': column, 'hour': hours})
  price = context.codes['context.price']
  assert price.dtype == np.float32 and context.unknown == {'context.price': 3, 'context.hour': 0}
  np.testing.assert_array_equal(price[:4], store.parts[0].examples['context.price'])
  assert np.isnan(price[4:]).all() and context.codes['context.hour'].tolist() == [1] * 7
