"""The time of a request: its batches, and the calls that are timed."""

import json
from itertools import islice

import numpy as np
import pytest

from lmn_jax.errors import UserError
from tests.runs import but_slow, load_experiment

latency = load_experiment('latency')


def test_a_request_is_one_user_with_a_full_history_and_candidates():
  request, other = islice(latency.requests(7, 5), 2)
  assert request['user'].shape == (1,) and request['history'].shape == (1, 7)
  assert request['item'].shape == request['item.category'].shape == (1, 5)
  assert request['length'].tolist() == [7]
  for name in ('item', 'item.category', 'history'):
    assert np.unique(request[name]).size > 2 and (request[name] != other[name]).any(), name


def test_calls_after_the_warmup_are_timed(monkeypatch):
  """A call takes its argument in seconds of a fake clock; the first WARMUP calls are not timed."""
  now = [0.0]
  monkeypatch.setattr(latency.time, 'perf_counter', lambda: now[0])

  def score(seconds):
    now[0] += seconds

  monkeypatch.setattr(latency, 'WARMUP', 2)
  assert latency.time_calls(score, [9, 8, 1, 2]) == pytest.approx([1000, 2000])


def test_a_row_for_each_model(monkeypatch, capsys):
  """All models get the same requests; the percentiles are over all blocks."""
  items, took = (
    {'din': [], 'sam': []},
    {'din': iter(range(201)), 'sam': iter(range(0, 2010, 10))},
  )

  def make_score(name, request):
    return name, {'first_s': 1.0, 'temporaries_mib': 2.0}

  def time_calls(name, requests):
    items[name] += [request['item'] for request in requests]
    return [next(took[name]) for _ in requests[latency.WARMUP :]]

  monkeypatch.setattr(latency, 'make_score', make_score)
  monkeypatch.setattr(latency, 'time_calls', time_calls)
  monkeypatch.setattr(latency, 'BLOCKS', 3)
  latency.main(['--length=7', '--candidates=5', '--calls=200', '--models=din,sam'])
  *lines, heads, _, din, sam = capsys.readouterr().out.splitlines()
  rows = [json.loads(line) for line in lines]
  assert [(row['model'], row['calls'], row['p50_ms'], row['p99_ms']) for row in rows] == [
    ('din', 201, 100, 198), ('sam', 201, 1000, 1980),
  ]  # fmt: skip
  assert 'p99_ms' in heads and '| din ' in din and '| sam ' in sam
  np.testing.assert_array_equal(items['din'], items['sam'])


@pytest.mark.parametrize('name', but_slow(['pooling', 'din', 'lmn', 'sam'], {1}))
def test_every_model_answers(name):
  request, other = islice(latency.requests(9, 4), 2)
  score, taken = latency.make_score(name, request)
  assert score(request).shape == (1, 4) and np.unique(score(request)).size == 4
  assert (score(request) != score(other)).any()
  assert taken.keys() == {'first_s', 'temporaries_mib'}


def test_an_unknown_model_is_refused():
  with pytest.raises(UserError, match="--models='dni' is unknown; did you mean 'din'?"):
    latency.main(['--models=dni'])
