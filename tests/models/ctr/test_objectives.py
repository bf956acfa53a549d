"""The loss that config.model.loss names, in a step of training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed.mesh import place
from lmn_jax.errors import UserError
from lmn_jax.layers import click_losses
from lmn_jax.layers.losses import click_loss
from lmn_jax.models import registry
from lmn_jax.models.ctr import objectives
from tests.examples import SCHEMA, make_batch, make_config, make_trainer
from tests.runs import mesh_of

SETTINGS = objectives.Settings(gamma=1.5, ranking=0.25, delta=0.5)


def weighted_batch():
  batch = make_batch()
  batch['user_index'] = np.sort(batch['user_index'] % 12)
  return batch | {'weight': np.linspace(0, 2, 16, dtype=np.float32)}


def step_of(loss, batch, **fields):
  """(logits before the step, metrics of the step) of a small model."""
  config = make_config('pooling', loss=loss, gamma=SETTINGS.gamma, ranking=SETTINGS.ranking)
  config.model.update(fields)
  _, trainer = make_trainer(config, mesh_of(1), batch)
  state, batch = trainer.init(0), place(mesh_of(1), batch)
  logit = jax.device_get(trainer.predict(state, batch))
  return logit, jax.device_get(trainer.update(state, batch)[1])


@pytest.mark.parametrize('name', ['bce', 'focal', 'pairwise', 'listwise'])
def test_a_step_has_the_named_loss_of_its_scores(name):
  batch = weighted_batch()
  logit, metrics = step_of(name, batch)
  y, w, g = (jnp.asarray(batch[name]) for name in ('label', 'weight', 'user_index'))
  s = jnp.asarray(logit)
  bce = click_loss(s, y, w)
  expected = {
    'bce': bce,
    'focal': click_losses.focal_loss(s, y, w, 1.5),
    'pairwise': 0.75 * bce + 0.25 * click_losses.pairwise_loss(s, y, w, g),
    'listwise': 0.75 * bce + 0.25 * click_losses.listwise_loss(s, y, w, g),
  }[name]
  assert metrics['loss'] == pytest.approx(float(expected), rel=1e-5)
  share = float(click_losses.grouped_share(y, w, g))
  assert metrics.get('grouped') == (pytest.approx(share) if 'wise' in name else None)
  assert 0 < share < 1


def test_jrc_has_two_logits_and_scores_with_their_difference():
  batch, outputs = weighted_batch(), []

  def record(call, args, kwargs, context):
    result = call(*args, **kwargs)
    if context.module.name == 'head' and context.method_name == '__call__':
      outputs.append(result)
    return result

  config = make_config('pooling', loss='jrc', ranking=SETTINGS.ranking)
  model = registry.build(config.model.to_dict(), SCHEMA)
  rows = {name: jax.random.normal(jax.random.key(0), (V + 1, 4)) for name, V in SCHEMA.vocabulary}
  arrays = {name: jnp.asarray(x) for name, x in batch.items()}

  def read(name, ids):
    return rows[name][ids]

  variables = model.init(jax.random.key(0), arrays, read)
  with nn.intercept_methods(record):
    result = model.apply(variables, arrays, read, train=True, rngs={'dropout': jax.random.key(1)})
  z = outputs[0][:, 0]
  assert z.shape == (16, 2) and result.value.dtype == jnp.float32
  np.testing.assert_array_equal(result.value, z[:, 1] - z[:, 0])
  (x,) = objectives.examples_of(arrays, 1)
  expected = 0.75 * click_loss(z[:, 1] - z[:, 0], x.label_N, x.weight_N)
  expected += 0.25 * click_losses.jrc_loss(z, *x)
  assert float(result.losses['click']) == pytest.approx(float(expected), rel=1e-6)


def test_targets_of_a_request_are_a_group():
  label = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
  batch = {'label': label, 'weight': np.ones_like(label), 'user_index': np.array([8, 8], np.int32)}
  (x,) = objectives.examples_of({name: jnp.asarray(x) for name, x in batch.items()}, 1)
  assert x.group_N.tolist() == [0, 0, 0, 1, 1, 1] and x.label_N.tolist() == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(loss='bpr'), "config.model.loss='bpr' is unknown"),
    (dict(gamma=-1.0), 'config.model.gamma=-1.0 must be at least 0'),
    (dict(gamma=float('nan')), 'config.model.gamma=nan must be at least 0'),
    (dict(delta=0.0), 'config.model.delta=0.0 must be above 0'),
    (dict(loss='mse'), "config.model.loss='mse' does not fit config.data.label_kind='click'; use"),
    (dict(ranking=1.5), r'config.model.ranking=1.5 must be in \[0, 1\]'),
  ],
)
def test_wrong_fields_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    registry.build(make_config('din', **fields).model.to_dict(), SCHEMA)
