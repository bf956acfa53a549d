"""Lanes equal a walk through each user's events; hosts, order, ties, errors."""

import concurrent.futures
import contextlib
import pickle

import numpy as np
import pytest
from stores import event, make_store, store_of_fields

from lmn_jax.data.batches import loader
from lmn_jax.data.histories import histories_of
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.reads import Reads
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.targets import targets_of, times_of_targets, training_events
from lmn_jax.data.walks import deal
from lmn_jax.errors import UserError

B, T = 4, 3


@pytest.fixture(scope='module', params=['leave_one_out', 'global_time', 'user_ratio'])
def log(request, tmp_path_factory):
  """(rows, store): users with 1 to 29 events, some of the same time, in several parts."""
  rng = np.random.default_rng(0)
  rows = []
  for user in range(15):
    for _ in range(1 + 2 * user):
      # Few times, so that events share them; few items, so that they occur again.
      time, item = int(rng.integers(12)), int(rng.integers(9))
      rows.append(event(len(rows), f'u{user:02d}', f'i{item}', time))
  split = dict(protocol=request.param, valid=0.15, test=0.15)
  folder = tmp_path_factory.mktemp('lanes') / 'store'
  store = make_store(folder, rows, split=split, rows_per_part=60)
  assert len(store.parts) > 2
  return rows, store


def events_of(rows, store):
  """User record -> its events in order, each (item row, number of the split)."""
  code = {raw: row for row, raw in enumerate(store.raw_ids('item').to_pylist())}
  split = {}
  targets = targets_of(store)
  for user, place, number in zip(targets.user, targets.place, targets.split, strict=True):
    split[int(user), int(place)] = int(number)
  names = [name for p in range(len(store.parts)) for name in store.user_ids(p).to_pylist()]
  events = {}
  for record, name in enumerate(names):
    ordered = sorted((r for r in rows if r['user'] == name), key=lambda r: (r['time'], r['row']))
    events[record] = [
      (code.get(r['item'], 0), split.get((record, k), 0)) for k, r in enumerate(ordered)
    ]
  return events


def numbers_at(batch, shape=(B, T)):
  """The numbers of the targets of a batch, at the positions that predict them: [B, T], else -1."""
  numbers = np.full(shape, -1)
  lane, k = np.nonzero(batch['number'] >= 0)
  numbers[lane, batch['asked'][lane, k]] = batch['number'][lane, k]
  assert (numbers >= 0).sum() == len(lane), 'two targets have one position'
  return numbers


def test_each_target_has_its_own_place_among_events_of_one_time(log):
  rows, store = log
  targets, users = targets_of(store), events_of(rows, store)
  pairs = list(zip(targets.user.tolist(), targets.place.tolist(), strict=True))
  assert len(set(pairs)) == len(pairs) == store.examples['valid'] + store.examples['test']
  for (user, place), item in zip(pairs, targets.item, strict=True):
    assert users[user][place][0] == item
  last = [max(place for u, place in pairs if u == user) for user in {u for u, _ in pairs}]
  assert last == [len(users[user]) - 1 for user in {u for u, _ in pairs}]


def streamed(source, steps):
  """For each lane its users, and for each of these its segments, as batches of one lane."""
  lanes = [[] for _ in range(B)]
  for step in range(steps):
    batch = source[step]
    for lane in range(B):
      if batch['first'][lane]:
        lanes[lane].append([])
      segment = {name: x[lane] for name, x in batch.items()}
      if 'asked' in batch:
        segment['number'] = numbers_at(batch)[lane]
      lanes[lane][-1].append(segment)
  return lanes


