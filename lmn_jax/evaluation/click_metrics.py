"""Exact metrics of click prediction over host arrays, overall and by length of the history.

Symbols: label y in {0, 1}, logit s, prediction p = sigmoid(s), weight w >= 0 (0 removes a row, such
as the filler of a last batch). All sums are float64. An undefined metric (one class only, no rows,
a score that is not finite) is None, in JSON null.
"""

from collections.abc import Sequence

import numpy as np
import scipy.special
from jaxtyping import Shaped

from lmn_jax.errors import UserError
from lmn_jax.evaluation import custom_metrics

Rows = Shaped[np.ndarray, 'N']
BUCKETS = (10, 50, 100, 500)


def auc(label: Rows, score: Rows, weight: Rows | None = None) -> float | None:
  """Area under the ROC curve: the probability that a click has a higher score than a non-click.

    AUC = sum_{i: y_i = 1} sum_{j: y_j = 0} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2)
          / (sum_{i: y_i = 1} w_i  sum_{j: y_j = 0} w_j)

  Exact, by one sort in O(N log N), without thresholds; ties count half (Hanley & McNeil, Radiology
  1982; Fawcett, Pattern Recognition Letters 2006, section 7).

  Args:
    label: [N] 0 or 1, any dtype.
    score: [N] real; only the order matters.
    weight: [N] non-negative; None counts every row once.

  Returns:
    AUC in [0, 1], or None if it is undefined.

  Raises:
    ValueError: on a label that is not 0 or 1, a negative weight, or lengths that differ.
  """
  label, score, weight = _rows(label, score, weight)
  if not label.size or not np.isfinite(score).all():
    return None
  area, _ = _areas(label, score, np.zeros(label.size, np.int8), weight)
  return None if np.isnan(area[0]) else float(area[0])


def gauc(
  label: Rows, score: Rows, user: Rows, weight: Rows | None = None
) -> tuple[float | None, int]:
  """AUC within each user, averaged with the user's impressions as weights.

    gAUC = sum_u n_u AUC_u / sum_u n_u,  n_u = sum_{i of u} w_i

  over the users with both classes; users with one class have no AUC and are skipped (Zhu et al.,
  Optimized Cost per Click in Taobao Display Advertising, KDD 2017, section 4; Zhou et al., DIN, KDD
  2018, equation 8).

  Args:
    label: [N] 0 or 1.
    score: [N] real.
    user: [N] ids of any sortable type.
    weight: [N] non-negative, or None.

  Returns:
    (gAUC or None, number of users with both classes).

  Raises:
    ValueError: as `auc`.
  """
  if len(user) != len(label):
    raise ValueError(f'{len(user)} users for {len(label)} labels')
  if weight is not None:
    user = user[weight > 0]
  label, score, weight = _rows(label, score, weight)
  if not label.size or not np.isfinite(score).all():
    return None, 0
  area, mass = _areas(label, score, user, weight)
  both = ~np.isnan(area)
  if not both.any():
    return None, 0
  return float(np.sum(area[both] * mass[both]) / np.sum(mass[both])), int(both.sum())


def log_loss(label: Rows, logit: Rows, weight: Rows | None = None) -> float | None:
  """Mean binary cross-entropy in nats, from logits.

    LogLoss = -1/W sum_i w_i (y_i log p_i + (1 - y_i) log(1 - p_i))
            =  1/W sum_i w_i (log(1 + exp(s_i)) - y_i s_i),  W = sum_i w_i

  The second form never takes the log of a rounded 0.

  Args:
    label: [N] 0 or 1.
    logit: [N] real.
    weight: [N] non-negative, or None.

  Returns:
    Nats for each impression, or None without rows or with a logit that is not finite.

  Raises:
    ValueError: as `auc`.
  """
  label, logit, weight = _rows(label, logit, weight)
  if not label.size or not np.isfinite(logit).all():
    return None
  logit = logit.astype(np.float64)
  return float(np.sum(weight * (np.logaddexp(0.0, logit) - label * logit)) / np.sum(weight))


def normalised_entropy(label: Rows, logit: Rows, weight: Rows | None = None) -> float | None:
  """LogLoss relative to that of predicting the mean label (He et al., ADKDD 2014, eq. 1).

    NE = LogLoss / -(c log c + (1 - c) log(1 - c)),  c = sum_i w_i y_i / W

  Below 1 is better than predicting the click rate. It can be compared across click rates.

  Args:
    label: [N] 0 or 1.
    logit: [N] real.
    weight: [N] non-negative, or None.

  Returns:
    NE, or None with one class only (the background entropy is 0).

  Raises:
    ValueError: as `auc`.
  """
  loss = log_loss(label, logit, weight)
  label, _, weight = _rows(label, logit, weight)
  if loss is None or not 0 < np.sum(weight * label) < np.sum(weight):
    return None
  rate = np.sum(weight * label) / np.sum(weight)
  return float(loss / (scipy.special.entr(rate) + scipy.special.entr(1 - rate)))


def calibration(label: Rows, logit: Rows, weight: Rows | None = None) -> float | None:
  """Predicted clicks divided by clicks; 1 is calibrated (He et al., ADKDD 2014, section 2).

    calibration = sum_i w_i p_i / sum_i w_i y_i

  Args:
    label: [N] 0 or 1.
    logit: [N] real.
    weight: [N] non-negative, or None.

  Returns:
    The ratio, or None without a click or with a logit that is not finite.

  Raises:
    ValueError: as `auc`.
  """
  label, logit, weight = _rows(label, logit, weight)
  clicks = np.sum(weight * label)
  if not clicks or not np.isfinite(logit).all():
    return None
  return float(np.sum(weight * scipy.special.expit(logit.astype(np.float64))) / clicks)


