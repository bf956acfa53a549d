"""Lanes against walking through each user by hand; hosts, order, ties, bad input."""

import pickle

import numpy as np
import pytest
from stores import event, make_store, slow_splits

from lmn_jax.data.batches import loader
from lmn_jax.data.lanes import (
  LaneSource,
  deal,
  histories_of,
  targets_of,
  training_events,
  training_items,
)
from lmn_jax.data.packing import pack
from lmn_jax.data.splits import SPLITS
from lmn_jax.errors import UserError

B, T = 4, 3


@pytest.fixture(scope='module', params=['leave_one_out', 'global_time', 'user_ratio'])
def log(request, tmp_path_factory):
  """(rows, store): users of 1 to 30 events, some of one second, several parts."""
  rng = np.random.default_rng(0)
  rows = []
  for user in range(15):
    for _ in range(1 + 2 * user):
      # Few times, so that events share them; few items, so that they come again.
      time, item = int(rng.integers(12)), int(rng.integers(9))
      rows.append(event(len(rows), f'u{user:02d}', f'i{item}', time))
  split = dict(protocol=request.param, valid=0.15, test=0.15)
  folder = tmp_path_factory.mktemp('lanes') / 'store'
  store = make_store(folder, rows, split=split, rows_per_part=60)
  assert len(store.parts) > 2
  return rows, store


def walked(rows, store):
  """By user the events in order: (item row, number of the split)."""
  code = {raw: row for row, raw in enumerate(store.raw_ids('item').to_pylist())}
  split = {}
  targets = targets_of(store)
  for user, place, number in zip(targets.user, targets.place, targets.split, strict=True):
    split[int(user), int(place)] = int(number)
  names = [name for p in range(len(store.parts)) for name in store.user_ids(p).to_pylist()]
  found = {}
  for record, name in enumerate(names):
    mine = sorted((r for r in rows if r['user'] == name), key=lambda r: (r['time'], r['row']))
    found[record] = [
      (code.get(r['item'], 0), split.get((record, k), 0)) for k, r in enumerate(mine)
    ]
  return found


def asked_at(batch, shape=(B, T)):
  """The numbers of a batch of evaluation where they are asked: [B, T], -1 elsewhere."""
  found = np.full(shape, -1)
  lane, which = np.nonzero(batch['number'] >= 0)
  found[lane, batch['asked'][lane, which]] = batch['number'][lane, which]
  assert (found >= 0).sum() == len(lane), 'each at a position of its own'
  return found


def test_targets_stand_where_the_order_has_them(log):
  """A target is at its own place among the events of its second, each at another."""
  rows, store = log
  targets, users = targets_of(store), walked(rows, store)
  pairs = list(zip(targets.user.tolist(), targets.place.tolist(), strict=True))
  assert len(set(pairs)) == len(pairs) == store.examples['valid'] + store.examples['test']
  for (user, place), item in zip(pairs, targets.item, strict=True):
    assert users[user][place][0] == item
  last = [max(place for u, place in pairs if u == user) for user in {u for u, _ in pairs}]
  assert last == [len(users[user]) - 1 for user in {u for u, _ in pairs}]


def streamed(source, steps):
  """By lane, the segments of each user: [(user's items, targets, numbers)]."""
  lanes = [[] for _ in range(B)]
  for step in range(steps):
    batch = source[step]
    for lane in range(B):
      if batch['first'][lane]:
        lanes[lane].append([])
      one = {name: x[lane] for name, x in batch.items()}
      if 'asked' in batch:
        one['number'] = asked_at(batch)[lane]
      lanes[lane][-1].append(one)
  return lanes


def test_a_round_of_training_learns_every_event_once(log):
  rows, store = log
  source, V = LaneSource(store.path, 'train', B, T, shuffle=True), store.vocabulary['item']
  users = walked(rows, store)
  wanted = []
  for events in users.values():
    cut = next((k for k, (_, split) in enumerate(events) if split), len(events))
    if cut > 1:
      wanted.append([item for item, _ in events[:cut]])
  lanes = streamed(source, 3 * source.batches)
  rounds = []
  for lane, dealt in zip(lanes, source._dealt, strict=True):
    walks = []
    for walk in lane:
      items, targets = (
        np.concatenate([segment[name] for segment in walk]) for name in ('item', 'target')
      )
      count = (targets < V).sum()
      np.testing.assert_array_equal(items[1:count], targets[: count - 1])
      assert (targets[count:] == V).all()
      walks.append([*items[:1].tolist(), *targets[:count].tolist()])
    # Each round has the lane's users once; the last of all was cut off by the last step.
    n = len(dealt)
    assert sorted(walks[:n]) == sorted(walks[n : 2 * n])
    rounds += walks[:n]
  assert sorted(rounds) == sorted(wanted)


