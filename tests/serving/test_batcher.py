"""Batches of concurrent requests: their sizes, their order, and failures."""

import asyncio
import threading
import time

import pytest

from lmn_jax.serving.batcher import Batcher, Closed, QueueFull

NEVER = float('inf')


def run(test, *, max_batch=4, wait_s=0.02, max_queue=100):
  """Runs `test(batcher, sizes)` in a loop; sizes: of the batches so far."""

  async def inside():
    sizes = []
    batcher = Batcher(max_batch, wait_s, max_queue, sizes.append)
    try:
      return await asyncio.wait_for(test(batcher, sizes), 10)
    finally:
      await batcher.close()

  return asyncio.run(inside())


def double(numbers):
  return [2 * x for x in numbers]


class Slow:
  """A function that waits for `go`; `calls` are its arguments."""

  def __init__(self):
    self.calls, self.begun, self.go = [], threading.Event(), threading.Event()

  def __call__(self, numbers):
    self.calls.append(list(numbers))
    self.begun.set()
    assert self.go.wait(10)
    return double(numbers)

  async def started(self):
    await asyncio.to_thread(self.begun.wait, 10)


def ask(batcher, function, numbers, deadline=NEVER):
  return [asyncio.create_task(batcher.run(function, x, deadline)) for x in numbers]


def test_each_request_gets_its_answer_from_full_batches():
  async def test(batcher, sizes):
    answers = await asyncio.gather(*ask(batcher, double, range(10)))
    assert answers == [2 * x for x in range(10)] and sizes == [4, 4, 2]

  run(test, wait_s=0.01)


def test_a_full_batch_does_not_wait_and_others_wait_for_wait_s():
  async def test(batcher, sizes):
    began = time.monotonic()
    await asyncio.gather(*ask(batcher, double, range(4)))
    assert time.monotonic() - began < 0.25
    await batcher.run(double, 1, NEVER)
    assert 0.29 < time.monotonic() - began < 2 and sizes == [4, 1]

  run(test, wait_s=0.3)


def test_a_batch_is_of_one_function():
  def minus(numbers):
    kinds.append(list(numbers))
    return [-x for x in numbers]

  async def test(batcher, sizes):
    tasks = ask(batcher, minus, [1]) + ask(batcher, double, [2, 3]) + ask(batcher, minus, [4])
    assert await asyncio.gather(*tasks) == [-1, 4, 6, -4]
    assert kinds == [[1, 4]] and sizes == [2, 2]

  kinds = []
  run(test)


def counting(steps, notes):
  """Returns a function in steps, which records them; the answer is twice the request."""

  def count(request):
    for k in range(steps):
      notes.append((request, k))
      time.sleep(0.002)
      yield
    return 2 * request

  return count


def step_by_step(batcher, steps, numbers, deadline=NEVER):
  return [asyncio.create_task(batcher.run_steps(steps, x, deadline)) for x in numbers]


def test_a_batch_waits_for_one_step_at_most():
  """However many long requests wait; these are computed in their order."""
  notes = []

  async def test(batcher, sizes):
    long = step_by_step(batcher, counting(50, notes), [7, 8])
    for x in range(20):
      began = len(notes)
      assert await batcher.run(double, x, NEVER) == 2 * x
      assert len(notes) - began <= 2  # one in progress, and one before the answer arrives
    assert len(notes) < 50 and sizes == [1] * 20
    assert await asyncio.gather(*long) == [14, 16]
    assert notes == [(x, k) for x in (7, 8) for k in range(50)] and len(batcher) == 0

  run(test, wait_s=5.0)  # no request waits for others while steps are due


def test_steps_of_different_functions_take_turns():
  notes = []

  async def test(batcher, sizes):
    long = step_by_step(batcher, counting(40, notes), [1])
    short = step_by_step(batcher, counting(3, notes), [2])
    assert await short[0] == 4 and len(notes) < 10 and not long[0].done()
    assert await long[0] == 2

  run(test)


