"""The HTTP interface: answers, errors, limits, and concurrent requests."""

import contextlib
import json
import logging
import random
import re
import shutil
import subprocess
import time

import fakeredis
import httpx
import pytest

from lmn_jax.data import times
from lmn_jax.export.runtime.histories import KnownEvent
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.serving import api, middleware
from lmn_jax.serving.service import Service
from lmn_jax.serving.users import redis_store
from lmn_jax.serving.users.records import Event
from lmn_jax.serving.users.store import open_store
from tests.fake_service import (
  ITEMS,
  FakeBundle,
  listening,
  running,
  settings,
  wait_for,
  write_export,
)

ONE = {'user': 'u', 'candidates': ['i1', 'i8']}


@pytest.fixture(scope='module')
def click(tmp_path_factory):
  """Yields a client of a click model without a store."""
  with running(write_export(tmp_path_factory.mktemp('export'))) as client:
    yield client.ready()


@pytest.fixture
def store(tmp_path):
  return open_store(str(tmp_path / 'users.sqlite'), 10)


@pytest.fixture
def next_item(tmp_path, store):
  """Yields a client of a next-item model with a store."""
  with running(write_export(tmp_path / 'export', 'next_item'), store) as client:
    yield client.ready()


def error(response, status):
  """Returns the line of an error response."""
  assert response.status_code == status, response.text
  assert response.headers['content-type'] == 'application/json'
  ((name, line),) = response.json().items()
  assert name == 'error' and line and '\n' not in line and 'Traceback' not in line
  return line


def scores(response):
  assert response.status_code == 200, response.text
  return response.json()


# Answers.


def test_score_of_a_click_model(click):
  answer = scores(click.post('/v1/score', ONE | {'candidates': ['i8', 'never seen', 4]}))
  assert answer.pop('probabilities') == pytest.approx([0.982014, 0.017986, 0.017986], abs=1e-6)
  assert answer == {
    'scores': [4.0, -4.0, -4.0], 'unknown_candidates': ['never seen', '4'], 'user_known': False,
    'events': 0, 'degraded': False, 'model': 'fake', 'export': 'one', 'unknown_features': [],
  }  # fmt: skip


def test_the_history_is_that_of_the_request_or_of_the_export(click):
  assert scores(click.post('/v1/score', ONE | {'user': 'old'}))['events'] == 2
  body = ONE | {'user': 'old', 'history': [1, 'i2', 'i3', 'x', 'i4', 'i5']}
  answer = scores(click.post('/v1/score', body))
  assert answer['events'] == 4 and answer['user_known']
  assert answer['scores'] == pytest.approx([-2.6, 4.4])
  assert scores(click.post('/v1/score', body | {'history': []}))['events'] == 0
  assert scores(click.post('/v1/score', body | {'history': None}))['events'] == 2


def test_events_of_a_history_may_have_times_and_features(tmp_path):
  """They are passed to the export as they are, stored ones with integers as times; fields without a
  value are named."""
  asked = []

  class Rich(FakeBundle):
    rich = True

    def known_events(self, user):
      return [KnownEvent('i1', 90, {'kind': 'a', 'dwell': None})] if user == 'old' else []

    def exported(self, user):
      return self.known_events(user)

    def check_event(self, features, time):
      if 'dwell' in features and not features['dwell'].isdigit():
        raise RequestError(f'event.dwell={features["dwell"]!r} is not a number')

    def ask(self, user, candidates, history=(), context=None, profile=None, state=None, time=None):
      asked.append((list(history), time))
      request = super().ask(user, candidates, ['i1'] * len(history), context, profile, state)
      return request._replace(missing=['event.dwell'] if history else [])

  store = open_store(str(tmp_path / 'users.sqlite'), 5)
  with running(write_export(tmp_path / 'export'), store, open_bundle=Rich) as client:
    client.ready()
    event = {'item': 3, 'time': 95, 'kind': 'b', 'dwell': 1.5}
    scores(client.post('/v1/score', ONE | {'history': ['i2', event], 'time': 99}))
    assert asked.pop() == (['i2', event | {'item': '3', 'dwell': '1.5'}], 99)
    answer = scores(client.post('/v1/score', ONE | {'user': 'old'}))
    assert asked.pop() == ([KnownEvent('i1', 90, {'kind': 'a', 'dwell': None})], None)
    assert answer['missing'] == ['event.dwell']
    assert 'missing' not in scores(client.post('/v1/score', ONE))
    new = {'user': 'old', 'events': [{'item': 'i4', 'time': 97, 'dwell': 8}]}
    assert client.post('/v1/update', new).json()['events_taken'] == 1
    assert store.events('old', 9) == [
      Event('i1', 90, '', '{"kind": "a"}'), Event('i4', 97, '', '{"dwell": "8"}')
    ]  # fmt: skip
    scores(client.post('/v1/score', ONE | {'user': 'old'}))
    assert asked[-1][0] == [
      KnownEvent('i1', 90, {'kind': 'a'}), KnownEvent('i4', 97, {'dwell': '8'})
    ]  # fmt: skip
    new['events'][0]['dwell'] = 'long'
    refused = client.post('/v1/update', new)
    assert refused.status_code == 422
    assert refused.json()['error'] == "events.0: event.dwell='long' is not a number"