@pytest.mark.parametrize('split', SPLITS[1:])
def test_evaluation_reads_all_before_each_target_and_nothing_behind(log, split):
  rows, store = log
  source, V = LaneSource(store.path, split, B, T), store.vocabulary['item']
  users, targets, seen = walked(rows, store), source.targets, []
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
      own = [int(targets.place[n]) for n in numbers[numbers >= 0]]
      if own:
        assert (items < V).sum() == max(own), 'nothing behind the last target'
  placed = source.own[targets.place[source.own] > 0]
  assert sorted(seen) == sorted(placed.tolist())


def rounds_of(source):
  """Each lane of a round of training as a batch of its own; the second round has another order."""
  rows = len(source._segments)
  orders = [[], []]
  for k in range(2 * rows):
    step, lane = divmod(k, B)
    batch = {name: x[lane : lane + 1] for name, x in source[step].items()}
    assert batch['first'].all()
    orders[k // rows].append(batch)
  one, two = ([batch['item'].tolist() for batch in order] for order in orders)
  assert sorted(one) == sorted(two) and one != two
  return orders[0]


def test_the_latest_window_of_training(log):
  _, store = log
  source, V = (
    LaneSource(store.path, 'train', B, T, shuffle=True, latest=True),
    store.vocabulary['item'],
  )
  wanted = [
    (items[-T - 1 : -1].tolist(), items[-T:][1 - (len(items) > T) :].tolist())
    for items in LaneSource(store.path, 'train', B, T).histories()
  ]
  found = []
  for batch in rounds_of(source):
    item, target = batch['item'], batch['target']
    found.append((item[item < V].tolist(), target[target < V].tolist()))
  assert sorted(found) == sorted(wanted)


def test_windows_of_training_end_with_the_history(log):
  rows, store = log
  source, V = (
    LaneSource(store.path, 'train', B, T, shuffle=True, whole=False),
    store.vocabulary['item'],
  )
  assert all(source[k]['first'].all() for k in range(5))
  wanted = []
  for items in LaneSource(store.path, 'train', B, T).histories():
    for end in range(len(items) - 1, 0, -T):
      begin = max(end - T, 0)
      wanted.append((items[begin:end].tolist(), items[begin + 1 : end + 1].tolist()))
  found = []
  for batch in rounds_of(source):
    pair = [batch[name][0] for name in ('item', 'target')]
    found.append(tuple(x[x < V].tolist() for x in pair))
    assert (np.diff((pair[0] < V).astype(int)) <= 0).all(), 'events stand on the left'
  assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize('split', SPLITS[1:])
def test_a_window_of_evaluation_is_what_stands_before_its_target(log, split):
  rows, store = log
  source, V = LaneSource(store.path, split, B, T, whole=False), store.vocabulary['item']
  users, targets, seen = walked(rows, store), source.targets, []
  for step in range(source.batches):
    batch = source[step]
    for lane in range(B):
      numbers = asked_at(batch)[lane]
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
  assert sorted(seen) == source.own[targets.place[source.own] > 0].tolist()


def windows_in(batch, V):
  """(items, targets or numbers) of each window of a packed batch, which stand without gaps."""
  found = []
  shape = batch['item'].shape
  wanted = batch['target'] if 'target' in batch else asked_at(batch, shape)
  for item, target, begin in zip(batch['item'], wanted, batch['begin'], strict=True):
    there = item < V
    assert (np.diff(there.astype(int)) <= 0).all(), 'nothing between windows'
    for low in np.unique(begin[there]):
      own = there & (begin == low)
      assert own[low] and (np.flatnonzero(own) == low + np.arange(own.sum())).all()
      found.append((item[own].tolist(), target[own].tolist()))
  return found


def test_windows_side_by_side_are_those_of_training_and_fill_the_lanes(log):
  _, store = log
  V, room = store.vocabulary['item'], 12
  apart, packed = (
    LaneSource(store.path, 'train', B, room, shuffle=True, whole=False, packed=packed)
    for packed in (False, True)
  )
  wanted = []
  for batch in rounds_of(apart):
    item, target = batch['item'], batch['target']
    wanted.append((item[item < V].tolist(), target[item < V].tolist()))
  assert any(len(items) < room for items, _ in wanted)
  found, filled, lanes = [], 0, len(packed._segments)
  for batch in rounds_of(packed):
    assert 'user' not in batch
    found += windows_in(batch, V)
    filled += int((batch['item'] < V).sum())
  assert sorted(found) == sorted(wanted)
  assert lanes == -(-filled // room) < len(wanted), 'not a lane more than must be'


@pytest.mark.parametrize('split', SPLITS[1:])
def test_windows_of_evaluation_side_by_side(log, split):
  rows, store = log
  V, room = store.vocabulary['item'], 12
  source = LaneSource(store.path, split, B, room, whole=False, packed=True)
  users, seen = walked(rows, store), []
  for k in range(source.batches):
    for items, numbers in windows_in(source[k], V):
      number = numbers[-1]
      assert set(numbers[:-1]) <= {-1}
      user, place = int(source.targets.user[number]), int(source.targets.place[number])
      assert items == [item for item, _ in users[user][max(place - room, 0) : place]]
      seen.append(number)
  assert sorted(seen) == source.own[source.targets.place[source.own] > 0].tolist()


def test_windows_are_packed_whole_each_once_and_tightly():
  rng = np.random.default_rng(0)
  for N, room in ((1, 5), (40, 1), (3000, 50), (500, 200), (30, 7)):
    size = np.minimum(rng.geometric(min(1, 2.5 / room), N), room)
    packed, bounds = pack(size, room)
    assert sorted(packed.tolist()) == list(range(N)) and bounds[0] == 0 and bounds[-1] == N
    held = np.add.reduceat(size[packed], bounds[:-1])
    assert (np.diff(bounds) > 0).all() and held.max() <= room
    # Of any two lanes at least one is more than half full; with short ones nearly all are full.
    assert np.sum(2 * held <= room) <= 1
    if N > 100:
      assert len(held) <= np.ceil(size.sum() / room) * 1.01 + 1
  packed, bounds = pack(np.array([4, 3, 3, 2, 2, 2]), 8)  # 4 + 3, then 3 + 2 + 2, then 2
  np.testing.assert_array_equal(packed, [0, 1, 2, 3, 4, 5])
  np.testing.assert_array_equal(bounds, [0, 2, 5, 6])


def test_lanes_are_even_and_have_every_user_once():
  segments = np.random.default_rng(0).integers(1, 9, 1000)
  dealt = deal(segments, 7)
  assert sorted(np.concatenate(dealt).tolist()) == list(range(1000))
  totals = [segments[users].sum() for users in dealt]
  assert max(totals) - min(totals) <= 8
  assert [len(users) for users in deal(segments[:3], 5)] == [1, 1, 1, 0, 0]


def test_hosts_read_their_lanes_of_the_same_batches(log):
  _, store = log
  made = dict(shuffle=True, sampler='popularity', negatives=5)
  whole = LaneSource(store.path, 'train', B, T, **made)
  for rows in ([0, 1], [2, 3]):
    part = pickle.loads(
      pickle.dumps(LaneSource(store.path, 'train', B, T, rows=np.array(rows), **made))
    )
    for step in (0, 7, 100):
      for name, x in part[step].items():
        np.testing.assert_array_equal(x, whole[step][name][rows])
  assert repr(part) == repr(whole)


def test_the_step_alone_is_the_position(log):
  _, store = log
  source = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True)
  wanted = [source[step] for step in range(40)]
  again = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True)
  iterator = loader(again)
  iterator.set_state({'next_index': 17})
  for step in (17, 18, 19):
    for name, x in next(iterator).items():
      np.testing.assert_array_equal(x, wanted[step][name])
  other = LaneSource(store.path, 'train', B, T, seed=4, shuffle=True)
  assert any((other[k]['item'] != wanted[k]['item']).any() for k in range(40))


