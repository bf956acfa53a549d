"""What every request passes before and after its own code: token, type, size, time, error, meters.

It is an ASGI application around another one. Every refusal is JSON, {"error": "one line"}.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lmn_jax.serving.metrics import Meters

FREE = ('/healthz', '/readyz')  # for load balancers, which have no token
LATER = {'retry-after': '1'}  # seconds

logger = logging.getLogger(__name__)


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
  """A refusal. message: made one line, and of characters that can be sent."""
  line = ' '.join(message.split()).encode('utf-8', 'backslashreplace').decode()
  return JSONResponse({'error': line[:500]}, status, headers)


class Gate:
  """The application with a gate before it."""

  def __init__(
    self,
    app: Any,
    tokens: Sequence[bytes],
    max_body: int,
    timeout_s: float,
    ready: Callable[[], bool],
    meters: Meters,
    paths: Collection[str],
    bodies: Collection[str],
    kind: str = 'application/json',
    finished: Collection[str] = (),
  ):
    """Builds it.

    Args:
      app: of ASGI. tokens: one of which a request bears; none: everyone may ask. max_body: bytes.
      timeout_s: seconds from the first line to the answer; the application finds the deadline, in
        time of the event loop, as scope['deadline']. ready: whether the model is there.
      meters: of the requests. paths: that there are. bodies: those which take a body of `kind`, a
        Content-Type, by POST and need the model. finished: those of them whose work goes on when
        the client goes away, since it keeps what was sent; that of others stops.
    """
    self._app, self._tokens, self._max_body, self._timeout_s = app, tokens, max_body, timeout_s
    self._ready, self._meters, self._paths, self._bodies = ready, meters, paths, bodies
    self._kind, self._finished = kind, finished

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Answers a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status = time.perf_counter(), None

    async def noting(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    refusal = None
    try:
      await self._pass(scope, receive, noting)
    except HTTPException as error:
      refusal = problem(error.status_code, error.detail, error.headers)
    except TimeoutError:
      refusal = problem(504, f'no answer within {self._timeout_s:g} s', LATER)
    except Exception:
      logger.exception('%s %s failed', scope['method'], scope['path'])
      refusal = problem(500, 'an error of the service; its log says more')
    if refusal and status is None:
      await refusal(scope, receive, noting)
    path = scope['path'] if scope['path'] in self._paths else 'other'
    self._meters.requests.labels(path, status or 'gone').inc()
    self._meters.seconds.labels(path).observe(time.perf_counter() - began)

  async def _pass(self, scope, receive, send):
    scope['deadline'] = asyncio.get_running_loop().time() + self._timeout_s
    headers = {name.lower(): value for name, value in scope['headers']}
    if self._tokens and scope['path'] not in FREE:
      self._check_token(headers.get(b'authorization', b''))
    if scope['path'] in self._bodies and scope['method'] == 'POST':
      body = await self._body(scope, headers, receive)
      if body is None:
        return
      left = [{'type': 'http.request', 'body': body, 'more_body': False}]
      stops = scope['path'] not in self._finished
    else:
      left, stops = [], False

    async def again():
      return left.pop() if left else await receive()

    async with asyncio.timeout_at(scope['deadline']):
      if stops:
        await _while_there(receive, self._app(scope, again, send))
      else:
        await self._app(scope, again, send)

  async def _body(self, scope, headers, receive):
    """The body; None if the client went away."""
    if not self._ready():
      raise HTTPException(503, 'the model is being loaded; try again in a moment', LATER)
    kind = headers.get(b'content-type', b'').partition(b';')[0].strip().lower()
    if kind != self._kind.encode():
      raise HTTPException(415, f'the body must have Content-Type: {self._kind}')
    size = headers.get(b'content-length', b'')
    if size.isdigit() and int(size[:20]) > self._max_body:
      self._too_large()
    try:
      async with asyncio.timeout_at(scope['deadline']):
        return await self._read(receive)
    except TimeoutError:
      raise HTTPException(
        408, f'the body did not come within {self._timeout_s:g} s', {'connection': 'close'}
      ) from None

  def _check_token(self, given):
    scheme, _, token = given.partition(b' ')
    # All are compared, so that time says nothing of which.
    fits = [hmac.compare_digest(token.strip(), one) for one in self._tokens]
    if scheme.lower() != b'bearer' or not any(fits):
      raise HTTPException(
        401, 'a token is needed: Authorization: Bearer TOKEN', {'www-authenticate': 'Bearer'}
      )

  async def _read(self, receive):
    parts, size = [], 0
    while True:
      message = await receive()
      if message['type'] == 'http.disconnect':
        return None
      parts.append(message.get('body', b''))
      size += len(parts[-1])
      if size > self._max_body:
        self._too_large()
      if not message.get('more_body', False):
        return b''.join(parts)

  def _too_large(self):
    # The rest of the body is not read, so nothing can follow on this connection.
    raise HTTPException(
      413, f'the body is larger than {self._max_body} bytes', {'connection': 'close'}
    )


async def _while_there(receive, work):
  """Does the work of a request whose body was read, until it is done or the client goes away."""
  doing = asyncio.ensure_future(work)

  async def watch():
    while (await receive())['type'] != 'http.disconnect':
      pass
    doing.cancel()

  watching = asyncio.ensure_future(watch())
  try:
    await asyncio.wait([doing])
  finally:
    watching.cancel()
    doing.cancel()  # if this is being cancelled itself; else it is done
    await asyncio.wait([doing, watching])
  if not doing.cancelled():
    doing.result()