@pytest.mark.parametrize(
  'more, message',
  [
    ({'history': [{'time': 3}]}, 'history.0.item: Field required'),
    ({'history': ['i', {'item': 'i', 'dwell': [1]}]}, 'history.1.dwell: must be a string or a num'),
    ({'history': [None]}, 'history.0: must be a string or an integer'),
    ({'history': [{'item': 'i'} | {f'f{n}': 1 for n in range(257)}]}, 'history.0: has 257 feat'),
    ({'time': 'noon'}, "time='noon': a whole number near those of the log, 0 to 100, is expected"),
  ],
)
def test_events_and_times_that_are_not_valid_are_refused(click, more, message):
  answer = click.post('/v1/score', ONE | more)
  assert answer.status_code == 422 and answer.json()['error'].startswith(message)


def test_ids_may_be_numbers(click):
  answer = scores(click.post('/v1/score', {'user': -7, 'candidates': [0, 2**64 - 1]}))
  assert answer['unknown_candidates'] == ['0', '18446744073709551615']


def test_recommend_returns_the_best_items(click):
  answer = scores(click.post('/v1/recommend', {'user': 'old', 'k': 3, 'exclude': ['i8', 'x']}))
  assert answer.pop('items') == [
    {'item': item, 'score': pytest.approx(score)}
    for item, score in [('i7', 3.2), ('i6', 2.2), ('i5', 1.2)]
  ]
  assert answer == {
    'user_known': True, 'events': 2, 'degraded': False, 'model': 'fake', 'export': 'one',
    'unknown_features': [],
  }  # fmt: skip


def test_values_are_read_by_the_rules_of_the_log(click):
  spelt = {'user': ' old ', 'candidates': [' i8\t', 'i8', 7, 7.0, '7.00']}
  answer = scores(click.post('/v1/score', spelt))
  assert answer['user_known'] and answer['unknown_candidates'] == ['7'] * 3
  assert answer['scores'][0] == answer['scores'][1] and answer['unknown_features'] == []
  for value in (1.5, True, 8, 'new'):
    answer = scores(click.post('/v1/score', ONE | {'context': {'query': value}}))
    assert answer['unknown_features'] == ['query']


@pytest.mark.parametrize(
  'more, items',
  [
    ({}, ITEMS[2:]),
    ({'exclude_seen': False}, ITEMS),
    ({'exclude_seen': None}, ITEMS[2:]),
    ({'history': ['i5']}, [x for x in ITEMS[2:] if x != 'i5']),
    ({'exclude_seen': False, 'exclude': ['i4']}, [x for x in ITEMS if x != 'i4']),
  ],
)
def test_items_that_are_left_out_of_recommendations(click, more, items):
  answer = scores(click.post('/v1/recommend', {'user': 'old', 'k': 100} | more))
  assert [pair['item'] for pair in answer['items']] == items[::-1]


def test_nan_becomes_null(next_item):
  answer = scores(next_item.post('/v1/score', ONE | {'candidates': ['i5', 'x']}))
  assert answer['scores'] == [1.0, None] and answer['unknown_candidates'] == ['x']
  assert 'probabilities' not in answer


def test_concurrent_requests_are_computed_together(tmp_path):
  with running(write_export(tmp_path), wait_ms=200.0, max_batch=4) as client:
    client.ready()
    answers = client.posts(*[('/v1/score', ONE | {'candidates': [item]}) for item in ITEMS])
    assert [scores(answer)['scores'] for answer in answers] == [[k - 3.0] for k in range(8)]
    assert client.bundle.sizes == [4, 4]


# Users.


