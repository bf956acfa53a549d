"""Requests that come at the same time take turns in one thread.

A function over a list costs little more than over one: requests wait a moment for others of their
kind, never longer than `wait_s`, and not at all for more than fit. While a batch is computed the
next one gathers. One thread computes, since a compiled function takes all cores by itself.

What takes long is computed in steps: a generator gives its answer at its end, and after each of its
steps a batch that waits goes first. So a batch waits for one step at most, however long the whole
is, and the whole stops when its deadline passes or its client has gone.
"""

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# A list of requests -> as many answers, in their order.
Function = Callable[[Sequence[Any]], Sequence[Any]]
# One request -> a generator that yields between its steps and returns the answer.
Steps = Callable[[Any], Generator[None, None, Any]]


class QueueFull(Exception):
  """More requests wait than may; the message is a line."""


class Closed(Exception):
  """The batcher takes no more requests; the message is a line."""


@dataclasses.dataclass(eq=False)
class _Job:
  request: Any
  deadline: float
  came: float
  answer: asyncio.Future
  steps: Generator[None, None, Any] | None = None  # once it was begun


# Requests that wait, by the function that answers them; a function without one has no key, since
# it may hold a model that is no longer used.
_Waiting = dict[Callable, deque[_Job]]


class Batcher:
  """Batches of requests, and requests in steps; made and used in one event loop.

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
    self._batched: _Waiting = {}
    self._stepped: _Waiting = {}
    self._changed = asyncio.Event()
    self._closed = False
    self._thread = ThreadPoolExecutor(1, thread_name_prefix='model')
    self._task = asyncio.create_task(self._work())

  def __len__(self) -> int:
    """How many requests wait; one that is computed in steps waits until its end."""
    kinds = (*self._batched.values(), *self._stepped.values())
    return sum(map(len, kinds))

  async def run(self, function: Function, request: Any, deadline: float) -> Any:
    """The answer of `function` to a request, computed with others of the same function.

    If a batch fails its requests are computed one by one, so that only those fail that are at
    fault. What is cancelled while it waits is not computed.

    Args:
      function: equal functions make a batch. request: of it. deadline: in time of the event loop;
        a request that still waits then is not computed.

    Raises:
      TimeoutError: the deadline passed. QueueFull, Closed: it was not taken. Besides, what
        `function` raises for this request.
    """
    return await self._wait(self._batched, function, request, deadline)

  async def run_steps(self, steps: Steps, request: Any, deadline: float) -> Any:
    """The answer of a request that is computed step by step, others between its steps.

    Of requests of the same function the first is computed to its end before the next is begun;
    functions take turns.

    Args:
      steps: makes the generator. request: of it. deadline: in time of the event loop; the request
        stops then, as it does when it is cancelled.

    Raises:
      as `run`.
    """
    return await self._wait(self._stepped, steps, request, deadline)

  async def _wait(self, waiting, function, request, deadline):
    if self._closed:
      raise Closed('the service is stopping')
    if len(self) >= self._max_queue:
      raise QueueFull(f'{self._max_queue} requests wait already; try again in a moment')
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
        if not self._stepped and (left := self._to_wait()) > 0:
          await self._change(left)
          continue
        step_is_due = True
        await self._batch()
      else:
        await self._change(None)

  async def _change(self, seconds):
    """Waits for another request, so long at most."""
    self._changed.clear()
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(self._changed.wait(), seconds)

  def _to_wait(self):
    """Seconds that the first kind of batches may wait for more of its kind."""
    jobs = next(iter(self._batched.values()))
    if self._closed or len(jobs) >= self.max_batch:
      return 0
    return jobs[0].came + self._wait_s - asyncio.get_running_loop().time()

  async def _batch(self):
    """Computes a batch of the kind whose turn it is."""
    loop = asyncio.get_running_loop()
    function = next(iter(self._batched))
    batch = list(self._batched[function])[: self.max_batch]
    for job in batch:
      _take(self._batched, function, job)
    _to_the_end(self._batched, function)
    batch = [job for job in batch if _in_time(job, loop.time())]
    if not batch:
      return
    requests = [job.request for job in batch]
    found = await loop.run_in_executor(self._thread, _answers, function, requests)
    for job, (answer, error) in zip(batch, found, strict=True):
      _answer(job, answer, error)
    self._on_batch(len(batch))

  async def _step(self):
    """Computes a step of the kind whose turn it is."""
    loop = asyncio.get_running_loop()
    function = next(iter(self._stepped))
    job = self._stepped[function][0]
    ended = True
    if _in_time(job, loop.time()):
      ended, answer, error = await loop.run_in_executor(self._thread, _next_step, function, job)
      if ended:
        _answer(job, answer, error)
        self._on_batch(1)
    if ended and job in self._stepped.get(function, ()):  # else it was cancelled
      _take(self._stepped, function, job)
    _to_the_end(self._stepped, function)

  async def close(self) -> None:
    """Takes no more requests, answers those that wait, and ends the thread."""
    self._closed = True
    self._changed.set()
    await self._task
    self._thread.shutdown()


def _take(waiting, function, job):
  waiting[function].remove(job)
  if not waiting[function]:
    del waiting[function]


def _to_the_end(waiting, function):
  """The other kinds have their turns before this one has another."""
  if function in waiting:
    waiting[function] = waiting.pop(function)


def _in_time(job, now):
  """Whether a client still waits for the answer; a passed deadline is reported to it."""
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


def _next_step(function, job):
  """(whether it was the last step, answer, exception)."""
  try:
    if job.steps is None:
      job.steps = function(job.request)
    next(job.steps)
  except StopIteration as end:
    return True, end.value, None
  except Exception as error:
    return True, None, error
  return False, None, None
