"""The store against histories found the slow way, its seal, and bad input."""

import multiprocessing
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import event, kept_events, make_store, slow_store, tables

from lmn_jax import config
from lmn_jax.data import build as building
from lmn_jax.data import prepare, vocabulary
from lmn_jax.data.parts import write_part
from lmn_jax.data.splits import PROTOCOLS, SPLITS
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError


def random_log(seed: int, users: int = 9, items: int = 12, rows: int = 120, times: int = 30):
  rng = np.random.default_rng(seed)
  return [
    event(
      row,
      f'u{rng.integers(users)}',
      f'i{rng.integers(items)}',
      int(rng.integers(times)),
      float(rng.integers(2)),
      history=bool(rng.integers(4)),
      query=f'q{rng.integers(4)}',
    )
    for row in range(rows)
  ]


def decoded(store: Store) -> list[tuple]:
  """Examples as (split, user, time, item, label, [(time, item)...]) with raw ids; None unknown."""
  item_ids = store.raw_ids('item').to_pylist()
  found = []
  for number, part in enumerate(store.parts):
    user_ids = store.user_ids(number).to_pylist()
    e, h = part.examples, part.history
    for i in range(len(e['user'])):
      user = e['user'][i]
      first = part.users['offset'][user]
      events = slice(first, first + e['end'][i])
      history = list(
        zip(h['time'][events].tolist(), [item_ids[x] for x in h['item'][events]], strict=True)
      )
      found.append(
        (
          int(e['split'][i]),
          user_ids[user],
          int(e['time'][i]),
          item_ids[e['item'][i]],
          float(e['label'][i]),
          history,
        )
      )
  return found


@st.composite
def logs_of_ties(draw):
  """Few users, items and times, so that ties, duplicates and empty histories are common."""
  rows = []
  for row in range(draw(st.integers(1, 25))):
    history, example = draw(st.sampled_from([(True, True), (False, True), (True, False)]))
    rows.append(
      event(
        row,
        draw(st.sampled_from('abc')),
        draw(st.sampled_from('wxyz')),
        draw(st.integers(-2, 4)),
        draw(st.sampled_from([0.0, 1.0])),
        history,
        example,
        draw(st.sampled_from([0, 1, 2])) if example else draw(st.sampled_from([0, 2, None])),
      )
    )
  # In any order on disk: the original row number alone breaks ties.
  return draw(st.permutations(rows))


@settings(max_examples=60)
@given(
  logs_of_ties(),
  st.sampled_from(PROTOCOLS),
  st.sampled_from([(0.1, 0.1), (0.2, 0.3), (0.0, 0.5)]),
  st.sampled_from([0, 1, 3]),
  st.sampled_from([1, 2]),
  st.sampled_from([1, 7, 1000]),
)
def test_store_says_what_the_definition_says(rows, protocol, shares, longest, min_count, per_part):
  """Every protocol, with ties and duplicates; above all: nothing at or after a label's time."""
  if protocol != 'column':
    rows = [dict(row, split=None) for row in rows]
  fields = dict(
    split=dict(protocol=protocol, valid=shares[0], test=shares[1]),
    max_history=longest,
    min_count=min_count,
    rows_per_part=per_part,
  )
  expected, users, items = slow_store(rows, config.data(**fields))
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'store'
    if not any(example[0] == 0 for example in expected):
      with pytest.raises(UserError, match='learn from|left for training'):
        make_store(path, rows, **fields)
      return
    store = make_store(path, rows, **fields)
    found = decoded(store)
    ids = {kind: store.raw_ids(kind).to_pylist() for kind in ('user', 'item')}

  for _, _, time, _, _, history in found:
    assert all(before < time for before, _ in history)

  def known(item):
    return item if item in items else None

  assert sorted(found, key=str) == sorted(
    (
      (split, user, time, known(item), label, [(t, known(x)) for t, x in history])
      for split, user, time, _, item, label, history in expected
    ),
    key=str,
  )
  assert ids == dict(user=[None, *sorted(users)], item=[None, *sorted(items)])
  assert store.vocabulary == {'user': len(users) + 1, 'item': len(items) + 1}
  counts = store.manifest['counts']
  everyone = {row['user'] for row in rows}
  assert counts['users'] == len(everyone) == sum(len(part.users['row']) for part in store.parts)
  kept = [len(events) for events in kept_events(rows, longest).values()]
  assert counts['users_without_history'] == kept.count(0)
  assert counts['events'] == sum(kept)
  assert counts['events'] + counts['cut_events'] == sum(row['history'] for row in rows)
  for number, split in enumerate(SPLITS):
    mine = [example for example in expected if example[0] == number]
    assert counts['examples'][split] == len(mine)
    assert counts['clicks'][split] == sum(example[5] for example in mine)
    unknown = counts['out_of_vocabulary']
    assert unknown['item'][split] * len(mine) == pytest.approx(
      sum(example[4] not in items for example in mine)
    )
    assert unknown['user'][split] * len(mine) == pytest.approx(
      sum(example[1] not in users for example in mine)
    )


