"""Batches equal example-by-example slicing; order, hosts, resuming, and errors."""

import pickle

import grain
import numpy as np
import pytest
from stores import event, make_store, store_of_features, store_of_fields, tables

from lmn_jax import config
from lmn_jax.data.batches import BatchSource, loader
from lmn_jax.data.build import build
from lmn_jax.data.reads import Reads
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store
from lmn_jax.data.times import Clock
from lmn_jax.data.train_lengths import BLOCK
from lmn_jax.errors import UserError


@pytest.fixture(scope='module')
def store(tmp_path_factory) -> Store:
  """A store of several parts, with empty histories, unknown items and features of every kind."""
  store = store_of_features(tmp_path_factory.mktemp('batches'))
  assert len(store.parts) > 5
  return store


def slow_examples(store: Store, split: str, length: int) -> list[dict]:
  """The examples of a split in the store's order, cut one at a time."""
  padding = store.vocabulary['item']
  examples = []
  for part in store.parts:
    for i in range(*part.bounds[split]):
      user, end = int(part.examples['user'][i]), int(part.examples['end'][i])
      first = int(part.users['offset'][user])
      newest = part.history['item'][first : first + end].tolist()[-length:]
      history = newest + [padding] * (length - len(newest))
      example = dict(
        user=part.users['row'][user],
        item=part.examples['item'][i],
        label=part.examples['label'][i],
        weight=1.0,
        history=history,
        length=len(newest),
        total=end,
        user_index=part.first + user,
      )
      for key in store.features['user']:
        example[key] = part.users[key][user]
      for key in store.features['context']:
        example[key] = part.examples[key][i]
      for key in store.features['item']:
        codes = store.items[key]
        example[key] = codes[example['item']]
        # Computed without the store's padding row: V_f in every column of the feature.
        pad = np.full_like(codes[0], store.vocabulary[key])
        example[key.replace('item.', 'history.')] = np.stack(
          [pad if x == padding else codes[x] for x in history]
        )
      examples.append(example)
  return examples