def report(
  label: Rows,
  logit: Rows,
  user: Rows,
  total: Rows,
  buckets: Sequence[int] = BUCKETS,
  weight: Rows | None = None,
  ranks_only: bool = False,
  metrics: dict[str, custom_metrics.Metric] | None = None,
) -> dict:
  """All metrics, overall and by the length of the whole history (not of the window that is read).

  Args:
    label: [N] 0 or 1.
    logit: [N] real; a logit, or with `ranks_only` any score.
    user: [N] user ids, for gAUC.
    total: [N] events in the user's history before the impression.
    buckets: ascending edges; a bucket has edge <= total < next edge, the first begins at 0 (with or
      without a 0 in the list) and the last is open.
    weight: [N] non-negative, or None.
    ranks_only: the score is not a logit (such as a popularity): LogLoss, NE, calibration and
      `metrics` are None.
    metrics: custom metrics by name, functions of (label, logit, user) without weights.

  Returns:
    {'overall': metrics, 'by_history': {'0-9': metrics, ..., '500+': metrics}}, ready for JSON.
    metrics has rows, clicks, not_finite (number of such scores; if any, the metrics are None), auc,
    gauc, gauc_users, log_loss, normalised_entropy, calibration, and the custom metrics.

  Raises:
    UserError: the edges do not ascend.
    ValueError: as `auc`, and on a negative total.
  """
  edges, names = bucket_names(buckets)
  if len(total) != len(label) or (total < 0).any():
    raise ValueError('total must have one number >= 0 for each label')
  bucket = np.searchsorted(edges, total, side='right') - 1

  def measure(rows):
    w = None if weight is None else weight[rows]
    return _measure(label[rows], logit[rows], user[rows], w, ranks_only, metrics or {})

  return dict(
    overall=measure(slice(None)),
    by_history={name: measure(bucket == k) for k, name in enumerate(names)},
  )


def _measure(label, score, user, weight, ranks_only, metrics):
  """The metrics of some rows, by the keys of `report`."""
  y, s, w = _rows(label, score, weight)
  group_auc, users = gauc(label, score, user, weight)
  if ranks_only or not np.isfinite(score).all():
    custom = dict.fromkeys(metrics)
  else:
    custom = custom_metrics.measure(metrics, label, score, user)
  return dict(
    rows=int(y.size),
    clicks=_number(np.sum(w * y)),
    not_finite=int(np.sum(~np.isfinite(s))),
    auc=auc(label, score, weight),
    gauc=group_auc,
    gauc_users=users,
    log_loss=None if ranks_only else log_loss(label, score, weight),
    normalised_entropy=None if ranks_only else normalised_entropy(label, score, weight),
    calibration=None if ranks_only else calibration(label, score, weight),
    **custom,
  )


def bucket_names(buckets: Sequence[int]) -> tuple[np.ndarray, list[str]]:
  """The edges of buckets, starting at 0, and their names: '0-9', ..., '500+'.

  Raises:
    UserError: the edges do not ascend.
  """
  edges = np.asarray(buckets if buckets and buckets[0] == 0 else (0, *buckets))
  if (np.diff(edges) <= 0).any():
    raise UserError(f'buckets={tuple(buckets)} must be >= 0 and ascend; use for example {BUCKETS}')
  return edges, [f'{a}-{b - 1}' for a, b in zip(edges[:-1], edges[1:], strict=True)] + [
    f'{edges[-1]}+'
  ]


def _rows(label, score, weight):
  """Checks the arrays and removes rows of weight 0; returns label and weight as float64."""
  if len(score) != len(label) or (weight is not None and len(weight) != len(label)):
    raise ValueError(
      f'{len(label)} labels, {len(score)} scores'
      + ('' if weight is None else f', {len(weight)} weights')
      + '; the lengths must be equal'
    )
  label = label.astype(np.float64)
  if weight is None:
    weight = np.ones(label.size)
  else:
    weight = weight.astype(np.float64)
    if not (weight >= 0).all():
      raise ValueError(f'weight {weight[~(weight >= 0)][0]} is not a number >= 0')
    used = weight > 0
    label, score, weight = label[used], score[used], weight[used]
  wrong = (label != 0) & (label != 1)
  if wrong.any():
    raise ValueError(f'label {label[wrong][0]} is not 0 or 1; {wrong.sum()} such labels')
  return label, score, weight


def _areas(label, score, group, weight):
  """AUC [G] of each distinct group, nan for one class only, and its weight [G].

  Sorted by (group, score), a run of equal scores wins against the negatives before it in its group
  and against half of the negatives in the run.
  """
  order = np.lexsort((score, group))
  label, score, group, weight = label[order], score[order], group[order], weight[order]
  new_group = np.concatenate([[True], group[1:] != group[:-1]])
  new_run = new_group | np.concatenate([[True], score[1:] != score[:-1]])
  runs, groups = np.flatnonzero(new_run), np.flatnonzero(new_group)
  positive, negative = weight * label, weight * (1 - label)
  run_group = np.cumsum(new_group)[runs] - 1
  run_positive, run_negative = np.add.reduceat(positive, runs), np.add.reduceat(negative, runs)
  positives, negatives = np.add.reduceat(positive, groups), np.add.reduceat(negative, groups)
  before = np.cumsum(run_negative) - run_negative - (np.cumsum(negatives) - negatives)[run_group]
  wins = run_positive * (before + run_negative / 2)
  pairs = positives * negatives
  area = np.full(groups.size, np.nan)
  np.divide(
    np.bincount(run_group, weights=wins, minlength=groups.size), pairs, out=area, where=pairs > 0
  )
  return area, positives + negatives


def _number(x):
  """Converts a whole float to an int, for counts in reports."""
  return int(x) if x == int(x) else float(x)