@pytest.mark.parametrize('task', ['click', 'next_item'])
@pytest.mark.parametrize('kind', ['sqlite', 'redis'])
def test_events_are_stored_once_and_used_in_scores(tmp_path, store, task, kind):
  if kind == 'redis':
    store = redis_store.RedisStore('redis://here', 10, fakeredis.FakeRedis())
  with running(write_export(tmp_path / 'export', task), store) as client:
    client.ready()

    def update(*events, user='u'):
      answer = scores(client.post('/v1/update', {'user': user, 'events': list(events)}))
      assert answer['model'] == 'fake' and answer['export'] == 'one'
      assert answer['time_form'] == 'number' and answer['time_unit'] == ''
      return answer['events_taken'], answer['events_repeated'], answer['user_known']

    def events(user='u'):
      return scores(client.post('/v1/score', ONE | {'user': user}))['events']

    def items(user='u'):
      return [event.item for event in store.events(user, 10)]

    assert events() == 0
    five, six = {'item': 'i5', 'time': 5}, {'item': 6, 'time': 6}
    assert update(six, five, five) == (3, 0, False)
    assert items() == ['i5', 'i5', '6'] and events() == 3
    assert scores(client.post('/v1/score', ONE))['user_known']
    assert update(six, five) == (0, 2, True) and events() == 3
    assert update({'item': 'i7', 'time': 7}, six) == (1, 1, True) and events() == 4
    # An event of the newest time, and a late one.
    assert update({'item': 'i1', 'time': 7}, {'item': 'i2', 'time': 6}) == (2, 0, True)
    assert items() == ['i5', 'i5', '6', 'i2', 'i7', 'i1']
    assert update({'item': 'i8'}) == update({'item': 'i8'}) == (1, 0, True)
    named = {'item': 'i8', 'id': 17}
    assert update(named) == (1, 0, True) and update(named) == (0, 1, True)
    assert items()[-5:] == ['i7', 'i1', 'i8', 'i8', 'i8']
    # A user of the export: their events there are stored too, and not added twice.
    assert update({'item': 'i2', 'time': 100}, {'item': 'i1', 'time': 90}, user='old')[:2] == (0, 2)
    assert store.get('old').version == 0 and events('old') == 2
    assert update({'item': 'i3', 'time': 99}, user='old') == (1, 0, True)
    assert items('old') == ['i1', 'i3', 'i2'] and events('old') == 3
    answer = scores(client.post('/v1/recommend', {'user': 'old', 'k': 2, 'exclude': ['i8']}))
    assert [pair['item'] for pair in answer['items']] == ['i7', 'i6']
    answer = scores(client.post('/v1/recommend', {'user': 'u', 'k': 2}))
    assert [pair['item'] for pair in answer['items']] == ['i6', 'i4']
    # Items of events that are no longer stored count as met.
    assert update(*[{'item': 'i4', 'time': 50 + k} for k in range(9)]) == (9, 0, True)
    assert store.met('u') and set(items()) == {'i4', 'i8'}
    answer = scores(client.post('/v1/recommend', {'user': 'u', 'k': 9}))
    assert [pair['item'] for pair in answer['items']] == ['i6', 'i3']


def test_a_stored_state_is_used_by_its_own_export_only(tmp_path, next_item, store):
  next_item.post('/v1/update', {'user': 'u', 'events': [{'item': x} for x in ITEMS]})
  record = store.get('u')
  assert record.tag == 'one' and json.loads(record.state) == ITEMS
  # A state that differs from the events shows that it is used.
  assert store.put('u', 1, 0, [], 'one', b'["a", "b"]')
  assert scores(next_item.post('/v1/score', ONE))['events'] == 2
  assert store.put('u', 2, 0, [], 'one', b'damaged')
  assert scores(next_item.post('/v1/score', ONE))['events'] == 8
  write_export(tmp_path / 'export', 'next_item', 'two')
  wait_for(lambda: scores(next_item.post('/v1/score', ONE))['export'] == 'two')
  assert store.put('u', 3, 0, [], 'one', b'["a", "b"]')
  assert scores(next_item.post('/v1/score', ONE))['events'] == 8
  next_item.post('/v1/update', {'user': 'u', 'events': [{'item': 'i1'}]})
  assert store.get('u').tag == 'two' and len(json.loads(store.get('u').state)) == 9


def test_concurrent_updates_of_a_user_lose_no_event(next_item, store):
  bodies = [{'user': 'u', 'events': [{'item': f'{k}'}]} for k in range(9)]
  answers = next_item.posts(*[('/v1/update', body) for body in bodies])
  assert all(scores(answer)['events_taken'] == 1 for answer in answers)
  assert sorted(event.item for event in store.events('u', 10)) == [f'{k}' for k in range(9)]
  assert len(json.loads(store.get('u').state)) == 9


def test_an_update_is_tried_again_when_another_process_writes_the_user(
  next_item, store, monkeypatch
):
  """After many failures the answer is 503."""
  put, failed = store.put, []

  def failing(user, version, *more):
    if len(failed) < most:
      failed.append(version)
      put(user, version, 0, [Event('theirs')], '', None)
    return put(user, version, *more)

  monkeypatch.setattr(store, 'put', failing)
  most, event = 2, {'user': 'u', 'events': [{'item': 'ours'}]}
  assert scores(next_item.post('/v1/update', event))['events_taken'] == 1
  assert failed == [0, 1]
  assert store.events('u', 10) == list(map(Event, ['theirs', 'theirs', 'ours']))
  assert json.loads(store.get('u').state) == ['theirs', 'theirs', 'ours']
  most = 1000
  assert "user 'u' is being written by other processes" in error(
    next_item.post('/v1/update', event), 503
  )


SECONDS = dict(form='number', unit='second', first=1_700_000_000, last=1_700_086_399)
TEXTS = dict(form='text', unit='microsecond', first=17 * 10**14, last=17 * 10**14 + 10**9)


