"""Exact metrics of predicted numbers over host arrays, overall and by length of the history.

Symbols: label y, prediction p, both in the unit of the label. All sums are float64. An undefined
metric (no rows, a prediction that is not finite) is None, in JSON null.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from lmn_jax.evaluation import custom_metrics
from lmn_jax.evaluation.click_metrics import bucket_names

Rows = Shaped[np.ndarray, 'N']


def rmse(label: Rows, prediction: Rows) -> float | None:
  """The root of the mean squared error, `sqrt(mean_i (p_i - y_i)^2)`.

  Args:
    label: [N] real. prediction: [N] real.
  """
  error = _errors(label, prediction)
  return None if error is None else float(np.sqrt(np.mean(np.square(error))))


def mae(label: Rows, prediction: Rows) -> float | None:
  """The mean absolute error, `mean_i |p_i - y_i|`.

  Args:
    label: [N] real. prediction: [N] real.
  """
  error = _errors(label, prediction)
  return None if error is None else float(np.mean(np.abs(error)))


def report(
  label: Rows,
  prediction: Rows,
  user: Rows,
  total: Rows,
  buckets: Sequence[int],
  metrics: dict[str, custom_metrics.Metric] | None = None,
) -> dict:
  """All metrics, overall and by the length of the whole history.

  Args:
    label: [N] real. prediction: [N] real. user: [N], for custom metrics. total: [N], events in the
      user's history before the row. buckets: ascending edges, as in `click_metrics.report`.
    metrics: custom metrics by name, functions of (label, prediction, user).

  Returns:
    {'overall': metrics, 'by_history': {'0-9': metrics, ..., '500+': metrics}}, ready for JSON.
    metrics has rows, not_finite (number of such predictions), rmse, mae and the custom metrics.

  Raises:
    UserError: the edges do not ascend.
  """
  edges, names = bucket_names(buckets)
  bucket = np.searchsorted(edges, total, side='right') - 1

  def measure(rows):
    y, p = label[rows], prediction[rows]
    finite = bool(np.isfinite(p).all())
    custom = custom_metrics.measure(metrics or {}, y, p, user[rows]) if finite else {}
    return dict(
      rows=int(y.size),
      not_finite=int(np.sum(~np.isfinite(p))),
      rmse=rmse(y, p),
      mae=mae(y, p),
      **(custom or dict.fromkeys(metrics or {})),
    )

  return dict(
    overall=measure(slice(None)),
    by_history={name: measure(bucket == k) for k, name in enumerate(names)},
  )


def _errors(label, prediction):
  """The errors as float64; None if a metric of them is undefined."""
  if not label.size or not np.isfinite(prediction).all():
    return None
  return prediction.astype(np.float64) - label.astype(np.float64)
