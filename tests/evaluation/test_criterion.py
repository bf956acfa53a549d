"""The criterion of the best checkpoint, and custom metrics."""

import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_metrics, custom_metrics
from lmn_jax.evaluation.criterion import criterion_of

COLUMNS = ('auc', 'log_loss')


@pytest.mark.parametrize(
  'name, score', [('', 0.7), ('auc', 0.7), ('log_loss', 0.5), ('-log_loss', -0.5)]
)
def test_a_criterion_is_the_named_metric(name, score):
  config = configs.base('pooling')
  config.criterion = name
  criterion = criterion_of(config, COLUMNS)
  assert criterion.score({'auc': 0.7, 'log_loss': 0.5}) == score
  assert criterion.name == (name or 'auc')


@pytest.mark.parametrize('value', [None, float('nan'), 'high', np.ones(2)])
def test_a_value_that_is_not_a_finite_number_is_rejected(value):
  criterion = criterion_of(configs.base('pooling'), COLUMNS)
  with pytest.raises(UserError, match='cannot choose the best checkpoint'):
    criterion.score({'auc': value})


def mean_of_clicks(label, logit, user):
  return (label * logit).sum() / label.sum() if label.any() else None


def users(label, logit, user):
  return len(set(user))


def test_custom_metrics_are_measured_on_the_rows_of_each_bucket():
  label, logit = np.array([0.0, 1, 1, 0]), np.array([0.1, 0.2, 0.3, 0.4])
  user, total = np.array([0, 0, 1, 1]), np.array([0, 20, 20, 3])
  metrics = {'mean_of_clicks': mean_of_clicks, 'users': users}
  report = click_metrics.report(label, logit, user, total, (10, 30), metrics=metrics)
  assert report['overall']['mean_of_clicks'] == pytest.approx(0.25)
  assert report['by_history']['0-9']['mean_of_clicks'] is None
  assert (
    report['by_history']['10-29']['users'] == 2 and report['by_history']['30+']['users'] is None
  )
  logit[0] = np.nan
  report = click_metrics.report(label, logit, user, total, (10, 30), metrics=metrics)
  assert report['overall']['users'] is None  # like all metrics of scores that are not finite
  with pytest.raises(UserError, match=r"users\(\) returned 'two'; it must return one number"):
    custom_metrics.measure({'users': lambda rank: 'two'}, np.array([1]))
