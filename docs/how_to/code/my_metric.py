"""Two metrics and a criterion, a function each."""

import numpy as np


def precision_of_the_top_tenth(label, logit, user):
  """Clicks: the share of clicks among the tenth of the rows with the highest scores."""
  top = np.argsort(-logit, kind='stable')[: max(1, len(label) // 10)]
  return label[top].mean()


def median_rank(rank):
  """Next items: the median of the targets' ranks."""
  return np.median(rank)


def order_and_calibration(metrics):
  """The best checkpoint orders well and predicts as many clicks as there are."""
  return metrics['auc'] - abs(metrics['calibration'] - 1)
