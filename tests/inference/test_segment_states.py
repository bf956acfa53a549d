"""Events of users in segments: their times, features and gaps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.inference.segment_states import (
  UNTIMED,
  UserStates,
  all_steps,
  clear,
  no_events,
  segment_of,
  take_in,
)

T, V = 4, 30
PADDING = {
  'item': np.array(V, np.int32), 'event.tags': np.full(2, 5, np.int32),
  'event.dwell': np.array(np.nan, np.float32), 'time': np.array(0, np.int32),
}  # fmt: skip


def empty(N=1):
  zeros = np.zeros(N, np.int64)
  return UserStates(zeros.astype(np.int32), zeros, zeros.copy(), no_events(PADDING, N, T), ())


def events_of(time):
  """Events at these times, whose values tell them apart."""
  n = np.arange(len(time))
  return {
    'item': (n % V).astype(np.int32),
    'event.tags': np.stack([n % 5, n % 3], axis=1).astype(np.int32),
    'event.dwell': n.astype(np.float32),
    'time': np.array(time, np.int32),
  }


def cut(events, begin, end):
  return {name: x[begin:end] for name, x in events.items()}


@given(st.lists(st.integers(0, 1000), max_size=14), st.lists(st.integers(0, 14), max_size=3))
def test_events_in_pieces_are_read_like_the_whole_history(times, cuts):
  """Each full segment is read once, with the gap from its last event to the next one."""
  times = sorted(times)
  events, states, read = events_of(times), empty(), []

  def fold(states, users, request):
    read.append(segment_of(states, users, request))
    clear(states, users, PADDING)

  bounds = [0, *sorted(min(x, len(times)) for x in cuts), len(times)]
  for begin, end in zip(bounds, bounds[1:], strict=False):
    states = all_steps(take_in(states, [cut(events, begin, end)], fold))
  full = max(0, len(times) - 1) // T
  assert len(read) == states.segments[0] == full and states.held[0] == len(times) - full * T
  read.append(segment_of(states, np.array([0]), np.array([2000])))
  following = [*times[1:], 2000]
  for n, batch in enumerate(read):
    span = slice(n * T, (n + 1) * T)
    size = len(times[span])
    assert batch['first'][0] == (n == 0)
    for name, x in cut(events, span.start, span.stop).items():
      np.testing.assert_array_equal(batch[name][0, :size], x)
      padding = np.broadcast_to(PADDING[name], batch[name][0, size:].shape)
      np.testing.assert_array_equal(batch[name][0, size:], padding)
    gaps = np.subtract(following[span], times[span])
    assert batch['time_gap'][0].tolist() == [*gaps, *[0] * (T - size)]
    assert batch['time_gap'].dtype == np.float32 and batch['time'].dtype == np.int32


@given(st.lists(st.integers(0, 99), max_size=9), st.integers(0, 9))
def test_a_model_of_windows_keeps_the_newest_events(times, at):
  events, states = events_of(sorted(times)), empty()
  at = min(at, len(times))
  for begin, end in ((0, at), (at, len(times))):
    states = all_steps(take_in(states, [cut(events, begin, end)], None))
  held = states.held[0]
  assert held == min(T, len(times)) and states.segments[0] == 0
  for name, x in events.items():
    np.testing.assert_array_equal(states.recent[name][0, :held], x[len(times) - held :])


def test_an_event_without_a_time_is_at_the_request():
  states = all_steps(take_in(empty(), [events_of([10, UNTIMED, 30])], None))
  batch = segment_of(states, np.array([0]), np.array([50]))
  assert batch['time'].tolist() == [[10, 50, 30, 0]]
  assert batch['time_gap'].tolist() == [[40, 0, 20, 0]]
  # The next event of a full segment may have no time, either.
  batch = segment_of(states, np.array([0]), np.array([UNTIMED]))
  assert batch['time'].tolist() == [[10, 30, 30, 0]]
  assert batch['time_gap'].tolist() == [[20, 0, 0, 0]]
  states = all_steps(take_in(empty(), [events_of([UNTIMED] * 2)], None))
  batch = segment_of(states, np.array([0]), np.array([UNTIMED]))
  assert not batch['time'].any() and not batch['time_gap'].any()
