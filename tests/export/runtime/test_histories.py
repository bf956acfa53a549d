"""Requests with times and features of events: what is read, what is missing, what is refused."""

import math

import numpy as np
import pytest

from lmn_jax.errors import UserError
from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.histories import KnownEvent
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.export.runtime.requests import best
from lmn_jax.training import setup as setups
from tests.rich_runs import FIRST, L, log_rows, rich_config, rich_run
from tests.runs import mesh_of, untrained

SIZES = dict(batch_sizes=(1, 2), candidate_sizes=(4,))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """(store, bundle) of a click model with fields of every kind."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    config, workdir, store = rich_run(tmp_path_factory.mktemp('run'), 'din', 'click', time='bias')
    export.export(config, workdir, store, workdir / 'export', 'float32')
  return store, Bundle(workdir / 'export', **SIZES)


def at(seconds, item='i1', **features):
  return {'item': item, 'time': FIRST + seconds} | features


def test_the_manifest_describes_the_fields(exported):
  store, bundle = exported
  features = bundle.manifest['features']
  assert features['event.dwell']['number'] == store.manifest['numeric']['event.dwell']
  assert features['event.dwell']['kind'] == 'event' and 'number' not in features['event.kind']
  assert bundle.manifest['reads_time'] and bundle.rich and bundle.timed
  assert set(store.fields('event')) == {k for k, f in features.items() if f['kind'] == 'event'}


def test_events_are_read_as_those_of_the_log(exported):
  store, bundle = exported
  first = store.clock.first - FIRST
  event = at(first + 50, kind=' k1', dwell='3.50', marks='b|a', price=1)
  history = ['i2', at(first + 40), event]
  request = bundle.ask('u1', ['i3'], history, time=FIRST + first + 60)
  read = request.history
  assert read['time_gap'].tolist() == [0, 20, 10] and read['time_gap'].dtype == np.float32
  kinds = store.raw_ids('event.kind').to_pylist()
  assert read['event.kind'].tolist() == [0, 0, kinds.index('k1')]
  np.testing.assert_array_equal(read['event.dwell'], np.float32([np.nan, np.nan, 3.5]))
  marks = store.raw_ids('event.marks').to_pylist()
  V = store.vocabulary['event.marks']
  assert read['event.marks'].tolist() == [[0, V], [0, V], [marks.index('b'), marks.index('a')]]
  missing = {'event.kind', 'event.marks', 'event.dwell', 'event.price', 'time'}
  assert missing <= set(request.missing)
  # Only the newest L are read.
  assert bundle.ask('u1', ['i3'], ['i2'] * 9).events == L


def test_the_events_of_the_export_are_read_as_they_are(exported):
  store, bundle = exported
  for user in ('u0', 'u3', 'u7'):
    record, _ = bundle._users.find(user)
    events = bundle.known_events(user)
    history = bundle._histories.read(events)
    for key, values in bundle._users.event_features(record).items():
      np.testing.assert_array_equal(history.events[key], values)
    assert [event.time for event in events] == bundle.known_times(user)
    exported = bundle.exported(user)
    assert exported[1:3] == history[1:3] and not exported.missing  # what the log lacks is not named
    for key, values in history.events.items():
      np.testing.assert_array_equal(exported.events[key], values)
      assert exported.events[key].dtype == values.dtype
    read = [bundle.ask(user, None, x) for x in (events, exported)]
    assert read[0].history.keys() == read[1].history.keys()
    np.testing.assert_array_equal(read[0].met, read[1].met)
    np.testing.assert_array_equal(read[0].history['time_gap'], read[1].history['time_gap'])
  assert bundle.known_events('no one') == []


def test_a_request_without_a_time_is_at_the_newest_known_one(exported):
  store, bundle = exported
  first = store.clock.first - FIRST
  last = store.clock.last - store.clock.first
  assert bundle.ask('u1', ['i1'], [at(first + 9)]).time == 9
  assert bundle.ask('u1', ['i1'], ['i1']).time == bundle.ask('u1', ['i1']).time == last
  assert bundle.ask('u1', ['i1'], bundle.known_events('u1')).time == last
  new = KnownEvent('i1', store.clock.last + 7, {})
  assert bundle.ask('u1', ['i1'], [new]).time == last + 7


def test_fields_without_a_value_are_named(exported):
  _, bundle = exported
  context = {'hour': 5, 'query': 'q1', 'price': 'nan'}
  assert bundle.ask('u1', ['i1'], [], context).missing == ['context.price']
  request = bundle.ask('no one', ['i1'], [], context | {'price': 3}, {'age': 30})
  assert request.missing == ['user.city'] and request.unknown_features == []
  assert request.features['user.age'] == np.float32(30)
  assert math.isnan(bundle.ask('u1', ['i1']).features['context.price'])


def test_values_of_events_that_training_did_not_see_are_named(exported):
  _, bundle = exported
  history = [at(0, kind='never', marks='a|never', dwell=3), at(1, kind='k1')]
  assert bundle.ask('u1', ['i1'], history).unknown_features == ['event.kind', 'event.marks']
  assert not bundle.ask('u1', ['i1'], history[1:]).unknown_features


@pytest.mark.parametrize('k', [0, -1, True])
def test_a_wrong_number_of_items_is_refused(exported, k):
  _, bundle = exported
  with pytest.raises(RequestError, match=f'k={k!r} must be a whole number of at least 1'):
    best(np.arange(3), np.zeros(3, np.float32), k)
  with pytest.raises(RequestError, match="exclude='i1' is not a list"):
    bundle.recommend([bundle.ask('u1', None)], [3], ['i1'])


def test_stored_features_that_the_model_does_not_read_so_are_missing(exported):
  _, bundle = exported
  event = KnownEvent('i1', None, {'dwell': 'long', 'unheard of': '1', 'kind': 'k1'})
  request = bundle.ask('u1', ['i1'], [event])
  assert {'event.dwell', 'time'} <= set(request.missing) and 'event.kind' not in request.missing


@pytest.mark.parametrize(
  'history, more, message',
  [
    ([at(10**7)], {'time': FIRST + 10**7 - 3}, 'time=1709999997 is 3 s before the newest event'),
    ([at(9), at(7)], {}, 'history.1.time=1700000007 is before that of an earlier event'),
    ([at(0, sound='x')], {}, "history.0: event feature 'sound' is unknown; event features of the"),
    ([at(0, dwell='long')], {}, "history.0: event.dwell='long' is not a number of float32"),
    ([at(0, dwell='1e39')], {}, "event.dwell='1e39' is not a number of float32"),
    ([at(0, dwell='inf')], {}, "event.dwell='inf' is not a number of float32"),
    ([{'time': 3}], {}, "history.0 has no 'item'"),
    ([KnownEvent('i1', None, {}), 'i1'], {}, 'history: known events are mixed with others'),
    (['i1', at(0, marks='a|b|c|d')], {}, 'history.1: event.marks has 4 values; the model takes at'),
    ([{'item': 'i', 'time': 'noon'}], {}, "history.0.time='noon': a whole number of seconds"),
    ([], {'time': '2024-01-01'}, "time='2024-01-01': a whole number of seconds"),
    ([], {'time': 4_050_000_000}, 's from the earliest one of the log; the model counts up to'),
    ([], {'context': {'price': 'cheap'}}, "context.price='cheap' is not a number of float32"),
    ([], {'profile': {'age': 'old'}}, "user.age='old' is not a number of float32"),
    ([], {'context': {'hour': [1]}}, 'context.hour=[1]: a text or a number is expected'),
    ([at(0, kind=['a', 'b'])], {}, "history.0: event.kind=['a', 'b']: a text or a number"),
    ('i1', {}, "history='i1' is not a list; give a list"),
    ([], {'candidates': 'i1'}, "candidates='i1' is not a list; give a list"),
    ([], {'candidates': [10**5000]}, 'a value of the type int: Exceeds the limit'),
    ([], {'candidates': [np.zeros((99, 9))]}, 'is expected; this has the type ndarray'),
  ],
)
def test_requests_that_are_wrong_are_refused_in_a_line(exported, history, more, message):
  _, bundle = exported
  with pytest.raises(RequestError) as refused:
    bundle.ask('u1', history=history, **{'candidates': ['i1']} | more)
  assert message in str(refused.value) and '\n' not in str(refused.value)


def test_new_events_are_checked(exported):
  _, bundle = exported
  bundle.check_event({'kind': 'new', 'dwell': 3}, FIRST)
  for features, time, message in (
    ({'sound': 1}, None, "event feature 'sound' is unknown"),
    ({'dwell': 'x'}, None, 'not a number'),
    ({}, 2**33, 'the model counts up to'),
  ):
    with pytest.raises(RequestError, match=message):
      bundle.check_event(features, time)


def test_runs_whose_requests_cannot_have_their_fields_are_refused(tmp_path):
  config = rich_config(tmp_path, 'din', 'click', time='bias')
  config.data.time = ''
  config, workdir, store = untrained(config, tmp_path)
  with pytest.raises(UserError, match="time='bias' on a log without times: its gaps are of posit"):
    export.export(config, workdir, store, workdir / 'export', 'float32')
  config.data.event_features = ('id',)
  with pytest.raises(UserError, match="has 'id', but in a request item, time, id are other parts"):
    export.export(config, workdir, store, workdir / 'export', 'float32')


def test_the_log_has_every_case():
  assert any(not row['dwell'] for row in log_rows()) and any('|' in x['marks'] for x in log_rows())
