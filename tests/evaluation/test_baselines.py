"""The baselines without a model, against values by hand and a loop."""

import numpy as np
import pytest

from lmn_jax.evaluation import baselines

ITEM = np.array([1, 1, 1, 2, 2], np.int32)
USER = np.array([0, 1, 1, 0, 2], np.int32)
LABEL = np.array([1, 1, 0, 0, 0], np.float32)


def test_scores_equal_values_by_hand():
  """Item 3 and user 3 were never shown: their score is the global mean, 2 clicks of 5."""
  counts = baselines.count([(ITEM, USER, LABEL)], items=4, users=4)
  item, user = np.array([1, 2, 3, 3]), np.array([1, 3, 0, 3])
  np.testing.assert_array_equal(baselines.popularity(counts, item, user), [2, 0, 0, 0])
  np.testing.assert_allclose(baselines.item_mean(counts, item, user), [2 / 3, 0, 0.4, 0.4])
  np.testing.assert_allclose(
    baselines.item_user_mean(counts, item, user), [2 / 3 + 1 / 2, 0 + 0.4, 0.4 + 1 / 2, 0.4 + 0.4]
  )


def test_counts_of_parts_equal_those_of_the_whole():
  rng = np.random.default_rng(0)
  item, user, label = rng.integers(0, 7, 100), rng.integers(0, 5, 100), rng.integers(0, 2, 100)
  whole = baselines.count([(item, user, label)], 7, 5)
  parts = baselines.count(((item[k::3], user[k::3], label[k::3]) for k in range(3)), 7, 5)
  for a, b in zip(whole, parts, strict=True):
    np.testing.assert_array_equal(a, b)
  for i in range(7):
    assert whole.item_shown[i] == sum(item == i)
    assert whole.item_clicks[i] == sum(label[item == i])


@pytest.mark.parametrize(
  'score', baselines.BASELINES['click'].values(), ids=baselines.BASELINES['click']
)
def test_without_examples_every_score_is_zero(score):
  counts = baselines.count([], items=2, users=2)
  np.testing.assert_array_equal(score(counts, np.array([0, 1]), np.array([1, 0])), [0, 0])


def test_ids_out_of_range_are_rejected():
  with pytest.raises(ValueError, match=r'item row 2 is outside \[0, 2\)'):
    baselines.count([(ITEM, USER, LABEL)], items=2, users=4)
  counts = baselines.count([(ITEM, USER, LABEL)], items=4, users=4)
  with pytest.raises(ValueError, match=r'item row -1 is outside \[0, 4\)'):
    baselines.popularity(counts, np.array([-1]), np.array([0]))
  with pytest.raises(ValueError, match=r'user record 4 is outside \[0, 4\)'):
    baselines.item_user_mean(counts, np.array([0]), np.array([4]))
