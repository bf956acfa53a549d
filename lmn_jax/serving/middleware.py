"""What happens to every request around its own code: metrics, errors, token, limits, deadline.

Each part is an ASGI middleware. Every error is JSON, {"error": "one line"}.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.authentication import (
  AuthCredentials,
  AuthenticationBackend,
  AuthenticationError,
  UnauthenticatedUser,
)
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmn_jax.serving.metrics import Metrics

OPEN_PATHS = ('/healthz', '/readyz')  # for load balancers, which have no token
RETRY = {'retry-after': '1'}  # seconds
CLOSE = {'connection': 'close'}  # the rest of the body is not read, so nothing can follow it

logger = logging.getLogger(__name__)


class BodyLimits(NamedTuple):
  """Limits of requests.

  max_body: bytes. timeout_s: seconds from the head of a request to its answer. bodies: paths that
  take a body by POST. kind: the Content-Type of bodies. finished: those of `bodies` whose work is
  finished after the client has disconnected, since it stores what was sent; other work stops.
  """

  max_body: int
  timeout_s: float
  bodies: Collection[str]
  kind: str = 'application/json'
  finished: Collection[str] = ()


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
  """Returns an error response. message: is made one line, of characters that can be sent."""
  line = ' '.join(message.split()).encode('utf-8', 'backslashreplace').decode()
  return JSONResponse({'error': line[:500]}, status, headers)


def add_middleware(
  app: Starlette,
  limits: BodyLimits,
  tokens: Sequence[bytes],
  metrics: Metrics,
  paths: Collection[str],
  ready: Callable[[], bool] = lambda: True,
) -> None:
  """Adds all middleware to an application.

  Args:
    app: the application. limits: of requests. tokens: of which a request must send one; none: no
      token is needed. metrics: count requests. paths: of the application; others count as 'other'.
    ready: whether paths with a body can be answered; otherwise they get 503.
  """
  # The last one added is the outermost.
  app.add_middleware(LimitMiddleware, limits=limits, ready=ready)
  if tokens:
    # Not a FastAPI dependency: FastAPI reads the body first, and unknown paths, the document and
    # shards have no dependencies.
    app.add_middleware(AuthenticationMiddleware, backend=Tokens(tokens), on_error=unauthorized)
  app.add_middleware(ProblemMiddleware)
  app.add_middleware(MetricsMiddleware, metrics=metrics, paths=paths)


class MetricsMiddleware:
  """Counts and times requests by path and status."""

  def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
    """See `add_middleware`."""
    self._app, self._metrics, self._paths = app, metrics, paths

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    start, status = time.perf_counter(), 'gone'  # unless a response is sent

    async def send_and_note(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    await self._app(scope, receive, send_and_note)
    path = scope['path'] if scope['path'] in self._paths else 'other'
    self._metrics.requests.labels(path, status).inc()
    self._metrics.seconds.labels(path).observe(time.perf_counter() - start)


class ProblemMiddleware:
  """Turns exceptions into error responses.

  Starlette's ServerErrorMiddleware is not used for this: it raises again what it has answered.
  """

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    response, started = None, False

    async def send_and_note(message):
      nonlocal started
      started = True
      await send(message)

    try:
      await self._app(scope, receive, send_and_note)
    except HTTPException as error:
      response = problem(error.status_code, error.detail, error.headers)
    except Exception:
      logger.exception('%s %s failed', scope['method'], scope['path'])
      response = problem(500, 'an error of the service; see its log')
    if response and not started:
      await response(scope, receive, send)


class Tokens(AuthenticationBackend):
  """Accepts requests with one of some bearer tokens."""

  def __init__(self, tokens: Sequence[bytes]):
    self._tokens = tokens

  async def authenticate(
    self, conn: HTTPConnection
  ) -> tuple[AuthCredentials, UnauthenticatedUser] | None:
    """Checks the token of a request; tokens name no user.

    Raises:
      AuthenticationError: no token, or a wrong one.
    """
    if conn.scope['path'] in OPEN_PATHS:
      return None
    scheme, _, token = conn.headers.get('authorization', '').partition(' ')
    sent = token.encode('latin-1').strip()
    # All are compared, so that the time does not tell which one is close.
    matches = [hmac.compare_digest(sent, token) for token in self._tokens]
    if scheme.lower() != 'bearer' or not any(matches):
      raise AuthenticationError('a token is needed; send Authorization: Bearer TOKEN')
    return None


def unauthorized(conn: HTTPConnection, error: AuthenticationError) -> JSONResponse:
  """Returns the response to a request without a valid token."""
  return problem(401, str(error), {'www-authenticate': 'Bearer'})


class LimitMiddleware:
  """Reads bodies within limits, and stops the application at the deadline.

  The application gets the deadline, in time of the event loop, as scope['deadline'].
  """

  def __init__(self, app: ASGIApp, limits: BodyLimits, ready: Callable[[], bool]):
    """See `add_middleware`."""
    self._app, self._limits, self._ready = app, limits, ready

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    limits = self._limits
    scope['deadline'] = asyncio.get_running_loop().time() + limits.timeout_s
    messages: list[Message] = []
    has_body = scope['path'] in limits.bodies and scope['method'] == 'POST'
    if has_body:
      body = await self._body(HTTPConnection(scope), receive)
      if body is None:
        return
      messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def replay():
      return messages.pop() if messages else await receive()

    try:
      async with asyncio.timeout_at(scope['deadline']):
        if has_body and scope['path'] not in limits.finished:
          await _while_connected(receive, self._app(scope, replay, send))
        else:
          await self._app(scope, replay, send)
    except TimeoutError:
      raise HTTPException(504, f'no answer within {limits.timeout_s:g} s', RETRY) from None

  async def _body(self, conn, receive):
    """Returns the body of a request; None if the client has disconnected."""
    limits = self._limits
    if not self._ready():
      raise HTTPException(503, 'the model is being loaded; try again in a moment', RETRY)
    kind = conn.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != limits.kind:
      raise HTTPException(415, f'the body must have Content-Type: {limits.kind}')
    try:
      async with asyncio.timeout_at(conn.scope['deadline']):
        return await _read(receive, limits.max_body, conn.headers.get('content-length', ''))
    except TimeoutError:
      raise HTTPException(
        408, f'the body did not arrive within {limits.timeout_s:g} s', CLOSE
      ) from None


async def _read(receive: Receive, max_body: int, size: str) -> bytes | None:
  """Returns a body, None after a disconnect. size: the header Content-Length, '' for none.

  Starlette's RequestBodyLimitMiddleware and FastAPI's max_body_size are not used: they answer in
  plain text, and keep the connection.
  """
  too_large = HTTPException(413, f'the body is larger than {max_body} bytes', CLOSE)
  if size.isdigit() and int(size[:20]) > max_body:
    raise too_large
  parts, length = [], 0
  while True:
    message = await receive()
    if message['type'] == 'http.disconnect':
      return None
    parts.append(message.get('body', b''))
    length += len(parts[-1])
    if length > max_body:
      raise too_large
    if not message.get('more_body', False):
      return b''.join(parts)


async def _while_connected(receive: Receive, work: Any) -> None:
  """Runs the work for a request whose body was read, and cancels it if the client disconnects."""
  task = asyncio.ensure_future(work)

  async def watch():
    while (await receive())['type'] != 'http.disconnect':
      pass
    task.cancel()

  watching = asyncio.ensure_future(watch())
  try:
    await asyncio.wait([task])
  finally:
    watching.cancel()
    task.cancel()  # if this is being cancelled itself; otherwise it is done
    await asyncio.wait([task, watching])
  if not task.cancelled():
    task.result()
