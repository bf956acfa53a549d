"""The labels that an exported model scores, and the order of items by one or several of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmn_jax.export.runtime.raw_values import LARGEST, RequestError, shown
from lmn_jax.export.runtime.requests import Scores


class Labels:
  """The labels of a model.

  Attributes:
    names: of several labels, the main one first; () of one label.
    log_odds: whether scores are log-odds of a click; otherwise they are predicted numbers in the
      unit of the label, or products of next-item models.
  """

  def __init__(self, manifest: dict[str, Any]):
    """manifest: of the export; without `labels` and `label_kind` it has one label of clicks."""
    self.names = tuple(manifest.get('labels', ()))
    self.log_odds = manifest['task'] == 'click' and manifest.get('label_kind', 'click') == 'click'

  def empty(self, count: int) -> np.ndarray:
    """Returns zeros as the scores of `count` items: float32 [C] or, of K labels, [C, K]."""
    return np.zeros((count, len(self.names)) if self.names else count, np.float32)

  def scores(self, values: np.ndarray, degraded: bool) -> Scores:
    """Returns the scores of an answer. values: float32 [C] or [C, K]."""
    if not self.names:
      return Scores(values, degraded)
    by_label = dict(zip(self.names, np.ascontiguousarray(values.T), strict=True))
    return Scores(by_label[self.names[0]], degraded, by_label)

  def order(self, values: np.ndarray, by: str | Mapping[str, Any] | None) -> np.ndarray:
    """Returns the numbers [C] by which items are ordered.

    Args:
      values: float32 [C] or [C, K]. by: None, the main label; the name of a label; or its weight
        `w` by name, for `sum w p`, float64, with the probabilities `p` of clicks or the predicted
        numbers.

    Raises:
      RequestError: the model has no such label, or a weight is not finite or all are 0.
    """
    if by is None:
      return values[:, 0] if self.names else values
    for name in [by] if isinstance(by, str) else by:
      if name not in self.names:
        names = ', '.join(self.names) or 'it has one only, so leave `by` out'
        raise RequestError(f'by: label {shown(name)} is unknown; labels of the model: {names}')
    if isinstance(by, str):
      return values[:, self.names.index(by)]
    weight_K = np.array([_weight(by.get(name, 0)) for name in self.names])
    if not weight_K.any():
      raise RequestError('by: all weights are 0, so they order nothing; give a label a weight')
    values = values.astype(np.float64)
    return (probability(values) if self.log_odds else values) @ weight_K


def _weight(raw):
  """Returns a weight as float64 if it is finite."""
  is_number = isinstance(raw, int | float | np.integer | np.floating) and not isinstance(raw, bool)
  if not is_number or not abs(raw) <= LARGEST:
    raise RequestError(f'by: the weight {shown(raw)} is not a number of float32; give a number')
  return float(raw)


def probability(log_odds: np.ndarray) -> np.ndarray:
  """Returns probabilities, float64."""
  odds = np.exp(-np.abs(log_odds.astype(np.float64)))
  return np.where(log_odds < 0, odds, 1.0) / (1.0 + odds)
