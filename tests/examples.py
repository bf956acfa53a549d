"""A small model, and batches with every kind of field, for tests of models and training."""

import numpy as np

from lmn_jax import config as configs
from lmn_jax.distributed.mesh import make_mesh
from lmn_jax.layers.basic import Number, Schema
from lmn_jax.layers.fields import Fields
from lmn_jax.models import registry
from lmn_jax.training import program
from lmn_jax.training.trainer import compile_program

SIZES = {
  'user': 40, 'item': 60, 'user.age': 5, 'item.category': 7, 'item.tags': 6, 'context.query': 11,
}  # fmt: skip
SCHEMA = Schema(
  tuple(SIZES.items()), ('user.age',), ('item.category', 'item.tags'), ('context.query',)
)


def make_batch(seed=0, B=16, L=6):
  """A batch in the form of batches.py; `item.tags` has up to 3 values, and 6 is its padding."""
  rng = np.random.default_rng(seed)
  length = rng.integers(0, L + 1, B).astype(np.int32)
  length[0] = 0

  def ids(name, *shape):
    return rng.integers(0, SIZES[name], shape).astype(np.int32)

  def padded(x, V):
    real = (np.arange(L)[None] < length[:, None]).reshape(B, L, *[1] * (x.ndim - 2))
    return np.where(real, x, np.int32(V))

  tags = rng.integers(0, 7, (B, 3)).astype(np.int32)
  return {
    'user': ids('user', B),
    'item': ids('item', B),
    'user.age': ids('user.age', B),
    'item.category': ids('item.category', B),
    'item.tags': tags,
    'context.query': ids('context.query', B),
    'history': padded(ids('item', B, L), SIZES['item']),
    'history.category': padded(ids('item.category', B, L), SIZES['item.category']),
    'history.tags': padded(rng.integers(0, 7, (B, L, 3)).astype(np.int32), 6),
    'length': length,
    'total': length,
    'user_index': ids('user', B),
    'label': rng.integers(0, 2, B).astype(np.float32),
    'weight': np.ones(B, np.float32),
  }


# The same with numbers of every kind, and features of events.
RICH_SIZES = SIZES | {'event.action': 4, 'event.marks': 5}
NUMBERS = (
  Number('user.income', 'log', 2.0, 1.5),
  Number('item.price', 'standard', 10.0, 4.0),
  Number('context.hour', 'autodis', 12.0, 6.0, 3),
  Number('event.dwell', 'log', 1.0, 2.0),
  Number('event.share', 'autodis', 0.5, 0.25, 4),
)
RICH_SCHEMA = SCHEMA._replace(
  vocabulary=tuple(RICH_SIZES.items()), event=('event.action', 'event.marks'), numbers=NUMBERS
)


def make_rich_batch(seed=0, B=16, L=6):
  """`make_batch` with the fields of RICH_SCHEMA and `time_gap`; some numbers are NaN."""
  batch, rng = make_batch(seed, B, L), np.random.default_rng((seed, 1))
  real = np.arange(L)[None] < batch['length'][:, None]

  def numbers(mean, *shape):
    x = rng.normal(mean, 3, shape).astype(np.float32)
    missing = rng.random(shape) < 1 / 6
    missing.flat[1] = True
    return np.where(missing, np.float32(np.nan), x)

  def padded(x, padding):
    return np.where(real.reshape(B, L, *[1] * (x.ndim - 2)), x, padding)

  nan = np.float32(np.nan)
  # The newest event is the last one.
  gap = np.sort(np.exp(rng.uniform(0, 18, (B, L))), axis=1)[:, ::-1].astype(np.int32)
  return batch | {
    'user.income': numbers(5, B),
    'item.price': numbers(10, B),
    'context.hour': numbers(12, B),
    'history.price': padded(numbers(10, B, L), nan),
    'event.action': padded(rng.integers(0, 4, (B, L)).astype(np.int32), np.int32(4)),
    'event.marks': padded(rng.integers(0, 6, (B, L, 2)).astype(np.int32), np.int32(5)),
    'event.dwell': padded(numbers(5, B, L), nan),
    'event.share': padded(numbers(0.5, B, L), nan),
    'time_gap': padded(gap.astype(np.float32), np.float32(0)),
  }


def embedded(batch, read):
  """The embedded batch (basic.Inputs); ids need no parameters."""
  return Fields(SCHEMA, parent=None).apply({}, batch, read)


def make_config(model='lmn', **fields):
  """A config that is small enough to compile in a second. fields: of the model."""
  config = configs.base(model)
  with config.unlocked():  # the encoders of `histories` are new names
    config.model.update(dict(width=4, hidden=(8,)) | fields)
  if model == 'lmn':
    small = dict(slots_per_axis=8, top_k=3, query_width=8, query_hidden=8, positions=2, attention=4)
    config.model.update(small | fields)
  config.steps = 10
  return config


def make_trainer(config, mesh=None, batch=None, shared=True, schema=SCHEMA):
  """(model, trainer) of a config.

  schema: the fields of the batch.
  shared: whether equal programs share a compiled trainer; False for a test that patches code which
  is traced.
  """
  model = registry.build(config.model.to_dict(), schema)
  built = program.make(config, model, batch or make_batch(), mesh or make_mesh())
  return model, (compile_program if shared else compile_program.__wrapped__)(built)
