"""A small model, and a batch with every kind of field, for tests of training."""

import numpy as np

from lmn_jax import config as configs
from lmn_jax.distributed.mesh import make_mesh
from lmn_jax.layers.basic import Schema
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


def make_config(model='lmn', **fields):
  """A config that is small enough to compile in a second. fields: of the model."""
  config = configs.base(model)
  config.model.update(dict(width=4, hidden=(8,)) | fields)
  if model == 'lmn':
    small = dict(slots_per_axis=8, top_k=3, query_width=8, query_hidden=8, positions=2, attention=4)
    config.model.update(small | fields)
  config.steps = 10
  return config


def make_trainer(config, mesh=None, batch=None, shared=True):
  """(model, trainer) of a config.

  shared: whether equal programs share a compiled trainer; False for a test that patches code which
  is traced.
  """
  model = registry.build(config.model.to_dict(), SCHEMA)
  built = program.make(config, model, batch or make_batch(), mesh or make_mesh())
  return model, (compile_program if shared else compile_program.__wrapped__)(built)
