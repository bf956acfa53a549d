"""Sampled negatives are of their positive's kind, uniform, and independent of the parts."""

import numpy as np
from stores import decoded, event, make_store

from lmn_jax.data.store import Store


def sampled(store: Store) -> list[tuple]:
  """(user, time, label, item) of all examples, sorted."""
  return sorted((u, t, y, i or '') for _, u, t, i, y, _ in decoded(store))


def test_negatives_are_of_their_positives_kind_and_uniform(tmp_path):
  rng = np.random.default_rng(5)
  rows = [
    event(i, f'u{rng.integers(20)}', f'i{rng.integers(40):02d}', int(rng.integers(25)))
    for i in range(600)
  ]
  fields = dict(negatives=3, seed=7, split=dict(protocol='user_ratio', valid=0.2, test=0.3))
  store = make_store(tmp_path / 'one', rows, **fields)
  counts, examples = store.manifest['counts'], decoded(store)
  left_out = counts['examples_left_out']
  assert 0 <= left_out < 10 and counts['negatives'] == 3 * (600 - left_out)
  assert len(examples) == 4 * (600 - left_out) == 4 * sum(counts['clicks'].values())
  trained = {x[1:4] for x in examples if x[0] == 0 and x[4]}  # user, time and item in training
  tied = {(r['user'], r['time'], r['item']) for r in rows}
  first = {}
  for r in rows:
    key = r['user'], r['item']
    first[key] = min(first.get(key, r['time']), r['time'])
  per_item = dict.fromkeys(store.raw_ids('item').to_pylist()[1:], 0)
  kinds = set()
  for split, user, time, item, label, _ in examples:
    if label:  # its negatives follow
      kind = split > 0 and (user, time, item) in trained, first[user, item] < time
      positive = item
      kinds.add(kind)
      continue
    per_item[item] += 1
    assert item != positive
    assert (split > 0 and (user, time, item) in trained) == kind[0]
    if not kind[0]:
      assert (first.get((user, item), time) < time) == kind[1]
      assert (user, time, item) not in tied
  assert kinds >= {(False, False), (False, True)}
  # Uniform except for what users have met: no item is far from the mean of 45.
  assert min(per_item.values()) > 15 and max(per_item.values()) < 90
  for part in store.parts:  # each positive is followed by its three negatives
    for name in ('split', 'user', 'time', 'end'):
      assert (np.ptp(part.examples[name].reshape(-1, 4), axis=1) == 0).all()
    assert (part.examples['label'].reshape(-1, 4) == [1, 0, 0, 0]).all()

  again = make_store(tmp_path / 'parts', rows, rows_per_part=50, **fields)
  assert len(again.parts) > 5
  assert sampled(again) == sampled(store)
  other = make_store(tmp_path / 'seed', rows, **dict(fields, seed=8))
  assert sampled(other) != sampled(store)


def test_an_example_without_another_item_of_its_kind_is_dropped(tmp_path):
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
  # At time 1 all items are new. At 2 the positive is an item that was met, at 3 it is one of two
  # new items, and at 4 it is the only new item: an example without negatives would show its label.
  assert at[1] == {'198', '199'} and at[2] <= {f'{i:03d}' for i in range(1, 198)}
  assert at[3] == {'199'} and not at[4]
  # 'b' meets the whole vocabulary at one time.
  assert store.manifest['counts']['examples_left_out'] == 200 + 1
  assert sum(store.manifest['counts']['clicks'].values()) == 200
