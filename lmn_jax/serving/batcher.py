"""Batches of concurrent requests, computed in one thread.

A function of several requests costs little more than of one: a request waits for others of the same
function, at most `wait_s` seconds, and no longer than until the batch is full. One thread computes,
since a compiled function uses all cores.

A long request is computed in steps: a generator, which returns the answer at its end. After each
step a waiting batch is computed first. So a batch waits for at most one step, and a long request
stops when its deadline passes or its client disconnects.
"""

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Requests -> their answers, in the same order.
Function = Callable[[Sequence[Any]], Sequence[Any]]
# One request -> a generator that yields between its steps and returns the answer.
Steps = Callable[[Any], Generator[None, None, Any]]


class QueueFull(Exception):
  """Too many requests wait; the message is one line."""


class Closed(Exception):
  """The batcher accepts no more requests; the message is one line."""


@dataclasses.dataclass(eq=False)
class _Job:
  request: Any
  deadline: float
  arrival: float
  answer: asyncio.Future
  steps: Generator[None, None, Any] | None = None  # after the first step


# Waiting requests by function. A function without requests has no key, since it may hold a model
# that is no longer used.
_Waiting = dict[Callable, deque[_Job]]


class Batcher:
  """Computes requests in batches, and long requests in steps; used in one event loop.

  Attributes:
    max_batch: most requests in a batch.
  """

  def __init__(
    self,
    max_batch: int,
    wait_s: float,
    max_queue: int,
    on_batch: Callable[[int], None] = lambda size: None,
  ):
    """Starts the task that forms the batches.

    Args:
      max_batch: most requests in a batch. wait_s: seconds that a request waits for others.
      max_queue: most requests that wait. on_batch: called with the size of each computed batch.
    """
    self.max_batch, self._wait_s, self._max_queue = max_batch, wait_s, max_queue
    self._on_batch = on_batch
    self._batched: _Waiting = {}
    self._stepped: _Waiting = {}
    self._changed = asyncio.Event()
    self._closed = False
    self._thread = ThreadPoolExecutor(1, thread_name_prefix='model')
    self._task = asyncio.create_task(self._work())

  def __len__(self) -> int:
    """Returns how many requests wait, including a request in steps until its end."""
    return sum(map(len, (*self._batched.values(), *self._stepped.values())))

  async def run(self, function: Function, request: Any, deadline: float) -> Any:
    """Returns the answer of `function` to a request, computed with others of the same function.

    If a batch fails, its requests are computed one by one, so that only the faulty ones fail. A
    request that is cancelled while it waits is not computed.

    Args:
      function: requests of equal functions form a batch. request: its argument. deadline: in time
        of the event loop; a request that waits until then is not computed.

    Raises:
      TimeoutError: the deadline passed. QueueFull, Closed: the request was not accepted. Also
        exceptions of `function` for this request.
    """
    return await self._wait(self._batched, function, request, deadline)

  async def run_steps(self, steps: Steps, request: Any, deadline: float) -> Any:
    """Returns the answer to a request that is computed in steps, with batches between the steps.

    Requests of the same function are computed one after the other; functions take turns.

    Args:
      steps: creates the generator. request: its argument. deadline: in time of the event loop; the
        request stops then, or when it is cancelled.

    Raises:
      As `run`.
    """
    return await self._wait(self._stepped, steps, request, deadline)

  async def _wait(self, waiting, function, request, deadline):
    if self._closed:
      raise Closed('the service is stopping')
    if len(self) >= self._max_queue:
      raise QueueFull(
        f'{self._max_queue} requests are waiting, which is the limit; try again in a moment'
      )
    loop = asyncio.get_running_loop()
    job = _Job(request, deadline, loop.time(), loop.create_future())
    waiting.setdefault(function, deque()).append(job)
    self._changed.set()
    try:
      return await job.answer
    finally:
      if job in waiting.get(function, ()):  # cancelled
        _take(waiting, function, job)

  async def _work(self):
    step_is_due = False  # after each batch one step, if there is one
    while self._batched or self._stepped or not self._closed:
      if self._stepped and (step_is_due or not self._batched):
        step_is_due = False
        await self._step()
      elif self._batched:
        if not self._stepped and (seconds := self._to_wait()) > 0:
          await self._change(seconds)
          continue
        step_is_due = True
        await self._batch()
      else:
        await self._change(None)

  async def _change(self, seconds):
    """Waits for another request, at most so many seconds (None: no limit)."""
    self._changed.clear()
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(self._changed.wait(), seconds)

  def _to_wait(self):
    """Returns how many seconds the next batch may wait for more requests."""
    jobs = next(iter(self._batched.values()))
    if self._closed or len(jobs) >= self.max_batch:
      return 0
    return jobs[0].arrival + self._wait_s - asyncio.get_running_loop().time()

  async def _batch(self):
    """Computes a batch of the function whose turn it is."""
    loop = asyncio.get_running_loop()
    function = next(iter(self._batched))
    batch = list(self._batched[function])[: self.max_batch]
    for job in batch:
      _take(self._batched, function, job)
    _move_to_end(self._batched, function)
    batch = [job for job in batch if _in_time(job, loop.time())]
    if not batch:
      return
    requests = [job.request for job in batch]
    results = await loop.run_in_executor(self._thread, _answers, function, requests)
    for job, (answer, error) in zip(batch, results, strict=True):
      _answer(job, answer, error)
    self._on_batch(len(batch))

  async def _step(self):
    """Computes a step of the function whose turn it is."""
    loop = asyncio.get_running_loop()
    function = next(iter(self._stepped))
    job = self._stepped[function][0]
    ended = True
    if _in_time(job, loop.time()):
      ended, answer, error = await loop.run_in_executor(self._thread, _next_step, function, job)
      if ended:
        _answer(job, answer, error)
        self._on_batch(1)
    if ended and job in self._stepped.get(function, ()):  # otherwise it was cancelled
      _take(self._stepped, function, job)
    _move_to_end(self._stepped, function)

  async def close(self) -> None:
    """Accepts no more requests, answers those that wait, and ends the thread."""
    self._closed = True
    self._changed.set()
    await self._task
    self._thread.shutdown()


def _take(waiting, function, job):
  waiting[function].remove(job)
  if not waiting[function]:
    del waiting[function]


def _move_to_end(waiting, function):
  """Lets the other functions have a turn before this one has another."""
  if function in waiting:
    waiting[function] = waiting.pop(function)


def _in_time(job, now):
  """Returns whether a client still waits for the answer; reports a passed deadline to it."""
  if job.deadline <= now:
    _answer(job, None, TimeoutError())
  return not job.answer.done()


def _answer(job, answer, error):
  if job.answer.done():  # cancelled meanwhile
    return
  if error is None:
    job.answer.set_result(answer)
  else:
    job.answer.set_exception(error)


def _answers(function, requests):
  """Returns (answer, None) or (None, exception) for each request."""
  try:
    answers = function(requests)
    if len(answers) != len(requests):
      raise RuntimeError(f'{len(answers)} answers to {len(requests)} requests')
    return [(answer, None) for answer in answers]
  except Exception as error:
    if len(requests) == 1:
      return [(None, error)]
  return [pair for request in requests for pair in _answers(function, [request])]


def _next_step(function, job):
  """Computes a step, and returns (whether it was the last one, answer, exception)."""
  try:
    if job.steps is None:
      job.steps = function(job.request)
    next(job.steps)
  except StopIteration as end:
    return True, end.value, None
  except Exception as error:
    return True, None, error
  return False, None, None
