"""Counts of the labels of a store, if there are several or they are numbers.

Label -> 'labelled': the examples with the label by split; of clicks 'clicks', those that are 1; of
numbers 'mean' and 'deviation' over the labelled examples of training.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from lmn_jax.data.splits import SPLITS

Counts = dict[str, dict[str, Any]]  # by label


def of_part(
  labels: dict[str, Float[np.ndarray, 'E']], split: Integer[np.ndarray, 'E'], kind: str
) -> Counts:
  """Returns the counts of a part; of numbers 'mean' and 'squares', the sum about the mean.

  Args:
    labels: values by name; NaN where a label is missing. split: of the examples. kind: of labels.
  """

  def by_split(mask):
    return dict(zip(SPLITS, np.bincount(split[mask], minlength=len(SPLITS)).tolist(), strict=True))

  counts = {name: {'labelled': by_split(~np.isnan(x))} for name, x in labels.items()}
  for name, values in labels.items():
    if kind == 'click':
      counts[name]['clicks'] = by_split(values > 0)
      continue
    known = values[(split == 0) & ~np.isnan(values)].astype(np.float64)
    mean = float(known.mean()) if known.size else 0.0
    counts[name] |= {'mean': mean, 'squares': float(np.square(known - mean).sum())}
  return counts


def total(parts: list[Counts]) -> Counts:
  """Returns the counts of all parts together, from those of `of_part`."""
  counts: Counts = {}
  for name, first in parts[0].items():
    of_label = [part[name] for part in parts]
    counts[name] = {
      count: {split: sum(part[count][split] for part in of_label) for split in SPLITS}
      for count in ('labelled', 'clicks')
      if count in first
    }
    if 'mean' in first:
      counts[name] |= _moments(of_label)
  return counts


def _moments(parts: list[dict]) -> dict[str, float]:
  """The mean and the deviation over all parts.

  Parts are combined by their means and squares about these (Chan et al. 1979), as sums of squares
  about 0 lose the digits of numbers that are far from 0.
  """
  count = mean = squares = 0.0
  for part in parts:
    more = part['labelled']['train']
    if more:
      step = part['mean'] - mean
      squares += part['squares'] + step**2 * count * more / (count + more)
      mean += step * more / (count + more)
      count += more
  return {'mean': mean, 'deviation': math.sqrt(squares / max(count, 1))}
