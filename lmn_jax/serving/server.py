"""--mode=serve: the processes of the service, their port, and how they start and stop.

On SIGTERM /readyz answers 503 at once. Requests are still accepted for `drain_s` seconds, so that a
load balancer notices it; then the port is closed, and requests in progress have `stop_s` seconds to
finish. A second signal closes the port at once.
"""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from lmn_jax.distributed import compilation_cache
from lmn_jax.errors import UserError
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.manifest import FolderError, read_manifest
from lmn_jax.export.runtime.programs import PlatformError, device_of, platform_of
from lmn_jax.serving import settings as serving_settings
from lmn_jax.serving.settings import part_of
from lmn_jax.serving.users.store import open_store

ENVIRONMENT = 'LMN_JAX_SERVE'  # export and settings for the workers, as JSON
METRICS = 'PROMETHEUS_MULTIPROC_DIR'  # see metrics.py
APPLICATION = 'lmn_jax.serving.server:worker'
KEEP_ALIVE_S = 75  # longer than load balancers keep a connection, so that they close it
CANNOT_START = 3  # exit status of a worker that uvicorn does not replace
SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


def opener(
  settings: ml_collections.ConfigDict, tokens: Sequence[bytes] = ()
) -> Callable[[Path], Bundle]:
  """Returns a function that opens the folder of an export. tokens: shards get the first one."""

  def open_bundle(folder):
    values = None
    if settings.shards:
      from lmn_jax.serving.shards.client import Shards

      manifest = read_manifest(folder)
      if not manifest['pooled']:
        raise FolderError(
          f'{folder}: the model {manifest["model"]} has no memory, so it has no shards; leave '
          '--serve.shards out'
        )
      token = tokens[0].decode() if tokens else ''
      timeout_s = settings.shard_timeout_ms / 1000
      values = Shards(settings.shards, manifest, timeout_s, token)
    return Bundle(
      folder, settings.batch_sizes, settings.candidate_sizes, values, platform=settings.platform
    )

  return open_bundle


def read_tokens(path: str) -> list[bytes]:
  """Returns the tokens of a file, one a line; [] without a file.

  Raises:
    UserError: the file does not exist or has no token, or a token cannot be sent in a header.
  """
  if not path:
    return []
  try:
    tokens = Path(path).read_bytes().split(b'\n')
    mode = os.stat(path).st_mode
  except OSError as error:
    raise UserError(
      f'serve.token_file={path!r} cannot be read ({error.strerror}); create it with '
      f'`openssl rand -hex 32 > {path}`'
    ) from None
  tokens = [token.strip() for token in tokens if token.strip()]
  if not tokens:
    raise UserError(f'serve.token_file={path!r} has no token; write one on each line')
  if any(not 33 <= byte <= 126 for token in tokens for byte in token):
    raise UserError(f'serve.token_file={path!r}: a token must be printable ASCII without spaces')
  if mode & stat.S_IROTH:
    logger.warning('%s can be read by every user of this machine; use chmod 600', path)
  return tokens


def bind(host: str, port: int) -> socket.socket:
  """Listens on a port.

  Raises:
    UserError: the port is in use, or the address is not one of this machine.
  """
  try:
    family, *_, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=2048)
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno in errno.errorcode else error.strerror
    raise UserError(
      f'serve.host={host!r}, serve.port={port}: {reason}; choose another --serve.port, or '
      '--serve.host=127.0.0.1'
    ) from None


def serve(settings: ml_collections.ConfigDict, export: str, cache: Path | None) -> None:
  """Answers requests until SIGTERM or SIGINT.

  Args:
    settings: see serving/settings.py. export: the folder, or a link to it. cache: folder of
      compiled programs, None for none.

  Raises:
    UserError: a wrong setting, a folder that is not an export, or a port that is in use.
  """
  serving_settings.check(settings)
  uvicorn = _uvicorn()
  try:
    read_manifest(Path(export))
  except FolderError as error:
    raise UserError(f'--export={export}: {error}') from None
  tokens = read_tokens(settings.token_file)
  store = open_store(settings.users, settings.keep_events) if settings.users else None
  listener = bind(settings.host, settings.port)
  host, port = listener.getsockname()[:2]
  shard = f'shard {settings.shard} of ' if settings.role == 'shard' else ''
  url_host = f'[{host}]' if ':' in host else host
  logger.info('http://%s:%d serves %s%s', url_host, port, shard, export)
  if not tokens and not host.startswith('127.') and host != '::1':
    logger.warning(
      'anyone who can reach %s can send requests; use --serve.token_file=FILE to require a token',
      host,
    )
  shared = dict(
    log_config=None, log_level='error', access_log=False, server_header=False, ws='none',
    lifespan='on', timeout_keep_alive=KEEP_ALIVE_S,
    timeout_graceful_shutdown=max(1, round(settings.stop_s)),
  )  # fmt: skip
  # When uvicorn has stopped it raises the signal again, which has been handled by then.
  with listener, _signals_ignored():
    if settings.workers == 1:
      app, service = _build(settings, export, cache, store, tokens)
      server = uvicorn.Server(uvicorn.Config(app, **shared))
      if service:
        service.live.on_failure = lambda: setattr(server, 'should_exit', True)
      server.run([listener])
      _raise(service.live.failure if service else None, export)
    else:
      if store:
        store.close()  # each worker has its own
      with _environment(settings, export, cache):
        _supervise(uvicorn, listener, settings.workers, shared)
  logger.info('stopped')