@pytest.mark.parametrize(
  'clock, fine, refused, expected',
  [
    (
      SECONDS, [1_800_000_000, '1800000001', 1_900_000_000, 1_600_000_000],
      [1_800_000_001_000, '2027-01-15 08:00:00', 1_800_000_000.5, -5], 'number of seconds since',
    ),
    (
      TEXTS, ['2027-01-15 08:00:00', '2027-01-15T08:00:00+01:00', '2027-01-16'],
      [1_800_000_000, 1_800_000_000_000, '1800000000', 'yesterday'], 'a text such as 2024-05-31',
    ),
  ],
)  # fmt: skip
def test_times_of_another_form_than_those_of_the_log_are_refused(
  tmp_path, store, clock, fine, refused, expected
):
  """Others are stored; the unit is in the answer, the error and the document."""
  export = write_export(tmp_path / 'export', time=times.Clock(**clock)._asdict())
  with running(export, store) as client:
    client.ready()

    def update(when):
      return client.post('/v1/update', {'user': 'u', 'events': [{'item': 'i1', 'time': when}]})

    for when in fine:
      answer = scores(update(when))
      assert (answer['events_taken'], answer['time_form']) == (1, clock['form'])
      assert answer['time_unit'] == clock['unit']
    held = store.events('u', 10)
    for when in refused:
      line = error(update(when), 422)
      assert line.startswith(f'events.0.time={when!r}: ') and expected in line
    assert store.events('u', 10) == held and len(held) == len(fine)
    event = client.get('/openapi.json').json()['components']['schemas']['Event']
    assert expected in event['properties']['time']['description']


@pytest.mark.parametrize('task', ['click', 'next_item'])
def test_a_log_that_is_sent_one_event_at_a_time(tmp_path, store, task):
  """Histories equal those of the log, although many events have the same time."""
  rng = random.Random(0)
  log = [(time, f'u{rng.randrange(3)}', n) for n, time in enumerate(sorted([*range(9)] * 7))]
  store.keep = 1000
  with running(write_export(tmp_path / 'export', task), store) as client:
    client.ready()
    for late in (0, 1):  # the second time out of order; all are repeats
      for when, user, n in sorted(log, key=lambda x: x[0] + late * rng.random() * 3):
        events = [{'item': f'{n}', 'time': when}]
        answer = scores(client.post('/v1/update', {'user': user, 'events': events}))
        assert (answer['events_taken'], answer['events_repeated']) == (1 - late, late)
    for user in ('u0', 'u1', 'u2'):
      items = [f'{n}' for _, name, n in log if name == user]
      assert [event.item for event in store.events(user, 100)] == items
      if task == 'next_item':
        assert json.loads(store.get(user).state) == items


def test_a_late_event_is_read_after_the_segments_that_were_read(next_item, store):
  """Segments have four events; two have been read before the late event."""
  store.keep = 1000
  sent = [{'item': f'{k}', 'time': 10 * k} for k in range(10)]
  next_item.post('/v1/update', {'user': 'u', 'events': sent})
  for when, late, at in ((85, 0, 9), (1, 1, 8)):
    event = {'item': f'at {when}', 'time': when}
    answer = scores(next_item.post('/v1/update', {'user': 'u', 'events': [event]}))
    assert (answer['events_taken'], answer['events_late']) == (1, late)
    items = [event.item for event in store.events('u', 99)]
    assert items[at] == f'at {when}' and json.loads(store.get('u').state) == items


def test_an_update_without_a_store_is_refused(click):
  line = error(click.post('/v1/update', {'user': 'u', 'events': [{'item': 'i1'}]}), 409)
  assert line.endswith('start it with --serve.users=PATH.sqlite')


def test_a_store_that_does_not_answer(tmp_path):
  server = fakeredis.FakeServer()
  store = redis_store.RedisStore('redis://here', 10, fakeredis.FakeRedis(server=server))
  with running(write_export(tmp_path), store) as client:
    client.ready()
    server.connected = False
    for path, body in [
      ('/v1/score', ONE),
      ('/v1/update', {'user': 'u', 'events': [{'item': 'i1'}]}),
    ]:
      refused = client.post(path, body)
      assert 'the store of users is not available' in error(refused, 503)
      assert refused.headers['retry-after'] == '1'
    assert 'lmn_jax_store_errors_total 2.0' in client.get('/metrics').text
    assert scores(client.post('/v1/score', ONE | {'history': []}))
    server.connected = True
    assert scores(client.post('/v1/score', ONE))


# Errors.


@pytest.mark.parametrize(
  'body, status, message',
  [
    (b'{', 400, 'the body is not valid JSON: '),
    (b'\xff', 400, 'the body'),
    (b'[' * 100_000, 400, ''),
    (b'1' * 5000, 400, ''),
    (b'', 422, 'body: '),
    (b'[]', 422, 'body: '),
    (b'null', 422, 'body: '),
    (b'{}', 422, r'user: Field required (and 1 more)'),
    (b'{"user": "\\ud800", "candidates": ["a"]}', 422, 'user: must be valid Unicode'),
    (b'{"user": "u", "candidates": ["a"], "context": {"\\ud800": ""}}', 422, 'context.'),
    (
      b'{"user": "u", "candidates": ["a"], "\\ud800": ""}',
      422,
      'body: Input should be a valid string',
    ),
    (b'{"user": "u", "candidates": [NaN]}', 422, 'candidates.0: must be a string or an int'),
  ],
)
def test_wrong_bodies_are_refused(click, body, status, message):
  refused = click.request(
    'POST', '/v1/score', content=body, headers={'content-type': 'application/json'}
  )
  assert message in error(refused, status)


