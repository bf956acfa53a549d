"""Warnings about configs that can be trained but give meaningless results.

They are not errors, because a test of the program may use such a config.
"""

import math
from typing import Any

import ml_collections

from lmn_jax.data.store import Store
from lmn_jax.training.tasks import TASKS

# A higher peak rate changes a weight in one step by more than the size of trained weights.
LARGEST = {'adam': 1.0, 'adagrad': 10.0, 'rowwise_adagrad': 10.0, 'sgd': 1000.0}
FEW = 1.2  # examples of a request
UNKNOWN = 0.5  # share of the examples of a split whose id is not in the vocabulary


def doubts(config: ml_collections.ConfigDict, store: Store, sources: dict[str, Any]) -> list[str]:
  """Returns one line for each warning about an experiment.

  Args:
    config: the whole experiment. store: its data. sources: batches by split.
  """
  return [
    *_id_doubts(config, store),
    *TASKS[config.task].doubts(config, store),
    *_batch_doubts(config, sources),
    *_rate_doubts(config),
  ]


def _id_doubts(config, store):
  least = f'config.data.min_count={config.data.min_count}'
  for kind in ('user', 'item'):
    unknown = store.manifest['counts']['out_of_vocabulary'][kind]
    if store.vocabulary[kind] == 1:
      yield f'every {kind} is unknown: none occurs often enough in training for {least}; lower it'
    elif unknown['train'] > UNKNOWN:
      yield f'{unknown["train"]:.0%} of the training examples have an unknown {kind}, see {least}'
    else:
      for split in ('valid', 'test'):
        if unknown[split] > UNKNOWN:
          yield (
            f'{unknown[split]:.0%} of the examples of {split} have an unknown {kind}, about which '
            'its id says nothing; another config.data.split may have fewer'
          )


def _batch_doubts(config, sources):
  source = sources['train']
  rows = source.rows
  if config.targets_per_request > 1 and source.examples_per_row < FEW:
    yield (
      f'config.targets_per_request={config.targets_per_request} saves little: requests have '
      f'{source.examples_per_row:.2f} examples on average, as few targets of a user share their '
      f'history; raise config.stale_events={config.stale_events}'
    )
  if config.batch_size > rows:
    yield (
      f'config.batch_size={config.batch_size} is more than the {rows} rows that training has for '
      'batches: each step has some of them more than once; lower it'
    )


def _rate_doubts(config):
  for group in ('dense', 'embedding', 'memory'):
    name, rate = config.optimizer[group].name, config.optimizer[group].rate
    if rate > LARGEST.get(name, math.inf):
      yield (
        f'config.optimizer.{group}.rate={rate} is too large for {name} to learn anything; '
        f'set at most {LARGEST[name]:g}'
      )
