"""Features of events: values of their own rows, in stores and in logs of new events."""

import json

import numpy as np
import pytest
from stores import event, make_store, store_of_fields
from test_interactions import staged, write

from lmn_jax import config
from lmn_jax.data import new_events, prepare
from lmn_jax.errors import UserError

LOG = 'user,item,time,stars,kind,price,tags\n' + ''.join(
  f'u{k % 3},i{k * 7 % 11},{100 + k // 2},{k % 5},{"vcb"[k % 3]},{"" if k % 6 == 5 else k},'
  f'{"|".join("pqr"[: k % 4])}\n'
  for k in range(40)
)
FIELDS = dict(
  label='stars', label_threshold=3.0, history='all',
  event_features=('stars', 'kind', 'price', 'tags'), numeric={'price': 'log'}, multi={'tags': '|'},
  split=dict(protocol='user_ratio', valid=0.0, test=0.3),
)  # fmt: skip


@pytest.fixture
def store(tmp_path):
  source = write(tmp_path / 'log.csv', LOG)
  return prepare.prepare(config.data(source=source, **FIELDS), tmp_path / 'stores')


def log_events():
  """User -> their events in order: (time, stars, kind, price, tags)."""
  events = {}
  for line in LOG.splitlines()[1:]:
    user, _, time, *values = line.split(',')
    events.setdefault(user, []).append([int(time), *values])
  return events


def test_events_have_the_values_of_their_own_rows(store):
  assert store.features['event'] == ('event.stars', 'event.kind', 'event.tags')
  assert store.numbers == {'event': ('event.price',)} and store.widths['event.tags'] == 3
  ids = {key: store.raw_ids(key).to_pylist() for key in store.features['event']}
  (part,) = store.parts
  for number, user in enumerate(store.user_ids(0).to_pylist()):
    first, count = part.users['offset'][number], part.users['count'][number]
    for at, row in enumerate(log_events()[user], first):
      time, stars, kind, price, tags = row
      assert part.history['time'][at] == time
      assert ids['event.stars'][part.history['event.stars'][at]] == stars
      assert ids['event.kind'][part.history['event.kind'][at]] == kind
      np.testing.assert_equal(float(part.history['event.price'][at]), float(price or 'nan'))
      tokens = [c for c in part.history['event.tags'][at] if c < store.vocabulary['event.tags']]
      assert [ids['event.tags'][c] for c in tokens] == (tags.split('|') if tags else [None])
    assert count == len(log_events()[user])


def test_the_vocabulary_is_of_events_of_training(tmp_path):
  """A value that only held-out rows, or rows that are no events, have is unknown."""
  rows = [
    event(i, 'a', 'x', i, history=i != 2) | {'event.kind': 'late' if i > 7 else f'k{i}'}
    for i in range(10)
  ]
  split = dict(protocol='global_time', valid=0.0, test=0.2)
  store = make_store(tmp_path / 's', rows, event_features=('kind',), split=split)
  assert store.raw_ids('event.kind').to_pylist() == [None, 'k0', 'k1', 'k3', 'k4', 'k5', 'k6', 'k7']
  assert store.parts[0].history['event.kind'].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0]


def test_a_column_may_be_a_feature_of_the_context_and_of_events(tmp_path):
  rows = [event(i, 'a', 'x', i, hour=f'{i % 3}') | {'event.hour': f'{i % 3}'} for i in range(20)]
  fields = dict(context_features=('hour',), event_features=('hour',))
  store = make_store(tmp_path / 's', rows, **fields)
  assert store.parts[0].history['event.hour'].tolist() == [1 + i % 3 for i in range(20)]
  assert store.features['context'] == ('context.hour',)
  log = write(tmp_path / 'log.csv', 'user,item,time,label,hour\na,x,1,1,7\nb,y,2,0,8\n')
  db, _ = staged(tmp_path, config.data(source=log, **fields))
  assert db.execute('SELECT hour, "event.hour" FROM interactions').fetchall() == [
    ('7', '7'), ('8', '8')
  ]  # fmt: skip


