"""Evaluation of a split: every example scored on the mesh, metrics exact on the host."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lmn_jax import baselines, memory, mesh, metrics
from lmn_jax.batches import BatchSource, loader
from lmn_jax.models.ctr import TableSpec
from lmn_jax.store import Store
from lmn_jax.update import State, Trainer


class Scored(NamedTuple):
  """The examples of a split with their scores, in the store's order; filler rows are gone.

  label float32 [N], logit float32 [N], user int32 [N] records, item int32 [N] rows,
  total int32 [N] events before.
  """

  label: np.ndarray
  logit: np.ndarray
  user: np.ndarray
  item: np.ndarray
  total: np.ndarray


def score(trainer: Trainer, state: State, source: BatchSource, place_on: Mesh) -> Scored:
  """Scores every example of a split.

  Args:
    trainer: whose `predict` is used. state: the weights. source: an unshuffled source.
    place_on: the mesh.
  """
  batches, logits = [], []
  for batch in loader(source):
    logits.append(trainer.predict(state, mesh.place(place_on, batch)))
    batches.append(batch)
  # One transfer at the end, so that scoring never waits for the host.
  logit = np.concatenate(jax.device_get(logits))
  real = np.concatenate([b['weight'] for b in batches]) > 0

  def column(name):
    return np.concatenate([b[name] for b in batches])[real]

  return Scored(column('label'), logit[real], column('user_index'), column('item'), column('total'))


def report(scored: Scored, buckets: tuple[int, ...]) -> dict:
  """All metrics of a scored split, overall and by length of the history."""
  return metrics.report(scored.label, scored.logit, scored.user, scored.total, buckets)


def report_baselines(store: Store, scored: Scored, buckets: tuple[int, ...]) -> dict[str, dict]:
  """The trainless baselines on the same examples, fitted on the training examples only."""
  counts = baselines.count(
    (
      (
        part.examples['item'][slice(*part.bounds['train'])],
        part.examples['user'][slice(*part.bounds['train'])] + np.int32(part.first),
        part.examples['label'][slice(*part.bounds['train'])],
      )
      for part in store.parts
    ),
    store.vocabulary['item'],
    store.manifest['counts']['users'],
  )
  return {
    name: metrics.report(
      scored.label,
      baseline(counts, scored.item, scored.user),
      scored.user,
      scored.total,
      buckets,
      ranks_only=True,
    )  # fmt: skip
    for name, baseline in baselines.BASELINES.items()
  }


def health(state: State, specs: dict[str, TableSpec]) -> dict[str, float]:
  """Usage of every table that counts its reads since the last `reset_reads`."""
  usage = jax.jit(memory.usage, static_argnums=2)
  values = {}
  for name, table in state.tables.items():
    if table.reads_R is not None:
      found = jax.device_get(usage(table.reads_R, table.ever_R, specs[name].rows))
      values |= {f'{name}/{key}': float(value) for key, value in found.items()}
  return values
