"""SIGTERM from Slurm, Kubernetes or a cloud: the machine will be taken away soon.

The first SIGTERM stops training after the steps that were sent, and a checkpoint is saved. During a
validation or a report, where nothing has to be saved, it ends them at once. Several hosts stop
before the same step; work between two steps they finish. A second SIGTERM ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from lmn_jax.distributed import processes
from lmn_jax.distributed.processes import WAIT_MILLISECONDS
from lmn_jax.errors import Preempted

KEY = 'lmn_jax/notice'


class Notice:
  """Whether SIGTERM came.

  Attributes:
    received: by this process.
  """

  def __init__(self):
    self.received = False
    self._deferred = False

  def _hear(self, *_):
    if self.received:
      print('error: ended by a second SIGTERM', file=sys.stderr, flush=True)
      os._exit(128 + signal.SIGTERM)
    self.received = True
    print('SIGTERM: stops and saves; a second one ends at once', file=sys.stderr, flush=True)
    announce()
    if not self._deferred:
      self.raise_if_received()

  def due(self, step: int) -> bool:
    """Whether training stops after `step` steps, on all hosts."""
    return self.received if processes.count() == 1 else stop_here(step)

  def explains_failure(self) -> bool:
    """Whether SIGTERM explains that there are no more batches: their readers received it too.

    False with several hosts: one that has no batches cannot reach the step at which all stop.
    """
    time.sleep(0.5)  # the signal may reach the readers first
    return self.received and processes.count() == 1

  def raise_if_received(self) -> None:
    """Ends the current work if SIGTERM came; several hosts continue.

    Raises:
      Preempted: SIGTERM came to a single process.
    """
    if self.received and processes.count() == 1:
      raise Preempted('SIGTERM')

  @contextlib.contextmanager
  def deferred(self, deferred: bool = True) -> Iterator[None]:
    """Within, SIGTERM only sets `received`; with False it ends the current work at once."""
    before, self._deferred = self._deferred, deferred
    try:
      if not deferred:
        self.raise_if_received()
      yield
    finally:
      self._deferred = before


@contextlib.contextmanager
def listening() -> Iterator[Notice]:
  """Yields a Notice that SIGTERM sets within the context; outside the main thread none does."""
  notice = Notice()
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return
  before = signal.signal(signal.SIGTERM, notice._hear)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, before)


class _Agreement:
  """step: the last step before which this host called `stop_here`. stop_at: where all stop."""

  def __init__(self):
    self.lock, self.step, self.stop_at = threading.Lock(), -1, None


_agreement = _Agreement()


def announce(message: str = 'stop') -> None:
  """Announces to all hosts that one of them received SIGTERM: they stop together."""
  if processes.count() > 1:
    with contextlib.suppress(Exception):  # another host was first, or this one is lost
      processes.client().key_value_set(KEY, message)


def end_agreement() -> None:
  """Ends `agree_on_stop` of every process; process 0 calls it when all are done."""
  announce('null')


def stop_here(step: int) -> bool:
  """Whether all hosts stop after `step` steps, since one of them received SIGTERM.

  Each host calls it before each step. Hosts are not at the same step when the signal comes: one may
  have sent a step that waits for the others. So all stop before the next step of the foremost.
  """
  with _agreement.lock:
    _agreement.step = step
    return _agreement.stop_at is not None and step >= _agreement.stop_at


def agree_on_stop() -> None:
  """Waits for SIGTERM on any host, and agrees where all stop. Runs in a thread."""
  client = processes.client()
  try:
    if client.blocking_key_value_get(KEY, WAIT_MILLISECONDS) == 'null':
      return  # `end_agreement`
    with _agreement.lock:  # this host begins no further step until all agree
      client.key_value_set(f'{KEY}/{processes.index()}', str(_agreement.step))
      steps = [
        int(client.blocking_key_value_get(f'{KEY}/{process}', WAIT_MILLISECONDS))
        for process in range(processes.count())
      ]
      _agreement.stop_at = max(steps) + 1
  except Exception:
    return  # a host is lost: `failure.watch` ends this one
