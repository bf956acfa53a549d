"""Metrics of predicted numbers against their definitions."""

import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.errors import UserError
from lmn_jax.evaluation import baselines, number_metrics
from lmn_jax.evaluation.criterion import criterion_of

LABEL = np.array([1.0, 4.0, -2.0, 10.0], np.float32)
PREDICTION = np.array([2.0, 4.0, 1.0, 7.0], np.float32)


def test_metrics_equal_values_by_hand():
  assert number_metrics.rmse(LABEL, PREDICTION) == pytest.approx(np.sqrt((1 + 0 + 9 + 9) / 4))
  assert number_metrics.mae(LABEL, PREDICTION) == pytest.approx((1 + 0 + 3 + 3) / 4)


def test_sums_are_those_of_float64():
  label = np.full(100_001, 1e6, np.float32)
  assert number_metrics.mae(label, label + np.float32(0.125)) == 0.125


def test_the_report_has_metrics_by_history_and_custom_ones():
  total, user = np.array([0, 20, 20, 3]), np.array([0, 0, 1, 1])
  metrics = {'bias': lambda y, p, user: float((p - y).mean())}
  report = number_metrics.report(LABEL, PREDICTION, user, total, (10, 30), metrics)
  assert report['overall'] == {
    'rows': 4, 'not_finite': 0, 'rmse': pytest.approx(np.sqrt(19 / 4)), 'mae': 7 / 4, 'bias': 0.25,
  }  # fmt: skip
  assert report['by_history']['10-29']['mae'] == 1.5 and report['by_history']['0-9']['rows'] == 2
  assert report['by_history']['30+'] == {
    'rows': 0, 'not_finite': 0, 'rmse': None, 'mae': None, 'bias': None,
  }  # fmt: skip


def test_a_prediction_that_is_not_finite_leaves_no_metric():
  prediction = np.array([2.0, np.nan, 1.0, np.inf], np.float32)
  zeros = np.zeros(4, int)
  metrics = {'bias': lambda y, p, user: 1.0}
  overall = number_metrics.report(LABEL, prediction, zeros, zeros, (10,), metrics)['overall']
  assert overall == {'rows': 4, 'not_finite': 2, 'rmse': None, 'mae': None, 'bias': None}


def test_baselines_are_the_means_of_all_of_the_item_and_of_the_user():
  item, user = np.array([1, 1, 2]), np.array([0, 1, 1])
  counts = baselines.count([(item, user, np.array([3.0, 5.0, -2.0], np.float32))], 4, 3)
  scores = {
    name: score(counts, np.array([1, 2, 3]), np.array([0, 1, 2])).tolist()
    for name, score in baselines.BASELINES['number'].items()
  }
  assert scores == {
    'label_mean': [2, 2, 2], 'item_mean': [4, -2, 2], 'user_mean': [3, 1.5, 2],
  }  # fmt: skip


def test_the_lowest_error_is_the_best():
  config = configs.base('pooling')
  criterion = criterion_of(config, ('rmse', 'mae'))
  assert criterion.name == '-rmse' and criterion.score({'rmse': 3.0, 'mae': 1.0}) == -3.0
  config.criterion = '-dwell/mae'
  assert criterion_of(config, ('dwell/rmse', 'dwell/mae')).score({'dwell/mae': 2.0}) == -2.0
  config.criterion = 'mae'
  with pytest.raises(
    UserError, match="config.criterion='mae' would choose .* highest error; use '-m"
  ):
    criterion_of(config, ('rmse', 'mae'))
  config.criterion = 'auc'
  with pytest.raises(UserError, match="config.criterion='auc' is unknown; .*rmse, mae"):
    criterion_of(config, ('rmse', 'mae'))
