"""Event features, numbers and times in every model of both tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed.mesh import place
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Schema
from lmn_jax.layers.fields import EventFields
from lmn_jax.models import registry
from lmn_jax.models.registry import CLICK, NEXT_ITEM
from tests.encoders import make_params
from tests.examples import RICH_SCHEMA, make_config, make_rich_batch, make_trainer
from tests.models.next_item.test_next_item_models import REFERENCES
from tests.runs import but_slow, mesh_of, tiny_next

WIDTH, EVENTS = 6, (4, 3, 1)  # width of next-item models; events of each lane
# Fields that make each model small; SAM, SASRec and BST have 4 fields of an item to divide.
FIELDS = {
  'caser': dict(window=3, horizontal=2, vertical=2), 'sasrec': dict(heads=2), 'hpmn': dict(slots=3),
  'sdm': dict(heads=2), 'hstu': dict(heads=2), 'dman': dict(slots=2),
}  # fmt: skip
BATCHES = {'click': make_rich_batch()}
# Event fields enter all models in two places, Fields and the input of next items; these models do
# the most different things with events.
EVERY = [('click', x) for x in ('din', 'twin', 'lmn', 'sam', 'dien', 'mimn', 'sdim')]
EVERY += [('next_item', x) for x in ('hstu', 'gru4rec', 'dman', 'caser', 'sdm')]
MODELS = {'click': CLICK, 'next_item': NEXT_ITEM}
BIASED = [(task, x) for task in MODELS for x in MODELS[task] if MODELS[task][x].has_time_bias]
FAST = ('din', 'twin', 'hstu', 'gru4rec')


def cases(pairs):
  return but_slow(pairs, {k for k, (_, name) in enumerate(pairs) if name in FAST})


def make_lanes():
  """A segment of three lanes with event features and times."""
  rng, (B, T) = np.random.default_rng(0), (3, 4)
  events = np.array(EVENTS)
  real = np.arange(T)[None] < events[:, None]

  def padded(x, padding):
    return np.where(real.reshape(B, T, *[1] * (x.ndim - 2)), x, x.dtype.type(padding))

  time = np.sort(rng.integers(0, 2**31 - 2**26, (B, T)), axis=1).astype(np.int32)
  after = np.append(time[:, 1:], time[:, -1:] + 2**20, axis=1)
  number = rng.normal(3, 2, (2, B, T)).astype(np.float32)
  number[:, 0, 2] = np.nan
  return {
    'item': padded(rng.integers(1, 60, (B, T)).astype(np.int32), 60),
    'target': padded(rng.integers(1, 60, (B, T)).astype(np.int32), 60),
    'first': np.ones(B, bool),
    'user': rng.integers(0, 40, B).astype(np.int32),
    'event.action': padded(rng.integers(0, 4, (B, T)).astype(np.int32), 4),
    'event.marks': padded(rng.integers(0, 6, (B, T, 2)).astype(np.int32), 5),
    'event.dwell': padded(number[0], np.nan),
    'event.share': padded(number[1], np.nan),
    'time': padded(time, 0),
    'time_gap': padded((after - time).astype(np.float32), 0),
  }


BATCHES['next_item'] = make_lanes()


def build(task, name, schema=RICH_SCHEMA, **fields):
  """(model, run: (params, batch) -> values, params)"""
  if task == 'click':
    config = make_config(name, **fields)
  else:
    config = tiny_next(name, **(dict(width=WIDTH) | FIELDS.get(name, {}) | fields))
  model = registry.build(config.model.to_dict(), schema, task)
  rng = np.random.default_rng(0)
  tables = {
    name: jnp.asarray(rng.normal(size=(spec.rows, spec.width)), jnp.float32)
    for name, spec in model.tables().items()
  }

  def read(name, ids, weights=None):
    rows = jnp.where((ids < len(tables[name]))[..., None], tables[name][ids], 0)
    return rows if weights is None else jnp.einsum('...k,...kd->...d', weights, rows)

  batch = jax.tree.map(jnp.asarray, BATCHES[task])
  carry = model.carry(batch) if task == 'next_item' else None
  keys = dict.fromkeys(('params', 'dropout', 'positions'), jax.random.key(0))
  variables = make_params(lambda: model.init(keys, batch, read, carry, train=True))
  stats = {k: jax.tree.map(jnp.abs, x) for k, x in variables.items() if k != 'params'}

  @jax.jit
  def run(params, batch):
    return model.apply({'params': params, **stats}, batch, read, carry).value

  return model, run, variables['params'], read


def without_events(schema=RICH_SCHEMA):
  numbers = tuple(x for x in schema.numbers if not x.key.startswith('event.'))
  return schema._replace(event=(), numbers=numbers)


def split_events(task, params):
  """(parameters of the event fields, the other parameters)"""
  rest = dict(params)
  if task == 'next_item':
    return rest.pop('event_fields'), rest
  rest['field_embedding'] = dict(rest['field_embedding'])
  return rest['field_embedding'].pop('events'), rest


def with_events(task, rest, events):
  if task == 'next_item':
    return rest | {'event_fields': events}
  return rest | {'field_embedding': rest['field_embedding'] | {'events': events}}


@pytest.mark.parametrize('task, name', cases(EVERY))
def test_without_their_map_event_fields_have_no_effect(task, name):
  """With W = 0 scores are those of a model without event fields; with W they differ."""
  _, run, params, _ = build(task, name, time='buckets')
  _, plain, _, _ = build(task, name, without_events())
  batch = BATCHES[task]
  events, rest = split_events(task, params)
  zero = with_events(
    task, rest, events | {'project': jax.tree.map(jnp.zeros_like, events['project'])}
  )
  value = plain(rest, batch)
  np.testing.assert_allclose(run(zero, batch), value, rtol=1e-5, atol=1e-5)
  real = BATCHES['click']['length'] > 0 if task == 'click' else batch['item'] < 60
  changed = run(params, batch) != value
  if task == 'next_item':
    changed = changed.any(axis=-1)
  assert np.asarray(changed)[real].any()
  if task == 'click':
    assert not np.asarray(changed)[~real].any(), 'an empty history has event fields'


@pytest.mark.parametrize('task, name', cases(EVERY))
def test_padding_has_no_effect_and_rows_are_independent(task, name):
  time = 'bias' if (task, name) in BIASED else 'buckets'
  _, run, params, _ = build(task, name, time=time)
  batch = BATCHES[task]
  value, B = run(params, batch), len(batch['user'])
  length = batch['length'] if task == 'click' else (batch['item'] < 60).sum(1)
  noisy = {}
  for name, array in batch.items():
    if name.startswith('event.') or name in ('time_gap', 'history.price', 'time'):
      blank = np.arange(array.shape[1])[None] >= length[:, None]
      blank = blank.reshape(*blank.shape, *[1] * (array.ndim - 2))
      noisy[name] = np.where(blank, array.dtype.type(3), array)
  assert len(noisy) == 6
  real = np.ones(B, bool) if task == 'click' else batch['item'] < 60
  np.testing.assert_array_equal(
    np.asarray(run(params, batch | noisy))[real], np.asarray(value)[real]
  )
  order = np.random.default_rng(0).permutation(B)
  permuted = run(params, {name: array[order] for name, array in batch.items()})
  np.testing.assert_allclose(
    np.asarray(permuted)[real[order]], np.asarray(value)[order][real[order]], rtol=1e-4, atol=1e-5
  )


# Bound on the error in bfloat16, relative to the norm; a rounded vector may have other hash bits.
ROUNDING = dict(sdim=0.5, eta=0.5)


@pytest.mark.parametrize('task, name', cases(EVERY))
def test_bfloat16_is_near_float32(task, name):
  time = 'bias' if (task, name) in BIASED else 'buckets'
  _, exact, params, _ = build(task, name, time=time)
  # JAX's attention promotes bfloat16.
  with jax.numpy_dtype_promotion('standard' if name == 'bst' else 'strict'):
    _, rounded, _, _ = build(task, name, time=time, bf16=True)
    value = rounded(params, BATCHES[task])
  assert value.dtype == jnp.float32
  reference = np.asarray(exact(params, BATCHES[task]))
  error = np.linalg.norm(value - reference) / np.linalg.norm(reference)
  assert 0 < error < ROUNDING.get(name, 0.1)


def biases_in(params):
  return [
    path
    for path, _ in jax.tree.leaves_with_path(params)
    if 'bias_by_time' in jax.tree_util.keystr(path)
  ]


@pytest.mark.parametrize('task, name', cases(BIASED))
def test_a_bias_of_zero_has_no_effect(task, name):
  """A bias of zeros gives the scores of time='none', and another bias does not."""
  _, run, params, _ = build(task, name, time='bias')
  _, plain, without, _ = build(task, name)
  paths = biases_in(params)
  assert paths

  def scaled(factor):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: factor * x if path in paths else x, params
    )

  batch = BATCHES[task]
  leaves = iter([x for path, x in jax.tree.leaves_with_path(params) if path not in paths])
  value = plain(jax.tree.map(lambda _: next(leaves), without), batch)
  np.testing.assert_allclose(run(scaled(0), batch), value, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(run(scaled(4), batch)) - np.asarray(value)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('name', ['din', 'sasrec'])
def test_a_step_on_eight_devices_equals_that_on_one(name):
  """All parameters and tables move, and alike."""
  time, steps = ('buckets' if name in ('din', 'lmn') else 'bias'), []
  config = make_config(name, time=time)
  for group in ('dense', 'embedding', 'memory'):
    config.optimizer[group].update(dict(name='sgd', rate=1.0))
  for shape in ((1, 1), (4, 2)):
    mesh = mesh_of(*shape)
    _, trainer = make_trainer(config, mesh, BATCHES['click'], schema=RICH_SCHEMA)
    state = trainer.init(0)
    before = jax.device_get(state)
    state, _ = trainer.update(state, place(mesh, BATCHES['click']))
    steps.append(jax.device_get(state))
  rows = [{name: t.rows_RD[:40] for name, t in s.tables.items()} for s in (before, *steps)]
  for a, b in (([s.params for s in steps]), rows[1:]):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), steps[0].params, before.params)
  still = [jax.tree_util.keystr(k) for k, x in jax.tree.leaves_with_path(moved) if not x]
  assert not still
  for table in ('event.action', 'event.marks'):
    assert np.any(rows[1][table] != rows[0][table])


@pytest.mark.parametrize('name', but_slow(list(REFERENCES), {0, 2}))
def test_the_input_of_a_next_item_model_is_the_sum(name):
  """x = e + r: equal to a model of ids alone whose rows of events are these sums."""
  model, run, params, read = build('next_item', name, time='buckets')
  plain, _, _, _ = build('next_item', name, without_events())
  batch = jax.tree.map(jnp.asarray, BATCHES['next_item'])
  events, rest = split_events('next_item', params)
  fields = EventFields(RICH_SCHEMA, WIDTH, model.scale, True, jnp.float32, WIDTH)
  r_BTD = fields.apply({'params': events}, batch, read, batch['item'] < 60)

  def read_sums(name, ids):
    return read(name, ids) + r_BTD if name == 'item' else read(name, ids)

  value = plain.apply({'params': rest}, batch, read_sums, plain.carry(batch)).value
  np.testing.assert_allclose(run(params, batch), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['sasrec', 'hstu'])
def test_vectors_with_a_bias_equal_the_formulas(name):
  """In the whole sequence, in packed windows, and at requested positions."""
  schema = Schema((('user', 40), ('item', 60)))
  _, run, params, read = build('next_item', name, schema, time='bias')
  batch = BATCHES['next_item']
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  items = np.asarray(read('item', jnp.arange(60)), np.float64)

  def reference(lane, low, high):
    times = [batch[key][lane, low:high].astype(np.float64) for key in ('time', 'time_gap')]
    return REFERENCES[name](p, items[batch['item'][lane, low:high]], None, times)

  value = np.asarray(run(params, batch))
  for lane, events in enumerate(EVENTS):
    np.testing.assert_allclose(
      value[lane, :events], reference(lane, 0, events), rtol=5e-4, atol=5e-5
    )
  begin = np.zeros((3, 4), np.int32)
  begin[0, 2:] = 2
  packed = np.asarray(run(params, batch | {'begin': begin}))
  for low, high in ((0, 2), (2, 4)):
    np.testing.assert_allclose(packed[0, low:high], reference(0, low, high), rtol=5e-4, atol=5e-5)
  asked = np.array([[3, 1], [2, 0], [0, 0]], np.int32)
  picked = run(params, batch | {'asked': asked})
  np.testing.assert_allclose(picked, value[np.arange(3)[:, None], asked], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'task, name, fields, message',
  [
    ('click', 'din', dict(time='bucket'), "time='bucket' is unknown; did you mean 'buckets'?"),
    (
      'click', 'pooling', dict(time='bias'),
      "config.model.time='bias' needs an attention .* Pooling has none; use 'buckets' or 'none'",
    ),
    ('next_item', 'dman', dict(time='bias'), "and DMAN has none; use 'buckets' or 'none'"),
    ('click', 'lmn', dict(time='bias', base='pooling'), "attention of base='din', and con"),
    ('click', 'din', dict(event_width=-1), 'config.model.event_width=-1 must be 0 .* or more'),
    ('click', 'ubr4ctr', dict(event_width=8), 'config.model.event_width=8 must be 0 for UBR4CTR'),
    ('next_item', 'sasrec', dict(event_width=8), 'event_width=8 must be 0: the events of a next-'),
    ('click', 'bst', dict(event_width=6, heads=4), 'config.model.heads=4 must divide 6, the width'),
  ],
)  # fmt: skip
def test_values_that_do_not_fit_are_rejected(task, name, fields, message):
  config = make_config(name) if task == 'click' else tiny_next(name)
  config.model.update(fields)
  with pytest.raises(UserError, match=message):
    registry.build(config.model.to_dict(), RICH_SCHEMA, task)


@pytest.mark.parametrize(
  'name, fields',
  but_slow(
    [
      ('sam', {}),
      ('lmn', dict(time='bias')),
      ('mimn', {}),
      ('sim', {}),
      ('sdim', dict(bits=8, tau=2)),
    ],
    {0},
  ),
)
def test_encoders_have_the_event_width(name, fields):
  _, run, params, _ = build('click', name, event_width=10, **fields)
  value = run(params, BATCHES['click'])
  assert value.shape == (16,) and np.isfinite(value).all() and np.unique(value).size > 8
