"""Counts of several labels of a store: by label and split, of a part and of all parts."""

from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from lmn_jax.data.splits import SPLITS

# Label -> 'labelled' and 'clicks' -> split -> number of examples.
LabelCounts = dict[str, dict[str, Any]]


def of_part(
  labels: dict[str, Float[np.ndarray, 'E']], split: Integer[np.ndarray, 'E']
) -> LabelCounts:
  """Returns the counts of a part.

  Args:
    labels: values by name; NaN where a label is missing. split: of the examples.
  """

  def by_split(mask):
    return dict(zip(SPLITS, np.bincount(split[mask], minlength=len(SPLITS)).tolist(), strict=True))

  return {
    name: {'labelled': by_split(~np.isnan(values)), 'clicks': by_split(values > 0)}
    for name, values in labels.items()
  }


def total(parts: list[LabelCounts]) -> LabelCounts:
  """Returns the counts of all parts together."""
  return {
    name: {
      count: {split: sum(part[name][count][split] for part in parts) for split in SPLITS}
      for count in counts
    }
    for name, counts in parts[0].items()
  }