def test_a_round_of_training_has_every_event_as_target_once(log):
  rows, store = log
  source, V = LaneSource(store.path, 'train', B, T, shuffle=True), store.vocabulary['item']
  expected = []
  for events in events_of(rows, store).values():
    cut = next((k for k, (_, split) in enumerate(events) if split), len(events))
    if cut > 1:
      expected.append([item for item, _ in events[:cut]])
  lanes = streamed(source, 3 * source.batches)
  rounds = []
  for lane, dealt in zip(lanes, source._walks.dealt, strict=True):
    walks = []
    for walk in lane:
      items, targets = (
        np.concatenate([segment[name] for segment in walk]) for name in ('item', 'target')
      )
      count = (targets < V).sum()
      np.testing.assert_array_equal(items[1:count], targets[: count - 1])
      assert (targets[count:] == V).all()
      walks.append([*items[:1].tolist(), *targets[:count].tolist()])
    # Each round has the lane's users once; the last user may not be complete.
    n = len(dealt)
    assert sorted(walks[:n]) == sorted(walks[n : 2 * n])
    rounds += walks[:n]
  assert sorted(rounds) == sorted(expected)


@pytest.mark.parametrize('split', SPLITS[1:])
def test_evaluation_reads_all_before_each_target_and_nothing_after_the_last(log, split):
  rows, store = log
  source, V = LaneSource(store.path, split, B, T), store.vocabulary['item']
  users, targets, seen = events_of(rows, store), source.targets, []
  for lane in streamed(source, source.batches):
    for walk in lane:
      items = np.concatenate([s['item'] for s in walk])
      numbers = np.concatenate([s['number'] for s in walk])
      for at in np.flatnonzero(numbers >= 0):
        number = numbers[at]
        user, place = int(targets.user[number]), int(targets.place[number])
        assert at == place - 1
        assert items[:place].tolist() == [item for item, _ in users[user][:place]]
        np.testing.assert_array_equal(source.before(np.array([number]))[0], items[:place])
        seen.append(number)
      places = [int(targets.place[n]) for n in numbers[numbers >= 0]]
      if places:
        assert (items < V).sum() == max(places), 'events after the last target'
  placed = source.numbers[targets.place[source.numbers] > 0]
  assert sorted(seen) == sorted(placed.tolist())


