"""Baselines without a model: scores from counts of the training examples."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Shaped

Ids = Integer[np.ndarray, 'N']
Scores = Float[np.ndarray, 'N']


class Counts(NamedTuple):
  """Impressions and clicks of the training examples; V item rows, R user records, all float64.

  Where labels are numbers, `clicks` are their sums.
  """

  item_shown: Float[np.ndarray, 'V']
  item_clicks: Float[np.ndarray, 'V']
  user_shown: Float[np.ndarray, 'R']
  user_clicks: Float[np.ndarray, 'R']


def count(
  parts: Iterable[tuple[Ids, Ids, Shaped[np.ndarray, 'N']]], items: int, users: int
) -> Counts:
  """Counts training examples, part by part, so that a log may be larger than memory.

  Args:
    parts: (item row [N], user record [N], label [N]) of each part; N may differ.
    items: V, rows of the item vocabulary; row 0 stands for ids outside the vocabulary.
    users: R, user records.

  Returns:
    The counts.

  Raises:
    ValueError: on a row outside [0, items) or a record outside [0, users).
  """
  total = Counts(np.zeros(items), np.zeros(items), np.zeros(users), np.zeros(users))
  for item, user, label in parts:
    _check('item row', item, items)
    _check('user record', user, users)
    label = label.astype(np.float64)
    total.item_shown[:] += np.bincount(item, minlength=items)
    total.item_clicks[:] += np.bincount(item, weights=label, minlength=items)
    total.user_shown[:] += np.bincount(user, minlength=users)
    total.user_clicks[:] += np.bincount(user, weights=label, minlength=users)
  return total


def popularity(counts: Counts, item: Ids, user: Ids) -> Scores:
  """The number of training clicks of the item: c_i.

  Ids outside the vocabulary share row 0 and its clicks, which are 0 unless the vocabulary omits
  rare ids.

  Args:
    counts: of the training examples.
    item: [N] item rows.
    user: [N] user records, not used; the baselines share one signature.

  Returns:
    [N] scores, which are not probabilities.

  Raises:
    ValueError: on a row outside the counts.
  """
  del user
  return _take('item row', counts.item_clicks, item)


def item_mean(counts: Counts, item: Ids, user: Ids) -> Scores:
  """The mean training label of the item, c_i / n_i; the global mean where n_i = 0.

  Args:
    counts: of the training examples.
    item: [N] item rows.
    user: [N] user records, not used.

  Returns:
    [N] scores, of clicks in [0, 1].

  Raises:
    ValueError: on a row outside the counts.
  """
  del user
  return _take('item row', _mean(counts.item_clicks, counts.item_shown, counts), item)


def item_user_mean(counts: Counts, item: Ids, user: Ids) -> Scores:
  """The mean label of the item plus that of the user, each the global mean where unseen.

    score = c_i / n_i + c_u / n_u

  Args:
    counts: of the training examples.
    item: [N] item rows.
    user: [N] user records.

  Returns:
    [N] scores in [0, 2], which are not probabilities.

  Raises:
    ValueError: on a row or record outside the counts.
  """
  by_user = _mean(counts.user_clicks, counts.user_shown, counts)
  return item_mean(counts, item, user) + _take('user record', by_user, user)


def label_mean(counts: Counts, item: Ids, user: Ids) -> Scores:
  """The mean training label, the same for all examples.

  Args:
    counts: of the training examples.
    item: [N] item rows, of which only the number is used.
    user: [N] user records, not used.

  Returns:
    [N] scores, in the unit of the label.
  """
  del user
  return np.full(item.shape, _global_mean(counts))


def user_mean(counts: Counts, item: Ids, user: Ids) -> Scores:
  """The mean training label of the user; the global mean where they have none.

  Args:
    counts: of the training examples.
    item: [N] item rows, not used.
    user: [N] user records.

  Returns:
    [N] scores, in the unit of the label.

  Raises:
    ValueError: on a record outside the counts.
  """
  del item
  return _take('user record', _mean(counts.user_clicks, counts.user_shown, counts), user)


# By the kind of the labels; those of numbers are in the unit of the label.
BASELINES = {
  'click': {'popularity': popularity, 'item_mean': item_mean, 'item_user_mean': item_user_mean},
  'number': {'label_mean': label_mean, 'item_mean': item_mean, 'user_mean': user_mean},
}


def _mean(clicks, shown, counts):
  """Clicks over impressions by row; without impressions, the global mean (0 without examples)."""
  mean = np.full(shown.shape, _global_mean(counts))
  return np.divide(clicks, shown, out=mean, where=shown > 0)


def _global_mean(counts):
  return counts.item_clicks.sum() / max(counts.item_shown.sum(), 1.0)


def _take(kind, values, ids):
  _check(kind, ids, values.size)
  return values[ids]


def _check(kind, ids, bound):
  if ids.size and not (0 <= ids.min() and ids.max() < bound):
    wrong = ids[(ids < 0) | (ids >= bound)][0]
    raise ValueError(f'{kind} {wrong} is outside [0, {bound})')