@pytest.mark.parametrize('raw', [True, 1.5, None, [], {}, '', ' ', 'x' * 513, 'a\0b', 2**64])
@pytest.mark.parametrize('place', ['user', 'candidates', 'history', 'exclude', 'events'])
def test_wrong_ids_are_refused(click, raw, place):
  path = {'exclude': '/v1/recommend', 'events': '/v1/update'}.get(place, '/v1/score')
  body = {
    '/v1/score': ONE, '/v1/recommend': {'user': 'u', 'k': 1}, '/v1/update': {'user': 'u'},
  }[path]  # fmt: skip
  value = {'user': raw, 'events': [{'item': raw}]}.get(place, [raw])
  assert place in error(click.post(path, body | {place: value}), 422)


@pytest.mark.parametrize(
  'path, more, message',
  [
    ('score', {'candidates': []}, 'candidates: List should have at least 1 item'),
    ('score', {'candidates': ['i'] * 21}, 'candidates: List should have at most 20 items'),
    ('score', {'candidates': 'i1'}, 'candidates: Input should be a valid list'),
    ('score', {'history': ['i'] * 31}, 'history: List should have at most 30 items'),
    ('score', {'hist': []}, 'hist: Extra inputs are not permitted'),
    ('score', {'context': {'q\nx': 'y'}}, r"context feature 'q\nx' is unknown"),
    ('score', {'context': {'query': []}}, 'context.query: must be a string or a number'),
    ('score', {'time': [1]}, 'time: must be a number or a string'),
    ('score', {'time': True}, 'time: must be a number or a string'),
    ('recommend', {'k': 1, 'by': {'click': True}}, 'by: must be the name of a label, or an object'),
    ('score', {'context': {'query': 1e300}}, 'context.query: must be a number of 64 bits'),
    ('score', {'context': {'query': 'x' * 5000}}, 'context.query: must have at most 4096'),
    ('score', {'context': {f'{k}': '' for k in range(300)}}, 'context: Dictionary should have'),
    ('recommend', {'k': 0}, 'k: Input should be greater than or equal to 1'),
    ('recommend', {'k': 16}, 'k: Input should be less than or equal to 15'),
    ('recommend', {'k': True}, 'k: Input should be a valid integer'),
    ('recommend', {'k': '5'}, 'k: Input should be a valid integer'),
    ('recommend', {'k': 1, 'exclude': ['i'] * 31}, 'exclude: List should have at most 30 items'),
    ('recommend', {'k': 1, 'exclude_seen': 1}, 'exclude_seen: Input should be a valid boolean'),
    ('update', {'events': []}, 'events: List should have at least 1 item'),
    ('update', {'events': [{'item': 'i'}] * 11}, 'events: List should have at most 10 items'),
    ('update', {'events': [{'item': 'i', 'time': 'x' * 65}]}, 'events.0.time: must have at most'),
    ('update', {'events': [{'item': 'i', 'id': ''}]}, 'events.0.id: must have 1 to 512'),
    ('update', {'events': [{'item': 'i', 'time': 1}, {'item': 'i'}]}, '1 of 2 have a time;'),
  ],
)  # fmt: skip
def test_fields_out_of_bounds_are_refused(limited, path, more, message):
  body = {'user': 'u'} | ({'candidates': ['i1']} if path == 'score' else {}) | more
  assert message in error(limited.post(f'/v1/{path}', body), 422)


@pytest.fixture(scope='module')
def limited(tmp_path_factory):
  folder = write_export(tmp_path_factory.mktemp('export'))
  with running(
    folder, max_candidates=20, max_history=30, max_events=10, max_k=15, max_body=8000, timeout_s=0.3
  ) as client:
    yield client.ready()


def chunks(body, size=1000):
  """Returns a body without Content-Length."""

  async def parts():
    for k in range(0, len(body), size):
      yield body[k : k + size]

  return parts()


def test_a_body_that_is_too_large_is_refused(limited):
  headers = {'content-type': 'application/json'}
  fits = json.dumps(ONE).encode().ljust(8000)
  for content in (fits, chunks(fits)):
    assert limited.request('POST', '/v1/score', content=content, headers=headers).status_code == 200
  for content in (fits + b' ', chunks(fits + b' '), chunks(b'[' * 10**7)):
    refused = limited.request('POST', '/v1/score', content=content, headers=headers)
    assert error(refused, 413) == 'the body is larger than 8000 bytes'
    assert refused.headers['connection'] == 'close'
  large = headers | {'content-length': '9' * 30}
  assert error(limited.request('POST', '/v1/score', content=b'', headers=large), 413)