def rounds_of(source):
  """Each lane of a round of training as its own batch; checks that the next order is different."""
  rows = source.rows
  orders = [[], []]
  for k in range(2 * rows):
    step, lane = divmod(k, B)
    batch = {name: x[lane : lane + 1] for name, x in source[step].items()}
    assert batch['first'].all()
    orders[k // rows].append(batch)
  first, second = ([batch['item'].tolist() for batch in order] for order in orders)
  assert sorted(first) == sorted(second) and first != second
  return orders[0]


def test_latest_reads_the_last_window_of_each_user(log):
  _, store = log
  source, V = (
    LaneSource(store.path, 'train', B, T, shuffle=True, latest=True),
    store.vocabulary['item'],
  )
  expected = [
    (items[-T - 1 : -1].tolist(), items[-T:][1 - (len(items) > T) :].tolist())
    for items in LaneSource(store.path, 'train', B, T).histories()
  ]
  windows = []
  for batch in rounds_of(source):
    item, target = batch['item'], batch['target']
    windows.append((item[item < V].tolist(), target[target < V].tolist()))
  assert sorted(windows) == sorted(expected)


def test_windows_of_training_are_cut_from_the_end_of_the_history(log):
  rows, store = log
  source, V = (
    LaneSource(store.path, 'train', B, T, shuffle=True, whole=False),
    store.vocabulary['item'],
  )
  assert all(source[k]['first'].all() for k in range(5))
  expected = []
  for items in LaneSource(store.path, 'train', B, T).histories():
    for end in range(len(items) - 1, 0, -T):
      begin = max(end - T, 0)
      expected.append((items[begin:end].tolist(), items[begin + 1 : end + 1].tolist()))
  windows = []
  for batch in rounds_of(source):
    pair = [batch[name][0] for name in ('item', 'target')]
    windows.append(tuple(x[x < V].tolist() for x in pair))
    assert (np.diff((pair[0] < V).astype(int)) <= 0).all(), 'events are not left-aligned'
  assert sorted(windows) == sorted(expected)


@pytest.mark.parametrize('split', SPLITS[1:])
def test_a_window_of_evaluation_has_the_events_before_its_target(log, split):
  rows, store = log
  source, V = LaneSource(store.path, split, B, T, whole=False), store.vocabulary['item']
  users, targets, seen = events_of(rows, store), source.targets, []
  for step in range(source.batches):
    batch = source[step]
    for lane in range(B):
      numbers = numbers_at(batch)[lane]
      (at,) = np.nonzero(numbers >= 0)
      items = batch['item'][lane]
      items = items[items < V]
      assert len(at) == (len(items) > 0) and batch['first'][lane]
      if len(at):
        number = numbers[at[0]]
        user, place = int(targets.user[number]), int(targets.place[number])
        before = [item for item, _ in users[user][:place]]
        assert items.tolist() == before[-T:] and at[0] == len(items) - 1
        assert source.before(np.array([number]))[0].tolist() == before
        seen.append(number)
  assert sorted(seen) == source.numbers[targets.place[source.numbers] > 0].tolist()


def windows_in(batch, V):
  """(items, targets or numbers) of each window of a packed batch; checks that there are no gaps."""
  windows = []
  shape = batch['item'].shape
  targets = batch['target'] if 'target' in batch else numbers_at(batch, shape)
  for item, target, begin in zip(batch['item'], targets, batch['begin'], strict=True):
    real = item < V
    assert (np.diff(real.astype(int)) <= 0).all(), 'padding between windows'
    for low in np.unique(begin[real]):
      window = real & (begin == low)
      assert window[low] and (np.flatnonzero(window) == low + np.arange(window.sum())).all()
      windows.append((item[window].tolist(), target[window].tolist()))
  return windows


def test_packed_training_windows_are_the_same_and_fill_the_lanes(log):
  _, store = log
  V, room = store.vocabulary['item'], 12
  unpacked, packed = (
    LaneSource(store.path, 'train', B, room, shuffle=True, whole=False, packed=packed)
    for packed in (False, True)
  )
  expected = []
  for batch in rounds_of(unpacked):
    item, target = batch['item'], batch['target']
    expected.append((item[item < V].tolist(), target[item < V].tolist()))
  assert any(len(items) < room for items, _ in expected)
  windows, events, lanes = [], 0, packed.rows
  for batch in rounds_of(packed):
    assert 'user' not in batch
    windows += windows_in(batch, V)
    events += int((batch['item'] < V).sum())
  assert sorted(windows) == sorted(expected)
  assert lanes == -(-events // room) < len(expected), 'more lanes than are needed'


@pytest.mark.parametrize('split', SPLITS[1:])
def test_packed_windows_of_evaluation_have_the_events_before_each_target(log, split):
  rows, store = log
  V, room = store.vocabulary['item'], 12
  source = LaneSource(store.path, split, B, room, whole=False, packed=True)
  users, seen = events_of(rows, store), []
  for k in range(source.batches):
    for items, numbers in windows_in(source[k], V):
      number = numbers[-1]
      assert set(numbers[:-1]) <= {-1}
      user, place = int(source.targets.user[number]), int(source.targets.place[number])
      assert items == [item for item, _ in users[user][max(place - room, 0) : place]]
      seen.append(number)
  assert sorted(seen) == source.numbers[source.targets.place[source.numbers] > 0].tolist()


def test_users_are_dealt_once_and_evenly():
  segments = np.random.default_rng(0).integers(1, 9, 1000)
  dealt = deal(segments, 7)
  assert sorted(np.concatenate(dealt).tolist()) == list(range(1000))
  totals = [segments[users].sum() for users in dealt]
  assert max(totals) - min(totals) <= 8
  assert [len(users) for users in deal(segments[:3], 5)] == [1, 1, 1, 0, 0]


def test_hosts_read_their_lanes_of_the_global_batch(log):
  _, store = log
  arguments = dict(shuffle=True, sampler='popularity', negatives=5)
  whole = LaneSource(store.path, 'train', B, T, **arguments)
  for rows in ([0, 1], [2, 3]):
    part = pickle.loads(
      pickle.dumps(LaneSource(store.path, 'train', B, T, rows=np.array(rows), **arguments))
    )
    for step in (0, 7, 100):
      for name, x in part[step].items():
        np.testing.assert_array_equal(x, whole[step][name][rows])
  assert repr(part) == repr(whole)


def test_the_step_alone_is_the_position_in_the_data(log):
  _, store = log
  source = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True)
  batches = [source[step] for step in range(40)]
  again = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True)
  iterator = loader(again)
  iterator.set_state({'next_index': 17})
  for step in (17, 18, 19):
    for name, x in next(iterator).items():
      np.testing.assert_array_equal(x, batches[step][name])
  other = LaneSource(store.path, 'train', B, T, seed=4, shuffle=True)
  assert any((other[k]['item'] != batches[k]['item']).any() for k in range(40))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_loader_starts_at_any_step(tmp_path, workers):
  rows = [event(k, f'u{k % 9}', f'i{k % 7}', k) for k in range(80)]
  store = make_store(tmp_path / 'store', rows, split=dict(protocol='leave_one_out'))
  source = LaneSource(store.path, 'train', B, T, 3, True, sampler='uniform', negatives=2)
  start = 2**36 + 5
  with contextlib.closing(loader(source, start=start, workers=workers)) as batches:
    for step in range(start, start + 3):
      for name, x in next(batches).items():
        np.testing.assert_array_equal(x, source[step][name])


