"""Sends valid, invalid and random requests to a running service.

    python -m lmn_jax --mode=serve --export=DIR --serve.users=users.sqlite &
    python experiments/fuzz.py [--url=http://127.0.0.1:8000] [--seconds=60] [--token=TOKEN]

schemathesis generates requests from the OpenAPI document (tests/serving/test_fuzz.py is a short
form); other bodies are random bytes, truncated JSON, values of wrong types, and wrong methods.
Prints the number of answers by kind and status, and each failed check once; the exit status is 1 if
any failed. The only allowed 5xx are 503 and 504, which are counted.
"""

import argparse
import collections
import json
import random
import sys
import time

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

PATHS = ('/v1/score', '/v1/recommend', '/v1/update')
# Errors that the document does not cover: features of the model, times of some events, no store.
CONFIG = {
  'checks': {
    'positive_data_acceptance': {'expected-statuses': ['200', '409', '422', '503', '504']},
    'negative_data_rejection': {'expected-statuses': ['400', '413', '415', '422', '503', '504']},
    'not_a_server_error': {'expected-statuses': ['2xx', '4xx', '503', '504']},
  }
}
ALLOWED = (200, 400, 404, 405, 409, 413, 415, 422, 503, 504)
BATCH = 50  # examples between two checks of the time


def whole(value):
  """Returns a body with 7 for 7.0, which JSON Schema allows and the service refuses."""
  if isinstance(value, dict):
    return {key: whole(x) for key, x in value.items()}
  if isinstance(value, list):
    return [whole(x) for x in value]
  return int(value) if isinstance(value, float) and value.is_integer() else value


class Tally:
  """Counts of answers, and the failed checks."""

  def __init__(self):
    self.statuses = collections.Counter()
    self.failures = collections.Counter()

  def note(self, kind, status):
    self.statuses[kind, status] += 1

  def fail(self, kind, check, what):
    if not self.failures[kind, check]:
      print(f'{kind}: {check}: {what:.600}', flush=True)
    self.failures[kind, check] += 1


def of_document(schema, path, mode, headers, tally, seed):
  """Sends a batch of requests from the document."""
  kind = f'{path} {mode.value}'

  @settings(
    max_examples=BATCH, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip
  @given(case=schema[path]['post'].as_strategy(generation_mode=mode))
  def ask(case):
    response = case.call(headers=headers)
    tally.note(kind, response.status_code)
    try:
      case.validate_response(response)
    except BaseExceptionGroup as group:
      for error in group.exceptions:
        tally.fail(kind, type(error).__name__, f'{error} {case.body!r}')

  ask._hypothesis_internal_use_seed = seed
  ask()


def nonsense(rng, url, headers, tally):
  """Sends a batch of requests that are not from the document."""
  fine = json.dumps({'user': 'u', 'candidates': ['a', 1], 'k': 3, 'events': [{'item': 'a'}]})
  for _ in range(BATCH):
    body = rng.choice(
      (
        rng.randbytes(rng.randrange(200)),
        fine[: rng.randrange(len(fine))].encode(),
        b'[' * rng.randrange(100_000),
        b'{"user": "\\ud800", "candidates": ["\\udfff"], "k": 1, "events": []}',
        fine.encode() + b' ' * rng.randrange(2_000_000),
        b'"' + b'9' * rng.randrange(10_000) + b'"',
        b'9' * rng.randrange(10_000),
      )
    )
    kind = rng.choice(('application/json', 'application/json; charset=latin-1', 'text/xml', ''))
    method = rng.choice(('POST', 'POST', 'POST', 'GET', 'PUT', 'DELETE', 'PATCH', 'TRACE', 'FOO'))
    path = rng.choice((*PATHS, '/healthz', '/v1/../../etc/passwd', '/%00', '/v1/score%0a', '//'))
    chunked = iter((body[:5], body[5:])) if len(body) > 5 and rng.random() < 0.3 else body
    try:
      response = requests.request(
        method, url + path, data=chunked, headers=headers | {'content-type': kind}, timeout=30
      )
    except requests.ConnectionError:
      # A body can be refused before it is read: the connection then ends while it is sent.
      tally.note('nonsense', 'closed')
      continue
    if response.text.startswith('Invalid HTTP'):  # from uvicorn, for bytes that are not a request
      tally.note('nonsense', 'no HTTP')
      continue
    tally.note('nonsense', response.status_code)
    if response.status_code not in ALLOWED:
      tally.fail('nonsense', str(response.status_code), f'{method} {path} {kind!r} {body[:100]!r}')
    elif response.status_code >= 400 and not response.text.startswith('{"error":'):
      tally.fail('nonsense', 'no line', f'{method} {path}: {response.text}')


def main():
  """Fuzzes the service; see the docstring of the module."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--url', default='http://127.0.0.1:8000')
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--token', default='')
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args()
  headers = {'authorization': f'Bearer {flags.token}'} if flags.token else {}
  schema = schemathesis.openapi.from_url(
    f'{flags.url}/openapi.json', headers=headers, config=SchemathesisConfig.from_dict(CONFIG)
  )

  @schema.hook
  def map_body(context, body):
    return whole(body)

  tally, rng, began, seed = Tally(), random.Random(flags.seed), time.monotonic(), flags.seed
  while time.monotonic() - began < flags.seconds:
    for path in PATHS:
      for mode in GenerationMode:
        of_document(schema, path, mode, headers, tally, seed)
        seed += 1
    nonsense(rng, flags.url, headers, tally)
  for (kind, status), count in sorted(tally.statuses.items(), key=str):
    print(f'{kind} -> {status}: {count}')
  total, failed = tally.statuses.total(), tally.failures.total()
  print(f'{total} requests in {time.monotonic() - began:.0f} s, {failed} failures')
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main()
