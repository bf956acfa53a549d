"""The cost of DMAN for growing histories: a training step, an update, a request.

    python experiments/history_cost.py [--lengths=100,1000,10000] [--models=dman,sasrec]

A log (synthetic.generate_interests), a store and an experiment for each length. A model of
segments, such as DMAN, reads whole histories, segment by segment; a model of windows, such as
SASRec, reads only its window. The lengths take turns in every pass; reported are medians over the
passes:

  step_ms        a training step on the batches of training
  update_ms      one more event for the states of 128 users with a full segment
  score_ms       200 candidates scored for each of 128 users, from their states
  state_kib      of a user: the carry and the newest events
  whole_ms       reading the whole histories of 128 users, which states make unnecessary
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from step_cost import show

from lmn_jax import config as configs
from lmn_jax.data.histories import users_of
from lmn_jax.data.prepare import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.models import registry
from lmn_jax.training import setup as setups

USERS, CANDIDATES = 128, 200


def make_config(name: str, length: int, args: argparse.Namespace):
  """The experiment of a model on histories of a length."""
  config = configs.base(name, 'next_item')
  config.data = configs.interests_data(
    users=USERS, length=length, goods=2_000, chatter=1_000, favourites=8
  )
  config.data.name = f'interests_{length}'
  config.history_length, config.model.width = args.segment, args.width
  config.batch_size = config.eval_batch_size = USERS
  return config


def seconds(call: Callable, times: int) -> float:
  """The median seconds of some calls, after one that is not timed."""
  durations = []
  for _ in range(times + 1):
    began = time.perf_counter()
    jax.block_until_ready(call())
    durations.append(time.perf_counter() - began)
  return statistics.median(durations[1:])


def turn(name: str, length: int, root: Path, args: argparse.Namespace) -> Callable[[], dict]:
  """A function that measures a model at a length one time."""
  config = make_config(name, length, args)
  store = prepare(config.data, root)
  setup = setups.set_up(config, store)
  state = setup.trainer.init(0)
  model = StatefulModel(setup.model, setup.trainer, setup.mesh, args.segment, USERS)
  users, (part,) = users_of(store), store.parts
  whole = [{'item': part.history['item'][n * length : (n + 1) * length]} for n in range(USERS)]
  # A multiple of the segment: the next event reads a whole segment.
  full = length // args.segment * args.segment
  rng = np.random.default_rng(0)
  candidates = rng.integers(1, store.vocabulary['item'], (USERS, CANDIDATES))
  fed = model.update(
    state, model.empty(users.row), [{'item': events['item'][:full]} for events in whole]
  )
  event = [{'item': np.array([1])} for _ in whole]
  source, at = setup.sources['train'], 0

  def step():
    nonlocal state, at
    batch = meshes.place(setup.mesh, source[at])
    at += 1
    state, metrics = setup.trainer.update(state, batch)
    return metrics

  def measured():
    return {
      'step_ms': 1e3 * seconds(step, args.calls),
      'update_ms': 1e3 * seconds(lambda: model.update(state, fed, event), args.calls),
      'score_ms': 1e3 * seconds(lambda: model.score(state, fed, candidates), args.calls),
      'whole_ms': 1e3 * seconds(lambda: model.update(state, model.empty(users.row), whole), 1),
      'state_kib': sum(x[0].nbytes for x in jax.tree.leaves(fed)) / 1024,
    }

  return measured


def measure(root: Path, args: argparse.Namespace) -> list[dict]:
  """A row for each model and length."""
  turns = {(m, n): turn(m, n, root, args) for m in args.models for n in args.lengths}
  results = {key: [] for key in turns}
  for _ in range(args.passes):
    for key, measured in turns.items():
      results[key].append(measured())
  return [
    {'model': m, 'length': n}
    | {key: round(statistics.median(x[key] for x in lines), 2) for key in lines[0]}
    for (m, n), lines in results.items()
  ]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  numbers = {'type': lambda x: [int(n) for n in x.split(',')]}
  parser.add_argument('--lengths', **numbers, default=[100, 1_000, 10_000])
  parser.add_argument('--models', type=lambda x: x.split(','), default=['dman', 'sasrec'])
  for name, value in {'segment': 20, 'width': 128, 'passes': 3, 'calls': 20}.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  for name in args.models:
    one_of('--models', name, registry.NEXT_ITEM)
  with tempfile.TemporaryDirectory() as root:
    rows = measure(Path(root), args)
  show(rows, args)


if __name__ == '__main__':
  main()
