"""Evaluation of click models on a split: scores on the mesh, exact metrics on the host."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from lmn_jax.data.store import Store
from lmn_jax.evaluation import baselines, click_metrics, custom_metrics
from lmn_jax.layers import product_keys
from lmn_jax.tables.spec import TableSpec
from lmn_jax.tables.table import Table

_usage = jax.jit(product_keys.usage, static_argnums=2)
_largest = jax.jit(lambda rows_RD: jnp.max(jnp.abs(rows_RD)).astype(jnp.float32))


class Examples(NamedTuple):
  """The examples of a split in the store's order; every host has the examples of all hosts.

  label: float32 [N]. user: int32 [N] records. item: int32 [N] rows. total: int32 [N], number of
  events of the user before the example.
  """

  label: np.ndarray
  user: np.ndarray
  item: np.ndarray
  total: np.ndarray


def examples_of(store: Store, split: str) -> Examples:
  """Reads the columns of a split that the metrics need besides the scores."""

  def column(name, dtype):
    pieces = [part.examples[name][slice(*part.bounds[split])] for part in store.parts]
    if name == 'user':  # records are numbered within a part; convert them to the store
      pieces = [x + part.first for x, part in zip(pieces, store.parts, strict=True)]
    return np.concatenate(pieces).astype(dtype)

  return Examples(
    column('label', np.float32), store.users()[column('user', np.int32)],
    column('item', np.int32), column('end', np.int32),
  )  # fmt: skip


def score(
  predict: Callable[[dict], jax.Array], batches: Iterable[tuple[Any, dict]], examples: int
) -> np.ndarray:
  """Scores every example of a split: logits float32 [N], in the store's order, on every host.

  Args:
    predict: a batch -> its logits [B]. batches: of the split, see `feed.held_out`. examples: N.
  """
  logits = [predict(batch) for _, batch in batches]
  # One transfer at the end, so that scoring never waits for the host. The filler of the last
  # batch comes after all examples.
  return np.concatenate(jax.device_get(logits))[:examples]


def report(
  examples: Examples,
  logit: np.ndarray,
  buckets: tuple[int, ...],
  metrics: dict[str, custom_metrics.Metric] | None = None,
) -> dict:
  """All metrics of a scored split and custom `metrics`, overall and by length of the history."""
  return click_metrics.report(
    examples.label, logit, examples.user, examples.total, buckets, metrics=metrics
  )


def rows_of(store: Store, split: str, logit: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
  """Yields the examples of a split with their scores, a part of the store at a time.

  Args:
    store: of the examples. split: its name. logit: from `score`.

  Returns:
    Columns for `scored_rows.write`.
  """
  begin = 0
  for part in store.parts:
    rows = slice(*part.bounds[split])
    columns = {name: part.examples[name][rows] for name in ('user', 'item', 'time', 'label', 'end')}
    score = logit[begin : begin + len(columns['user'])].astype(np.float32)
    begin += len(score)
    yield {
      'user': columns['user'] + np.int64(part.first),
      'item': columns['item'],
      'time': columns['time'],
      'label': columns['label'].astype(np.int8),
      'score': score,
      'probability': scipy.special.expit(score),
      'events': columns['end'],
    }


def count_training(store: Store) -> baselines.Counts:
  """Counts the training examples for the baselines."""
  users = store.users()
  pieces = (
    (
      part.examples['item'][slice(*part.bounds['train'])],
      users[part.examples['user'][slice(*part.bounds['train'])] + np.int32(part.first)],
      part.examples['label'][slice(*part.bounds['train'])],
    )
    for part in store.parts
  )
  return baselines.count(pieces, store.vocabulary['item'], store.manifest['counts']['users'])


def report_baselines(
  counts: baselines.Counts,
  examples: Examples,
  buckets: tuple[int, ...],
  metrics: dict[str, custom_metrics.Metric] | None = None,
) -> dict[str, dict]:
  """The ranking metrics of the baselines on the same examples."""
  return {
    name: click_metrics.report(
      examples.label, baseline(counts, examples.item, examples.user), examples.user,
      examples.total, buckets, ranks_only=True, metrics=metrics,
    )
    for name, baseline in baselines.BASELINES.items()
  }  # fmt: skip


def health(tables: dict[str, Table], specs: dict[str, TableSpec]) -> dict[str, float]:
  """Usage and largest value of every table that counts its reads.

  The usage is that since the counters were cleared. The largest value shows memory values that
  diverge before they are infinite.
  """
  values = {}
  for name, table in tables.items():
    if table.reads_R is not None:
      metrics = jax.device_get(_usage(table.reads_R, table.ever_R, specs[name].rows))
      metrics['largest'] = jax.device_get(_largest(table.rows_RD))
      values |= {f'{name}/{key}': float(value) for key, value in metrics.items()}
  return values