def test_a_body_that_does_not_arrive_is_refused(limited):
  async def never():
    import asyncio

    yield b'{'
    await asyncio.sleep(5)

  headers, began = {'content-type': 'application/json'}, time.monotonic()
  refused = limited.request('POST', '/v1/score', content=never(), headers=headers)
  assert error(refused, 408) == 'the body did not arrive within 0.3 s'
  assert time.monotonic() - began < 2


@pytest.mark.parametrize('kind', [None, 'text/plain', 'application/x-www-form-urlencoded', ''])
def test_another_content_type_is_refused(click, kind):
  headers = {} if kind is None else {'content-type': kind}
  refused = click.request('POST', '/v1/score', content=json.dumps(ONE), headers=headers)
  assert 'application/json' in error(refused, 415)


def test_content_type_may_have_parameters_and_capitals(click):
  headers = {'content-type': 'Application/JSON; charset=utf-8'}
  assert scores(click.request('POST', '/v1/score', content=json.dumps(ONE), headers=headers))


@pytest.mark.parametrize(
  'method, path, status',
  [
    ('GET', '/nowhere', 404), ('POST', '/v1/score/', 404), ('POST', '/v1/%2e%2e/etc', 404),
    ('GET', '/v1/score', 405), ('DELETE', '/v1/update', 405), ('POST', '/healthz', 405),
  ],
)  # fmt: skip
def test_unknown_paths_and_methods_are_refused(click, method, path, status):
  refused = click.request(method, path)
  assert error(refused, status)
  assert ('allow' in refused.headers) == (status == 405)


def test_an_error_of_the_model_fails_its_request_only(tmp_path, caplog):
  """The log has the traceback."""
  with running(write_export(tmp_path, crash=True), wait_ms=100.0) as client:
    client.ready()
    answers = client.posts(*[('/v1/score', ONE | {'candidates': [x]}) for x in ('i1', 'i8', 'i2')])
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert error(answers[1], 500) == 'an error of the service; see its log'
  (record,) = [record for record in caplog.records if record.exc_info]
  assert record.message == 'POST /v1/score failed' and record.levelno == logging.ERROR
  assert str(record.exc_info[1]) == 'the model crashed'


def test_an_error_is_one_line_of_characters_that_can_be_sent():
  sent = middleware.problem(422, 'one\ntwo \ud800' + 'x' * 1000)
  assert json.loads(sent.body)['error'].startswith(r'one two \ud800xxx') and len(sent.body) < 600


# Time and queue.


def test_late_and_too_many_requests_are_refused(tmp_path):
  with running(write_export(tmp_path), timeout_s=0.3, max_queue=2, max_batch=1) as client:
    client.ready()
    bundle = client.bundle
    bundle.slow.clear()
    try:
      first = client.begin('/v1/score', ONE)
      assert bundle.began.wait(5)
      answers = client.posts(*[('/v1/score', ONE)] * 4)
      assert error(first.result(), 504) == 'no answer within 0.3 s'
    finally:
      bundle.slow.set()
    assert sorted(answer.status_code for answer in answers) == [503, 503, 504, 504]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert 'requests are waiting' in error(refused, 503) and refused.headers['retry-after'] == '1'
    wait_for(lambda: client.post('/v1/score', ONE).status_code == 200)
    # Late requests were not computed.
    assert set(bundle.sizes) == {1} and len(bundle.sizes) <= 3


def test_a_long_request_delays_no_other_and_stops_at_its_deadline(tmp_path):
  export = write_export(tmp_path, blocks=10_000, block_s=0.002)
  with running(export, timeout_s=1.5) as client:
    client.ready()
    long = [client.begin('/v1/recommend', {'user': 'u', 'k': 1}) for _ in range(2)]
    for _ in range(5):
      assert scores(client.post('/v1/score', ONE))
    assert not any(future.done() for future in long)
    for future in long:
      assert error(future.result(), 504) == 'no answer within 1.5 s'
    time.sleep(0.1)  # of the step in which it stopped
    taken = client.bundle.steps
    time.sleep(0.05)
    assert client.bundle.steps == taken < 10_000


def test_few_candidates_do_not_wait_for_many(tmp_path):
  export = write_export(tmp_path, block_s=0.002)
  with running(export, max_candidates=30_000, wait_ms=100.0, timeout_s=20.0) as client:
    client.ready()
    many = ONE | {'candidates': ITEMS * 3}
    assert all(map(scores, client.posts(*[('/v1/score', body) for body in (ONE, many, ONE, many)])))
    assert client.bundle.sizes == [2, 2]
    very_many = client.begin('/v1/score', ONE | {'candidates': ITEMS * 1500})
    wait_for(lambda: client.bundle.steps > 0)
    for _ in range(20):
      assert scores(client.post('/v1/score', ONE))
    assert not very_many.done()
    assert scores(very_many.result())['scores'] == [k - 3.0 for k in range(8)] * 1500


