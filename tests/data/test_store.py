"""The store equals the histories of the definition; its bytes, features, and errors."""

import multiprocessing
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import decoded, event, kept_events, make_store, slow_store, tables

from lmn_jax import config
from lmn_jax.data import build as building
from lmn_jax.data import vocabulary
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
  # In any order on disk: only the original row number breaks ties.
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
def test_the_store_equals_the_definition(rows, protocol, shares, longest, min_count, per_part):
  """Every protocol, with ties and duplicates; no history has an event at or after its example."""
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
    examples = decoded(store)
    ids = {kind: store.raw_ids(kind).to_pylist() for kind in ('user', 'item')}

  for _, _, time, _, _, history in examples:
    assert all(before < time for before, _ in history)

  def coded(item):
    return item if item in items else None

  assert sorted(examples, key=str) == sorted(
    (
      (split, user, time, coded(item), label, [(t, coded(x)) for t, x in history])
      for split, user, time, _, item, label, history in expected
    ),
    key=str,
  )
  assert ids == dict(user=[None, *sorted(users)], item=[None, *sorted(items)])
  assert store.vocabulary == {'user': len(users) + 1, 'item': len(items) + 1}
  counts = store.manifest['counts']
  everyone = {row['user'] for row in rows}
  assert counts['users'] == len(everyone) == sum(len(part.users['row']) for part in store.parts)
  lengths = [len(events) for events in kept_events(rows, longest).values()]
  assert counts['users_without_history'] == lengths.count(0)
  assert counts['events'] == sum(lengths)
  assert counts['events'] + counts['cut_events'] == sum(row['history'] for row in rows)
  for number, split in enumerate(SPLITS):
    of_split = [example for example in expected if example[0] == number]
    assert counts['examples'][split] == len(of_split)
    assert counts['clicks'][split] == sum(example[5] for example in of_split)
    unknown = counts['out_of_vocabulary']
    assert unknown['item'][split] * len(of_split) == pytest.approx(
      sum(example[4] not in items for example in of_split)
    )
    assert unknown['user'][split] * len(of_split) == pytest.approx(
      sum(example[1] not in users for example in of_split)
    )


def test_examples_of_a_split_are_contiguous_in_order_of_user_time_and_row(tmp_path):
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
  # Examples of equal (split, user, time) are in the order of the log: compared by their labels.
  expected, _, _ = slow_store(rows, config.data(rows_per_part=40))
  examples = [x for part in range(len(store.parts)) for x in _examples_of(store, part)]
  assert sorted(examples, key=lambda x: x[:3]) == [
    (split, user, time, label) for split, user, time, _, _, label, _ in expected
  ]


def _examples_of(store: Store, number: int) -> list[tuple]:
  """(split, user, time, label) of the examples of a part."""
  ids, e = store.user_ids(number).to_pylist(), store.parts[number].examples
  return [
    (int(s), ids[u], int(t), float(y))
    for s, u, t, y in zip(e['split'], e['user'], e['time'], e['label'], strict=True)
  ]


