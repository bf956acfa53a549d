"""A criterion that chooses the best checkpoint."""


def order_and_calibration(metrics):
  """AUC, less the distance of the calibration from 1."""
  return metrics['auc'] - abs(metrics['calibration'] - 1)