def test_lists_of_sequences_give_each_event_its_value(tmp_path):
  lines = [
    dict(user='a', item=['x', 'y'], time=[1, 2], kind=['v', 'b'], dwell=[3, 4.5]),
    dict(user='b', item=['y', 'x', 'x'], time=[1, 2, 3], kind=['b', 'b', 'v'], dwell=7),
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  fields = dict(label='', event_features=('kind', 'dwell'), numeric={'dwell': 'standard'})
  expected = [('v', '3'), ('b', '4.5'), ('b', '7'), ('b', '7'), ('v', '7')]
  query = 'SELECT "event.kind", "event.dwell" FROM interactions ORDER BY row'
  db, _ = staged(tmp_path, config.data(source=write(tmp_path / 'log.jsonl', text), **fields))
  assert db.execute(query).fetchall() == expected
  text = 'user\titem\ttime\tkind\tdwell\na\tx,y\t1,2\tv,b\t3,4.5\nb\ty,x,x\t1,2,3\tb,b,v\t7\n'
  source = write(tmp_path / 'log.tsv', text)
  db, _ = staged(tmp_path, config.data(source=source, format='sequences', **fields))
  assert db.execute(query).fetchall() == expected


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(event_features=('kid',)), "config.data.event_features='kid' is unknown; did you mean"),
    (dict(event_features=('kind', 'Kind')), "event_features: 'Kind' is named twice"),
    (
      dict(event_features=('kind',), row_history='past'),
      r"event_features=\('kind',\) is not read: config.data.row_history='past' has the items",
    ),
    (dict(event_features=('kind',), numeric={'kind': 'log'}), "row 1: .* 'kind' holds 'v'"),
  ],
)
def test_wrong_event_features_are_refused(tmp_path, fields, message):
  text = 'user,item,time,label,kind,past\na,x,1,1,v,x y\nb,y,2,0,b,x\n'
  with pytest.raises(UserError, match=message) as error:
    staged(tmp_path, config.data(source=write(tmp_path / 'log.csv', text), **fields))
  assert '\n' not in str(error.value)


def test_a_context_feature_may_not_have_the_name_of_a_staged_event_feature(tmp_path):
  source = write(tmp_path / 'log.csv', 'user,item,time,label,kind,event.kind\na,x,1,1,v,w\n')
  fields = dict(event_features=('kind',), context_features=('event.kind',))
  with pytest.raises(UserError, match="'event.kind' is one of the reserved"):
    staged(tmp_path, config.data(source=source, **fields))


def test_new_events_have_features_and_times(tmp_path, store):
  """Those of the store's own log are those of the store; unknown values have the code 0."""
  data = config.data(source=str(tmp_path / 'log.csv'), **FIELDS)
  log, _ = new_events.log_of(data, str(tmp_path / 'log.csv'))
  read = list(new_events.events_of_log(log, store, tmp_path / 'scratch', 2))
  stored = list(new_events.events_of_store(store, 2))
  assert len(read) == len(stored) == 2
  for one, other in zip(read, stored, strict=True):
    assert one.user == other.user and one.features.keys() == other.features.keys()
    for name in ('items', 'times'):
      for x, y in zip(getattr(one, name), getattr(other, name), strict=True):
        np.testing.assert_array_equal(x, y)
    for key, columns in other.features.items():
      for x, y in zip(one.features[key], columns, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x, y, err_msg=key)
  text = 'user,item,time,stars,kind,price,tags\nu0,i1,150,9,v,2.5,p|new\n'
  log, _ = new_events.log_of(data, write(tmp_path / 'new.csv', text))
  (events,) = new_events.events_of_log(log, store, tmp_path / 'scratch2', 2)
  values = {key: columns[0].tolist() for key, columns in events.features.items()}
  code = store.raw_ids('event.kind').to_pylist().index('v')
  p = store.raw_ids('event.tags').to_pylist().index('p')
  assert values == {
    'event.stars': [0], 'event.kind': [code], 'event.price': [2.5],
    'event.tags': [[p, 0, store.vocabulary['event.tags']]],
  }  # fmt: skip
  text = text.replace('2.5', 'dear')
  log, _ = new_events.log_of(data, write(tmp_path / 'bad.csv', text))
  with pytest.raises(UserError, match="bad.csv: row 1: the numeric column 'price' holds 'dear'"):
    list(new_events.events_of_log(log, store, tmp_path / 'scratch3', 2))


def test_a_store_of_several_parts_has_the_values_of_one_part(tmp_path):
  many, one = store_of_fields(tmp_path / 'a'), store_of_fields(tmp_path / 'b', 2**20)
  assert len(many.parts) > 5 and len(one.parts) == 1
  for key in many.fields('event'):
    whole = np.concatenate([part.history[key] for part in many.parts])
    np.testing.assert_array_equal(whole, one.parts[0].history[key])
