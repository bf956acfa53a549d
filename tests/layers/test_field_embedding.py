"""The vectors of users, items and events against numpy; padding; what has no parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.layers.fields import Fields
from lmn_jax.layers.time_gaps import bucket
from tests.encoders import make_params
from tests.examples import (
  NUMBERS,
  RICH_SCHEMA,
  RICH_SIZES,
  SCHEMA,
  make_batch,
  make_rich_batch,
)
from tests.layers.test_number_field import row_of

D = 3
BATCH = make_rich_batch()
NUMBER = {x.key: x for x in NUMBERS}


def make(schema=RICH_SCHEMA, buckets=True, event_width=0, dtype=jnp.float32):
  """(run: (variables, batch) -> Inputs, variables, tables)"""
  fields = Fields(schema, D, 0.05, buckets, dtype, event_width)
  rng = np.random.default_rng(3)
  tables = {
    name: jnp.asarray(np.r_[rng.normal(size=(V, D)), np.zeros((1, D))], jnp.float32)
    for name, V in RICH_SIZES.items()
  }

  def read(name, ids):
    return tables[name][ids]

  @jax.jit
  def run(variables, batch):
    return fields.apply(variables, batch, read)

  variables = make_params(
    lambda: fields.init(jax.random.key(0), jax.tree.map(jnp.asarray, BATCH), read)
  )
  return run, variables, tables


def coded(tables, name, ids):
  """The row of one id, or the mean of those of a list."""
  rows = [tables[name][i] for i in np.atleast_1d(ids) if i < RICH_SIZES[name]]
  return np.mean(rows, axis=0) if rows else np.zeros(D)


def test_every_vector_equals_numpy():
  run, variables, tables = make()
  x = run(variables, BATCH)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
  tables = {name: np.asarray(rows, np.float64) for name, rows in tables.items()}

  def number(key, value, params):
    return row_of(params[key], value, NUMBER[key])

  for b in range(16):
    one = {name: array[b] for name, array in BATCH.items()}

    def entity(ids, features, values, one=one):
      rows = [coded(tables, table, one[name]) for name, table in (ids, *features)]
      return np.concatenate(rows + [number(key, one[name], p) for name, key in values])

    user = entity(('user', 'user'), [('user.age',) * 2], [('user.income',) * 2])
    np.testing.assert_allclose(x.u_BU[b], user, atol=1e-5)
    context = [coded(tables, 'context.query', one['context.query'])]
    context.append(number('context.hour', one['context.hour'], p))
    np.testing.assert_allclose(x.c_BQC[b, 0], np.concatenate(context), atol=1e-5)
    features = [('item.category',) * 2, ('item.tags',) * 2]
    target = entity(('item', 'item'), features, [('item.price',) * 2])
    np.testing.assert_allclose(x.i_BQI[b, 0], target, atol=1e-5)
    assert np.sum(x.mask_BL[b]) == one['length']
    for place in range(one['length']):
      event = {name: array[place] for name, array in one.items() if np.ndim(array)
               and name.startswith(('history', 'event', 'time_gap'))}  # fmt: skip
      features = [('history.category', 'item.category'), ('history.tags', 'item.tags')]
      item = entity(('history', 'item'), features, [('history.price', 'item.price')], event)
      fields = [coded(tables, key, event[key]) for key in ('event.action', 'event.marks')]
      fields += [number(key, event[key], p['events']) for key in ('event.dwell', 'event.share')]
      fields.append(p['events']['time'][int(bucket(jnp.float32(event['time_gap'])))])
      added = np.concatenate(fields) @ p['events']['project']['kernel']
      np.testing.assert_allclose(x.s_BLI[b, place], item + added, atol=1e-4)
    np.testing.assert_array_equal(x.s_BLI[b, one['length'] :], 0)


def test_ids_alone_have_no_parameters():
  _, variables, _ = make(SCHEMA, buckets=False)
  assert not variables


def test_targets_and_events_have_the_event_width():
  run, variables, _ = make(event_width=7)
  x, plain = run(variables, BATCH), make(buckets=False)[0]
  assert x.i_BQI.shape == (16, 1, 7) and x.s_BLI.shape == (16, 6, 7)
  # The item part is that of `event_width=0`, projected by one matrix.
  params = dict(variables['params'])
  kernel = params['item']['kernel']
  zeros = jax.tree.map(jnp.zeros_like, params['events'])
  x = run({'params': params | {'events': zeros}}, BATCH)
  wide_project = jnp.zeros((4 * D, 4 * D))
  wide = params['events'] | {'project': {'kernel': wide_project}}
  del wide['time'], params['item']
  wide = plain({'params': params | {'events': wide}}, BATCH)
  np.testing.assert_allclose(x.i_BQI, wide.i_BQI @ kernel, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(x.s_BLI, wide.s_BLI @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('event_width', [0, 5])
def test_padding_has_no_effect_and_rows_are_independent(event_width):
  run, variables, _ = make(event_width=event_width)
  x = run(variables, BATCH)
  blank = np.arange(6)[None] >= BATCH['length'][:, None]
  noise = {
    name: np.where(blank.reshape(16, 6, *[1] * (array.ndim - 2)), array.dtype.type(2), array)
    for name, array in BATCH.items()
    if name.startswith('event.') or name in ('time_gap', 'history.price')
  }
  assert len(noise) == 6
  jax.tree.map(np.testing.assert_array_equal, run(variables, BATCH | noise), x)
  order = np.random.default_rng(0).permutation(16)
  permuted = run(variables, {name: array[order] for name, array in BATCH.items()})
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[order], rtol=1e-5, atol=1e-6), permuted, x
  )


def test_numbers_of_candidates_are_those_of_each():
  run, variables, _ = make()
  rng = np.random.default_rng(0)
  several = {name: rng.permutation(16)[:3] for name in ('item', 'item.category', 'item.tags',
                                                         'item.price')}  # fmt: skip
  several = {name: np.stack([BATCH[name][(rows + b) % 16] for b in range(16)])
             for name, rows in several.items()}  # fmt: skip
  together = run(variables, BATCH | several)
  for q in range(3):
    alone = run(variables, BATCH | {name: array[:, q] for name, array in several.items()})
    np.testing.assert_allclose(together.i_BQI[:, q], alone.i_BQI[:, 0], rtol=1e-6)


def test_bfloat16_is_near_float32():
  run, variables, _ = make()
  rounded = make(dtype=jnp.bfloat16)[0](variables, BATCH)
  exact = run(variables, BATCH)
  assert {x.dtype for x in rounded[:4]} == {jnp.dtype('bfloat16')}
  for a, b in zip(rounded[:4], exact[:4], strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.05, atol=0.1)


def test_a_column_may_have_a_slash_in_its_name():
  number = NUMBER['item.price']._replace(key='item.price/unit')
  schema = SCHEMA._replace(numbers=(number,))
  batch = make_batch() | {
    'item.price/unit': BATCH['item.price'], 'history.price/unit': BATCH['history.price'],
  }  # fmt: skip
  batch, fields = jax.tree.map(jnp.asarray, batch), Fields(schema, D)
  params = jax.eval_shape(
    lambda: fields.init(jax.random.key(0), batch, lambda name, ids: jnp.ones((*ids.shape, D)))
  )
  assert set(params['params']) == {'item.price%2Funit'}