@pytest.mark.parametrize('arguments', [dict(), dict(whole=False, packed=True)])
@pytest.mark.parametrize('split', SPLITS)
def test_plans_of_several_steps_are_those_of_each(log, split, arguments):
  _, store = log
  source = LaneSource(store.path, split, B, T, shuffle=split == 'train', **arguments)
  steps = 3 * source.batches if split == 'train' else source.batches
  plans = source.plans(0, steps)
  # Lanes of other rounds in between, as when threads cut steps in any order.
  again = LaneSource(store.path, split, B, T, shuffle=split == 'train', **arguments)
  for step in np.random.default_rng(0).permutation(steps):
    plan = again.plan(int(step))
    assert plan.keys() == plans.keys()
    for name, x in plan.items():
      assert x.dtype == (bool if name == 'first' else np.int32) and len(x) == B
      np.testing.assert_array_equal(x, plans[name][step])


def test_threads_cut_the_same_batches(log):
  _, store = log
  source = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True)
  steps = list(range(40)) * 2
  expected = [source[step]['item'] for step in steps]
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    for item, x in zip(
      threads.map(lambda step: source[step]['item'], steps), expected, strict=True
    ):
      np.testing.assert_array_equal(item, x)


@pytest.mark.parametrize('whole', [True, False])
def test_the_target_of_an_event_is_the_next_event_also_after_two_to_the_31_steps(log, whole):
  _, store = log
  source = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True, whole=whole)
  V = store.vocabulary['item']
  for step in (0, 2**31 + 5):
    batch = source[step]
    real = (batch['item'] < V) & (batch['target'] < V)
    assert real[:, 0].all()
    assert (batch['item'][:, 1:] == batch['target'][:, :-1])[real[:, 1:]].all()


def test_negatives_are_drawn_with_the_probabilities_of_their_sampler(log):
  _, store = log
  V = store.vocabulary['item']
  counts = np.zeros(V)
  for items in LaneSource(store.path, 'train', B, T).histories():
    np.add.at(counts, items, 1)
  for sampler in ('uniform', 'popularity'):
    source = LaneSource(store.path, 'train', B, T, shuffle=True, sampler=sampler, negatives=50)
    drawn = np.concatenate([source[k]['negative'].ravel() for k in range(40)])
    share = np.bincount(drawn, minlength=V) / len(drawn)
    expected = (
      np.r_[0, np.full(V - 1, 1 / (V - 1))] if sampler == 'uniform' else counts / counts.sum()
    )
    np.testing.assert_allclose(share, expected, atol=0.01)
    if sampler == 'popularity':
      batch = source[0]
      np.testing.assert_allclose(
        np.exp(batch['negative_log_q']), expected[batch['negative']], rtol=1e-5
      )
      real = batch['target'] < V
      np.testing.assert_allclose(
        np.exp(batch['log_q'][real]), expected[batch['target'][real]], rtol=1e-5
      )