def test_a_request_stops_when_its_client_disconnects(tmp_path):
  """An update is finished."""
  store = open_store(str(tmp_path / 'users.sqlite'), 10)
  export = write_export(tmp_path / 'export', 'next_item', blocks=10_000, block_s=0.002)
  service = Service(settings(timeout_s=20.0), export, FakeBundle, store)
  with listening(api.make_app(service)) as url, httpx.Client(base_url=url) as client:
    wait_for(lambda: client.get('/readyz').status_code == 200)

    def send_and_disconnect(path, more, seconds):
      with contextlib.suppress(httpx.ReadTimeout):
        client.post(path, json={'user': 'u'} | more, timeout=httpx.Timeout(5, read=seconds))

    send_and_disconnect('/v1/recommend', {'k': 1}, 0.2)
    wait_for(lambda: not len(service._batcher), 2)
    taken = service.live.answers().bundle.steps
    assert 0 < taken < 1000
    assert 'requests_total{path="/v1/recommend",status="gone"} 1.0' in client.get('/metrics').text
    send_and_disconnect('/v1/update', {'events': [{'item': 'i1'}]}, 0.001)
    wait_for(lambda: store.get('u').version == 1)


# Token.


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
  folder = write_export(tmp_path_factory.mktemp('export'))
  with running(folder, tokens=[b'old-secret', b'secret']) as client:
    yield client.ready()


@pytest.mark.parametrize(
  'header',
  [
    None,
    '',
    'secret',
    'Bearer',
    'Bearer ',
    'Bearer secre',
    'Bearer secret2',
    'Basic secret',
    'Bearer \xe9',
  ],
)
@pytest.mark.parametrize('path', ['/v1/score', '/metrics', '/docs', '/openapi.json', '/nowhere'])
def test_requests_without_a_valid_token_are_refused(guarded, header, path):
  headers = {} if header is None else {'authorization': header.encode('latin-1')}
  method = 'POST' if path == '/v1/score' else 'GET'
  refused = guarded.request(method, path, headers=headers)
  assert error(refused, 401) and refused.headers['www-authenticate'] == 'Bearer'
  assert 'secret' not in refused.text


def test_requests_with_a_token_and_open_paths_are_answered(guarded):
  for header in ('Bearer secret', 'bearer  old-secret'):
    headers = {'authorization': header}
    assert scores(guarded.post('/v1/score', ONE, headers=headers))
    assert guarded.get('/metrics', headers=headers).status_code == 200
  assert guarded.get('/healthz').json() == {'status': 'ok'}
  assert guarded.get('/readyz').status_code == 200
  document = guarded.get('/openapi.json', headers=headers).json()
  assert document['paths']['/v1/score']['post']['security'] == [{'HTTPBearer': []}]
  assert 'security' not in document['paths']['/readyz']['get']


# Ready.


def test_before_the_model_is_loaded_the_service_is_not_ready(tmp_path):
  with running(write_export(tmp_path, warm_s=0.3)) as client:
    assert client.get('/healthz').status_code == 200
    for refused in (client.get('/readyz'), client.post('/v1/score', ONE)):
      assert 'being loaded' in error(refused, 503) and refused.headers['retry-after'] == '1'
    client.ready()
    assert client.get('/readyz').json() == {
      'status': 'ready', 'model': 'fake', 'export': 'one', 'lost': [],
    }  # fmt: skip
    client.service.stopping = True
    assert error(client.get('/readyz'), 503) == 'the service is stopping'
    assert scores(client.post('/v1/score', ONE))  # requests are still answered


def test_the_log_has_the_progress_of_the_compilation(tmp_path, caplog):
  caplog.set_level(logging.INFO, 'lmn_jax')
  with running(write_export(tmp_path)) as client:
    client.ready()
  lines = [record.getMessage().partition(f'{tmp_path}: ')[2] for record in caplog.records]
  assert [line.rpartition(',')[0] for line in lines if line] == [
    '0 of 3 programs compiled for cpu',
    'serves fake one on cpu, 3 programs compiled',
  ]


def test_an_export_that_cannot_be_opened_is_a_failure(tmp_path):
  with running(tmp_path / 'nowhere') as client:
    wait_for(lambda: client.service.live.failure)
    assert 'is not an export' in str(client.service.live.failure)
    assert client.get('/readyz').status_code == 503


def test_answers_without_lost_shards_are_degraded(tmp_path):
  lost = ['10.0.0.7:9000']
  with running(write_export(tmp_path, degraded=True, lost=lost)) as client:
    client.ready()
    answer = client.get('/readyz').json()
    assert answer['status'] == 'degraded' and answer['lost'] == lost
    assert scores(client.post('/v1/score', ONE))['degraded'] is True
    assert scores(client.post('/v1/recommend', {'user': 'u', 'k': 1}))['degraded'] is True
    assert 'lmn_jax_degraded_answers_total 2.0' in client.get('/metrics').text