def _uvicorn():
  try:
    import fastapi  # noqa: F401
    import fastapi_offline  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn
  except ImportError as error:
    raise UserError(
      f"--mode=serve needs the package {error.name}; pip install 'lmn_jax[serve]'"
    ) from None
  return uvicorn


def _raise(failure, export):
  if isinstance(failure, FolderError):
    raise UserError(f'--export={export}: {failure}')
  if failure is not None:
    raise failure


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
  """A context in which signals without another handler do nothing."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _environment(settings, export, cache):
  """A context with environment variables for the workers: the job, and the folder of metrics."""
  job = json.dumps(
    {'export': export, 'cache': str(cache) if cache else '', 'settings': settings.to_dict()}
  )
  with tempfile.TemporaryDirectory(prefix='lmn_jax_metrics_') as folder:
    os.environ.update({ENVIRONMENT: job, METRICS: folder})
    try:
      yield
    finally:
      del os.environ[ENVIRONMENT], os.environ[METRICS]


def _supervise(uvicorn, listener, workers, shared):
  from uvicorn.supervisors import Multiprocess

  config = uvicorn.Config(
    APPLICATION, factory=True, workers=workers, timeout_worker_healthcheck=30, **shared
  )
  supervisor = Multiprocess(config, [listener])
  supervisor.run()
  if any(process.exitcode == CANNOT_START for process in supervisor.processes):
    raise UserError('no worker could start; see the errors in the lines above')


def worker() -> Any:
  """Returns the application of a worker; uvicorn's supervisor calls it in each process."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  package = logging.getLogger('lmn_jax')
  package.handlers, package.propagate = [handler], False
  package.setLevel(logging.INFO)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  job = json.loads(os.environ[ENVIRONMENT])
  settings = serving_settings.settings()
  # JSON has no tuples.
  settings.update({k: tuple(v) if isinstance(v, list) else v for k, v in job['settings'].items()})
  try:
    store = open_store(settings.users, settings.keep_events) if settings.users else None
    cache = Path(job['cache']) if job['cache'] else None
    app, service = _build(settings, job['export'], cache, store, read_tokens(settings.token_file))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(CANNOT_START)

  def end():
    logger.error('error: --export=%s: %s', job['export'], service.live.failure)
    os._exit(CANNOT_START)  # no request was answered yet

  if service:
    service.live.on_failure = end
  return app


def _end_with_parent():
  """Stops this worker when its parent process has ended, also after `kill -9`.

  Otherwise the worker would keep the port and continue to answer.
  """
  parent = multiprocessing.parent_process()
  assert parent
  parent.join()  # returns however the parent ends, on every system
  logger.error('the parent process of this worker has ended; the worker stops')
  for _ in range(2):  # the second signal skips the drain_s seconds
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


def _build(settings, export, cache, store, tokens):
  """Returns (application, Service), or for a shard (application, None)."""
  if settings.role == 'shard':
    from lmn_jax.serving.shards.rows import Shard
    from lmn_jax.serving.shards.server import make_shard_app

    return make_shard_app(settings, Shard(Path(export), *part_of(settings)), tokens), None
  from lmn_jax.serving import api
  from lmn_jax.serving.service import Service

  compilation_cache.enable(cache)
  settings = _for_device(settings)
  service = Service(settings, Path(export), opener(settings, tokens), store)
  return api.make_app(service, tokens, lambda: _stopping(service)), service


def _for_device(settings):
  """Returns the settings with the numbers for the device that computes.

  Raises:
    UserError: JAX does not have the platform.
  """
  try:
    platform = platform_of(device_of(settings.platform))
  except PlatformError as error:
    raise UserError(f'serve.platform={settings.platform!r}: {error}') from None
  if settings.workers > 1 and platform != 'cpu':
    logger.warning(
      'serve.workers=%d: each worker takes a part of the memory of the %s device; one worker is '
      'enough, since the device computes', settings.workers, platform,
    )  # fmt: skip
  return serving_settings.for_platform(settings, platform)


@contextlib.contextmanager
def _stopping(service):
  """A context in which the first signal marks the service as stopping, before uvicorn gets it."""
  import asyncio

  loop, drain_s = asyncio.get_running_loop(), service.settings.drain_s
  before = {number: signal.getsignal(number) for number in SIGNALS}

  def handle(number, frame):
    first, service.stopping = not service.stopping, True
    if first and drain_s:
      logger.info('stops in %g s; requests are still accepted', drain_s)
      loop.call_soon_threadsafe(loop.call_later, drain_s, signal.raise_signal, number)
    else:
      before[number](number, frame)

  for number in SIGNALS:
    signal.signal(number, handle)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
