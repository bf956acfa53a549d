"""What can be trained and makes no sense: a line for each, before training begins.

An error would be too much, for each of these may be meant in a test of the machinery; but a number
that comes of it says nothing.
"""

import math
from typing import Any

import ml_collections

from lmn_jax.data.store import Store
from lmn_jax.training.tasks import TASKS

# Peak rates above these move a weight further in a step than trained weights are large.
LARGEST = {'adam': 1.0, 'adagrad': 10.0, 'rowwise_adagrad': 10.0, 'sgd': 1000.0}
UNKNOWN = 0.5  # share of the training examples without an id of their own


def doubts(config: ml_collections.ConfigDict, store: Store, sources: dict[str, Any]) -> list[str]:
  """What makes no sense in an experiment, a line each.

  Args:
    config: the whole experiment. store: its data. sources: batches by split.
  """
  return [
    *_of_ids(config, store),
    *TASKS[config.task].doubts(config, store),
    *_of_batches(config, sources),
    *_of_rates(config),
  ]


def _of_ids(config, store):
  least = f'config.data.min_count={config.data.min_count}'
  for kind in ('user', 'item'):
    unknown = store.manifest['counts']['out_of_vocabulary'][kind]['train']
    if store.vocabulary[kind] == 1:
      yield f'every {kind} is unknown: none occurs often enough in training for {least}; lower it'
    elif unknown > UNKNOWN:
      yield f'{unknown:.0%} of the training examples have an unknown {kind}, see {least}'


def _of_batches(config, sources):
  rows = sources['train'].rows
  if config.batch_size > rows:
    yield (
      f'config.batch_size={config.batch_size} is more than the {rows} rows that training has for '
      'batches: each step has some of them more than once'
    )


def _of_rates(config):
  for group in ('dense', 'embedding', 'memory'):
    name, rate = config.optimizer[group].name, config.optimizer[group].rate
    if rate > LARGEST.get(name, math.inf):
      yield (
        f'config.optimizer.{group}.rate={rate} is too large for {name} to learn anything; '
        f'at most {LARGEST[name]:g} makes sense'
      )