@pytest.mark.parametrize('ended', ['deadline', 'cancelled', 'error'])
def test_steps_stop_at_the_deadline_when_cancelled_and_at_an_error(ended):
  """Other requests continue."""
  notes = []

  def failing(request):
    yield from counting(3, notes)(request)
    raise ZeroDivisionError

  async def test(batcher, sizes):
    deadline = asyncio.get_running_loop().time() + 0.03 if ended == 'deadline' else NEVER
    function = failing if ended == 'error' else counting(1000, notes)
    (first,) = step_by_step(batcher, function, [1], deadline)
    (second,) = step_by_step(batcher, counting(3, notes), [2])
    await asyncio.sleep(0.02)
    if ended == 'cancelled':
      first.cancel()
    (answers,) = await asyncio.gather(first, return_exceptions=True)
    kinds = {'deadline': TimeoutError, 'cancelled': asyncio.CancelledError}
    assert isinstance(answers, kinds.get(ended, ZeroDivisionError))
    assert await second == 4
    await asyncio.sleep(0.01)
    assert len(notes) < 50 and len(batcher) == 0

  run(test)


def test_requests_in_steps_count_as_waiting_and_finish_before_close():
  notes = []

  async def test(batcher, sizes):
    long = step_by_step(batcher, counting(5, notes), [1, 2])
    await asyncio.sleep(0)
    assert len(batcher) == 2
    with pytest.raises(QueueFull):
      await batcher.run(double, 1, NEVER)
    await batcher.close()
    assert await asyncio.gather(*long) == [2, 4] and len(batcher) == 0

  run(test, max_queue=2)


def test_requests_join_the_next_batch_while_one_is_computed():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    others = ask(batcher, slow, [2, 3, 4])
    await asyncio.sleep(0)
    assert len(batcher) == 3
    slow.go.set()
    assert await asyncio.gather(*first, *others) == [2, 4, 6, 8]
    assert slow.calls == [[1], [2, 3, 4]] and len(batcher) == 0

  run(test, wait_s=0.0)


def test_a_failure_fails_its_request_only():
  def inverse(numbers):
    return [1 / x for x in numbers]

  async def test(batcher, sizes):
    answers = await asyncio.gather(*ask(batcher, inverse, [1, 0, 4]), return_exceptions=True)
    assert answers[0] == 1 and answers[2] == 0.25 and isinstance(answers[1], ZeroDivisionError)
    assert await batcher.run(inverse, 2, NEVER) == 0.5

  run(test)


def test_a_wrong_number_of_answers_is_an_error():
  async def test(batcher, sizes):
    answers = await asyncio.gather(
      *ask(batcher, lambda numbers: numbers[1:], [1, 2]), return_exceptions=True
    )
    assert [str(error) for error in answers] == ['0 answers to 1 requests'] * 2

  run(test)


def test_a_late_request_is_not_computed():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    late = ask(batcher, slow, [2], asyncio.get_running_loop().time() + 0.01)
    fine = ask(batcher, slow, [3])
    await asyncio.sleep(0.03)
    slow.go.set()
    answers = await asyncio.gather(*first, *late, *fine, return_exceptions=True)
    assert answers[0] == 2 and isinstance(answers[1], TimeoutError) and answers[2] == 6
    assert slow.calls == [[1], [3]]

  run(test, wait_s=0.0)


def test_a_cancelled_request_is_not_computed_and_leaves_the_queue():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    second, third = ask(batcher, slow, [2, 3])
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    assert len(batcher) == 1
    first[0].cancel()  # it is computed, and its answer dropped
    slow.go.set()
    assert await third == 6 and slow.calls == [[1], [3]]

  run(test, wait_s=0.0)


def test_a_full_queue_refuses_requests():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    waiting = ask(batcher, slow, [2, 3])
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match='2 requests are waiting'):
      await batcher.run(slow, 4, NEVER)
    slow.go.set()
    assert await asyncio.gather(*first, *waiting) == [2, 4, 6]
    assert await batcher.run(double, 5, NEVER) == 10

  run(test, wait_s=0.0, max_queue=2)


def test_close_answers_waiting_requests_and_refuses_new_ones():
  async def test(batcher, sizes):
    began = time.monotonic()
    tasks = ask(batcher, double, range(6))
    await asyncio.sleep(0)
    await batcher.close()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10] and sizes == [4, 2]
    assert time.monotonic() - began < 1  # requests no longer wait for others
    with pytest.raises(Closed, match='the service is stopping'):
      await batcher.run(double, 1, NEVER)

  run(test, wait_s=5.0)


def test_all_requests_are_computed_in_one_thread():
  def where(numbers):
    return [threading.get_ident()] * len(numbers)

  async def test(batcher, sizes):
    answers = await asyncio.gather(*ask(batcher, where, range(9)))
    assert len(set(answers)) == 1 and answers[0] != threading.get_ident()

  run(test)
