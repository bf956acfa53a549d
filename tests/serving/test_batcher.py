"""Requests that wait for each other: who is answered with whom, and whom a failure hits."""

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
  """Answers when it is let go; notes what it was asked."""

  def __init__(self):
    self.asked, self.begun, self.go = [], threading.Event(), threading.Event()

  def __call__(self, numbers):
    self.asked.append(list(numbers))
    self.begun.set()
    assert self.go.wait(10)
    return double(numbers)

  async def started(self):
    await asyncio.to_thread(self.begun.wait, 10)


def ask(batcher, function, numbers, deadline=NEVER):
  return [asyncio.create_task(batcher.run(function, x, deadline)) for x in numbers]


def test_each_gets_his_own_answer_in_full_batches():
  async def test(batcher, sizes):
    found = await asyncio.gather(*ask(batcher, double, range(10)))
    assert found == [2 * x for x in range(10)] and sizes == [4, 4, 2]

  run(test, wait_s=0.01)


def test_a_full_batch_does_not_wait_and_others_wait_no_longer_than_they_may():
  async def test(batcher, sizes):
    began = time.monotonic()
    await asyncio.gather(*ask(batcher, double, range(4)))
    assert time.monotonic() - began < 0.25
    await batcher.run(double, 1, NEVER)
    assert 0.29 < time.monotonic() - began < 2 and sizes == [4, 1]

  run(test, wait_s=0.3)


def test_a_batch_is_of_one_kind():
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
  """Steps that note themselves; the answer of a request is twice it."""

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
  """However many long requests wait, and however long they are; the first of them is first."""
  notes = []

  async def test(batcher, sizes):
    long = step_by_step(batcher, counting(50, notes), [7, 8])
    for x in range(20):
      began = len(notes)
      assert await batcher.run(double, x, NEVER) == 2 * x
      assert len(notes) - began <= 2  # one that was being computed, and one on the way back
    assert len(notes) < 50 and sizes == [1] * 20
    assert await asyncio.gather(*long) == [14, 16]
    assert notes == [(x, k) for x in (7, 8) for k in range(50)] and len(batcher) == 0

  run(test, wait_s=5.0)  # while others compute nobody waits for more of his kind


def test_steps_of_different_functions_take_turns():
  notes = []

  async def test(batcher, sizes):
    long = step_by_step(batcher, counting(40, notes), [1])
    short = step_by_step(batcher, counting(3, notes), [2])
    assert await short[0] == 4 and len(notes) < 10 and not long[0].done()
    assert await long[0] == 2

  run(test)


@pytest.mark.parametrize('ended', ['deadline', 'cancelled', 'error'])
def test_steps_stop(ended):
  """At the deadline, when nobody waits any more, and at an error; others go on."""
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
    (found,) = await asyncio.gather(first, return_exceptions=True)
    kinds = {'deadline': TimeoutError, 'cancelled': asyncio.CancelledError}
    assert isinstance(found, kinds.get(ended, ZeroDivisionError))
    assert await second == 4
    await asyncio.sleep(0.01)
    assert len(notes) < 50 and len(batcher) == 0

  run(test)


def test_steps_count_in_the_queue_and_end_before_it_is_closed():
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


def test_while_one_is_computed_the_next_gathers():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    others = ask(batcher, slow, [2, 3, 4])
    await asyncio.sleep(0)
    assert len(batcher) == 3
    slow.go.set()
    assert await asyncio.gather(*first, *others) == [2, 4, 6, 8]
    assert slow.asked == [[1], [2, 3, 4]] and len(batcher) == 0

  run(test, wait_s=0.0)


def test_one_failure_is_his_alone():
  def inverse(numbers):
    return [1 / x for x in numbers]

  async def test(batcher, sizes):
    found = await asyncio.gather(*ask(batcher, inverse, [1, 0, 4]), return_exceptions=True)
    assert found[0] == 1 and found[2] == 0.25 and isinstance(found[1], ZeroDivisionError)
    assert await batcher.run(inverse, 2, NEVER) == 0.5

  run(test)


def test_a_function_that_forgets_one_is_an_error():
  async def test(batcher, sizes):
    found = await asyncio.gather(
      *ask(batcher, lambda numbers: numbers[1:], [1, 2]), return_exceptions=True
    )
    assert [str(error) for error in found] == ['0 answers to 1 requests'] * 2

  run(test)


def test_who_is_too_late_is_not_computed():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    late = ask(batcher, slow, [2], asyncio.get_running_loop().time() + 0.01)
    fine = ask(batcher, slow, [3])
    await asyncio.sleep(0.03)
    slow.go.set()
    found = await asyncio.gather(*first, *late, *fine, return_exceptions=True)
    assert found[0] == 2 and isinstance(found[1], TimeoutError) and found[2] == 6
    assert slow.asked == [[1], [3]]

  run(test, wait_s=0.0)


def test_who_gives_up_is_not_computed_and_leaves_the_queue():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    second, third = ask(batcher, slow, [2, 3])
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    assert len(batcher) == 1
    first[0].cancel()  # its computing goes on, for nobody
    slow.go.set()
    assert await third == 6 and slow.asked == [[1], [3]]

  run(test, wait_s=0.0)


def test_a_full_queue_refuses():
  async def test(batcher, sizes):
    slow = Slow()
    first = ask(batcher, slow, [1])
    await slow.started()
    waiting = ask(batcher, slow, [2, 3])
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match='2 requests wait already'):
      await batcher.run(slow, 4, NEVER)
    slow.go.set()
    assert await asyncio.gather(*first, *waiting) == [2, 4, 6]
    assert await batcher.run(double, 5, NEVER) == 10

  run(test, wait_s=0.0, max_queue=2)


def test_close_answers_those_that_wait_and_takes_no_more():
  async def test(batcher, sizes):
    began = time.monotonic()
    tasks = ask(batcher, double, range(6))
    await asyncio.sleep(0)
    await batcher.close()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10] and sizes == [4, 2]
    assert time.monotonic() - began < 1  # nobody waits for others any more
    with pytest.raises(Closed, match='the service is stopping'):
      await batcher.run(double, 1, NEVER)

  run(test, wait_s=5.0)


def test_all_is_computed_in_one_thread():
  def where(numbers):
    return [threading.get_ident()] * len(numbers)

  async def test(batcher, sizes):
    found = await asyncio.gather(*ask(batcher, where, range(9)))
    assert len(set(found)) == 1 and found[0] != threading.get_ident()

  run(test)
