"""The export that is answered from, and the one that takes its place.

An export is replaced by letting a link lead to another folder, or by moving another folder to its
place; who began with the old one ends with it. A folder that is written over in place changes what
is being read: don't.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from lmn_jax.data import times
from lmn_jax.serving.metrics import Meters

logger = logging.getLogger(__name__)


class NotReady(Exception):
  """No answer can be given now, but later; the message is a line."""


def clock_of(bundle: Any) -> times.Clock:
  """The unit and form of the times of an export's log."""
  if 'time' in bundle.manifest:
    return times.Clock(**bundle.manifest['time'])
  # Of an earlier version: told by the size of the times.
  notes = {} if bundle.manifest['timed'] else {'time_unit': 'position'}
  time_format = bundle.manifest['config']['data']['time_format']
  return times.clock_of(notes, time_format, *bundle.time_span())


class Answers:
  """The functions of an export, for the batcher: over lists of requests, or in steps.

  Attributes:
    bundle: of the export. clock: of its log.
  """

  def __init__(self, bundle: Any):
    self.bundle, self.clock = bundle, clock_of(bundle)

  def score(self, asked: Sequence[Any]) -> list[Any]:
    """Asked -> Scores."""
    return self.bundle.score(list(asked))

  def score_many(self, asked: Sequence[Any]) -> list[Any]:
    """As `score`: another function, so that few candidates are not computed with many."""
    return self.bundle.score(list(asked))

  def score_pieces(self, asked: Any) -> Generator[None, None, Any]:
    """Asked -> Scores, in steps: of more candidates than a program takes."""
    (found,) = yield from self.bundle.scoring([asked])
    return found

  def recommend(self, request: Any) -> Generator[None, None, Any]:
    """(Asked, k, excluded, whether what was met is, too) -> (pairs, degraded), in steps."""
    return self.bundle.recommending(*request)

  def state(self, request: Any) -> Generator[None, None, Any]:
    """(user, state or None, events) -> state, in steps."""
    user, state, events = request
    return self.bundle.updating(self.bundle.state(user) if state is None else state, events)


class LiveExport:
  """Opens an export, and again whenever it is another.

  Attributes:
    failure: why the first one could not be opened, or None. on_failure: called then.
  """

  def __init__(
    self, path: Path, open_bundle: Callable[[Path], Any], watch_s: float, meters: Meters
  ):
    """Opens nothing yet.

    Args:
      path: of the folder, or a link to it. open_bundle: gives the Bundle of a folder. watch_s:
        seconds between two looks. meters: that count what was opened.
    """
    self.failure: Exception | None = None
    self.on_failure: Callable[[], None] = lambda: None
    self._path, self._open_bundle, self._watch_s = path, open_bundle, watch_s
    self._meters = meters
    self._answers: Answers | None = None

  @property
  def ready(self) -> bool:
    """Whether there is one to answer from."""
    return self._answers is not None

  def answers(self) -> Answers:
    """Of the export as it is now.

    Raises:
      NotReady: there is none yet.
    """
    if self._answers is None:
      raise NotReady('the model is being loaded; try again in a moment')
    return self._answers

  @contextlib.asynccontextmanager
  async def watching(self) -> AsyncIterator[None]:
    """While it lasts, an export that is another is opened."""
    watch = asyncio.create_task(self._watch())
    try:
      yield
    finally:
      watch.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await watch

  async def _watch(self):
    tried = object()  # nothing yet, also where there is nothing
    while True:
      looks = await asyncio.to_thread(look, self._path)
      if looks != tried:
        tried = looks
        try:
          await self._swap()
        except Exception as error:  # whatever an export is that is none
          self._meters.swaps.labels('refused').inc()
          if not self.ready:
            self.failure = error
            self.on_failure()
            return
          line = ' '.join(str(error).split())
          logger.error('%s: not used, the one before stays: %s', self._path, line)
      await asyncio.sleep(self._watch_s)

  async def _swap(self):
    began = time.monotonic()
    # The link is followed once: all files are of one folder.
    bundle = await asyncio.to_thread(self._open_bundle, self._path.resolve())
    await asyncio.to_thread(bundle.warm)
    before, self._answers = self._answers, Answers(bundle)
    self._meters.swaps.labels('opened').inc()
    self.note_compiled()
    if before:
      self._meters.export.labels(before.bundle.model, before.bundle.fingerprint).set(0)
    self._meters.export.labels(bundle.model, bundle.fingerprint).set(1)
    logger.info(
      '%s: answers from %s %.12s, %d programs compiled, %.1f s', self._path, bundle.model,
      bundle.fingerprint, bundle.compiled(), time.monotonic() - began,
    )  # fmt: skip

  def note_compiled(self) -> None:
    """Tells the meters how many programs are compiled."""
    self._meters.compiled.set(self.answers().bundle.compiled())


def look(path: Path) -> Any:
  """What is another when an export is replaced: where the link leads, its files and their times."""
  try:
    folder = path.resolve()
    return folder, sorted(
      (file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
      for file in folder.iterdir()
      for stat in [file.stat()]
    )
  except (OSError, RuntimeError):  # while it is being replaced; a link to itself
    return None