@pytest.mark.parametrize('length', [1, 7, 40, 1000])
@pytest.mark.parametrize('batch_size', [16, 1000])
def test_evaluation_batches_are_the_examples_in_order(store, length, batch_size):
  for split in SPLITS:
    expected = slow_examples(store, split, length)
    source = BatchSource(store.path, split, batch_size, length)
    assert source.examples == len(expected) and len(source) == -(-len(expected) // batch_size)
    batches = [source[k] for k in range(len(source))]
    for batch in batches:
      assert batch.keys() == expected[0].keys()
      assert all(len(column) == batch_size for column in batch.values())
    for key in expected[0]:
      column = np.concatenate([batch[key] for batch in batches])
      assert column.dtype == (np.float32 if key in ('label', 'weight') else np.int32)
      np.testing.assert_array_equal(
        column[: len(expected)], np.stack([example[key] for example in expected]), err_msg=key
      )
    weight = np.concatenate([batch['weight'] for batch in batches])
    assert weight[: len(expected)].all() and not weight[len(expected) :].any()


def test_the_store_has_every_case(store):
  """The comparison above covers all lengths, unknown ids, and several values of a feature."""
  examples = slow_examples(store, 'train', 10)
  assert {0, 3, 10} <= {example['length'] for example in examples}
  assert max(example['total'] for example in examples) > 10
  assert {0} < {int(example['item']) for example in examples}
  assert {0} < {int(example['user']) for example in examples}
  assert store.widths == {
    'user.age': 0,
    'user.likes': 2,
    'item.category': 0,
    'item.tags': 3,
    'context.query': 0,
  }


def keys_of(batch: dict) -> list[tuple]:
  names = ('user_index', 'item', 'label', 'total', 'context.query')
  return list(zip(*(batch[name].tolist() for name in names), strict=True))


def test_steps_after_position_two_to_the_31_are_whole_epochs_in_new_orders(store):
  n = BatchSource(store.path, 'train', 1, 5).examples
  source = BatchSource(store.path, 'train', n, 5, seed=3, shuffle=True)
  once = sorted(keys_of(source[0]))
  for step in (2**31 // n + 1, 2**31 - 1):
    assert step * n > 2**31 and sorted(keys_of(source[step])) == once
  small = BatchSource(store.path, 'train', 8, 5, seed=3, shuffle=True)
  late = [keys_of(small[2**31 - k]) for k in (1, 2, 3)]
  assert late[0] != late[1] != late[2] and keys_of(small[0]) not in late


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_all_hosts_together_read_each_example_once_an_epoch(store, hosts):
  split, batch_size = 'train', 48
  sources = [
    BatchSource(store.path, split, batch_size, 5, seed=3, shuffle=True, rows=rows)
    for rows in np.split(np.arange(batch_size), hosts)
  ]
  n = sources[0].examples
  assert n % batch_size  # epochs end within a batch
  steps = 3 * n // batch_size
  assert 3 * n == steps * batch_size + 3 * n % batch_size
  seen = {}
  for step in range(steps):
    for source in sources:
      batch = source[step]
      assert len(batch['user']) == batch_size // hosts and batch['weight'].all()
      for key in keys_of(batch):
        seen[key] = seen.get(key, 0) + 1
  once = BatchSource(store.path, split, n, 5)[0]
  expected = {}
  for key in keys_of(once):
    expected[key] = expected.get(key, 0) + 3
  # Three epochs except for the rest of the last batch: no example is missing or read too often.
  assert sum(expected.values()) - sum(seen.values()) == 3 * n % batch_size
  assert seen.keys() <= expected.keys()
  # That rest has at most one of the three readings of an example.
  assert all(2 * m // 3 <= seen.get(key, 0) <= m for key, m in expected.items())


def test_the_rows_of_each_host_are_rows_of_the_global_batch(store):
  """For any distribution of the rows over the hosts, such as that of a mesh's devices."""
  split = {
    'in order': np.split(np.arange(24), 3),
    'interleaved': [np.arange(k, 24, 3) for k in range(3)],
    'replicated': [np.arange(24)] * 2,
  }
  for shuffle in (True, False):
    whole = BatchSource(store.path, 'train', 24, 5, 1, shuffle)[2]
    for name, shares in split.items():
      for rows in shares:
        batch = BatchSource(store.path, 'train', 24, 5, 1, shuffle, rows)[2]
        for key, column in whole.items():
          np.testing.assert_array_equal(batch[key], column[rows], err_msg=f'{name} {key}')
  assert keys_of(BatchSource(store.path, 'train', 24, 5, 1, True)[2]) != keys_of(whole)


def test_the_order_depends_on_seed_and_epoch(store):
  def order(seed, step=0):
    return keys_of(BatchSource(store.path, 'train', 64, 5, seed, shuffle=True)[step])

  assert order(1) == order(1) and order(1) != order(2) and order(1) != order(1, step=1)


def same(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('law, length', [('suffix', 17), ('beta', 1000)])
def test_a_shorter_step_has_the_newest_events_of_the_same_examples(store, law, length):
  arguments = dict(seed=3, shuffle=True)
  source = BatchSource(store.path, 'train', 24, length, train_length=law, **arguments)
  full = BatchSource(store.path, 'train', 24, length, **arguments)
  for step in {source.lengths.at(step): step for step in range(0, 800, 7)}.values():
    most, batch, expected = source.lengths.at(step), source[step], full[step]
    assert batch.keys() == expected.keys()
    np.testing.assert_array_equal(batch['length'], np.minimum(expected['length'], most))
    for key, x in expected.items():
      if not key.startswith('history'):
        if key != 'length':
          np.testing.assert_array_equal(batch[key], x)
        continue
      assert batch[key].shape == (24, most, *x.shape[2:]) and batch[key].dtype == x.dtype
      for b, end in enumerate(expected['length']):
        newest = x[b, max(0, end - most) : end]
        np.testing.assert_array_equal(batch[key][b, : len(newest)], newest)
        padding = store.vocabulary['item' if key == 'history' else key.replace('history', 'item')]
        assert (batch[key][b, len(newest) :] == padding).all()


def test_plans_are_of_one_length(store):
  source = BatchSource(store.path, 'train', 24, 64, 3, True, train_length='suffix')
  plans = source.plans(2 * BLOCK, BLOCK)
  assert plans['place'].shape == (BLOCK, source.lengths.at(2 * BLOCK))
  with pytest.raises(ValueError):
    source.plans(0, 40 * BLOCK)
  assert 'place' not in BatchSource(store.path, 'train', 24, 64, 3, True).plans(0, 9)


@pytest.mark.parametrize('threads', [1, 4])
def test_a_restored_iterator_continues_with_the_next_batch(store, threads):
  source = BatchSource(store.path, 'train', 32, 10, seed=5, shuffle=True)
  whole = [source[step] for step in range(40)]  # includes the end of an epoch
  iterator = loader(source, threads=threads)
  first = [next(iterator) for _ in range(13)]
  state = iterator.get_state()
  [next(iterator) for _ in range(4)]  # lost in the interruption
  resumed = loader(pickle.loads(pickle.dumps(source)), threads=threads, buffer=3)
  resumed.set_state(state)
  rest = [next(resumed) for _ in range(27)]
  assert all(same(a, b) for a, b in zip(whole, first + rest, strict=True))
  iterator.set_state(state)
  assert same(next(iterator), whole[13])
  # Without a saved state, the step is sufficient.
  started = loader(source, start=13, threads=threads)
  assert started.get_state() == state
  assert same(next(started), whole[13]) and same(next(started), whole[14])


def test_evaluation_reads_the_split_once_and_ends(store):
  source = BatchSource(store.path, 'test', 16, 10)
  batches = list(loader(source))
  assert len(batches) == len(source) == source.batches
  assert sum(batch['weight'].sum() for batch in batches) == store.examples['test']
  rest = list(loader(source, start=2))
  assert len(rest) == len(source) - 2 and same(rest[0], batches[2])


@pytest.mark.parametrize('shuffle', [True, False])
def test_plans_of_several_steps_are_those_of_each(store, shuffle):
  source = BatchSource(store.path, 'train', 48, 5, seed=3, shuffle=shuffle)
  assert source.examples % 48
  plans = source.plans(2, 12)  # includes the end of an epoch, or of the split
  for k in range(12):
    plan = source.plan(2 + k)
    assert {name: x.dtype for name, x in plan.items()} == dict(index=np.int32, weight=np.float32)
    assert same(plan, {name: x[k] for name, x in plans.items()})
    rows = (2 + k) * 48 + np.arange(48)
    assert (np.diff(plan['index']) >= 0).all()
    if not shuffle:
      np.testing.assert_array_equal(plan['index'], np.minimum(rows, source.examples - 1))
      np.testing.assert_array_equal(plan['weight'], rows < source.examples)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(store):
  source = BatchSource(store.path, 'train', 32, 10, seed=5, shuffle=True)
  iterator = loader(source, start=3, workers=2, buffer=2)
  batches = [next(iterator) for _ in range(4)]
  state = iterator.get_state()
  batches.append(next(iterator))
  next(iterator)
  iterator.set_state(state)
  assert same(next(iterator), batches[4])
  iterator.close()
  assert all(same(batches[k], source[3 + k]) for k in range(5))
  late = loader(source, start=2**36, workers=2)
  assert all(same(next(late), source[2**36 + k]) for k in range(3))
  late.close()


def test_a_pickled_source_is_small_and_reads_the_same(store):
  source = BatchSource(store.path, 'train', 32, 10, seed=5, shuffle=True)
  packed = pickle.dumps(source)
  assert len(packed) < 2000
  assert same(pickle.loads(packed)[7], source[7])
  assert isinstance(grain.MapDataset.source(source)[7], dict)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(length=0), 'length=0 must be at least 1'),
    (dict(split='tests'), "did you mean 'test'"),
  ],
)
def test_wrong_arguments_are_an_error_of_one_line(store, fields, message):
  with pytest.raises(UserError, match=message) as error:
    BatchSource(store.path, **(dict(split='train', batch_size=8, length=4) | fields))
  assert '\n' not in str(error.value)


def test_an_empty_split_is_an_error(tmp_path):
  store = make_store(
    tmp_path / 's',
    [event(0, 'a', 'x', 1)],
    split=dict(protocol='user_ratio', valid=0.0, test=0.0),
  )
  with pytest.raises(UserError, match="split 'valid' has no example"):
    BatchSource(store.path, 'valid', 8, 4)


def test_histories_of_a_store_without_events_are_padding(tmp_path):
  rows = [event(i, 'a', 'x', i, 0.0, history=False) for i in range(5)]
  store = make_store(tmp_path / 's', rows)
  batch = BatchSource(store.path, 'train', 4, 3)[0]
  assert (batch['history'] == store.vocabulary['item']).all() and not batch['length'].any()


CLOCK = Clock('number', '', 7, '', 900, 1999)  # 7 in the store are 1; times are before `first`


@pytest.fixture(scope='module')
def rich(tmp_path_factory) -> Store:
  """A store with numbers and event features of every kind."""
  folder = tmp_path_factory.mktemp('rich')
  store = store_of_fields(folder, notes=dict(time=CLOCK._asdict()))
  assert len(store.parts) > 5 and store.fields('event') and store.numbers['event']
  return store


@pytest.mark.parametrize('length', [1, 7, 1000])
def test_numbers_event_features_and_gaps_are_those_of_each_example(rich, length):
  reads = Reads(True, rich.fields('event'))
  for split in SPLITS:
    source, row = BatchSource(rich.path, split, 50, length, reads=reads), 0
    batch = {key: np.concatenate([source[k][key] for k in range(len(source))]) for key in source[0]}
    for part in rich.parts:
      for i in range(*part.bounds[split]):
        user, end, time = (part.examples[name][i] for name in ('user', 'end', 'time'))
        first, n = part.users['offset'][user], min(end, length)
        newest = slice(first + end - n, first + end)
        assert batch['length'][row] == n
        expected = {
          'time_gap': [(time - 900) // 7 - (t - 900) // 7 for t in part.history['time'][newest]],
          'context.price': part.examples['context.price'][i],
          'user.age': part.users['user.age'][user],
          'item.cost': rich.items['item.cost'][batch['item'][row]],
          'history.cost': rich.items['item.cost'][batch['history'][row]],
        } | {key: part.history[key][newest] for key in reads.events}
        for key, values in expected.items():
          x = batch[key][row]
          if key.startswith(('time', 'event')):
            padding, x = x[n:], x[:n]
            V = 0 if key == 'time_gap' else rich.vocabulary.get(key, np.nan)
            np.testing.assert_array_equal(padding, np.full(padding.shape, V), err_msg=key)
          np.testing.assert_array_equal(x, values, err_msg=key)
        row += 1
    assert row == source.examples and (batch['time_gap'] >= 0).all()
    for key in ('time_gap', 'event.dwell', 'context.price', 'user.age', 'history.cost'):
      assert batch[key].dtype == np.float32
    assert batch['event.kind'].dtype == batch['event.tags'].dtype == np.int32


def test_what_is_not_read_changes_nothing(rich):
  """Also not the description that Grain compares with the one in a checkpoint."""
  plain = BatchSource(rich.path, 'train', 32, 9, 1, True)
  full = BatchSource(rich.path, 'train', 32, 9, 1, True, reads=Reads(True, ('event.dwell',)))
  assert full[3].keys() - plain[3].keys() == {'time_gap', 'event.dwell'}
  for key, column in plain[3].items():
    np.testing.assert_array_equal(column, full[3][key])
  assert 'reads' not in repr(plain) and "events=('event.dwell',)" in repr(full)
  again = pickle.loads(pickle.dumps(full))
  np.testing.assert_array_equal(again[3]['time_gap'], full[3]['time_gap'])


@pytest.mark.parametrize(
  'clock, message',
  [
    (Clock('number', '', 1, '', 0, 2**40), '1,099,511,627,776 of the unknown unit of its numbers'),
    (Clock('number', '', 1, '', -(2**63), 2**63 - 1), "set config.model.time='none', or write"),
    (Clock('text', 'microsecond', 1, '', 0, 10**6 * 2**31), 'reach over 2,147,483,648 seconds'),
  ],
)
def test_times_that_int32_cannot_count_are_refused(tmp_path, clock, message):
  store = store_of_fields(tmp_path, 2**20, notes=dict(time=clock._asdict()))
  BatchSource(store.path, 'train', 8, 4)
  with pytest.raises(UserError, match=message) as error:
    BatchSource(store.path, 'train', 8, 4, reads=Reads(time=True))
  assert '\n' not in str(error.value)


def test_row_histories_have_no_gaps_of_time(tmp_path):
  rows = [event(i, 'a', 'x', i) for i in range(30)]
  build(config.data(), tables(rows), {'row_histories': 3}, tmp_path / 's')
  with pytest.raises(UserError, match='row_history have no times of their own; set config.model'):
    BatchSource(tmp_path / 's', 'train', 8, 4, reads=Reads(time=True))
