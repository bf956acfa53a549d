"""Metrics against counts over all pairs, and undefined metrics."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_metrics


def by_pairs(label, score, weight):
  """AUC from its definition, O(N^2)."""
  wins = pairs = 0.0
  for i in np.flatnonzero(label == 1):
    for j in np.flatnonzero(label == 0):
      pair = weight[i] * weight[j]
      wins += pair * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
      pairs += pair
  return wins / pairs if pairs else None


@st.composite
def impressions(draw):
  """Few distinct scores, so that ties within and across classes and users are frequent."""
  rows = draw(
    st.lists(
      st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 3), st.integers(0, 2)),
      max_size=30,
    )
  )
  label, score, user, weight = np.array(rows, np.int64).reshape(-1, 4).T
  return label, score.astype(np.float32), user, weight.astype(np.float64)


@given(impressions())
def test_auc_equals_counts_over_pairs(data):
  label, score, _, weight = data
  assert click_metrics.auc(label, score, weight) == pytest.approx(by_pairs(label, score, weight))
  assert click_metrics.auc(label, score) == pytest.approx(
    by_pairs(label, score, np.ones(len(label)))
  )


@given(impressions())
def test_gauc_equals_the_mean_over_users(data):
  label, score, user, weight = data
  total = mass = users = 0
  for u in set(user):
    area = by_pairs(label[user == u], score[user == u], weight[user == u])
    if area is not None:
      total += area * weight[user == u].sum()
      mass += weight[user == u].sum()
      users += 1
  got, counted = click_metrics.gauc(label, score, user, weight)
  assert counted == users
  assert got == (pytest.approx(total / mass) if users else None)


@given(impressions())
def test_losses_equal_their_definitions(data):
  label, logit, _, weight = data
  kept = weight > 0
  y, s, w = label[kept], logit[kept].astype(np.float64), weight[kept]
  if not y.size:
    assert click_metrics.log_loss(label, logit, weight) is None
    return
  p = 1 / (1 + np.exp(-s))
  loss = np.average(-np.log(np.where(y == 1, p, 1 - p)), weights=w)
  assert click_metrics.log_loss(label, logit, weight) == pytest.approx(loss)
  rate = np.average(y, weights=w)
  if rate in (0, 1):
    assert click_metrics.normalised_entropy(label, logit, weight) is None
  else:
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert click_metrics.normalised_entropy(label, logit, weight) == pytest.approx(loss / entropy)
  ratio = None if rate == 0 else np.sum(w * p) / np.sum(w * y)
  assert click_metrics.calibration(label, logit, weight) == pytest.approx(ratio)


def test_log_loss_of_large_logits_is_finite():
  """A float sigmoid would round to 1 and give infinity; the loss of s = 500 at y = 0 is 500."""
  label, logit = np.array([0.0, 1.0]), np.array([500.0, 500.0], np.float32)
  assert click_metrics.log_loss(label, logit) == 250.0


def test_predicting_the_rate_has_normalised_entropy_one_and_is_calibrated():
  label = np.array([1, 0, 0, 0])
  logit = np.full(4, np.log(0.25 / 0.75))
  assert click_metrics.normalised_entropy(label, logit) == pytest.approx(1)
  assert click_metrics.calibration(label, logit) == pytest.approx(1)


def test_auc_of_a_large_sample_is_exact():
  """Swapping one adjacent pair of 2n sorted rows changes one pair of n * n."""
  n = 50_000
  label = np.repeat([0, 1], n)
  score = np.arange(2 * n, dtype=np.float64)
  score[[n - 1, n]] = score[[n, n - 1]]
  assert click_metrics.auc(label, score) == 1 - 1 / n**2


def test_report_by_length_of_history():
  rng = np.random.default_rng(0)
  label, logit = rng.integers(0, 2, 400), rng.normal(size=400)
  user, total = rng.integers(0, 9, 400), rng.integers(0, 30, 400)
  total[:2] = 10, 9
  got = click_metrics.report(label, logit, user, total, buckets=(10, 20))
  assert list(got['by_history']) == ['0-9', '10-19', '20+']
  inside = (total >= 10) & (total < 20)
  assert got['by_history']['10-19']['rows'] == inside.sum()
  assert got['by_history']['10-19']['auc'] == click_metrics.auc(label[inside], logit[inside])
  overall = got['overall']
  assert (overall['gauc'], overall['gauc_users']) == click_metrics.gauc(label, logit, user)
  assert sum(bucket['rows'] for bucket in got['by_history'].values()) == 400
  assert got['overall']['clicks'] == label.sum()


def test_undefined_is_null_in_json():
  """For one class, an empty bucket, and scores that are not finite."""
  ones, zeros = np.ones(3), np.zeros(3, np.int32)
  got = click_metrics.report(ones, ones, zeros, zeros)
  text = json.loads(json.dumps(got, allow_nan=False))
  assert text['overall']['auc'] is None and text['overall']['gauc'] is None
  assert text['overall']['normalised_entropy'] is None
  assert text['overall']['log_loss'] == pytest.approx(np.log1p(np.exp(-1)))
  assert text['by_history']['500+']['rows'] == 0
  assert text['by_history']['500+']['log_loss'] is None
  bad = click_metrics.report(np.array([0, 1, 0]), np.array([0.0, np.nan, np.inf]), zeros, zeros)
  assert bad['overall']['not_finite'] == 2
  for name in ('auc', 'gauc', 'log_loss', 'normalised_entropy', 'calibration'):
    assert bad['overall'][name] is None


def test_rows_of_weight_zero_are_ignored():
  """Also if they have NaN scores and invalid labels."""
  label, logit = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.3, 0.1, 2.0, -1.0])
  user, total = np.zeros(4, np.int32), np.array([0, 20, 0, 70])
  plain = click_metrics.report(label, logit, user, total)
  filled = click_metrics.report(
    np.append(label, [7.0]),
    np.append(logit, [np.nan]),
    np.append(user, [0]),
    np.append(total, [0]),
    weight=np.array([1.0, 1.0, 1.0, 1.0, 0.0]),
  )
  assert filled == plain


def test_ranking_scores_have_no_loss():
  label, score = np.array([0, 1, 1]), np.array([4, 9, 2])
  got = click_metrics.report(label, score, np.zeros(3, int), np.zeros(3, int), ranks_only=True)
  assert got['overall']['auc'] == 0.5
  assert got['overall']['log_loss'] is None and got['overall']['calibration'] is None


def test_the_first_bucket_begins_at_zero():
  label, total = np.array([0, 1]), np.array([0, 5])
  for buckets, names in (((), ['0+']), ((0, 5), ['0-4', '5+']), ((5,), ['0-4', '5+'])):
    got = click_metrics.report(label, label, total, total, buckets=buckets)
    assert list(got['by_history']) == names


@pytest.mark.parametrize('buckets', [(-1, 5), (0, 5, 5), (9, 3), (0, 0)])
def test_wrong_buckets_are_rejected(buckets):
  zeros = np.zeros(1, np.int32)
  with pytest.raises(UserError, match='must be >= 0 and ascend; use'):
    click_metrics.report(zeros, zeros, zeros, zeros, buckets=buckets)


def test_wrong_labels_and_weights_are_rejected():
  two = np.zeros(2)
  with pytest.raises(ValueError, match='label 2.0 is not 0 or 1; 1 such'):
    click_metrics.auc(np.array([0, 2]), two)
  with pytest.raises(ValueError, match='weight -1.0'):
    click_metrics.log_loss(two, two, np.array([1, -1]))
  with pytest.raises(ValueError, match='weight nan'):
    click_metrics.log_loss(two, two, np.array([1, np.nan]))
