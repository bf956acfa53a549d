"""Runs the service: its processes, their port, and how they start and stop.

On SIGTERM /readyz says 503 at once. For `drain_s` requests are still taken, so that a load balancer
has time to see it; then the port is closed, and requests in progress have `stop_s` to end. A second
signal ends the first part.
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

from lmn_jax.errors import UserError
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.manifest import FolderError, read_manifest
from lmn_jax.serving import settings as serving_settings
from lmn_jax.serving.settings import part_of
from lmn_jax.serving.users.store import open_store

ENVIRONMENT = 'LMN_JAX_SERVE'  # what workers are told, as JSON
METERS = 'PROMETHEUS_MULTIPROC_DIR'  # see meters
APPLICATION = 'lmn_jax.serving.server:worker'
KEEP_ALIVE_S = 75  # longer than load balancers keep a connection, so that they close it
CANNOT_START = 3  # a worker's exit status that uvicorn does not answer with another worker
SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


def opener(
  settings: ml_collections.ConfigDict, tokens: Sequence[bytes] = ()
) -> Callable[[Path], Bundle]:
  """What opens the folder of an export. tokens: of which shards are shown the first."""

  def open_bundle(folder):
    values = None
    if settings.shards:
      from lmn_jax.serving.shards.client import Shards

      manifest = read_manifest(folder)
      if not manifest['pooled']:
        raise FolderError(f'{folder}: {manifest["model"]} has no memory that can lie on shards')
      token = tokens[0].decode() if tokens else ''
      timeout_s = settings.shard_timeout_ms / 1000
      values = Shards(settings.shards, manifest, timeout_s, token)
    return Bundle(folder, settings.batch_sizes, settings.candidate_sizes, values)

  return open_bundle


def read_tokens(path: str) -> list[bytes]:
  """The tokens of a file, one a line; none without a file.

  Raises:
    UserError: no such file, none in it, or one that no header can carry.
  """
  if not path:
    return []
  try:
    tokens = Path(path).read_bytes().split(b'\n')
    mode = os.stat(path).st_mode
  except OSError as error:
    raise UserError(
      f'serve.token_file={path!r} cannot be read ({error.strerror}); make it with '
      f'`openssl rand -hex 32 > {path}`'
    ) from None
  tokens = [token.strip() for token in tokens if token.strip()]
  if not tokens:
    raise UserError(f'serve.token_file={path!r} has no token; write one a line')
  if any(not 33 <= byte <= 126 for token in tokens for byte in token):
    raise UserError(f'serve.token_file={path!r}: a token must be printable ASCII without spaces')
  if mode & stat.S_IROTH:
    logger.warning('%s can be read by every user of this machine; chmod 600 ends that', path)
  return tokens


def bind(host: str, port: int) -> socket.socket:
  """Takes the port.

  Raises:
    UserError: it is in use, or the address is none of this machine.
  """
  try:
    family, *_, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=2048)
  except OSError as error:
    said = os.strerror(error.errno) if error.errno in errno.errorcode else error.strerror
    raise UserError(
      f'serve.host={host!r}, serve.port={port}: {said}; choose another --serve.port, or '
      '--serve.host=127.0.0.1'
    ) from None


def serve(settings: ml_collections.ConfigDict, export: str) -> None:
  """Answers requests until SIGTERM or SIGINT.

  Args:
    settings: see serving/settings.py. export: the folder, or a link to it.

  Raises:
    UserError: a setting or an export that cannot be, or a port that is in use.
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
  what = f'shard {settings.shard} of ' if settings.role == 'shard' else ''
  shown = f'[{host}]' if ':' in host else host
  logger.info('http://%s:%d answers from %s%s', shown, port, what, export)
  if not tokens and not host.startswith('127.') and host != '::1':
    logger.warning('everyone who can reach %s may ask; --serve.token_file=FILE ends that', host)
  shared = dict(
    log_config=None, log_level='error', access_log=False, server_header=False, ws='none',
    lifespan='on', timeout_keep_alive=KEEP_ALIVE_S,
    timeout_graceful_shutdown=max(1, round(settings.stop_s)),
  )  # fmt: skip
  # uvicorn ends with the signal that it was given, which was answered by then.
  with listener, _deaf():
    if settings.workers == 1:
      app, service = _build(settings, export, store, tokens)
      server = uvicorn.Server(uvicorn.Config(app, **shared))
      if service:
        service.live.on_failure = lambda: setattr(server, 'should_exit', True)
      server.run([listener])
      _raise(service.live.failure if service else None, export)
    else:
      if store:
        store.close()  # each worker has its own
      with _told(settings, export):
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
def _deaf() -> Iterator[None]:
  """Signals that nobody else hears do nothing."""
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
def _told(settings, export):
  """Tells the workers what they serve, and where they count together."""
  told = json.dumps({'export': export, 'settings': settings.to_dict()})
  with tempfile.TemporaryDirectory(prefix='lmn_jax_meters_') as folder:
    os.environ.update({ENVIRONMENT: told, METERS: folder})
    try:
      yield
    finally:
      del os.environ[ENVIRONMENT], os.environ[METERS]


