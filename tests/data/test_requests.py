"""Requests: which examples share a history, and their batches, against loops over the examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import event, make_store, store_of_features

from lmn_jax.data.batches import BatchSource
from lmn_jax.data.reads import Reads
from lmn_jax.data.requests import request_bounds, requests_of


def slow_bounds(user, end, targets, stale_events):
  bounds = [0]
  for e in range(1, len(user)):
    first = bounds[-1]
    shares = user[e] == user[first] and end[e] - end[first] <= stale_events
    if not shares or e - first == targets:
      bounds.append(e)
  return [*bounds, len(user)]


@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=6),
  st.integers(1, 9),
  st.integers(0, 9),
)
def test_requests_take_the_next_examples_while_they_may(steps, targets, stale_events):
  """steps: for each user the number of new events before each example."""
  user = np.repeat(np.arange(len(steps), dtype=np.int32), [len(x) for x in steps])
  end = np.concatenate([np.cumsum(x) for x in steps]).astype(np.int64)
  bounds = request_bounds(user, end, targets, stale_events)
  assert bounds.tolist() == slow_bounds(user, end, targets, stale_events)


def test_many_events_of_many_users_do_not_overflow():
  user = np.repeat(np.arange(2**20, dtype=np.int32), 2)[-6:]
  end = np.array([0, 2**31, 1, 1, 5, 7])
  assert request_bounds(user, end, 8, 1).tolist() == [0, 1, 2, 4, 5, 6]
  assert request_bounds(user, end, 8, 2**31).tolist() == [0, 2, 4, 6]


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """'events': every row is an event. 'clicks': clicks are, so impressions share histories."""
  folder = tmp_path_factory.mktemp('requests')
  rng = np.random.default_rng(0)
  rows = [
    event(
      k, f'u{rng.integers(15)}', f'i{rng.integers(40)}', int(rng.integers(200)),
      label := int(rng.random() < 0.2), history=bool(label), query=f'q{rng.integers(5)}',
    )
    for k in range(600)
  ]  # fmt: skip
  clicks = make_store(folder / 'clicks', rows, context_features=('query',), rows_per_part=150)
  assert len(clicks.parts) > 2
  return {'events': store_of_features(folder), 'clicks': clicks}


CASES = [('clicks', 4, 0), ('clicks', 16, 0), ('events', 5, 3), ('events', 3, 1000)]


@pytest.mark.parametrize('name, targets, stale_events', CASES)
def test_a_request_is_its_examples_with_the_history_of_the_first(
  stores, name, targets, stale_events
):
  store, L = stores[name], 7
  source = BatchSource(store.path, 'train', 12, L, targets=targets, stale_events=stale_events)
  alone = BatchSource(store.path, 'train', store.examples['train'], L)[0]
  bounds = source.requests.bounds
  assert source.rows == len(bounds) - 1 and bounds[-1] == len(alone['user'])
  assert np.diff(bounds).max() > 1
  of_history = [key for key in alone if key.startswith(('history', 'user', 'length', 'total'))]
  of_target = alone.keys() - {*of_history, 'weight', 'label'}
  rows = 0
  for batch in (source[step] for step in range(source.batches)):
    assert batch.keys() == alone.keys()
    assert {key: x.dtype for key, x in batch.items()} == {k: x.dtype for k, x in alone.items()}
    for b in range(12):
      request = min(rows, source.rows - 1)
      first, end = bounds[request], bounds[request + 1]
      n, fills = end - first, rows < source.rows
      for key in of_history:
        np.testing.assert_array_equal(batch[key][b], alone[key][first], err_msg=key)
      for key in of_target:
        np.testing.assert_array_equal(batch[key][b, :n], alone[key][first:end], err_msg=key)
        assert (batch[key][b, n:] == store.vocabulary[key]).all(), key
      np.testing.assert_array_equal(batch['label'][b, :n], alone['label'][first:end])
      np.testing.assert_array_equal(batch['weight'][b], (np.arange(targets) < n) * float(fills))
      assert not batch['label'][b, n:].any()
      lacks = alone['total'][first:end] - batch['total'][b]
      assert (lacks >= 0).all() and lacks.max() <= stale_events
      rows += 1


@pytest.mark.parametrize('name, targets, stale_events', CASES)
def test_no_target_sees_its_future(stores, name, targets, stale_events):
  """Every event of a request is strictly before each of its targets, by the times of the log."""
  store = stores[name]
  requests = requests_of(store.parts, 'train', targets, stale_events)
  begin = 0
  for part in store.parts:
    low, high = part.bounds['train']
    for k, first in enumerate(requests.bounds[:-1]):
      if not begin <= first < begin + high - low:
        continue
      examples = np.arange(first, requests.bounds[k + 1]) - begin + low
      (user,) = set(part.examples['user'][examples].tolist())
      events = part.users['offset'][user] + np.arange(part.examples['end'][examples[0]])
      times = part.history['time'][events]
      assert not len(times) or times.max() < part.examples['time'][examples].min()
    begin += high - low


def key_of(batch, b, q):
  return batch['user_index'][b], batch['item'][b, q], batch['context.query'][b, q]


@pytest.mark.parametrize('hosts', [1, 2])
def test_all_hosts_together_read_each_example_once_an_epoch(stores, hosts):
  store, size = stores['clicks'], 14
  arguments = dict(targets=4, stale_events=1, seed=3, shuffle=True)
  sources = [
    BatchSource(store.path, 'train', size, 5, rows=rows, **arguments)
    for rows in np.split(np.arange(size), hosts)
  ]
  n = sources[0].rows
  assert n % size  # epochs end within a batch
  counts = {}
  for step in range(n):  # `size` epochs
    for source in sources:
      batch = source[step]
      for b, q in zip(*np.nonzero(batch['weight']), strict=True):
        key = key_of(batch, b, q)
        counts[key] = counts.get(key, 0) + 1
  expected = {}
  alone = BatchSource(store.path, 'train', store.examples['train'], 5)[0]
  for key in zip(*(alone[k] for k in ('user_index', 'item', 'context.query')), strict=True):
    expected[key] = expected.get(key, 0) + size
  assert counts == expected


def test_the_order_is_one_of_requests_and_follows_the_seed(stores):
  def order(seed, step=0):
    source = BatchSource(
      stores['clicks'].path, 'train', 32, 5, seed, shuffle=True, targets=4, stale_events=1
    )
    return source.plan(step)['index'].tolist()

  assert order(1) == order(1) and order(1) != order(2) and order(1) != order(1, step=1)


def test_plans_of_several_steps_are_those_of_each(stores):
  source = BatchSource(stores['clicks'].path, 'train', 32, 5, 3, True, targets=4)
  plans = source.plans(2, 5)
  for k in range(5):
    for name, x in source.plan(2 + k).items():
      np.testing.assert_array_equal(x, plans[name][k])


def test_what_targets_lack_is_counted(stores):
  store = stores['events']
  exact = requests_of(store.parts, 'train', 4, 0)
  assert not exact.stale and exact.describe().endswith('every target has its whole history')
  requests = requests_of(store.parts, 'train', 4, 2)
  total = BatchSource(store.path, 'train', store.examples['train'], 5)[0]['total']
  lacks = []
  for first, end in zip(requests.bounds[:-1], requests.bounds[1:], strict=True):
    lacks += (total[first:end] - total[first]).tolist()
  lacks = np.array(lacks)
  assert (requests.stale, requests.lacking) == (np.count_nonzero(lacks), lacks.sum())
  share, mean = np.mean(lacks > 0), lacks[lacks > 0].mean()
  assert f'{share:.1%} of the targets lack their newest events, {mean:.1f}' in requests.describe()


def test_the_line_says_how_late_targets_are(stores):
  store = stores['clicks']
  source = BatchSource(
    store.path, 'train', 16, 5, targets=4, stale_events=2, reads=Reads(time=True)
  )
  bounds, time = source.requests.bounds, []
  for part in store.parts:
    begin, end = part.bounds['train']
    time += store.clock.seconds(part.examples['time'][begin:end]).tolist()
  late = np.array(time) - np.repeat(np.array(time)[bounds[:-1]], np.diff(bounds))
  assert late.min() == 0 and late.mean() > 0 and source.requests.late == late.mean()
  assert f'{late.mean():,.1f} s before a target' in source.requests.describe()
  assert 'gaps of time' not in requests_of(store.parts, 'train', 4, 2).describe()
