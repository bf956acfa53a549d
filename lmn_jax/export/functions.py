"""The functions of an export: a model over stored tables, for any number of users and candidates.

They are `model.apply` with a `read` that gathers stored rows and converts only these to float32. A
model with an embedding bag (LMN's memory), whose sums other processes may compute, is exported
twice: as one function, and as two, before and after these sums.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from lmn_jax.distributed import mesh as meshes
from lmn_jax.export.runtime.click import GAP, LENGTH_MULTIPLE
from lmn_jax.export.runtime.platforms import PLATFORMS
from lmn_jax.export.stored_rows import Stored, restored
from lmn_jax.models.base import Model
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.tables import embedding_bag
from lmn_jax.tables.spec import TableSpec

BLOCK = 2**16  # items ranked at a time


class StoredReader:
  """`read(name, ids[, weights])` over stored tables.

  Attributes:
    bags: (name, ids [T, K], weights [T, K]) of each read with weights, in the order of the calls.
  """

  def __init__(
    self, tables: dict[str, Stored], specs: dict[str, TableSpec], sums_TD: Array | None = None
  ):
    """sums_TD: the result of the read with weights of a table that is not among `tables`."""
    self.bags: list[tuple[str, Array, Array]] = []
    self._tables, self._specs, self._sums_TD = tables, specs, sums_TD

  def _rows(self, name, ids):
    V = self._specs[name].rows
    ids = jnp.where(ids < V, ids, V)
    table = self._tables[name]
    return restored({part: x.at[ids].get(mode='fill', fill_value=0) for part, x in table.items()})

  def __call__(self, name: str, ids: Array, weights: Array | None = None) -> Array:
    if weights is None:
      return self._rows(name, ids)
    K, spec = ids.shape[-1], self._specs[name]
    ids_TK, weights_TK = ids.reshape(-1, K), weights.reshape(-1, K)
    self.bags.append((name, ids_TK, weights_TK))
    if name in self._tables:
      sums_TD = embedding_bag.sum_rows(
        lambda ids_T: self._rows(name, ids_T), spec.rows, spec.width, ids_TK, weights_TK
      )
    else:
      sums_TD = self._sums_TD
      if sums_TD is None:  # the outputs that depend on it are not used
        sums_TD = jnp.zeros((ids_TK.shape[0], spec.width))
    return sums_TD.reshape(*ids.shape[:-1], spec.width)


class Function(NamedTuple):
  """A function to export. shapes: of its arguments."""

  fn: Callable
  shapes: tuple


class Apply(NamedTuple):
  """A model over stored tables: `(dense, tables, batch, carry, sums_TD) -> (outputs, bags)`."""

  model: Model

  def __call__(self, dense, tables, batch, carry=None, sums_TD=None):
    read = StoredReader(tables, self.model.tables(), sums_TD)
    variables = traverse_util.unflatten_dict(dense, sep='/')
    return self.model.apply(variables, batch, read, {} if carry is None else carry), read.bags


def click_functions(
  model: Model, dense: dict[str, Any], tables: dict[str, Any], batch: dict[str, Any]
) -> tuple[dict[str, Function], str]:
  """Returns the functions of a click model, and the table that it reads with weights, or ''.

      score(dense, tables, batch) -> scores [b, q], of several labels [b, q, K]
      ask(dense, tables, batch) -> ids [b q, K], weights [b q, K] into that table
      finish(dense, tables, batch, sums [b q, D]) -> the same scores

  The last two do not use that table; they exist if there is one.

  Args:
    model: the model. dense, tables: shapes of the stored arrays. batch: a batch of training.
  """
  apply, scope = Apply(model), jax.export.SymbolicScope()
  length = batch['history'].shape[1]
  L = f'{LENGTH_MULTIPLE}*l' if model.any_length else length
  inputs = {}
  targets = batch['item'].ndim  # axes before those of a value: [B], or [B, Q]
  for name, x in batch.items():
    kind = name.partition('.')[0]
    if kind in ('item', 'item_index'):
      inputs[name] = symbolic(scope, x, 'b', 'q', *x.shape[targets:])
    elif kind in ('history', 'history_index', 'event', GAP):
      inputs[name] = symbolic(scope, x, 'b', L, *x.shape[2:])
    elif kind in ('user', 'context', 'length'):
      inputs[name] = symbolic(scope, x, 'b', *x.shape[1:])

  def score(dense, tables, batch):
    return apply(dense, tables, batch)[0].value

  functions = {'score': Function(score, (dense, tables, inputs))}
  names = set()
  jax.eval_shape(lambda *x: names.update(bag[0] for bag in apply(*x)[1]), dense, tables, inputs)
  if not names:
    return functions, ''
  (name,) = names
  others = {key: table for key, table in tables.items() if key != name}

  def ask(dense, tables, batch):
    ((_, ids_TK, weights_TK),) = apply(dense, tables, batch)[1]
    return ids_TK, weights_TK

  def finish(dense, tables, batch, sums_TD):
    return apply(dense, tables, batch, sums_TD=sums_TD)[0].value

  sums = symbolic(scope, jnp.zeros(0), 'b*q', model.tables()[name].width)
  functions['ask'] = Function(ask, (dense, others, inputs))
  functions['finish'] = Function(finish, (dense, others, inputs, sums))
  return functions, name


def next_item_functions(
  model: NextItemModel, dense: dict[str, Any], tables: dict[str, Any], batch: dict[str, Any]
) -> dict[str, Function]:
  """Returns the functions of a next-item model.

      fold(dense, tables, batch, carry) -> carry           reads a full segment of each user
      vector(dense, tables, batch, carry) -> [b, D]        after the event batch['asked']
      rate(tables, vector [b, D], candidates [b, c]) -> scores [b, c]
      block(tables, vector [b, D], first) -> scores [b, S] of the S items from row `first` on

  Args:
    model: the model. dense, tables: shapes of the stored arrays. batch: a batch of training.
  """
  apply, scope = Apply(model), jax.export.SymbolicScope()
  V, D, T = model.items, model.width, batch['item'].shape[1]
  ids = jnp.zeros(0, jnp.int32)
  segment = {
    'item': symbolic(scope, ids, 'b', T),
    'first': symbolic(scope, jnp.zeros(0, bool), 'b'),
    'user': symbolic(scope, ids, 'b'),
  } | {
    name: symbolic(scope, x, 'b', T, *x.shape[2:])
    for name, x in batch.items()
    if name.partition('.')[0] in ('event', 'time', GAP)
  }
  leaves, tree = jax.tree.flatten(model.carry({'item': jnp.zeros((1, T), jnp.int32)}))
  carries = [symbolic(scope, x, 'b', *x.shape[1:]) for x in leaves]
  vectors = symbolic(scope, jnp.zeros(0), 'b', D)

  def read_segment(dense, tables, batch, carry):
    return apply(dense, tables, batch, jax.tree.unflatten(tree, carry))[0]

  def fold(dense, tables, batch, carry):
    return jax.tree.leaves(read_segment(dense, tables, batch, carry).carry)

  def vector(dense, tables, batch, carry):
    return read_segment(dense, tables, batch, carry).value[:, 0]

  def rate(tables, vector_BD, candidate_BC):
    rows_BCD = StoredReader(tables, model.tables())('item', candidate_BC)
    return jnp.einsum('bd,bcd->bc', vector_BD, rows_BCD)

  def block(tables, vector_BD, first):
    parts = tables['item'].items()
    size = min(BLOCK, V)
    rows_SD = restored({k: jax.lax.dynamic_slice_in_dim(x, first, size) for k, x in parts})
    return vector_BD @ rows_SD.T

  last = segment | {'asked': symbolic(scope, ids, 'b', 1)}
  candidates = symbolic(scope, ids, 'b', 'c')
  return {
    'fold': Function(fold, (dense, tables, segment, carries)),
    'vector': Function(vector, (dense, tables, last, carries)),
    'rate': Function(rate, (tables, vectors, candidates)),
    'block': Function(block, (tables, vectors, jax.ShapeDtypeStruct((), jnp.int32))),
  }


def symbolic(scope: jax.export.SymbolicScope, like: Any, *dims: int | str) -> jax.ShapeDtypeStruct:
  """Returns a shape with symbols for sizes that may vary, and the dtype of `like`."""
  shape = jax.export.symbolic_shape(','.join(map(str, dims)), scope=scope)
  return jax.ShapeDtypeStruct(shape, like.dtype)


def serialized(function: Function) -> bytes:
  """Returns a function in the format of `jax.export`, for PLATFORMS.

  It is traced for each platform, with the block sizes of that platform. The tracebacks of
  operations are left out, since they contain the paths of source files: the same function has the
  same bytes, and an export the same fingerprint, wherever the code is.
  """

  def traced_for(platform):
    def traced(*arguments):
      with meshes.use_platform(platform):
        return function.fn(*arguments)

    return traced

  @functools.wraps(function.fn)
  def renewed(*arguments):  # not `function.fn`, which jit may have lowered with tracebacks
    return jax.lax.platform_dependent(*arguments, **{x: traced_for(x) for x in PLATFORMS})

  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    exported = jax.export.export(jax.jit(renewed), platforms=PLATFORMS)(*function.shapes)
    return bytes(exported.serialize())
  finally:
    jax.config.update('jax_traceback_in_locations_limit', before)
