"""Settings of the service, `--serve.FIELD=VALUE` on the command line."""

import copy
import math

import ml_collections
from ml_collections.config_dict import placeholder

from lmn_jax.errors import UserError, one_of
from lmn_jax.export.runtime.platforms import JOINING, PLATFORMS

ROLES = ('ranker', 'shard')
# The smallest values of fields.
LEAST = dict(
  workers=1, keep_events=1, max_body=1, max_candidates=1, max_history=1, max_events=1, max_k=1,
  max_queue=1, max_batch=1, wait_ms=0, stop_s=0, drain_s=0, shard_max_body=8,
)  # fmt: skip
POSITIVE = ('timeout_s', 'watch_s', 'shard_timeout_ms')


def settings() -> ml_collections.ConfigDict:
  """Returns the default settings."""
  return ml_collections.ConfigDict(
    dict(
      # Address to listen on; 0.0.0.0 is every address of the machine, port 0 any free port.
      host='127.0.0.1',
      port=8000,
      # Processes that share the port. A compiled function uses all cores, so more processes help
      # only if most of the time is spent on JSON.
      workers=1,
      # Store of users: PATH.sqlite or redis://HOST:6379/0; without it /v1/update answers 409.
      users='',
      # Newest events of a user that the store keeps with times and ids, by which it recognises
      # repeated events. Of older events it keeps the distinct items.
      keep_events=1000,
      # File of tokens, one a line; each request must send one of them. '': no token is needed.
      token_file='',
      # Limits of a request: bytes of the body, lengths of its lists, and k.
      max_body=1_048_576,
      max_candidates=1024,
      max_history=10_000,
      max_events=1000,
      max_k=1000,
      # Seconds that a request may take, including the time it waits.
      timeout_s=5.0,
      # Device that computes: cpu, cuda or tpu; '' is the one that JAX prefers.
      platform='',
      # Most requests that wait for the model.
      max_queue=256,
      # Most requests that are computed together. None: the largest of batch_sizes.
      max_batch=placeholder(int),
      # Milliseconds that a request waits for others to join its batch. None: .5.
      wait_ms=placeholder(float),
      # Users of the compiled programs: batches are cut into these numbers of users, on cuda and tpu
      # padded to one of them. None: (1, 2, 4, 8), on cuda and tpu (1, 8, 32).
      batch_sizes=placeholder(tuple),
      # Candidates of the compiled programs: those of a request are padded to one of these numbers.
      # None: (64, 256, 1024), on cuda and tpu (256, 1024).
      candidate_sizes=placeholder(tuple),
      # Seconds between two checks whether the export was replaced.
      watch_s=5.0,
      # On SIGTERM: seconds in which /readyz answers 503 and requests are still accepted (drain_s),
      # and then seconds for requests in progress to finish (stop_s).
      stop_s=30.0,
      drain_s=0.0,
      # For a model with a memory: HOST:PORT of the shards 0/N to N-1/N that hold its values, in
      # this order; (): this process holds them.
      shards=(),
      # Milliseconds in which a shard must answer; otherwise it is left out of the sums.
      shard_timeout_ms=50.0,
      # 'ranker' answers requests; 'shard' holds part K of N of the values, see `shard` ('K/N').
      role='ranker',
      shard='0/1',
      # Most bytes of a request to a shard, 8 for each slot read.
      shard_max_body=67_108_864,
    )
  )


def for_platform(serve: ml_collections.ConfigDict, platform: str) -> ml_collections.ConfigDict:
  """Returns settings with the numbers of a platform in place of None. platform: of PLATFORMS."""
  serve, joining = copy.deepcopy(serve), JOINING[platform]
  for field in ('batch_sizes', 'candidate_sizes', 'wait_ms'):
    if serve[field] is None:
      serve[field] = getattr(joining, field)
  if serve.max_batch is None:
    serve.max_batch = max(serve.batch_sizes)
  return serve


def part_of(serve: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns (K, N) of serve.shard.

  Raises:
    UserError: it is not K/N.
  """
  number, slash, count = serve.shard.partition('/')
  if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
    raise UserError(f'serve.shard={serve.shard!r} must be K/N with 0 <= K < N, such as 0/2')
  return int(number), int(count)


def check(serve: ml_collections.ConfigDict) -> None:
  """Refuses settings that are out of bounds.

  Raises:
    UserError: the first one, with its bound.
  """
  one_of('serve.role', serve.role, ROLES)
  if serve.platform:
    one_of('serve.platform', serve.platform, PLATFORMS)
  part_of(serve)
  if serve.role == 'shard' and serve.shards:
    raise UserError(
      f"serve.shards={serve.shards} is for serve.role='ranker', and this is a shard; leave it out"
    )
  for address in serve.shards:
    host, _, port = str(address).rpartition(':')
    if not (host and port.isdecimal()):
      raise UserError(f'serve.shards: {address!r} must be HOST:PORT, such as 10.0.0.7:8001')
  if not serve.host:
    raise UserError("serve.host='' is empty; give an address, such as 127.0.0.1 or 0.0.0.0 for all")
  if not 0 <= serve.port <= 65535:
    raise UserError(f'serve.port={serve.port} must be 1 to 65535, or 0 for any free port')
  for field, least in LEAST.items():
    if serve[field] is not None and not least <= serve[field] < math.inf:
      raise UserError(f'serve.{field}={serve[field]} must be at least {least}')
  for field in POSITIVE:
    if not 0 < serve[field] < math.inf:
      raise UserError(f'serve.{field}={serve[field]} must be larger than 0')
  for field in ('batch_sizes', 'candidate_sizes'):
    sizes = serve[field]
    if sizes is None:
      continue
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
      raise UserError(f'serve.{field}={sizes} must be integers from 1 up, such as (1, 8)')
