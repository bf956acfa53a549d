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
from lmn_jax.serving import schemas as models
from lmn_jax.serving.batcher import Closed, QueueFull
from lmn_jax.serving.hot_swap import NotReady
from lmn_jax.serving.middleware import LATER, Gate, problem
from lmn_jax.serving.service import NoStore, Question, Sent, Service
from lmn_jax.serving.users.records import StoreError

WHY = {
  400: 'The body is no JSON.',
  401: 'No token, or a wrong one.',
  404: 'No such path.',
  405: 'Not this method.',
  408: 'The body did not come in time.',
  409: 'No store of users was given to the service.',
  413: 'The body is too large.',
  415: 'Content-Type is not application/json.',
  422: 'A field is missing, unknown or out of bounds.',
  500: 'An error of the service.',
  503: 'Not now: loading, too many requests, or the store is out of reach. See Retry-After.',
  504: 'No answer in time.',
}
DOCS, ASSETS = '/docs', '/assets'
MODEL = (400, 401, 408, 413, 415, 422, 500, 503, 504)

logger = logging.getLogger(__name__)


def _documented(*statuses):
  return {status: {'model': models.Problem, 'description': WHY[status]} for status in statuses}


def make_app(
  service: Service,
  tokens: Sequence[bytes] = (),
  around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> FastAPI:
  """The application of a service, which runs while the application does.

  Args:
    service: that answers. tokens: one of which a request must bear; none: everyone may ask.
    around: a context that is held while it runs.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app):
    with around():
      async with service.running():
        yield

  # FastAPI's own /docs takes its script and style from the internet; this one brings them.
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
  guard = [Depends(HTTPBearer(auto_error=False))] if tokens else []  # for the document alone
  _add_posts(app, service, guard)
  _add_gets(app, service, guard)
  _add_errors(app, service)
  paths = app.openapi()['paths']
  _tell_times(app, service)
  app.add_middleware(
    Gate,
    tokens=tokens,
    max_body=service.settings.max_body,
    timeout_s=service.settings.timeout_s,
    ready=lambda: service.live.ready,
    meters=service.meters,
    paths={*paths, DOCS, app.openapi_url},
    bodies={path for path, methods in paths.items() if 'post' in methods},
    finished={'/v1/update'},
  )
  return app


def _tell_times(app, service):
  """The document says what a time must be, which the export knows, once it is open."""
  written = app.openapi

  def document():
    found = written()
    if service.live.ready:
      time = found['components']['schemas']['Event']['properties']['time']
      time['description'] = f'as in the log: {service.live.answers().clock.expected()}'
    return found

  app.openapi = document


def _add_posts(app, service, guard):
  asked = models.requests(service.settings)

  def question(ask):
    return Question(ask.user, ask.history, ask.context, ask.profile)

  def post(path, answer, *more):
    return app.post(
      path,
      response_model=answer,
      response_model_exclude_none=True,
      responses=_documented(*MODEL, *more),
      dependencies=guard,
    )

  # A response made here is sent as it is; the model of the answer is for the document.

  @post('/v1/score', models.ScoreAnswer)
  async def score(ask: asked.score, request: Request) -> Any:
    """Scores the candidates for the user."""
    deadline = request.scope['deadline']
    return JSONResponse(await service.score(question(ask), ask.candidates, deadline))

  @post('/v1/recommend', models.RecommendAnswer)
  async def recommend(ask: asked.recommend, request: Request) -> Any:
    """The k items of the whole catalogue that are best for the user."""
    deadline = request.scope['deadline']
    found = await service.recommend(question(ask), ask.k, ask.exclude, ask.exclude_seen, deadline)
    return JSONResponse(found)

  @post('/v1/update', models.UpdateAnswer, 409)
  async def update(ask: asked.update, request: Request) -> Any:
    """Takes new events of the user in, also late ones; events that are held are left out."""
    sent = [Sent(event.item, event.time, event.id or '') for event in ask.events]
    times = sum(event.time is not None for event in sent)
    if 0 < times < len(sent):
      raise RequestError('events: some have a time and some have none; give all a time, or none')
    return JSONResponse(await service.update(ask.user, sent, request.scope['deadline']))


def _add_gets(app, service, guard):
  @app.get('/healthz', response_model=models.Health, responses=_documented(500, 504))
  async def healthz() -> Any:
    """Whether the process lives."""
    return JSONResponse({'status': 'ok'})

  @app.get('/readyz', response_model=models.Readiness, responses=_documented(500, 503, 504))
  async def readyz() -> Any:
    """Whether requests should be sent here; with lost shards they still should."""
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
    responses=text | _documented(401, 500, 504),
    dependencies=guard,
  )
  async def metrics() -> Any:
    """Meters for Prometheus."""
    return Response(service.meters.text(), media_type=service_metrics.CONTENT_TYPE)


def _add_errors(app, service):
  def answer(kind, status, headers=None):
    async def handle(request, error):
      return problem(status, str(error), headers)

    app.add_exception_handler(kind, handle)

  answer(RequestError, 422)
  answer(NoStore, 409)
  for kind in (NotReady, QueueFull, Closed):
    answer(kind, 503, LATER)

  @app.exception_handler(StoreError)
  async def store_error(request, error):
    service.meters.store_errors.inc()
    logger.error('%s', error)
    return problem(503, 'the store of users cannot be reached; try again in a moment', LATER)

  @app.exception_handler(RequestValidationError)
  async def invalid(request, error):
    first, *others = error.errors()
    if first['type'] == 'json_invalid':
      return problem(400, f'the body is no JSON: {first["ctx"]["error"]}')
    # The first place is 'body'.
    where = '.'.join(str(place)[:100] for place in first['loc'][1:]) or 'body'
    more = f' (and {len(others)} more)' if others else ''
    return problem(422, f'{where}: {first["msg"].removeprefix("Value error, ")}{more}')

  @app.exception_handler(HTTPException)
  async def refused(request, error):
    said = WHY.get(error.status_code, error.detail) if error.status_code in (404, 405) else ''
    return problem(error.status_code, said or error.detail, error.headers)