def folder_bytes(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_parts_written_by_other_processes_in_any_order_have_the_same_bytes(tmp_path):
  rows = random_log(1)
  fields = dict(rows_per_part=30, negatives=2, context_features=('query',))
  store = make_store(tmp_path / 'a' / 'store', rows, **fields)
  assert len(store.parts) > 3

  folder, scratch = tmp_path / 'elsewhere' / 'store', tmp_path / 'scratch'
  scratch.mkdir()
  planned = building.plan(config.data(**fields), tables(rows, columns=('query',)), folder, scratch)
  numbers = list(range(len(planned['parts'])))[::-1]
  with multiprocessing.get_context('spawn').Pool(2) as pool:
    written = pool.starmap(write_part, [(scratch, folder, n) for n in numbers], chunksize=1)
  building.seal(folder, planned, written, {}, {})
  assert folder_bytes(folder) == folder_bytes(store.path)


def test_the_fingerprint_depends_on_the_content_only(tmp_path):
  rows = random_log(2)
  store = make_store(tmp_path / 'x' / 'store', rows)
  reordered = make_store(tmp_path / 'reordered', rows[::-1])
  rows[5] = dict(rows[5], label=1 - rows[5]['label'])
  changed = make_store(tmp_path / 'changed', rows)
  assert store.fingerprint == reordered.fingerprint != changed.fingerprint


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
  last = store.parts[2]  # of a user who only has a profile
  assert last.users['count'].tolist() == last.users['row'].tolist() == [0]
  assert len(last.examples['user']) == len(last.history['item']) == 0
  # 'c' is not in training, so its age is unknown; 'b' has no age.
  assert [part.users['user.age'].tolist() for part in store.parts] == [[1], [0], [0]]


def test_codes_of_plain_several_valued_and_binned_features(tmp_path):
  """Also of values that are missing or not in training, of row 0, and of the padding."""
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
    numeric={'age': 'bins:2'},
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
  store = make_store(
    tmp_path / 's', rows, context_features=('price',), numeric={'price': 'bins:12'}
  )
  train = values[: store.examples['train']]
  edges = np.quantile(train, np.arange(1, 12) / 12, method='inverted_cdf')
  assert store.manifest['bins']['context.price'] == edges.tolist()
  order = np.argsort(store.parts[0].examples['time'])
  code = store.parts[0].examples['context.price'][order]
  assert (code == 1 + np.searchsorted(edges, values, side='left')).all()


def test_several_valued_context_and_user_features_are_padded_lists(tmp_path):
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


def test_a_manifest_with_a_file_outside_of_its_folder_is_an_error(tmp_path):
  store = make_store(tmp_path / 's', random_log(8))
  outside = tmp_path / 'outside'
  shutil.copytree(store.path / 'part-00000', outside)
  text = (store.path / 'manifest.json').read_text()
  (store.path / 'manifest.json').write_text(text.replace('"part-00000"', '"../outside"'))
  with pytest.raises(UserError, match=r"'../outside/.*' is outside of the folder"):
    Store(store.path)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(split=dict(protocol='global_tme', valid=0.1, test=0.1)), "mean 'global_time'"),
    (dict(split=dict(protocol='user_ratio', valid=0.5, test=0.5)), 'sum below 1'),
    (dict(split=dict(protocol='column', valid=0.0, test=0.0)), '120 labelled rows have no split'),
    (dict(max_history=-1), 'max_history=-1'),
    (dict(negatives=-1), 'negatives=-1'),
    (dict(rows_per_part=0), 'rows_per_part=0'),
    (dict(multi={'querry': ' '}, context_features=('query',)), "did you mean 'query'"),
    (
      dict(numeric={'query': 'bins:4'}, multi={'query': ' '}, context_features=('query',)),
      'in config.data.multi and in config.data.numeric',
    ),
  ],
)
def test_wrong_fields_are_an_error_of_one_line(tmp_path, fields, message):
  with pytest.raises(UserError, match=message) as error:
    make_store(tmp_path / 's', random_log(9), **fields)
  assert '\n' not in str(error.value)
  assert not any(tmp_path.glob('s.*'))


def test_a_user_with_two_rows_in_the_side_file_is_an_error(tmp_path):
  with pytest.raises(UserError, match="user 'u1' has two rows"):
    make_store(tmp_path / 's', random_log(9), users=[dict(user='u1', age='1')] * 2)


def test_ids_must_fit_int32(tmp_path, monkeypatch):
  monkeypatch.setattr(vocabulary, 'ROW_LIMIT', 13)
  with pytest.raises(UserError, match='vocabulary item: 13 rows do not fit int32'):
    make_store(tmp_path / 's', random_log(10))
  monkeypatch.setattr(vocabulary, 'ROW_LIMIT', 9)
  with pytest.raises(UserError, match='user records: 9 rows'):
    make_store(tmp_path / 't', random_log(10))


def test_columns_may_have_any_name(tmp_path):
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
