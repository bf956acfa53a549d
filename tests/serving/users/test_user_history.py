"""Merging new events into stored ones: none is lost or added twice, and all are in order."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.serving.users.history import merged
from lmn_jax.serving.users.records import Event

ITEMS, TIMES = st.sampled_from('abc'), st.integers(0, 4)  # many equal times
SEED = st.integers(0, 2**32)


def with_ids(pairs):
  return [Event(item, time, f'{n}') for n, (item, time) in enumerate(pairs)]


def take(held, new, begin=0):
  placed = merged(held, new, begin)
  assert placed.taken + placed.repeated == len(new)
  return held[: placed.first] + placed.events, placed


@given(st.lists(st.tuples(ITEMS, TIMES), max_size=12), SEED)
def test_events_in_any_order_and_repeated(pairs, seed):
  """The history has all events once, sorted by time, in any order of arrival."""
  rng = random.Random(seed)
  events = with_ids(pairs)
  sent = rng.sample(events, len(events))
  held = []
  for event in sent:
    held, placed = take(held, [event])
    assert placed.taken == 1 and not placed.late
    before = rng.sample(held, rng.randint(0, len(held)))
    held, placed = take(held, before)
    assert placed.repeated == len(before)
  # Events of the same time are in order of arrival.
  assert held == sorted(sent, key=lambda event: event.time) == take([], sent)[0]


@given(st.lists(st.tuples(ITEMS, TIMES), max_size=12), st.integers(0, 12))
def test_a_request_without_ids_may_be_sent_again(pairs, cut):
  """Also with equal events in a request, or if a part of it was stored before."""
  events = sorted((Event(*pair) for pair in pairs), key=lambda event: event.time)
  held, _ = take([], events[:cut])
  for _ in range(2):
    held, _ = take(held, events)
    assert held == events


@given(st.lists(ITEMS, max_size=9), st.lists(ITEMS, max_size=9))
def test_without_times_only_events_with_a_stored_id_are_repeats(first, then):
  held, _ = take([], [Event(item) for item in first])
  held, placed = take(held, [Event(item) for item in then])
  assert [event.item for event in held] == first + then and placed.repeated == 0
  named = [Event(item, None, f'{n}') for n, item in enumerate(then)]
  once, _ = take(held, named)
  again, placed = take(once, named)
  assert again == once == held + named and placed.repeated == len(named)


@given(st.lists(st.tuples(ITEMS, TIMES), max_size=9), st.tuples(ITEMS, TIMES), st.integers(0, 9))
def test_new_events_are_placed_after_those_that_were_read(pairs, pair, begin):
  held = sorted((Event(*pair) for pair in pairs), key=lambda event: event.time)
  begin, new = min(begin, len(held)), Event(*pair, 'new')
  history, placed = take(held, [new], begin)
  at = history.index(new)
  assert history[:at] + history[at + 1 :] == held and at >= begin
  assert placed.late == any(event.time > new.time for event in held[:begin])
  assert all(event.time > new.time for event in history[at + 1 :])


def test_events_are_not_moved_past_an_event_without_a_time():
  held = [Event('a', 5), Event('b'), Event('c', 9)]
  assert take(held, [Event('d', 7)])[0] == [*held[:2], Event('d', 7), held[2]]
  assert take(held, [Event('d', 1)])[0] == [*held[:2], Event('d', 1), held[2]]
  assert take(held, [Event('d')])[0] == [*held, Event('d')]
