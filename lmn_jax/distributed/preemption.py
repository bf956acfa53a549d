"""SIGTERM: the notice that the machine is about to be taken, by Slurm, Kubernetes or a cloud.

The first one asks training to stop at the next step and to save; where there is nothing to save, in
a validation or a report, it ends what is going on at once. Several hosts stop together, before a
step that all of them come to; what goes on between two steps they finish. A second one ends the
process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from lmn_jax.distributed import processes
from lmn_jax.errors import Preempted


class Notice:
  """Whether notice was given.

  Attributes:
    given: to this process.
  """

  def __init__(self):
    self.given = False
    self._waits = False

  def _hear(self, *_):
    if self.given:
      print('error: ended by a second SIGTERM', file=sys.stderr, flush=True)
      os._exit(128 + signal.SIGTERM)
    self.given = True
    print('SIGTERM: stops and saves; a second one ends at once', file=sys.stderr, flush=True)
    processes.give_notice()
    if not self._waits:
      self.heed()

  def due(self, step: int) -> bool:
    """Whether training stops after so many steps, with all its hosts."""
    return self.given if processes.count() == 1 else processes.stop_here(step)

  def explains_failure(self) -> bool:
    """Whether that there are no more batches comes of the notice: their readers are given it too.

    Of several hosts one that has no batches cannot come to the step where all stop: no.
    """
    time.sleep(0.5)  # theirs may have come first
    return self.given and processes.count() == 1

  def heed(self) -> None:
    """Ends what is going on if notice was given; several hosts go on.

    Raises:
      Preempted: it was.
    """
    if self.given and processes.count() == 1:
      raise Preempted('SIGTERM')

  @contextlib.contextmanager
  def waits(self, waits: bool = True) -> Iterator[None]:
    """Within, a notice waits until it is asked for by `due`; with False it ends at once again."""
    before, self._waits = self._waits, waits
    try:
      if not waits:
        self.heed()
      yield
    finally:
      self._waits = before


@contextlib.contextmanager
def listening() -> Iterator[Notice]:
  """A Notice that is given by SIGTERM while the context lasts; outside the main thread by none."""
  notice = Notice()
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return
  before = signal.signal(signal.SIGTERM, notice._hear)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, before)
