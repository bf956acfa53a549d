"""Evaluation of click models on a split: scores on the mesh, exact metrics on the host.

Labels are clicks, or numbers that the same models predict.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import scipy.special

from lmn_jax.data import item_index
from lmn_jax.data.labels import MAIN
from lmn_jax.data.store import Store
from lmn_jax.evaluation import baselines, click_metrics, custom_metrics, number_metrics
from lmn_jax.layers import product_keys
from lmn_jax.tables.spec import TableSpec
from lmn_jax.tables.table import Table

_usage = jax.jit(product_keys.usage, static_argnums=2)
_largest = jax.jit(lambda rows_RD: jnp.max(jnp.abs(rows_RD)).astype(jnp.float32))


class Examples(NamedTuple):
  """The examples of a split in the store's order; every host has the examples of all hosts.

  label: float32 [N]; with K labels [N, K], NaN where one is missing. user: int32 [N] records. item:
  int32 [N] rows. total: int32 [N], number of events of the user before the example. cold: bool [N],
  whether the item is a cold one; None if the store has none.
  """

  label: np.ndarray
  user: np.ndarray
  item: np.ndarray
  total: np.ndarray
  cold: np.ndarray | None = None


def examples_of(store: Store, split: str) -> Examples:
  """Reads the columns of a split that the metrics need besides the scores."""

  def column(name, dtype):
    pieces = [part.examples[name][slice(*part.bounds[split])] for part in store.parts]
    if name == 'user':  # records are numbered within a part; convert them to the store
      pieces = [x + part.first for x, part in zip(pieces, store.parts, strict=True)]
    return np.concatenate(pieces).astype(dtype)

  labels = [column(name, np.float32) for name in store.label_columns]
  index, V = column('item', np.int32), store.vocabulary['item']
  return Examples(
    labels[0] if len(labels) == 1 else np.stack(labels, axis=1),
    store.users()[column('user', np.int32)],
    item_index.rows_of(index, V),
    column('end', np.int32),
    index > V if store.cold_items else None,
  )


def score(
  predict: Callable[[dict], jax.Array], batches: Iterable[tuple[Any, dict]], examples: int
) -> np.ndarray:
  """Scores every example of a split: logits float32 [N], in the store's order, on every host.

  Args:
    predict: a batch -> its logits [B], with K labels [B, K]; the result is then [N, K]. batches: of
      the split, see `feed.held_out`. examples: N.
  """
  logits = [predict(batch) for _, batch in batches]
  # One transfer at the end, so that scoring never waits for the host. The filler of the last
  # batch comes after all examples.
  return np.concatenate(jax.device_get(logits))[:examples]


def report(
  examples: Examples,
  score: np.ndarray,
  buckets: tuple[int, ...],
  labels: tuple[str, ...] = (MAIN,),
  metrics: dict[str, custom_metrics.Metric] | None = None,
  kind: str = 'click',
) -> dict:
  """All metrics of a scored split and custom `metrics`, overall and by length of the history.

  With several labels the metrics of each have its name, such as 'order/auc', and are those of the
  examples that have the label. With cold items also those of the examples with one: 'cold_items',
  with their share of the rows.

  Args:
    examples: of the split. score: [N] or [N, K], logits of clicks, or numbers. buckets: of lengths.
    labels: names of the K labels. metrics: custom ones by name. kind: of the labels.
  """
  return _report(examples, score, buckets, labels, metrics, kind, ranks_only=False)


def _report(examples, score, buckets, labels, metrics, kind, ranks_only):
  """`report` of any scores; ranks_only: see `click_metrics.report`."""

  def measured(rows, label, score):
    arrays = label, score, examples.user[rows], examples.total[rows], buckets
    if kind == 'number':
      return number_metrics.report(*arrays, metrics=metrics)
    return click_metrics.report(*arrays, ranks_only=ranks_only, metrics=metrics)

  def of_rows(among):
    """The report of some examples, bool [N]; None for all."""
    rows = slice(None) if among is None else among
    if len(labels) == 1:
      return measured(rows, examples.label[rows], score[rows])
    reports = {}
    for k, name in enumerate(labels):
      has = ~np.isnan(examples.label[:, k])
      has = has if among is None else has & among
      reports[name] = measured(has, examples.label[has, k], score[has, k])
    finite = np.isfinite(score[rows]).all(axis=1)
    return _joined(reports, len(finite), int(np.sum(~finite)))

  if examples.cold is None:
    return of_rows(None)
  of_cold = of_rows(examples.cold)['overall'] | {'share': float(examples.cold.mean())}
  return of_rows(None) | {'cold_items': of_cold}


def _joined(reports: dict[str, dict], rows: int, not_finite: int) -> dict:
  """One report of those of several labels: a metric of a label is 'label/metric'."""

  def joined(of_labels):
    return {f'{name}/{key}': x for name, values in of_labels.items() for key, x in values.items()}

  overall = joined({name: report['overall'] for name, report in reports.items()})
  main = next(iter(reports.values()))
  return dict(
    overall={'rows': rows, 'not_finite': not_finite} | overall,
    by_history={
      bucket: {'rows': values['rows']}
      | joined({name: report['by_history'][bucket] for name, report in reports.items()})
      for bucket, values in main['by_history'].items()
    },
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
    columns = {name: part.examples[name][rows] for name in ('user', 'item', 'time', 'end')}
    score = logit[begin : begin + len(columns['user'])].astype(np.float32)
    begin += len(score)
    yield {
      'user': columns['user'] + np.int64(part.first),
      'item': columns['item'],
      'time': columns['time'],
      **_scores_of(store, [part.examples[name][rows] for name in store.label_columns], score),
      'events': columns['end'],
    }


def _scores_of(store, labels, score):
  """The columns of labels, scores and, of clicks, probabilities; of several labels with names."""
  columns = {}
  for k, (name, label) in enumerate(zip(store.labels, labels, strict=True)):
    suffix = '' if len(labels) == 1 else f'.{name}'
    of_label = score if len(labels) == 1 else score[:, k]
    number, missing = store.label_kind == 'number', np.isnan(label)
    values = np.where(missing, 0, label).astype(np.float32 if number else np.int8)
    columns[f'label{suffix}'] = pa.array(values, mask=missing) if missing.any() else values
    columns[f'score{suffix}'] = of_label
    if not number:
      columns[f'probability{suffix}'] = scipy.special.expit(of_label)
  return columns


def count_training(store: Store) -> dict[str, baselines.Counts]:
  """Counts the training examples of each label for the baselines, by name of the label."""
  users = store.users()

  def pieces(column):
    for part in store.parts:
      rows = slice(*part.bounds['train'])
      label = part.examples[column][rows]
      item = item_index.rows_of(part.examples['item'][rows], store.vocabulary['item'])
      user = part.examples['user'][rows] + np.int32(part.first)
      known = ~np.isnan(label)
      yield item[known], users[user[known]], label[known]

  sizes = store.vocabulary['item'], store.manifest['counts']['users']
  return {
    name: baselines.count(pieces(column), *sizes)
    for name, column in zip(store.labels, store.label_columns, strict=True)
  }


def report_baselines(
  counts: dict[str, baselines.Counts],
  examples: Examples,
  buckets: tuple[int, ...],
  metrics: dict[str, custom_metrics.Metric] | None = None,
  kind: str = 'click',
) -> dict[str, dict]:
  """The metrics of the baselines on the same examples: of clicks only those of rankings.

  Args:
    counts: of `count_training`. examples: of the split. buckets: of lengths. metrics: custom ones.
    kind: of the labels.
  """
  reports, names = {}, tuple(counts)
  for name, baseline in baselines.BASELINES[kind].items():
    scores = [baseline(of_label, examples.item, examples.user) for of_label in counts.values()]
    score = scores[0] if len(scores) == 1 else np.stack(scores, axis=1)
    reports[name] = _report(examples, score, buckets, names, metrics, kind, ranks_only=True)
  return reports


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