@pytest.mark.parametrize('whole', [True, False])
def test_positions_past_two_to_the_31(log, whole):
  """Items and targets there are of the log, one behind the other, as at the first step."""
  _, store = log
  source = LaneSource(store.path, 'train', B, T, seed=3, shuffle=True, whole=whole)
  V = store.vocabulary['item']
  for step in (0, 2**31 + 5):
    batch = source[step]
    there = (batch['item'] < V) & (batch['target'] < V)
    assert there[:, 0].all()
    assert (batch['item'][:, 1:] == batch['target'][:, :-1])[there[:, 1:]].all()


def test_negatives_are_drawn_as_often_as_they_should(log):
  _, store = log
  V = store.vocabulary['item']
  counts = np.zeros(V)
  for items in LaneSource(store.path, 'train', B, T).histories():
    np.add.at(counts, items, 1)
  for sampler in ('uniform', 'popularity'):
    source = LaneSource(store.path, 'train', B, T, shuffle=True, sampler=sampler, negatives=50)
    drawn = np.concatenate([source[k]['negative'].ravel() for k in range(40)])
    share = np.bincount(drawn, minlength=V) / len(drawn)
    wanted = (
      np.r_[0, np.full(V - 1, 1 / (V - 1))] if sampler == 'uniform' else counts / counts.sum()
    )
    np.testing.assert_allclose(share, wanted, atol=0.01)
    if sampler == 'popularity':
      batch = source[0]
      np.testing.assert_allclose(
        np.exp(batch['negative_log_q']), wanted[batch['negative']], rtol=1e-5
      )
      there = batch['target'] < V
      np.testing.assert_allclose(
        np.exp(batch['log_q'][there]), wanted[batch['target'][there]], rtol=1e-5
      )


