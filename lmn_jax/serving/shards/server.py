"""A process that holds a part of a large memory's values and sums them (see client.py)."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lmn_jax.errors import UserError
from lmn_jax.export.runtime.manifest import FolderError, read_manifest
from lmn_jax.serving import metrics as service_metrics
from lmn_jax.serving.middleware import Gate, problem
from lmn_jax.serving.shards.client import HEADER, KIND, PATH, unpacked

KEPT = 2  # exports whose rows are held: while rankers change to a new one, both are asked for


class Held:
  """The rows of one shard, memory-mapped.

  Attributes:
    export: fingerprint. first, last: rows, the last one not among them.
  """

  def __init__(self, folder: Path, number: int, of: int):
    """Opens them.

    Args:
      folder: of the export. number, of: shard i of N.

    Raises:
      UserError: an export of a model that needs no shards. FolderError: no export.
    """
    manifest = read_manifest(folder)
    if not manifest['pooled']:
      raise UserError(
        f'{folder}: {manifest["model"]} has no table that is read with weights; only a memory such '
        "as LMN's can lie on shards"
      )
    table = manifest['tables'][manifest['pooled']]
    V = table['rows']
    self.export: str = manifest['fingerprint']
    self.first, self.last = number * V // of, (number + 1) * V // of
    self._parts = {
      part: np.load(folder / file, mmap_mode='r')[self.first : self.last]
      for part, file in table['files'].items()
    }

  def _rows(self, at):
    rows = self._parts['rows'][at]
    if rows.dtype == np.uint16:
      return (rows.astype(np.uint32) << 16).view(np.float32)
    if rows.dtype == np.int8:
      return rows * self._parts['scale'][at][:, None]
    return rows

  def partial(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s_i float32 [T, D] and u_i float32 [T] of this shard.

    Args:
      ids_TK: int32, rows of the table; those of other shards and beyond all add nothing.
      weights_TK: float32.
    """
    mine_TK = (ids_TK >= self.first) & (ids_TK < self.last)
    t_N, _ = np.nonzero(mine_TK)
    w_N = weights_TK[mine_TK]
    scaled_ND = self._rows(ids_TK[mine_TK] - self.first) * w_N[:, None]
    sums_TD = np.zeros((len(ids_TK), self._parts['rows'].shape[1]), np.float32)
    if len(t_N):
      # The reads of one query stand together.
      begins = np.flatnonzero(np.r_[True, t_N[1:] != t_N[:-1]])
      sums_TD[t_N[begins]] = np.add.reduceat(scaled_ND, begins, axis=0)
    return sums_TD, np.where(mine_TK, weights_TK, 0).sum(axis=1, dtype=np.float32)


class Shard:
  """One shard of the export that a link leads to, and of the one before. For many threads."""

  def __init__(self, export: Path, number: int, of: int):
    """Opens the export; see Held for the arguments and errors."""
    self._path, self._number, self._of = export, number, of
    self._lock = threading.Lock()
    self._held: dict[str, Held] = {}
    self._open()

  def _open(self):
    held = Held(self._path.resolve(), self._number, self._of)
    self._held[held.export] = held
    while len(self._held) > KEPT:
      del self._held[next(iter(self._held))]

  def newest(self) -> Held:
    """The rows of the export that was opened last."""
    with self._lock:
      return self._held[next(reversed(self._held))]

  def of(self, export: str) -> Held | None:
    """The rows of an export; None if neither it nor what the link leads to now is that one."""
    with self._lock:
      if export not in self._held:
        try:
          self._open()
        except (FolderError, UserError):
          return None
      return self._held.get(export)


def make_shard_app(
  settings: ml_collections.ConfigDict, shard: Shard, tokens: Sequence[bytes] = ()
) -> Starlette:
  """The application of a shard: PATH for rankers, /healthz, /readyz and /metrics.

  Args:
    settings: see serving/settings.py. shard: that answers. tokens: one of which a ranker must bear.
  """
  counted = service_metrics.Meters()

  async def partial(request):
    held = shard.of(request.headers.get(HEADER, ''))
    if held is None:
      return problem(409, f'{HEADER}: this shard does not hold that export')
    try:
      ids_TK, weights_TK = unpacked(await request.body())
    except ValueError as error:
      return problem(422, str(error))
    sums_TD, weights_T = await asyncio.to_thread(held.partial, ids_TK, weights_TK)
    return Response(sums_TD.tobytes() + weights_T.tobytes(), media_type=KIND)

  async def healthz(request):
    return JSONResponse({'status': 'ok'})

  async def readyz(request):
    held = shard.newest()
    return JSONResponse(
      {'status': 'ready', 'export': held.export, 'first': held.first, 'last': held.last}
    )

  async def metrics(request):
    return Response(counted.text(), media_type=service_metrics.CONTENT_TYPE)

  gets = {'/healthz': healthz, '/readyz': readyz, '/metrics': metrics}
  app = Starlette(
    routes=[Route(PATH, partial, methods=['POST'])]
    + [Route(path, answer) for path, answer in gets.items()]
  )
  app.add_middleware(
    Gate,
    tokens=tokens,
    max_body=settings.shard_max_body,
    timeout_s=settings.timeout_s,
    ready=lambda: True,
    meters=counted,
    paths={PATH, *gets},
    bodies={PATH},
    kind=KIND,
  )
  return app
