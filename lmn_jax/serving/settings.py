"""Settings of the service, `--serve.FIELD=VALUE` on the command line."""

import math

import ml_collections

from lmn_jax.errors import UserError, one_of

ROLES = ('ranker', 'shard')
# Fields with the least value that makes sense.
LEAST = dict(
  workers=1, keep_events=1, max_body=1, max_candidates=1, max_history=1, max_events=1, max_k=1,
  max_queue=1, max_batch=1, wait_ms=0, stop_s=0, drain_s=0, shard_max_body=8,
)  # fmt: skip
POSITIVE = ('timeout_s', 'watch_s', 'shard_timeout_ms')


def settings() -> ml_collections.ConfigDict:
  """The defaults."""
  return ml_collections.ConfigDict(
    dict(
      # Where it listens; 0.0.0.0 is every address of the machine, port 0 any that is free.
      host='127.0.0.1',
      port=8000,
      # Processes that share the port. A compiled function takes all cores by itself: more of them
      # help where reading and writing JSON is the larger part.
      workers=1,
      # The store of users: PATH.sqlite or redis://HOST:6379/0; without it events are not taken.
      users='',
      # Newest events of a user that the store keeps, with times and ids, by which an event that
      # is sent again is known. Of older ones it keeps the item, each once.
      keep_events=1000,
      # File of tokens, one a line, of which each request must bear one. None: everyone may ask.
      token_file='',
      # Limits of a request: bytes, and lengths of its lists.
      max_body=1_048_576,
      max_candidates=1024,
      max_history=10_000,
      max_events=1000,
      max_k=1000,
      # Seconds that a request may take, with its waiting.
      timeout_s=5.0,
      # Requests that wait for the model at most, and are answered together at most.
      max_queue=256,
      max_batch=8,
      # Milliseconds that a request waits for others; while a batch is computed, the next gathers.
      wait_ms=0.5,
      # Users and candidates of a compiled program: batches are cut in such pieces of users, and the
      # candidates of a request filled up to one of those sizes.
      batch_sizes=(1, 2, 4, 8),
      candidate_sizes=(64, 256, 1024),
      # Seconds between two looks whether the export was replaced.
      watch_s=5.0,
      # Seconds that requests in progress have when the service is stopped, and before that seconds
      # in which it still takes requests while /readyz says 503 to the load balancer.
      stop_s=30.0,
      drain_s=0.0,
      # Of a model with a memory: who holds its values, HOST:PORT of shards 0/N to N-1/N in this
      # order; none: this process does.
      shards=(),
      # Milliseconds that they have; who does not answer in time is left out of the sums.
      shard_timeout_ms=50.0,
      # 'ranker' answers requests; 'shard' holds part K of N of the values for rankers: shard='K/N'.
      role='ranker',
      shard='0/1',
      # Bytes that a ranker may send to a shard, 8 for each slot that is read.
      shard_max_body=67_108_864,
    )
  )


def part_of(serve: ml_collections.ConfigDict) -> tuple[int, int]:
  """(K, N) of serve.shard.

  Raises:
    UserError: it is no such pair.
  """
  number, slash, of = serve.shard.partition('/')
  if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
    raise UserError(f'serve.shard={serve.shard!r} must be K/N with 0 <= K < N, such as 0/2')
  return int(number), int(of)


def check(serve: ml_collections.ConfigDict) -> None:
  """Refuses values that make no sense.

  Raises:
    UserError: naming the first one.
  """
  one_of('serve.role', serve.role, ROLES)
  part_of(serve)
  if serve.role == 'shard' and serve.shards:
    raise UserError(f'serve.shards={serve.shards} is for role ranker, and this is a shard')
  for address in serve.shards:
    host, _, port = str(address).rpartition(':')
    if not (host and port.isdecimal()):
      raise UserError(f'serve.shards: {address!r} must be HOST:PORT, such as 10.0.0.7:8001')
  if not serve.host:
    raise UserError("serve.host='' is no address; for example 127.0.0.1, or 0.0.0.0 for all")
  if not 0 <= serve.port <= 65535:
    raise UserError(f'serve.port={serve.port} must be 1 to 65535, or 0 for any that is free')
  for field, least in LEAST.items():
    if not least <= serve[field] < math.inf:
      raise UserError(f'serve.{field}={serve[field]} must be at least {least}')
  for field in POSITIVE:
    if not 0 < serve[field] < math.inf:
      raise UserError(f'serve.{field}={serve[field]} must be larger than 0')
  for field in ('batch_sizes', 'candidate_sizes'):
    sizes = serve[field]
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
      raise UserError(f'serve.{field}={sizes} must be whole numbers from 1 on, such as (1, 8)')