def test_too_few_users_and_splits_without_targets_are_errors(tmp_path):
  rows = [event(k, f'u{k % 2}', f'i{k}', k) for k in range(8)]
  store = make_store(tmp_path / 'store', rows, split=dict(protocol='leave_one_out'))
  with pytest.raises(
    UserError,
    match='config.batch_size=3 lanes are more than the 2 users with at least two training',
  ):
    LaneSource(store.path, 'train', 3, T, shuffle=True)
  rows = [event(k, f'u{k}', f'i{k}', k) for k in range(4)]
  store = make_store(tmp_path / 'single', rows, split=dict(protocol='leave_one_out'))
  for split in SPLITS:
    with pytest.raises(UserError, match=f"split '{split}' has nothing to predict from"):
      LaneSource(store.path, split, 1, T)
  assert len(histories_of(training_events(store), targets_of(store), 'train').record) == 0


MODES = dict(whole=dict(), windows=dict(whole=False), packed=dict(whole=False, packed=True))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('split', SPLITS)
def test_events_have_their_features_and_the_time_to_what_they_predict(tmp_path, mode, split):
  """Targets of validation and test may be rows that are no events, with times of their own."""
  store = store_of_fields(tmp_path)
  reads, V = Reads(True, store.fields('event')), store.vocabulary['item']
  arguments = dict(shuffle=split == 'train', reads=reads, **MODES[mode])
  source = LaneSource(store.path, split, B, 5, **arguments)
  steps = 2 * source.batches if split == 'train' else source.batches
  time_of_target = times_of_targets(store)
  rows = {}  # what an event has: by its time, item and features
  for part in store.parts:
    for at in range(len(part.history['item'])):
      time = store.clock.seconds(int(part.history['time'][at]))
      values = [part.history[key][at] for key in reads.events]
      rows.setdefault((time, int(part.history['item'][at])), []).append(values)
  exact = seen = 0
  for batch in (source[step] for step in range(steps)):
    assert batch['time'].dtype == np.int32 and batch['time_gap'].dtype == np.float32
    for lane, at in zip(*np.nonzero(batch['item'] < V), strict=True):
      values = [batch[key][lane, at] for key in reads.events]
      near = rows[int(batch['time'][lane, at]), int(batch['item'][lane, at])]
      assert any(all(map(np.array_equal, values, x, [True] * len(x))) for x in near)
      gap, seen = batch['time_gap'][lane, at], seen + 1
      assert gap >= 0
      if at + 1 < 5 and batch['item'][lane, at + 1] < V and 'begin' not in batch:
        following = batch['time'][lane, at + 1] - batch['time'][lane, at]
        exact += gap == following
        assert gap <= following  # a target that is no event may come between
    padding = batch['item'] == V
    assert not batch['time'][padding].any() and not batch['time_gap'][padding].any()
    for key in reads.events:
      pad = np.float32(np.nan) if key in store.numbers['event'] else store.vocabulary[key]
      np.testing.assert_array_equal(batch[key][padding], np.full_like(batch[key][padding], pad))
    if split != 'train':
      for lane, k in zip(*np.nonzero(batch['number'] >= 0), strict=True):
        at = batch['asked'][lane, k]
        together = (batch['asked'][lane] == at) & (batch['number'][lane] >= 0)
        times = store.clock.seconds(time_of_target[batch['number'][lane][together]])
        assert batch['time'][lane, at] + batch['time_gap'][lane, at] == times.min()
  assert seen > 50 and (mode == 'packed' or exact > seen / 3)


def test_lanes_of_items_alone_are_described_as_before(log):
  _, store = log
  plain = LaneSource(store.path, 'train', B, T, shuffle=True)
  timed = LaneSource(store.path, 'train', B, T, shuffle=True, reads=Reads(True))
  assert 'reads' not in repr(plain) and 'time=True' in repr(timed)
  assert timed[2].keys() - plain[2].keys() == {'time', 'time_gap'}
  for key, column in plain[2].items():
    np.testing.assert_array_equal(column, timed[2][key])
