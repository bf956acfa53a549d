"""A metric for each task."""

import numpy as np


def precision_of_the_top_tenth(label, logit, user):
  """Clicks: the share of clicks among the tenth of the rows with the highest scores."""
  top = np.argsort(-logit, kind='stable')[: max(1, len(label) // 10)]
  return label[top].mean()


def median_rank(rank):
  """Next items: the median rank of the targets."""
  return np.median(rank)