def _supervise(uvicorn, listener, workers, shared):
  from uvicorn.supervisors import Multiprocess

  config = uvicorn.Config(
    APPLICATION, factory=True, workers=workers, timeout_worker_healthcheck=30, **shared
  )
  supervisor = Multiprocess(config, [listener])
  supervisor.run()
  if any(process.exitcode == CANNOT_START for process in supervisor.processes):
    raise UserError('no worker could start; the lines above say why')


def worker() -> Any:
  """The application of one of several workers, which uvicorn's supervisor starts."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  say = logging.getLogger('lmn_jax')
  say.handlers, say.propagate = [handler], False
  say.setLevel(logging.INFO)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  told = json.loads(os.environ[ENVIRONMENT])
  settings = serving_settings.settings()
  # JSON has no tuples.
  settings.update({k: tuple(v) if isinstance(v, list) else v for k, v in told['settings'].items()})
  try:
    store = open_store(settings.users, settings.keep_events) if settings.users else None
    app, service = _build(settings, told['export'], store, read_tokens(settings.token_file))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(CANNOT_START)

  def end():
    logger.error('error: --export=%s: %s', told['export'], service.live.failure)
    os._exit(CANNOT_START)  # nothing was answered yet

  if service:
    service.live.on_failure = end
  return app


def _end_with_parent():
  """Stops this worker when the process that started it is gone, as after `kill -9`.

  Nobody else would: it would hold the port and answer on.
  """
  parent = multiprocessing.parent_process()
  assert parent
  parent.join()  # ends however it ends, on every system
  logger.error('the process that started this worker is gone; it stops')
  for _ in range(2):  # the second signal ends the time in which requests are still taken
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


def _build(settings, export, store, tokens):
  """(application, Service), and of a shard (application, None)."""
  if settings.role == 'shard':
    from lmn_jax.serving.shards.server import Shard, make_shard_app

    return make_shard_app(settings, Shard(Path(export), *part_of(settings)), tokens), None
  from lmn_jax.serving import api
  from lmn_jax.serving.service import Service

  service = Service(settings, Path(export), opener(settings, tokens), store)
  return api.make_app(service, tokens, lambda: _stopping(service)), service


@contextlib.contextmanager
def _stopping(service):
  """Within, the first signal lets the service say that it stops, before uvicorn is told."""
  import asyncio

  loop, drain_s = asyncio.get_running_loop(), service.settings.drain_s
  before = {number: signal.getsignal(number) for number in SIGNALS}

  def hear(number, frame):
    first, service.stopping = not service.stopping, True
    if first and drain_s:
      logger.info('stops in %g s; requests are still taken', drain_s)
      loop.call_soon_threadsafe(loop.call_later, drain_s, signal.raise_signal, number)
    else:
      before[number](number, frame)

  for number in SIGNALS:
    signal.signal(number, hear)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
