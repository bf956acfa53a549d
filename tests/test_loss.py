"""Losses against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lmn_jax.loss import Recall, click_loss, memory_loss, smooth_l1, total_loss, weighted_mean


def test_click_loss_leaves_filler_rows_out():
  logit = np.array([0.3, -2.0, 40.0, -40.0], np.float32)
  label = np.array([1, 0, 1, 1], np.float32)
  weight = np.array([1, 1, 1, 0], np.float32)
  p = 1 / (1 + np.exp(-logit[:2].astype(np.float64)))
  want = -(np.log(p[0]) + np.log(1 - p[1])) / 3
  found = click_loss(jnp.asarray(logit), jnp.asarray(label), jnp.asarray(weight))
  assert float(found) == pytest.approx(want, rel=1e-6)


def test_smooth_l1_is_girshicks():
  x = np.array([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 2.5], np.float32)
  want = np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)
  np.testing.assert_allclose(smooth_l1(jnp.asarray(x)), want, rtol=1e-6)


def recall():
  rng = np.random.default_rng(0)
  recalled, target = rng.normal(0, 2, (2, 3, 4, 5)).astype(np.float32)
  weight = np.array([[2, 2, 2, 2], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]], np.float32)
  return recalled, target, weight


def test_memory_loss_and_its_yardstick():
  recalled, target, weight = recall()
  found = memory_loss(Recall(jnp.asarray(recalled), jnp.asarray(target), jnp.asarray(weight)))

  def mean(predicted):
    x = predicted - target
    loss = np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5).mean(-1)
    return (weight * loss).sum() / weight.sum()

  average = np.einsum('bp,bpv->v', weight, target) / weight.sum()
  assert float(found[0]) == pytest.approx(mean(recalled), rel=1e-5)
  assert float(found[1]) == pytest.approx(mean(average[None, None]), rel=1e-5)


def test_weighted_mean():
  x, weight = jnp.array([[1.0, 2.0], [4.0, 9.0]]), jnp.array([[0.25, 0.0], [0.5, 0.0]])
  assert float(weighted_mean(x, weight)) == pytest.approx(3)
  assert float(weighted_mean(x, 0 * weight)) == 0
  assert weighted_mean(x.astype(jnp.bfloat16), weight).dtype == jnp.float32


def test_total_is_click_plus_what_a_models_own_losses_weigh():
  logit = jnp.array([0.1, 0.2, -0.3])
  batch = {'label': jnp.array([1.0, 0.0, 1.0]), 'weight': jnp.ones(3)}
  own = {'memory': jnp.float32(3), 'search': jnp.float32(5)}
  weights = ConfigDict(dict(memory_weight=0.5, search_weight=2.0, balance_weight=7.0))
  alone, joined = (total_loss(logit, losses, batch, weights) for losses in ({}, own))
  assert set(alone.parts) == {'click'} and alone.total == alone.parts['click']
  assert joined.parts == alone.parts | own
  assert float(joined.total) == pytest.approx(float(alone.total) + 11.5, rel=1e-6)
