"""Asks a running service what its OpenAPI document allows, what it forbids, and plain nonsense.

    python -m lmn_jax --mode=serve --export=DIR --serve.users=users.sqlite &
    python experiments/fuzz.py [--url=http://127.0.0.1:8000] [--seconds=60] [--token=TOKEN]

Requests are schemathesis', from the document (tests/serving/test_fuzz.py has the same in short),
and bodies of random bytes, of JSON cut short, of the wrong type and of the wrong method. Prints how
many of each kind were answered with which status, and each check that failed, once; exit status 1
if any did. No 5xx but 503 and 504 is allowed, and those are counted.
"""

import argparse
import collections
import json
import random
import sys
import time

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, args, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

PATHS = ('/v1/score', '/v1/recommend', '/v1/update')
# What the document cannot say: features of the model, times for all events or none, no store.
CONFIG = {
  'checks': {
    'positive_data_acceptance': {'expected-statuses': ['200', '409', '422', '503', '504']},
    'negative_data_rejection': {'expected-statuses': ['400', '413', '415', '422', '503', '504']},
    'not_a_server_error': {'expected-statuses': ['2xx', '4xx', '503', '504']},
  }
}
ALLOWED = (200, 400, 404, 405, 409, 413, 415, 422, 503, 504)
BATCH = 50  # examples between two looks at the clock


def whole(value):
  """JSON Schema calls 7.0 a whole number; for the service it is none."""
  if isinstance(value, dict):
    return {key: whole(one) for key, one in value.items()}
  if isinstance(value, list):
    return [whole(one) for one in value]
  return int(value) if isinstance(value, float) and value.is_integer() else value


class Tally:
  """What was answered, and what should not have been."""

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
  """A batch of requests from the document."""
  kind = f'{path} {mode.value}'

  @settings(
    max_examples=BATCH, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip
  @args(case=schema[path]['post'].as_strategy(generation_mode=mode))
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
  """A batch of requests of no document."""
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
      # A body that is refused before it was read: the connection ends while it is being sent.
      tally.note('nonsense', 'closed')
      continue
    if response.text.startswith('Invalid HTTP'):  # by uvicorn, of what is no request at all
      tally.note('nonsense', 'no HTTP')
      continue
    tally.note('nonsense', response.status_code)
    if response.status_code not in ALLOWED:
      tally.fail('nonsense', str(response.status_code), f'{method} {path} {kind!r} {body[:100]!r}')
    elif response.status_code >= 400 and not response.text.startswith('{"error":'):
      tally.fail('nonsense', 'no line', f'{method} {path}: {response.text}')


def main():
  """See the head of the file."""
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