def test_examples_of_a_split_lie_together_in_order_of_user_time_and_row(tmp_path):
  rows = random_log(0)
  store = make_store(tmp_path / 's', rows, rows_per_part=40)
  assert len(store.parts) > 2
  for part in store.parts:
    e = part.examples
    for number, split in enumerate(SPLITS):
      start, stop = part.bounds[split]
      assert (e['split'][start:stop] == number).all()
    keys = list(zip(e['split'].tolist(), e['user'].tolist(), e['time'].tolist(), strict=True))
    assert keys == sorted(keys)
  # Original rows of equal (split, user, time): by their labels and items, in the log's order.
  wanted, _, _ = slow_store(rows, config.data(rows_per_part=40))
  in_order = [x for part in range(len(store.parts)) for x in _of_part(store, part)]
  assert sorted(in_order, key=lambda x: x[:3]) == [
    (split, user, time, label) for split, user, time, _, _, label, _ in wanted
  ]


def _of_part(store: Store, number: int) -> list[tuple]:
  ids, e = store.user_ids(number).to_pylist(), store.parts[number].examples
  return [
    (int(s), ids[u], int(t), float(y))
    for s, u, t, y in zip(e['split'], e['user'], e['time'], e['label'], strict=True)
  ]


def test_a_time_stamp_never_straddles_the_global_cut(tmp_path):
  rows = [event(i, f'u{i}', 'x', 0 if i < 5 else 1) for i in range(10)]
  # 70 % of the rows end inside the second time stamp: it stays whole, and is the last one.
  for k, test in enumerate((0.3, 0.5)):
    split = dict(protocol='global_time', valid=0.0, test=test)
    store = make_store(tmp_path / f'{k}', rows, split=split)
    assert store.examples == dict(train=5, valid=0, test=5)
  assert store.protocol.startswith('global time split: training before 1, test from 1;')


