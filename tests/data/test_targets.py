"""Targets equal those of the definition, also in stores without the column `place`."""

import numpy as np
import pytest
from stores import event, make_store, slow_splits

from lmn_jax.data.targets import targets_of, training_events, training_items


def log_of_ties(seed, copied, rows=60):
  """A log of few times and items; a share `copied` of the rows occurs twice."""
  rng = np.random.default_rng(seed)
  drawn = [(rng.integers(4), rng.integers(5), rng.integers(12)) for _ in range(rows)]
  drawn = [row for row in drawn for _ in range(1 + (rng.random() < copied))]
  return [event(k, f'u{u}', f'i{i}', int(t)) for k, (u, i, t) in enumerate(drawn)]


@pytest.mark.parametrize('protocol', ['leave_one_out', 'user_ratio', 'global_time'])
@pytest.mark.parametrize('has_column', [True, False])
def test_a_target_is_its_own_row_and_not_an_equal_one(tmp_path, protocol, has_column):
  """In the order (time, row): from the column `place` or, without it, by matching rows."""
  for seed in range(8):
    rows, split = log_of_ties(seed, 0.5), dict(protocol=protocol, valid=0.1, test=0.2)
    store = make_store(tmp_path / f'{seed}', rows, split=split)
    if not has_column:
      for part in store.parts:
        del part.examples['place']
    splits = slow_splits(rows, **split)
    names = [name for p in range(len(store.parts)) for name in store.user_ids(p).to_pylist()]
    targets = targets_of(store)
    expected, events = set(), []
    for user, name in enumerate(names):
      ordered = sorted((r for r in rows if r['user'] == name), key=lambda r: (r['time'], r['row']))
      held_out = [(user, k, splits[r['row']]) for k, r in enumerate(ordered) if splits[r['row']]]
      expected |= set(held_out)
      events.append(min((k for _, k, _ in held_out), default=len(ordered)))
    triples = zip(targets.user.tolist(), targets.place.tolist(), targets.split, strict=True)
    assert set(triples) == expected and len(targets.user) == len(expected)
    assert training_events(store).tolist() == events


def test_training_ends_before_a_held_out_event_that_is_no_click(tmp_path):
  rows = [event(k, 'a', f'i{k}', k, k != 7) for k in range(10)]
  split = dict(protocol='global_time', valid=0.2, test=0.1)
  store = make_store(tmp_path / 'store', rows, split=split)
  # Rows 7 and 8 are validation; row 7 is an event without a click.
  assert training_events(store).tolist() == [7]
  assert [items.tolist() for items in training_items(store)] == [[1, 2, 3, 4, 5, 6, 7]]
  assert targets_of(store).place.tolist() == [8, 9]


def test_training_items_are_of_every_user_also_with_one_training_event(tmp_path):
  rows = [event(k, f'u{k % 3}', f'i{k}', k) for k in range(8)]  # 3, 3 and 2 events
  store = make_store(tmp_path / 'store', rows, split=dict(protocol='leave_one_out'))
  ids = store.raw_ids('item').to_pylist()
  raw = [[ids[x] for x in items] for items in training_items(store)]
  assert raw == [['i0'], ['i1'], ['i2', 'i5']]
