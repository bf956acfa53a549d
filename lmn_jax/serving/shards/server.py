"""The HTTP application of a shard (see client.py for the message)."""

import asyncio
from collections.abc import Sequence

import ml_collections
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lmn_jax.serving.metrics import CONTENT_TYPE, Metrics
from lmn_jax.serving.middleware import BodyLimits, add_middleware, problem
from lmn_jax.serving.shards.client import HEADER, KIND, PATH, unpacked
from lmn_jax.serving.shards.rows import Shard


def make_shard_app(
  settings: ml_collections.ConfigDict, shard: Shard, tokens: Sequence[bytes] = ()
) -> Starlette:
  """Builds the application: PATH for rankers, /healthz, /readyz and /metrics.

  Args:
    settings: see serving/settings.py. shard: the rows. tokens: of which a ranker must send one;
      none: no token is needed.
  """
  metrics = Metrics()
  endpoints = _Endpoints(shard, metrics)
  gets = {
    '/healthz': endpoints.health,
    '/readyz': endpoints.readiness,
    '/metrics': endpoints.metrics,
  }
  routes = [Route(path, endpoint) for path, endpoint in gets.items()]
  app = Starlette(routes=[Route(PATH, endpoints.partial, methods=['POST']), *routes])
  limits = BodyLimits(settings.shard_max_body, settings.timeout_s, frozenset([PATH]), KIND)
  add_middleware(app, limits, tokens, metrics, {PATH, *gets})
  return app


class _Endpoints:
  """The answers of a shard."""

  def __init__(self, shard: Shard, metrics: Metrics):
    self._shard, self._metrics = shard, metrics

  async def partial(self, request: Request) -> Response:
    """Returns the sums of the shard's rows, and the sums of their weights."""
    rows = self._shard.rows_of(request.headers.get(HEADER, ''))
    if rows is None:
      return problem(409, f'{HEADER}: this shard does not hold that export')
    try:
      ids_TK, weights_TK = unpacked(await request.body())
    except ValueError as error:
      return problem(422, str(error))
    sums_TD, weights_T = await asyncio.to_thread(rows.partial, ids_TK, weights_TK)
    return Response(sums_TD.tobytes() + weights_T.tobytes(), media_type=KIND)

  async def health(self, request: Request) -> Response:
    """Returns 'ok': the process lives."""
    return JSONResponse({'status': 'ok'})

  async def readiness(self, request: Request) -> Response:
    """Returns which rows of which export the shard holds."""
    rows = self._shard.newest()
    return JSONResponse(
      {'status': 'ready', 'export': rows.export, 'first': rows.first, 'last': rows.last}
    )

  async def metrics(self, request: Request) -> Response:
    """Returns the metrics in the format of Prometheus."""
    return Response(self._metrics.text(), media_type=CONTENT_TYPE)
