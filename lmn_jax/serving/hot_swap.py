"""The export in use, and its replacement by a newer one without an interruption.

To replace an export, point its link to another folder, or rename another folder to its path.
Requests that began with the old export finish with it. Never write into a folder in use: its files
are memory-mapped.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from lmn_jax.data import times
from lmn_jax.serving.metrics import Metrics

PROGRESS_S = 5  # between two lines about programs that are being compiled

logger = logging.getLogger(__name__)


class NotReady(Exception):
  """The service cannot answer now, but may later; the message is one line."""


def clock_of(bundle: Any) -> times.Clock:
  """Returns the unit and the form of the times of an export's log."""
  if 'time' in bundle.manifest:
    return times.Clock(**bundle.manifest['time'])
  # Exports of an earlier version have no clock: it is derived from the values of the times.
  notes = {} if bundle.manifest['timed'] else {'time_unit': 'position'}
  time_format = bundle.manifest['config']['data']['time_format']
  return times.clock_of(notes, time_format, *bundle.time_span())


class Answers:
  """The functions of an export for the batcher: of lists of requests, or in steps.

  Attributes:
    bundle: the export. clock: the form of its times.
  """

  def __init__(self, bundle: Any):
    self.bundle, self.clock = bundle, clock_of(bundle)

  def score(self, requests: Sequence[Any]) -> list[Any]:
    """Returns the scores of each request."""
    return self.bundle.score(list(requests))

  def score_many(self, requests: Sequence[Any]) -> list[Any]:
    """As `score`; a second function, so that few candidates do not wait for many."""
    return self.bundle.score(list(requests))

  def score_pieces(self, request: Any) -> Generator[None, None, Any]:
    """Returns the scores of a request, in steps: for more candidates than one program takes."""
    (scores,) = yield from self.bundle.scoring([request])
    return scores

  def recommend(self, arguments: tuple) -> Generator[None, None, Any]:
    """(request, k, exclude, exclude_seen, by) -> (pairs, degraded), in steps."""
    return self.bundle.recommending(*arguments)

  def state(self, arguments: tuple) -> Generator[None, None, Any]:
    """(user, state or None, events) -> state, in steps."""
    user, state, events = arguments
    return self.bundle.updating(self.bundle.state(user) if state is None else state, events)


class LiveExport:
  """Opens an export, and opens it again whenever it is replaced.

  Attributes:
    failure: why the first export could not be opened, or None. on_failure: called then.
  """

  def __init__(
    self, path: Path, open_bundle: Callable[[Path], Any], watch_s: float, metrics: Metrics
  ):
    """Opens nothing yet.

    Args:
      path: of the folder, or a link to it. open_bundle: opens the Bundle of a folder. watch_s:
        seconds between two checks. metrics: count the exports.
    """
    self.failure: Exception | None = None
    self.on_failure: Callable[[], None] = lambda: None
    self._path, self._open_bundle, self._watch_s = path, open_bundle, watch_s
    self._metrics = metrics
    self._answers: Answers | None = None

  @property
  def ready(self) -> bool:
    """Whether an export is open."""
    return self._answers is not None

  def answers(self) -> Answers:
    """Returns the functions of the export in use.

    Raises:
      NotReady: none is open yet.
    """
    if self._answers is None:
      raise NotReady('the model is being loaded; try again in a moment')
    return self._answers

  @contextlib.asynccontextmanager
  async def watching(self) -> AsyncIterator[None]:
    """A context in which the export is opened, and opened again when it is replaced."""
    watch = asyncio.create_task(self._watch())
    try:
      yield
    finally:
      watch.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await watch

  async def _watch(self):
    tried = object()  # equals no identity, not even None
    while True:
      identity = await asyncio.to_thread(identity_of, self._path)
      if identity != tried:
        tried = identity
        try:
          await self._swap()
        except Exception as error:  # a damaged export may raise anything
          self._metrics.swaps.labels('refused').inc()
          if not self.ready:
            self.failure = error
            self.on_failure()
            return
          line = ' '.join(str(error).split())
          logger.error('%s: the new export is refused, the old one stays: %s', self._path, line)
      await asyncio.sleep(self._watch_s)

  async def _swap(self):
    start = time.monotonic()
    # The link is resolved once, so that all files are of one folder.
    bundle = await asyncio.to_thread(self._open_bundle, self._path.resolve())
    await asyncio.to_thread(self._warm, bundle, start)
    before, self._answers = self._answers, Answers(bundle)
    self._metrics.swaps.labels('opened').inc()
    self.note_compiled()
    if before:
      self._metrics.export.labels(before.bundle.model, before.bundle.fingerprint).set(0)
    self._metrics.export.labels(bundle.model, bundle.fingerprint).set(1)
    logger.info(
      '%s: serves %s %.12s on %s, %d programs compiled, %.1f s', self._path, bundle.model,
      bundle.fingerprint, bundle.platform, bundle.compiled(), time.monotonic() - start,
    )  # fmt: skip

  def _warm(self, bundle, start):
    """Compiles the programs of an export, with progress in the log."""
    logged = start

    def note(done, count):
      nonlocal logged
      now = time.monotonic()
      if done and now < logged + PROGRESS_S:
        return
      logged = now
      logger.info(
        '%s: %d of %d programs compiled for %s, %.1f s', self._path, done, count, bundle.platform,
        now - start,
      )  # fmt: skip

    # The compiler for CPU uses several cores for a program, and while another export answers, its
    # requests need them.
    threads = 1 if bundle.platform == 'cpu' or self.ready else os.cpu_count() or 1
    bundle.warm(threads, note)

  def note_compiled(self) -> None:
    """Sets the metric of compiled programs."""
    self._metrics.compiled.set(self.answers().bundle.compiled())


def identity_of(path: Path) -> Any:
  """Returns what changes when an export is replaced: its folder, files and their times."""
  try:
    folder = path.resolve()
    return folder, sorted(
      (file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
      for file in folder.iterdir()
      for stat in [file.stat()]
    )
  except (OSError, RuntimeError):  # while it is being replaced; a link to itself
    return None
