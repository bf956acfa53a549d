"""Losses against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.loss import click_loss, memory_loss, smooth_l1, total_loss
from lmn_jax.models.ctr import Outputs, Recall


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


def test_total_is_click_plus_lambda_memory():
  recalled, target, weight = map(jnp.asarray, recall())
  logit = jnp.array([0.1, 0.2, -0.3])
  batch = {'label': jnp.array([1.0, 0.0, 1.0]), 'weight': jnp.ones(3)}
  joined = total_loss(Outputs(logit, Recall(recalled, target, weight), {}), batch, 0.5, 0.1)
  alone = total_loss(Outputs(logit, None, {}), batch, 0.5, 0.1)
  assert set(alone.parts) == {'click'}
  assert float(joined.total) == pytest.approx(
    float(alone.total) + 0.5 * float(joined.parts['memory']), rel=1e-6
  )
