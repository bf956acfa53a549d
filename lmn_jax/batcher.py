"""Requests that come at the same time are answered together, by one thread.

A function over a list costs little more than over one: requests wait a moment for others of their
kind, never longer than `wait_s`, and not at all for more than fit. While a batch is computed the
next one gathers. One thread computes, since a compiled function takes all cores by itself.
"""

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# A list of requests -> as many answers, in their order.
Function = Callable[[Sequence[Any]], Sequence[Any]]


class QueueFull(Exception):
  """More requests wait than may; the message is a line."""


class Closed(Exception):
  """The batcher takes no more requests; the message is a line."""


@dataclasses.dataclass(eq=False)
class _Job:
  function: Function
  request: Any
  deadline: float
  came: float
  answer: asyncio.Future
  alone: bool


class Batcher:
  """Batches of requests; made and used in one event loop.

  Attributes:
    max_batch: requests answered together, at most.
  """

  def __init__(
    self,
    max_batch: int,
    wait_s: float,
    max_queue: int,
    on_batch: Callable[[int], None] = lambda size: None,
  ):
    """Starts the task that makes the batches.

    Args:
      max_batch: requests in a batch, at most. wait_s: seconds that a request waits for others.
      max_queue: requests that wait, at most. on_batch: told the size of each batch after it.
    """
    self.max_batch, self._wait_s, self._max_queue = max_batch, wait_s, max_queue
    self._on_batch = on_batch
    self._jobs: list[_Job] = []  # that wait, in the order they came
    self._kinds: Counter[Function] = Counter()  # how many of them are of a function
    self._changed = asyncio.Event()
    self._closed = False
    self._thread = ThreadPoolExecutor(1, thread_name_prefix='model')
    self._task = asyncio.create_task(self._work())

  def __len__(self) -> int:
    """How many requests wait."""
    return len(self._jobs)

  async def run(
    self, function: Function, request: Any, deadline: float, alone: bool = False
  ) -> Any:
    """The answer of `function` to a request, computed with others of the same function.

    If a batch fails its requests are computed one by one, so that only those fail that are at
    fault. What is cancelled while it waits is not computed.

    Args:
      function: equal functions make a batch. request: of it. deadline: in time of the event loop;
        a request that still waits then is not computed. alone: it neither waits for others nor
        is computed with them, as where many cost many times what one costs.

    Raises:
      TimeoutError: the deadline passed. QueueFull, Closed: it was not taken. Besides, what
        `function` raises for this request.
    """
    if self._closed:
      raise Closed('the service is stopping')
    if len(self._jobs) >= self._max_queue:
      raise QueueFull(f'{self._max_queue} requests wait already; try again in a moment')
    loop = asyncio.get_running_loop()
    job = _Job(function, request, deadline, loop.time(), loop.create_future(), alone)
    self._jobs.append(job)
    self._kinds[function] += 1
    self._changed.set()
    try:
      return await job.answer
    finally:
      if job in self._jobs:  # cancelled
        self._take(job)

  def _take(self, job):
    self._jobs.remove(job)
    self._kinds[job.function] -= 1
    if not self._kinds[job.function]:
      del self._kinds[job.function]  # it may hold a model that is no longer used

  async def _work(self):
    loop = asyncio.get_running_loop()
    while self._jobs or not self._closed:
      if not self._jobs:
        self._changed.clear()
        await self._changed.wait()
        continue
      # Who came first says of what kind the batch is, and how long it waits.
      first = self._jobs[0]
      most = 1 if first.alone else self.max_batch
      left = first.came + self._wait_s - loop.time()
      if self._kinds[first.function] < most and left > 0 and not self._closed:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
          await asyncio.wait_for(self._changed.wait(), left)
        continue
      batch = [job for job in self._jobs if job.function == first.function][:most]
      for job in batch:
        self._take(job)
        if job.deadline <= loop.time() and not job.answer.done():
          job.answer.set_exception(TimeoutError())
      batch = [job for job in batch if not job.answer.done()]
      if batch:
        requests = [job.request for job in batch]
        found = await loop.run_in_executor(self._thread, _answers, first.function, requests)
        for job, (answer, error) in zip(batch, found, strict=True):
          if job.answer.done():  # cancelled meanwhile
            continue
          if error is None:
            job.answer.set_result(answer)
          else:
            job.answer.set_exception(error)
        self._on_batch(len(batch))

  async def close(self) -> None:
    """Takes no more requests, answers those that wait, and ends the thread."""
    self._closed = True
    self._changed.set()
    await self._task
    self._thread.shutdown()


def _answers(function, requests):
  """(answer, None) or (None, exception) of each request."""
  try:
    answers = function(requests)
    if len(answers) != len(requests):
      raise RuntimeError(f'{len(answers)} answers to {len(requests)} requests')
    return [(answer, None) for answer in answers]
  except Exception as error:
    if len(requests) == 1:
      return [(None, error)]
  return [pair for request in requests for pair in _answers(function, [request])]
