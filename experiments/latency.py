"""How long one user's request takes: scores of C candidates after a history of L events.

    python experiments/latency.py [--length=1000] [--candidates=200] [--calls=1000]
    python experiments/latency.py --models=sam,din     # without it all but BST

A call is `Trainer.predict`, the compiled function that evaluation calls, from a request on the host
to logits [1, C] on the host, on one device. Every request is another, with a full history. Models
are those of configs/*_douyin.py with untrained weights, which cost what trained ones do. They take
turns, a block of calls each, so that what else the machine does falls on all of them; the first
calls of a block do not count. BST attends between all pairs anew for each candidate, at these sizes
for seconds: it is timed where it is asked for. Prints a JSON line for each model, then all as a
table: percentiles of the calls in milliseconds, seconds until the first answer, which compiles, and
the compiler's count of temporaries.
"""

import argparse
import json
import runpy
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from step_cost import SCHEMA, markdown, model_batch

from lmn_jax import mesh as meshes
from lmn_jax import models, update
from lmn_jax.errors import one_of

BLOCKS = 5  # of calls of each model
WARMUP = 10  # calls of a block before those that count

Request = dict[str, np.ndarray]


def requests(L: int, C: int) -> Iterator[Request]:
  """Batches of one user with L events and C candidates, without end; the same for every model."""
  rng = np.random.default_rng(0)
  while True:
    # The items of C users' batches are the candidates of one.
    of_one, of_all = model_batch(rng, 1, L), model_batch(rng, C, 1)
    yield of_one | {name: of_all[name][None] for name in ('item', *SCHEMA.item)}


def make_score(name: str, request: Request) -> tuple[Callable[[Request], np.ndarray], dict]:
  """A function from a request to logits [1, C], compiled, and what it takes besides time.

  Args:
    name: of models.CLICK. request: one of those to come.
  """
  path = Path(__file__).parents[1] / 'configs' / f'{name}_douyin.py'
  config = runpy.run_path(str(path))['get_config']()
  model = models.build(config.model.to_dict(), SCHEMA)
  one_device = meshes.make_mesh(devices=jax.devices()[:1])
  # A trainer is made for batches to learn from, which have one item of each user.
  trained = request | {name: request[name][:, 0] for name in ('item', *SCHEMA.item)}
  trainer = update.make_trainer(config, model, trained, one_device)
  state = jax.block_until_ready(trainer.init(0))

  def score(request):
    return np.asarray(trainer.predict(state, request))

  began = time.perf_counter()
  score(request)
  first_s = time.perf_counter() - began
  memory = trainer.predict.lower(state, request).compile().memory_analysis()
  return score, {
    'first_s': round(first_s, 2),
    'temporaries_mib': round(memory.temp_size_in_bytes / 2**20, 2),
  }


def time_calls(score: Callable[[Request], np.ndarray], asked: list[Request]) -> list[float]:
  """Milliseconds of each call after WARMUP that do not count."""
  times = []
  for request in asked:
    began = time.perf_counter()
    score(request)
    times.append((time.perf_counter() - began) * 1e3)
  return times[WARMUP:]


def measure(names: list[str], L: int, C: int, calls: int) -> list[dict]:
  """A row for each model, of at least `calls` calls.

  Args:
    names: of models.CLICK. L: events of the history. C: candidates.
  """
  each = -(-calls // BLOCKS)
  stream = requests(L, C)
  scores = {name: make_score(name, next(stream)) for name in names}
  times = {name: [] for name in names}
  for _ in range(BLOCKS):
    asked = list(islice(stream, WARMUP + each))
    for name, (score, _) in scores.items():
      times[name] += time_calls(score, asked)
  return [
    {
      'model': name,
      'length': L,
      'candidates': C,
      'calls': len(times[name]),
      **{f'p{q}_ms': round(float(np.percentile(times[name], q)), 3) for q in (50, 99)},
      **taken,
      'device': jax.devices()[0].device_kind,
    }
    for name, (_, taken) in scores.items()
  ]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--length', type=int, default=1000)
  parser.add_argument('--candidates', type=int, default=200)
  parser.add_argument(
    '--calls', type=int, default=1000, help='of each model, for a p99: 300 or more'
  )
  affordable = [name for name in models.CLICK if name != 'bst']  # see the head of this file
  parser.add_argument('--models', default=','.join(affordable))
  given = parser.parse_args(arguments)
  names = given.models.split(',')
  for name in names:
    one_of('--models', name, models.CLICK)
  rows = measure(names, given.length, given.candidates, given.calls)
  for row in rows:
    print(json.dumps(row))
  print(markdown(rows))


if __name__ == '__main__':
  main()