def test_few_times_give_each_split_at_least_one(tmp_path, caplog):
  rows = [event(i, f'u{i}', 'x', i // 30 if i < 90 else 2) for i in range(100)]
  split = dict(protocol='global_time', valid=0.3, test=0.1)
  store = make_store(tmp_path / 's', rows, split=split)
  assert store.examples == dict(train=30, valid=30, test=40)
  assert 'validation has 0.300 and test 0.400 of the examples, where valid=0.3' in caplog.text
  with pytest.raises(UserError, match='left for training .* smaller shares .0 leaves a split out'):
    make_store(tmp_path / 't', rows[:60], split=split)


def dated(tmp_path, form, **split):
  """The store of three days' rows, 30, 30 and 40, whose times are dates or numbers of seconds."""
  day = {'date': '2024-01-0{}', 'number': '170400000{}'}[form]
  rows = [f'u{i % 7},i{i % 5},{day.format(1 + min(i // 30, 2))},{i % 2}' for i in range(100)]
  (tmp_path / 'log.csv').write_text('\n'.join(['user,item,time,label', *rows]))
  data = config.data(source=str(tmp_path / 'log.csv'), history='all', split=split)
  return prepare.prepare(data, tmp_path / 'stores')


@pytest.mark.parametrize(
  'form, begins', [('date', ('2024-01-02', '2024-01-03')), ('number', (1704000002, 1704000003.0))]
)
def test_splits_may_begin_at_given_times(tmp_path, form, begins):
  store = dated(tmp_path, form, valid_from=begins[0], test_from=begins[1])
  assert store.examples == dict(train=30, valid=30, test=40)
  store = dated(tmp_path, form, test=0.0, valid_from=begins[1])
  assert store.examples == dict(train=60, valid=40, test=0)


@pytest.mark.parametrize(
  'split, message',
  [
    (dict(valid=0.0, test_from='2025-01-01'), "test_from='2025-01-01': test has no example then"),
    (dict(valid=0.0, test_from='1704000003'), "test_from='1704000003' is no time of this log"),
    (dict(test_from='2024-01-03'), "valid_from='' but config.data.split.valid=0.1"),
    (
      dict(valid_from='2024-01-03', test_from='2024-01-02'),
      "valid_from='2024-01-03': valid has no example then",
    ),
    (dict(protocol='user_ratio', test_from='2024-01-02'), 'are of protocol=global_time'),
    (dict(valid=0.0, test_from='2024-01-01'), 'none of 100 examples is left for training'),
  ],
)
def test_times_that_do_not_split_are_refused(tmp_path, split, message):
  with pytest.raises(UserError, match=message) as error:
    dated(tmp_path, 'date', **split)
  assert '\n' not in str(error.value)


def folder_bytes(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_writers_in_other_processes_and_any_order_give_the_same_bytes(tmp_path):
  rows = random_log(1)
  fields = dict(rows_per_part=30, negatives=2, context_features=('query',))
  store = make_store(tmp_path / 'a' / 'store', rows, **fields)
  assert len(store.parts) > 3

  folder, scratch = tmp_path / 'elsewhere' / 'store', tmp_path / 'scratch'
  scratch.mkdir()
  planned = building.plan(config.data(**fields), tables(rows, context=('query',)), folder, scratch)
  numbers = list(range(len(planned['parts'])))[::-1]
  with multiprocessing.get_context('spawn').Pool(2) as pool:
    written = pool.starmap(write_part, [(scratch, folder, n) for n in numbers], chunksize=1)
  building.seal(folder, planned, written, {}, {})
  assert folder_bytes(folder) == folder_bytes(store.path)


def test_fingerprint_is_of_the_content(tmp_path):
  rows = random_log(2)
  one = make_store(tmp_path / 'x' / 'one', rows)
  two = make_store(tmp_path / 'two', rows[::-1])
  rows[5] = dict(rows[5], label=1 - rows[5]['label'])
  three = make_store(tmp_path / 'three', rows)
  assert one.fingerprint == two.fingerprint != three.fingerprint


def test_columns_are_views_of_the_map(tmp_path):
  store = make_store(
    tmp_path / 's',
    random_log(3),
    items=[dict(item=f'i{i}', tags='a|b') for i in range(12)],
    item_features=('tags',),
    multi={'tags': '|'},
  )
  before = pa.total_allocated_bytes()
  store = Store(store.path)
  columns = [*store.items.values()]
  for part in store.parts:
    columns += [*part.users.values(), *part.history.values(), *part.examples.values()]
  assert len(columns) == 1 + 3 + 2 + 7
  for column in columns:
    assert not column.flags.owndata and not column.flags.writeable
    assert column.flags.c_contiguous
  assert pa.total_allocated_bytes() == before


def test_users_without_history_are_kept_and_counted(tmp_path):
  rows = [
    event(0, 'a', 'x', 1),
    event(1, 'a', 'y', 2),
    event(2, 'b', 'x', 1, 0.0, history=False),
  ]
  store = make_store(
    tmp_path / 's',
    rows,
    users=[dict(user='c', age='3'), dict(user='a', age='4')],
    user_features=('age',),
    split=dict(protocol='user_ratio', valid=0.0, test=0.0),
    rows_per_part=1,
  )
  assert store.manifest['counts']['users'] == 3
  assert store.manifest['counts']['users_without_history'] == 2
  ids = [x for number in range(len(store.parts)) for x in store.user_ids(number).to_pylist()]
  assert ids == ['a', 'b', 'c']
  assert [part.first for part in store.parts] == [0, 1, 2]
  last = store.parts[2]  # of a user with a profile and nothing else
  assert last.users['count'].tolist() == last.users['row'].tolist() == [0]
  assert len(last.examples['user']) == len(last.history['item']) == 0
  # 'c' never occurs in training, so its age is unknown; 'b' has no age.
  assert [part.users['user.age'].tolist() for part in store.parts] == [[1], [0], [0]]


def test_features(tmp_path):
  """Plain, several-valued and binned; missing, unseen in training, row 0 and padding."""
  rows = [
    event(0, 'a', 'x', 1, query='shoes'),
    event(1, 'b', 'y', 2, query='hats'),
    event(2, 'c', 'x', 3, query=None),
    event(3, 'd', 'y', 4, query=''),
    event(4, 'a', 'z', 9, query='scarfs'),
  ]
  users = [dict(user=u, age=a) for u, a in zip('abcd', ['10', '2', '30', 'nan'], strict=True)]
  items = [dict(item='x', tags='b|a|b'), dict(item='y', tags='|'), dict(item='z', tags='c|a')]
  store = make_store(
    tmp_path / 's',
    rows,
    users,
    items,
    user_features=('age',),
    item_features=('tags',),
    context_features=('query',),
    multi={'tags': '|'},
    bins={'age': 2},
    split=dict(protocol='global_time', valid=0.0, test=0.2),
  )
  assert store.features == dict(user=('user.age',), item=('item.tags',), context=('context.query',))
  assert store.raw_ids('context.query').to_pylist() == [None, 'hats', 'shoes']
  assert store.raw_ids('item.tags').to_pylist() == [None, 'a', 'b']
  assert store.raw_ids('item').to_pylist() == [None, 'x', 'y']
  assert store.widths == {'user.age': 0, 'item.tags': 3, 'context.query': 0}
  assert store.vocabulary['item.tags'] == 3
  # Rows: unknown item, x, y (a list without a token), padding. V_tags = 3 pads.
  assert store.items['item.tags'].tolist() == [[0, 3, 3], [2, 1, 2], [0, 3, 3], [3, 3, 3]]
  # Training ages 2, 10, 30: the median 10 is the upper edge of the lower bin.
  assert store.manifest['bins'] == {'user.age': [10.0]}
  assert store.raw_ids('user.age').to_pylist() == [None, '0', '1']
  (part,) = store.parts
  assert part.users['user.age'].tolist() == [1, 1, 2, 0]
  by_time = np.argsort(part.examples['time'])
  assert part.examples['context.query'][by_time].tolist() == [2, 1, 0, 0, 0]


def test_quantile_bins_are_those_of_numpy_over_training_rows(tmp_path):
  rng = np.random.default_rng(4)
  values = rng.normal(size=400).round(2)
  rows = [event(i, 'a', 'x', i, price=str(v)) for i, v in enumerate(values)]
  store = make_store(tmp_path / 's', rows, context_features=('price',), bins={'price': 12})
  train = values[: store.examples['train']]
  edges = np.quantile(train, np.arange(1, 12) / 12, method='inverted_cdf')
  assert store.manifest['bins']['context.price'] == edges.tolist()
  order = np.argsort(store.parts[0].examples['time'])
  code = store.parts[0].examples['context.price'][order]
  assert (code == 1 + np.searchsorted(edges, values, side='left')).all()


def test_several_valued_context_and_user_features(tmp_path):
  rows = [
    event(0, 'a', 'x', 0, words='p q'),
    event(1, 'a', 'x', 1, words='q'),
    event(2, 'b', 'x', 2, words=None),
  ]
  store = make_store(
    tmp_path / 's',
    rows,
    users=[dict(user='a', likes='1,2'), dict(user='b', likes=None)],
    user_features=('likes',),
    context_features=('words',),
    multi={'words': ' ', 'likes': ','},
    split=dict(protocol='user_ratio', valid=0.0, test=0.0),
  )
  (part,) = store.parts
  assert part.users['user.likes'].tolist() == [[1, 2], [0, 3]]
  assert part.examples['context.words'].tolist() == [[1, 2], [2, 3], [0, 3]]


def sampled(store: Store) -> list[tuple]:
  """(user, time, label, item) of all examples."""
  return sorted((u, t, y, i or '') for _, u, t, i, y, _ in decoded(store))


def test_negatives(tmp_path):
  rng = np.random.default_rng(5)
  rows = [
    event(i, f'u{rng.integers(20)}', f'i{rng.integers(40):02d}', int(rng.integers(25)))
    for i in range(600)
  ]
  fields = dict(negatives=3, seed=7, split=dict(protocol='user_ratio', valid=0.2, test=0.3))
  store = make_store(tmp_path / 'one', rows, **fields)
  counts, found = store.manifest['counts'], decoded(store)
  left_out = counts['examples_left_out']
  assert 0 <= left_out < 10 and counts['negatives'] == 3 * (600 - left_out)
  assert len(found) == 4 * (600 - left_out) == 4 * sum(counts['clicks'].values())
  learnt = {x[1:4] for x in found if x[0] == 0 and x[4]}  # user, time and item in training
  at_once = {(r['user'], r['time'], r['item']) for r in rows}
  first = {}
  for r in rows:
    key = r['user'], r['item']
    first[key] = min(first.get(key, r['time']), r['time'])
  per_item = dict.fromkeys(store.raw_ids('item').to_pylist()[1:], 0)
  kinds = set()
  for split, user, time, item, label, _ in found:
    if label:  # its negatives follow
      own = item, split > 0 and (user, time, item) in learnt, first[user, item] < time
      kinds.add(own[1:])
      continue
    per_item[item] += 1
    assert item != own[0]
    assert (split > 0 and (user, time, item) in learnt) == own[1]
    if not own[1]:
      assert (first.get((user, item), time) < time) == own[2]
      assert (user, time, item) not in at_once
  assert kinds >= {(False, False), (False, True)}
  # Uniform but for what users have met: no item is far from the mean of 45.
  assert min(per_item.values()) > 15 and max(per_item.values()) < 90
  for part in store.parts:  # a positive, then its three negatives, all of one split and time
    for name in ('split', 'user', 'time', 'end'):
      assert (np.ptp(part.examples[name].reshape(-1, 4), axis=1) == 0).all()
    assert (part.examples['label'].reshape(-1, 4) == [1, 0, 0, 0]).all()

  again = make_store(tmp_path / 'parts', rows, rows_per_part=50, **fields)
  assert len(again.parts) > 5
  assert sampled(again) == sampled(store)
  other = make_store(tmp_path / 'seed', rows, **dict(fields, seed=8))
  assert sampled(other) != sampled(store)


def test_negatives_of_a_user_who_has_met_nearly_all_or_all(tmp_path):
  # 200 items, and user 'a' has met all but two when the last examples come.
  rows = [event(i, 'b', f'{i:03d}', 1) for i in range(200)]
  rows += [event(200 + i, 'a', f'{i:03d}', 1) for i in range(198)]
  rows += [event(398, 'a', '000', 2), event(399, 'a', '198', 3), event(400, 'a', '199', 4)]
  store = make_store(
    tmp_path / 's',
    rows,
    negatives=20,
    split=dict(protocol='user_ratio', valid=0.0, test=0.0),
  )
  at = {time: set() for time in (1, 2, 3, 4)}
  for _, user, time, item, label, _ in decoded(store):
    if user == 'a' and not label:
      at[time].add(item)
  # At 1 all is new, at 2 the positive is one that was met, at 3 one of two new ones, and at 4 the
  # only one that is new is the positive: an example without negatives would tell its label.
  assert at[1] == {'198', '199'} and at[2] <= {f'{i:03d}' for i in range(1, 198)}
  assert at[3] == {'199'} and not at[4]
  # 'b' meets the whole vocabulary at one time.
  assert store.manifest['counts']['examples_left_out'] == 200 + 1
  assert sum(store.manifest['counts']['clicks'].values()) == 200


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
  store = make_store(tmp_path / 's', random_log(8))
  outside = tmp_path / 'outside'
  shutil.copytree(store.path / 'part-00000', outside)
  text = (store.path / 'manifest.json').read_text()
  (store.path / 'manifest.json').write_text(text.replace('"part-00000"', '"../outside"'))
  with pytest.raises(UserError, match=r"'../outside/.*' is outside of the folder"):
    Store(store.path)


@pytest.mark.parametrize(
  'fields, said',
  [
    (dict(split=dict(protocol='global_tme', valid=0.1, test=0.1)), "mean 'global_time'"),
    (dict(split=dict(protocol='user_ratio', valid=0.5, test=0.5)), 'sum below 1'),
    (dict(split=dict(protocol='column', valid=0.0, test=0.0)), '120 labelled rows have no split'),
    (dict(max_history=-1), 'max_history=-1'),
    (dict(negatives=-1), 'negatives=-1'),
    (dict(rows_per_part=0), 'rows_per_part=0'),
    (dict(multi={'querry': ' '}, context_features=('query',)), "did you mean 'query'"),
    (dict(bins={'query': 4}, context_features=('query',)), "'q[0-3]' is not a number"),
    (dict(bins={'query': 1}, context_features=('query',)), 'at least 2'),
    (
      dict(bins={'query': 4}, multi={'query': ' '}, context_features=('query',)),
      'in config.data.multi and in config.data.bins',
    ),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, fields, said):
  with pytest.raises(UserError, match=said) as error:
    make_store(tmp_path / 's', random_log(9), **fields)
  assert '\n' not in str(error.value)
  assert not any(tmp_path.glob('s.*'))


def test_a_user_twice_in_the_side_file(tmp_path):
  with pytest.raises(UserError, match="user 'u1' has two rows"):
    make_store(tmp_path / 's', random_log(9), users=[dict(user='u1', age='1')] * 2)


def test_ids_must_fit_int32(tmp_path, monkeypatch):
  monkeypatch.setattr(vocabulary, 'ROW_LIMIT', 13)
  with pytest.raises(UserError, match='vocabulary item: 13 rows do not fit int32'):
    make_store(tmp_path / 's', random_log(10))
  monkeypatch.setattr(vocabulary, 'ROW_LIMIT', 9)
  with pytest.raises(UserError, match='user records: 9 rows'):
    make_store(tmp_path / 't', random_log(10))


def test_names_of_columns_may_be_anything(tmp_path):
  names = ('raw', 'n', 'part', 'a "b"/c', 'last', 'position')
  rows = [
    dict(event(i, 'a', f'{i % 3}', i), **{name: str(i % 2) for name in names}) for i in range(30)
  ]
  store = make_store(
    tmp_path / 's',
    rows,
    users=[dict(user='a', id='5', train='6')],
    user_features=('id', 'train'),
    context_features=names,
  )
  assert store.features['context'] == tuple(f'context.{name}' for name in names)
  order = np.argsort(store.parts[0].examples['time'])
  for name in names:
    codes = store.parts[0].examples[f'context.{name}'][order]
    assert codes.tolist() == [1, 2] * 15
    assert store.raw_ids(f'context.{name}').to_pylist() == [None, '0', '1']


@pytest.mark.parametrize('history, kept', [('positive', [5]), ('all', [4, 5, 6])])
def test_a_cut_counts_rows_whatever_their_label(tmp_path, history, kept):
  log = tmp_path / 'log.csv'
  rows = '\n'.join(f'u,i{k},{k},{k % 2}' for k in range(7))
  log.write_text(f'user,item,time,label\n{rows}\n')
  data = config.data(source=str(log), max_history=3, history=history)
  store = prepare.prepare(data, tmp_path / 'stores')
  assert store.parts[0].history['time'].tolist() == kept
