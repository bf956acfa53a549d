"""Row optimizers against dense optax; schedules; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmn_jax import optim, table
from lmn_jax.config import base
from lmn_jax.errors import UserError
from lmn_jax.models.ctr import TableSpec


def settings(**changes):
  config = base('pooling').optimizer
  for name, value in changes.items():
    if isinstance(value, dict):
      config[name].update(value)
    else:
      config[name] = value
  return config


def after(name, touched, steps=5):
  """Rows after `steps` of a row optimizer and of the same dense one, equal gradients."""
  config = settings(embedding=dict(name=name, rate=0.1))
  tx = optim.make(config, 'embedding', 100)
  t = table.init(TableSpec(8, 4, 0.5), jax.random.key(0), tx, 1)
  rows, state = t.rows_RD, tx.init(t.rows_RD)
  ids = jnp.asarray(touched)
  for step in range(steps):
    grads = jax.random.normal(jax.random.key(step), (len(touched), 4))
    t = optim.update_rows(tx, t, table.RowGrads(ids, grads))
    dense = jnp.zeros_like(rows).at[ids].set(grads, mode='drop')
    updates, state = tx.update(dense, state, rows)
    rows = optax.apply_updates(rows, updates)
  return t, rows


@pytest.mark.parametrize('name', ['adagrad', 'sgd'])
def test_touched_rows_only_is_exact(name):
  """A row without gradient would not have moved; R = 512 drops its write."""
  t, rows = after(name, [3, 512, 0])
  np.testing.assert_allclose(t.rows_RD, rows, rtol=1e-6, atol=1e-7)
  assert np.abs(np.asarray(t.rows_RD)[[0, 3]]).sum() > 0


def test_lazy_adam_is_adam_on_rows_touched_in_every_step():
  t, rows = after('adam', [3, 0])
  np.testing.assert_allclose(t.rows_RD[jnp.array([0, 3])], rows[jnp.array([0, 3])], rtol=1e-5)


def test_lazy_adam_leaves_other_rows_alone():
  t, _ = after('adam', [3, 0])
  start = table.init(TableSpec(8, 4, 0.5), jax.random.key(0), optax.sgd(1.0), 1).rows_RD
  np.testing.assert_array_equal(t.rows_RD[jnp.array([1, 2, 4])], start[jnp.array([1, 2, 4])])


def test_schedules():
  def rates(kind, warmup):
    rule = optim.schedule(settings(schedule=kind, warmup_steps=warmup), 2.0, 100)
    return [float(rule(step)) for step in (0, 5, 10, 55, 100)]

  assert rates('constant', 0) == [2, 2, 2, 2, 2]
  assert rates('constant', 10) == pytest.approx([0, 1, 2, 2, 2])
  assert rates('linear', 10) == pytest.approx([0, 1, 2, 1, 0])
  assert rates('cosine', 10) == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


def test_frozen_rows_do_not_move():
  tx = optim.make(settings(), 'frozen', 10)
  t = table.init(TableSpec(8, 4, 0.5), jax.random.key(0), tx, 1)
  moved = optim.update_rows(tx, t, table.RowGrads(jnp.array([1]), jnp.ones((1, 4))))
  np.testing.assert_array_equal(moved.rows_RD, t.rows_RD)


def test_clipping_brings_the_norm_to_the_bound():
  grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  norm = optax.tree.norm(grads)
  factor = optim.clip_factor(1.0, norm)
  assert (float(norm), float(factor)) == pytest.approx((5, 0.2))
  assert float(optim.clip_factor(10.0, norm)) == 1


@pytest.mark.parametrize(
  'changes, says',
  [
    (dict(schedule='cosin'), "did you mean 'cosine'"),
    (dict(warmup_steps=101), 'warmup_steps=101'),
    (dict(embedding=dict(name='adamm')), "did you mean 'adam'"),
    (dict(embedding=dict(rate=0.0)), 'rate=0.0'),
  ],
)
def test_bad_settings(changes, says):
  with pytest.raises(UserError, match=says):
    optim.make(settings(**changes), 'embedding', 100)
