"""The HTTP interface of the service.

POST /v1/score, /v1/recommend, /v1/update; GET /healthz, /readyz, /metrics, /docs.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.serving import metrics as service_metrics
from lmn_jax.serving import schemas
from lmn_jax.serving.batcher import Closed, QueueFull
from lmn_jax.serving.hot_swap import NotReady
from lmn_jax.serving.middleware import RETRY, BodyLimits, add_middleware, problem
from lmn_jax.serving.service import NoStore, Query, SentEvent, Service
from lmn_jax.serving.users.records import StoreError

DESCRIPTIONS = {
  400: 'The body is not valid JSON.',
  401: 'The token is missing or wrong.',
  404: 'The path does not exist.',
  405: 'The path does not have this method.',
  408: 'The body did not arrive in time.',
  409: 'The service has no store of users.',
  413: 'The body is too large.',
  415: 'Content-Type is not application/json.',
  422: 'A field is missing, unknown or out of bounds.',
  500: 'An error of the service.',
  503: 'The model is being loaded, too many requests wait, or the store of users is not available. '
  'Try again after Retry-After seconds.',
  504: 'No answer in time.',
}
DOCS, ASSETS = '/docs', '/assets'
POST_STATUSES = (400, 401, 408, 413, 415, 422, 500, 503, 504)

logger = logging.getLogger(__name__)


def _problems(*statuses):
  """Returns the descriptions of error responses for the OpenAPI document."""
  return {
    status: {'model': schemas.Problem, 'description': DESCRIPTIONS[status]} for status in statuses
  }


def make_app(
  service: Service,
  tokens: Sequence[bytes] = (),
  around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> FastAPI:
  """Builds the application of a service, which runs as long as the application.

  Args:
    service: that answers. tokens: of which a request must send one; none: no token is needed.
    around: a context that is entered while it runs.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app):
    with around():
      async with service.running():
        yield

  # FastAPI's own /docs loads its script and style from the internet; this one contains them.
  app = FastAPIOffline(
    title='lmn_jax',
    version='1',
    description='Scores and recommendations of an exported model.',
    lifespan=lifespan,
    redirect_slashes=False,
    docs_url=DOCS,
    redoc_url=None,
    static_url=ASSETS,
  )
  # For the document only; see middleware.py for the check.
  guard = [Depends(HTTPBearer(auto_error=False))] if tokens else []
  _add_posts(app, service, guard)
  _add_gets(app, service, guard)
  _add_errors(app, service)
  paths = app.openapi()['paths']
  _describe_times(app, service)
  settings = service.settings
  bodies = {path for path, methods in paths.items() if 'post' in methods}
  limits = BodyLimits(settings.max_body, settings.timeout_s, bodies, finished={'/v1/update'})
  add_middleware(
    app, limits, tokens, service.metrics, {*paths, DOCS, app.openapi_url},
    ready=lambda: service.live.ready,
  )  # fmt: skip
  return app


def _describe_times(app, service):
  """Adds the form of times to the document, which is known once an export is open."""
  openapi = app.openapi

  def document():
    content = openapi()
    if service.live.ready:
      form = f'as in the log: {service.live.answers().clock.expected()}'
      for name in ('HistoryEvent', 'Event', 'ScoreRequest', 'RecommendRequest'):
        time = content['components']['schemas'][name]['properties']['time']
        time['description'] = time['description'].replace(schemas.TIME, form)
    return content

  app.openapi = document


def _add_posts(app, service, guard):
  bodies = schemas.requests(service.settings)

  def query(body):
    history = body.history
    if history is not None:
      history = [event if isinstance(event, str) else event.given() for event in history]
    return Query(body.user, history, body.context, body.profile, body.time)

  def post(path, answer, *statuses):
    return app.post(
      path,
      response_model=answer,
      response_model_exclude_none=True,
      responses=_problems(*POST_STATUSES, *statuses),
      dependencies=guard,
    )

  # FastAPI sends a JSONResponse as it is; response_model is for the document only.

  @post('/v1/score', schemas.ScoreAnswer)
  async def score(body: bodies.score, request: Request) -> Any:
    """Scores candidates for a user."""
    deadline = request.scope['deadline']
    return JSONResponse(await service.score(query(body), body.candidates, deadline))

  @post('/v1/recommend', schemas.RecommendAnswer)
  async def recommend(body: bodies.recommend, request: Request) -> Any:
    """Returns the k best items of the vocabulary for a user."""
    deadline, choice = request.scope['deadline'], (body.exclude, body.exclude_seen, body.by)
    return JSONResponse(await service.recommend(query(body), body.k, *choice, deadline))

  @post('/v1/update', schemas.UpdateAnswer, 409)
  async def update(body: bodies.update, request: Request) -> Any:
    """Stores new events of a user, also late ones; repeated events are skipped."""
    events = [
      SentEvent(event.item, event.time, event.id or '', event.features()) for event in body.events
    ]
    times = sum(event.time is not None for event in events)
    if 0 < times < len(events):
      raise RequestError(
        f'events: {times} of {len(events)} have a time; give a time to all of them, or to none'
      )
    return JSONResponse(await service.update(body.user, events, request.scope['deadline']))


def _add_gets(app, service, guard):
  @app.get('/healthz', response_model=schemas.Health, responses=_problems(500, 504))
  async def healthz() -> Any:
    """Returns 'ok': the process is running."""
    return JSONResponse({'status': 'ok'})

  @app.get('/readyz', response_model=schemas.Readiness, responses=_problems(500, 503, 504))
  async def readyz() -> Any:
    """Returns 200 if requests can be sent here, also while shards are lost; otherwise 503."""
    if service.stopping:
      raise NotReady('the service is stopping')
    bundle = service.live.answers().bundle
    lost = bundle.lost()
    return JSONResponse(
      {
        'status': 'degraded' if lost else 'ready',
        'model': bundle.model,
        'export': bundle.fingerprint,
        'lost': lost,
      }
    )

  text = {200: {'content': {'text/plain': {'schema': {'type': 'string'}}}}}

  @app.get(
    '/metrics',
    response_class=Response,
    responses=text | _problems(401, 500, 504),
    dependencies=guard,
  )
  async def metrics() -> Any:
    """Returns the metrics in the format of Prometheus."""
    return Response(service.metrics.text(), media_type=service_metrics.CONTENT_TYPE)


def _add_errors(app, service):
  def handle(exception, status, headers=None):
    async def respond(request, error):
      return problem(status, str(error), headers)

    app.add_exception_handler(exception, respond)

  handle(RequestError, 422)
  handle(NoStore, 409)
  for exception in (NotReady, QueueFull, Closed):
    handle(exception, 503, RETRY)

  @app.exception_handler(StoreError)
  async def store_error(request, error):
    service.metrics.store_errors.inc()
    logger.error('%s', error)
    return problem(503, 'the store of users is not available; try again in a moment', RETRY)

  @app.exception_handler(RequestValidationError)
  async def invalid(request, error):
    first, *others = error.errors()
    if first['type'] == 'json_invalid':
      return problem(400, f'the body is not valid JSON: {first["ctx"]["error"]}')
    # The location begins with 'body'.
    field = '.'.join(str(key)[:100] for key in first['loc'][1:]) or 'body'
    rest = f' (and {len(others)} more)' if others else ''
    return problem(422, f'{field}: {first["msg"].removeprefix("Value error, ")}{rest}')

  @app.exception_handler(HTTPException)
  async def http_error(request, error):
    status = error.status_code
    message = DESCRIPTIONS[status] if status in (404, 405) else error.detail
    return problem(status, message, error.headers)