# Another export.


def test_an_export_is_replaced_without_a_failed_request(tmp_path):
  """Requests that began with the old export finish with it."""
  link = tmp_path / 'export'
  link.symlink_to(write_export(tmp_path / 'a', fingerprint='one'))
  opened = []

  def open_bundle(folder):
    opened.append(FakeBundle(folder))
    return opened[-1]

  with running(link, open_bundle=open_bundle) as client:
    client.ready()
    opened[0].slow.clear()
    first = client.begin('/v1/score', ONE)
    assert opened[0].began.wait(5)
    write_export(tmp_path / 'b', fingerprint='two')
    (tmp_path / 'new').symlink_to(tmp_path / 'b')
    (tmp_path / 'new').rename(link)
    wait_for(lambda: client.get('/readyz').json()['export'] == 'two')
    opened[0].slow.set()
    assert scores(first.result())['export'] == 'one'
    assert scores(client.post('/v1/score', ONE))['export'] == 'two'
    text = client.get('/metrics').text
    assert 'lmn_jax_export{export="one",model="fake"} 0.0' in text
    assert 'lmn_jax_export{export="two",model="fake"} 1.0' in text
    assert len(opened) == 2


def test_a_damaged_new_export_is_refused(tmp_path, caplog):
  with running(write_export(tmp_path)) as client:
    client.ready()
    (tmp_path / 'manifest.json').write_text('{')
    wait_for(lambda: 'lmn_jax_export_swaps_total{result="refused"} 1.0' in metrics(client))
    assert scores(client.post('/v1/score', ONE))['export'] == 'one'
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (
      'the new export is refused, the old one stays: ' in record.message and not record.exc_info
    )
    time.sleep(0.1)  # it is tried once
    assert 'lmn_jax_export_swaps_total{result="refused"} 1.0' in metrics(client)
    write_export(tmp_path, fingerprint='two')
    wait_for(lambda: client.get('/readyz').json()['export'] == 'two')


# Metrics and document.


def metrics(client):
  return client.get('/metrics').text


def test_metrics_count_requests(tmp_path):
  with running(write_export(tmp_path)) as client:
    client.ready()
    before = metrics(client)
    client.post('/v1/score', ONE)
    client.post('/v1/score', {})
    client.get('/nowhere?x=1')
    answer = client.get('/metrics')
    assert answer.headers['content-type'].startswith('text/plain; version=')
    assert 'lmn_jax_compiled_programs 3.0' in before
    for line in (
      'lmn_jax_requests_total{path="/v1/score",status="200"} 1.0',
      'lmn_jax_requests_total{path="/v1/score",status="422"} 1.0',
      'lmn_jax_requests_total{path="other",status="404"} 1.0',
      'lmn_jax_requests_total{path="/metrics",status="200"} 1.0',
      'lmn_jax_request_seconds_count{path="/v1/score"} 2.0',
      'lmn_jax_batch_size_bucket{le="1.0"} 1.0',
      'lmn_jax_queue_length 0.0',
      'lmn_jax_store_errors_total 0.0',
      'lmn_jax_degraded_answers_total 0.0',
      'lmn_jax_export_swaps_total{result="opened"} 1.0',
      'lmn_jax_export{export="one",model="fake"} 1.0',
    ):
      assert line in answer.text.splitlines(), answer.text


def test_the_document_has_all_paths_and_statuses(click):
  paths = click.get('/openapi.json').json()['paths']
  assert sorted(paths) == [
    '/healthz', '/metrics', '/readyz', '/v1/recommend', '/v1/score', '/v1/update',
  ]  # fmt: skip
  statuses = set(paths['/v1/update']['post']['responses'])
  assert statuses == {'200', *map(str, (400, 401, 408, 409, 413, 415, 422, 500, 503, 504))}


def test_the_docs_page_needs_no_internet(click):
  page = click.get('/docs').text
  links = re.findall(r'(?:src|href)="([^"]*)"', page)
  assert len(links) >= 3 and 'http' not in page
  for link in links:
    answer = click.get(link)
    assert answer.status_code == 200 and len(answer.content) > 500, link
  assert click.get('/assets/../api.py').status_code == 404


CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on the path')
def test_the_docs_page_works_in_a_browser_without_internet(tmp_path):
  """The browser can resolve no host name; the page shows all requests."""
  assert CHROMIUM
  rules = 'MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
  flags = ['--headless', '--no-sandbox', '--disable-gpu', f'--host-resolver-rules={rules}']
  flags += [f'--user-data-dir={tmp_path / "browser"}', '--virtual-time-budget=20000', '--dump-dom']
  service = Service(settings(), write_export(tmp_path / 'export'), FakeBundle, None)
  with listening(api.make_app(service)) as url:
    ran = subprocess.run(
      [CHROMIUM, *flags, f'{url}/docs'], capture_output=True, text=True, timeout=120
    )
  assert all(path in ran.stdout for path in ('/v1/score', '/v1/recommend', '/v1/update'))
