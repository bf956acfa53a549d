"""The model of several histories: its encoders are those of the models of one history."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.errors import UserError
from lmn_jax.models import registry
from lmn_jax.training import setup as setups
from tests.examples import RICH_SCHEMA, make_config, make_rich_batch
from tests.models.test_request_batches import random_like, reader

OF_HISTORY = ('history', 'event', 'length', 'total', 'time_gap')
KEYS = {name: jax.random.key(0) for name in ('params', 'dropout', 'positions')}


def with_history(batch, name, other):
  """The batch with the history of another one as a named history."""
  named = {k: x for k, x in other.items() if k.partition('.')[0] in OF_HISTORY}
  return batch | {f'{name}:{key}': x for key, x in named.items()}


def build(name, **fields):
  """(model, tables, parameters) with random values."""
  model = registry.build(make_config(name, **fields).model.to_dict(), RICH_SCHEMA)
  tables = random_like(
    {k: jax.ShapeDtypeStruct((x.rows, x.width), jnp.float32) for k, x in model.tables().items()}, 0
  )
  shapes = jax.eval_shape(lambda: model.init(KEYS, BATCH, reader(tables), train=True))
  return model, tables, random_like(shapes, 1)


# `all` is the main history, `orders` has another one and another length.
BATCH = make_rich_batch(B=8)
BATCH = with_history(with_history(BATCH, 'all', BATCH), 'orders', make_rich_batch(1, B=8, L=3))
BATCH = jax.tree.map(jnp.asarray, BATCH)


def test_a_named_copy_of_the_main_history_has_the_scores_of_a_single_one():
  """With the same parameters, and no weight of the head on the other history."""
  shared = dict(time='buckets', event_width=5)
  single, tables, alone = build('din', **shared)
  encoders = {'orders': 'pooling', 'all': 'din'}
  several, _, both = build('histories', encoders=encoders, **shared)
  params = dict(alone['params'])
  fields, head = params.pop('field_embedding'), params.pop('head')
  chex.assert_trees_all_equal_shapes(both['params']['encoder_all'], params)
  kernel = np.asarray(head['Dense_0']['kernel'])
  width = single.item_width
  kernel = np.concatenate([kernel, np.zeros_like(kernel[-width:])])  # `all` is before `orders`
  first = head['Dense_0'] | {'kernel': jnp.asarray(kernel)}
  merged = {
    'encoder_all': params, 'field_embedding': fields, 'head': head | {'Dense_0': first}
  }  # fmt: skip
  chex.assert_trees_all_equal_shapes(
    merged, {k: x for k, x in both['params'].items() if k != 'encoder_orders'}
  )

  def run(model, params):
    outputs = model.apply({'params': params}, BATCH, reader(tables), train=True, rngs=KEYS)
    return outputs.value, outputs.losses

  expected = jax.jit(run, static_argnums=0)(single, alone['params'])
  assert np.std(expected[0]) > 0.1
  chex.assert_trees_all_close(jax.jit(run, static_argnums=0)(several, merged), expected, rtol=1e-5)


def test_auxiliary_losses_of_one_name_are_added():
  model, tables, variables = build('histories', encoders={'all': 'dien', 'orders': 'dien'})

  @jax.jit
  def gradients(params):
    def loss(params):
      outputs = model.apply({'params': params}, BATCH, reader(tables), train=True, rngs=KEYS)
      return outputs.losses['auxiliary']

    return jax.grad(loss)(params)

  of_parameters = gradients(variables['params'])
  for name in ('encoder_all', 'encoder_orders'):
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_parameters[name])) > 1e-6, name


@pytest.mark.slow
def test_every_click_model_may_be_an_encoder():
  """Each has its own parameters with gradients."""
  encoders = {f'h_{name}': name for name in registry.CLICK}
  arguments = {
    'h_lmn': dict(slots_per_axis=8, top_k=3, query_width=8), 'h_sim': dict(top_k=3),
    'h_ubr4ctr': dict(top_k=3), 'h_eta': dict(top_k=3), 'h_twin': dict(top_k=3),
  }  # fmt: skip
  batch = BATCH
  for history in encoders:
    other = jax.tree.map(jnp.asarray, make_rich_batch(2, B=8, L=4))
    batch = with_history(batch, history, other)
  model = registry.build(
    make_config('histories', encoders=encoders, encoder_arguments=arguments).model.to_dict(),
    RICH_SCHEMA,
  )
  assert 'memory' in model.tables() and not model.any_length
  shapes = {
    k: jax.ShapeDtypeStruct((x.rows, x.width), 'float32') for k, x in model.tables().items()
  }
  tables = random_like(shapes, 0)
  shapes = jax.eval_shape(lambda: model.init(KEYS, batch, reader(tables), train=True))
  stats = {k: x for k, x in shapes.items() if k != 'params'}
  stats = jax.tree.map(lambda x: jnp.ones(x.shape), stats)

  @jax.jit
  def gradients(params):
    def loss(params):
      outputs, _ = model.apply(
        {'params': params, **stats}, batch, reader(tables), train=True, rngs=KEYS,
        mutable=list(stats),
      )  # fmt: skip
      return sum(outputs.losses.values()), (outputs.losses, outputs.monitors)

    return jax.grad(loss, has_aux=True)(params)

  grads, (losses, monitors) = gradients(random_like(shapes['params'], 1))
  assert losses.keys() == {'click', 'memory', 'auxiliary', 'balance', 'search'}
  assert 'h_lmn/memory/top1_weight' in monitors
  of_encoders = {k: x for k, x in grads.items() if k.startswith('encoder_')}
  assert len(of_encoders) == len(encoders) - 2  # Pooling and SDIM have no parameters
  for name, leaves in of_encoders.items():
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(leaves)) > 1e-6, name


WRONG = [
  (dict(encoders={}), r'config.model.encoders=\{\} must name an encoder'),
  (dict(encoders={'clicks': 'dinn'}), "encoders.clicks='dinn' is unknown; did you mean 'din'"),
  (dict(encoders={'carts': 'din'}), "encoders: history='carts' is unknown; available: clicks, or"),
  (dict(encoder_arguments={'carts': {}}), "encoder_arguments: history='carts' is unknown"),
  (dict(encoder_arguments={'orders': {'variant': '2P'}}), "orders: field='variant' is unknown; av"),
  (dict(encoder_arguments={'orders': {'attention': '8'}}), "attention='8' is of the type str; it"),
  (dict(encoder_arguments={'orders': {'attention': 0}}), 'arguments.orders.attention=0 must be at'),
  (dict(encoders={'clicks': 'lmn', 'orders': 'lmn'}), 'clicks and orders both have a memory'),
  (dict(time='bias', encoders={'orders': 'pooling'}), 'and Pooling has none'),
]  # fmt: skip


def config_of(**fields):
  config = configs.base('histories')
  config.data.behaviour = 'kind'
  config.data.histories = {'clicks': ('view',), 'orders': ('buy',)}
  config.model.encoders = {'orders': 'din'}
  config.history_lengths = {'orders': 3}
  with config.model.unlocked():
    for name, value in fields.items():
      config.model[name] = value
  return config


@pytest.mark.parametrize('fields, message', WRONG)
def test_wrong_encoders_are_refused(fields, message):
  config = config_of(**fields)
  config.history_lengths = dict.fromkeys(config.model.encoders, 3)
  with pytest.raises(UserError, match=message) as error:
    setups.check(config)
  assert '\n' not in str(error.value)


def test_lengths_and_histories_fit_the_model():
  setups.check(config_of())

  def refused(message, config, **fields):
    config.update(fields)
    with pytest.raises(UserError, match=message):
      setups.check(config)

  for lengths, message in (
    ({}, "config.history_lengths has no 'orders'"),
    ({'orders': 3, 'clicks': 9}, "history_lengths: history='clicks' is unknown; available: orders"),
    ({'orders': 0}, 'config.history_lengths.orders=0 must be a whole number of at least 1'),
  ):
    config = config_of()
    config.history_lengths = lengths
    refused(message, config)
  config = config_of()
  config.data.histories = {}
  refused('config.model.encoders=.* needs config.data.histories', config)
  din = configs.base('din')
  din.history_lengths = {'orders': 3}
  refused("has no effect: only the model 'histories'", din)
  config = config_of(encoders={'orders': 'sam'})
  refused('needs a model of any length', config, train_length='suffix')
  dman = configs.base('dman', 'next_item')
  dman.data.behaviour, dman.data.histories = 'kind', {'orders': ('buy',)}
  refused('next items read one history, whose behaviours are config.data.history_behaviours', dman)