def test_what_cannot_be_read_is_refused(tmp_path):
  rows = [event(k, f'u{k % 2}', f'i{k}', k) for k in range(8)]
  store = make_store(tmp_path / 'store', rows, split=dict(protocol='leave_one_out'))
  with pytest.raises(UserError, match='config.batch_size=3 lanes are more than the 2 users'):
    LaneSource(store.path, 'train', 3, T, shuffle=True)
  rows = [event(k, f'u{k}', f'i{k}', k) for k in range(4)]
  store = make_store(tmp_path / 'single', rows, split=dict(protocol='leave_one_out'))
  for split in SPLITS:
    with pytest.raises(UserError, match=f"split '{split}' has nothing to predict from"):
      LaneSource(store.path, split, 1, T)
  assert len(histories_of(training_events(store), targets_of(store), 'train').record) == 0


def place_log(seed, copied, rows=60):
  """A log of few seconds and items in which rows stand twice."""
  rng = np.random.default_rng(seed)
  drawn = [(rng.integers(4), rng.integers(5), rng.integers(12)) for _ in range(rows)]
  drawn = [row for row in drawn for _ in range(1 + (rng.random() < copied))]
  return [event(k, f'u{u}', f'i{i}', int(t)) for k, (u, i, t) in enumerate(drawn)]


@pytest.mark.parametrize('protocol', ['leave_one_out', 'user_ratio', 'global_time'])
@pytest.mark.parametrize('column', [True, False])
def test_a_target_is_its_own_row_and_not_one_like_it(tmp_path, protocol, column):
  """By the order (time, row), with a column `place` and, of older stores, by looking it up."""
  for seed in range(8):
    rows, split = place_log(seed, 0.5), dict(protocol=protocol, valid=0.1, test=0.2)
    store = make_store(tmp_path / f'{seed}', rows, split=split)
    if not column:
      for part in store.parts:
        del part.examples['place']
    splits = slow_splits(rows, **split)
    names = [name for p in range(len(store.parts)) for name in store.user_ids(p).to_pylist()]
    targets, training = targets_of(store), training_events(store)
    found = set(zip(targets.user.tolist(), targets.place.tolist(), targets.split, strict=True))
    wanted, events = set(), []
    for user, name in enumerate(names):
      mine = sorted((r for r in rows if r['user'] == name), key=lambda r: (r['time'], r['row']))
      held = [(user, k, splits[r['row']]) for k, r in enumerate(mine) if splits[r['row']]]
      wanted |= set(held)
      events.append(min((k for _, k, _ in held), default=len(mine)))
    assert found == wanted and len(targets.user) == len(wanted)
    assert training.tolist() == events


def test_training_ends_before_a_held_out_event_that_is_no_click(tmp_path):
  rows = [event(k, 'a', f'i{k}', k, k != 7) for k in range(10)]
  split = dict(protocol='global_time', valid=0.2, test=0.1)
  store = make_store(tmp_path / 'store', rows, split=split)
  # Rows 7 and 8 validate, of which 7 is an event that was not clicked.
  assert training_events(store).tolist() == [7]
  assert [items.tolist() for items in training_items(store)] == [[1, 2, 3, 4, 5, 6, 7]]
  assert targets_of(store).place.tolist() == [8, 9]


def test_training_items_are_those_of_every_user(tmp_path):
  """Also of users with one event of training, and whatever a model reads."""
  rows = [event(k, f'u{k % 3}', f'i{k}', k) for k in range(8)]  # 3, 3 and 2 events
  store = make_store(tmp_path / 'store', rows, split=dict(protocol='leave_one_out'))
  ids = store.raw_ids('item').to_pylist()
  found = [[ids[x] for x in items] for items in training_items(store)]
  assert found == [['i0'], ['i1'], ['i2', 'i5']]
