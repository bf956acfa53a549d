"""Building blocks of all models: embeddings of the fields, masked mean, MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# read(name, ids) -> rows [..., D];  read(name, ids [..., K], weights [..., K]) -> sums [..., D]
Read = Callable[..., Array]
Size = Any  # of an axis: int, or a symbolic dimension during an export


class Label(NamedTuple):
  """A label of the examples.

  name: as in config.data.labels. kind: 'click' or 'number'. shift, scale: of a number, the mean and
  the deviation over training.
  """

  name: str = 'label'
  kind: str = 'click'
  shift: float = 0.0
  scale: float = 1.0


class Schema(NamedTuple):
  """The fields of a store's batches; static and hashable, so that it can be a module field.

  vocabulary: (table, V) of 'user', 'item' and every feature; V is the number of ids and also the
  padding id. user, item, context: names of the features beside the ids, such as 'item.category'.
  labels: the main one first.
  """

  vocabulary: tuple[tuple[str, int], ...]
  user: tuple[str, ...] = ()
  item: tuple[str, ...] = ()
  context: tuple[str, ...] = ()
  labels: tuple[Label, ...] = (Label(),)


class Inputs(NamedTuple):
  """An embedded batch, the input of an encoder.

  u_BU: rows of the user id and the user's features, concatenated. i_BQI: target items. c_BC:
  context. s_BLI: behaviours, oldest first, zeros on padding. mask_BL: True on real behaviours.
  """

  u_BU: Float[Array, 'B U']
  i_BQI: Float[Array, 'B Q I']
  c_BC: Float[Array, 'B C']
  s_BLI: Float[Array, 'B L I']
  mask_BL: Bool[Array, 'B L']


def rows_at(x_BTD: Float[Array, 'B T D'], at_BP: Int[Array, 'B P']) -> Float[Array, 'B P D']:
  """Returns the vectors at P positions of each sequence."""
  return jnp.take_along_axis(x_BTD, at_BP[:, :, None], axis=1)


def read_field(read: Read, table: str, ids: Int[Array, '...'], V: int, multi: bool) -> Array:
  """Reads the rows of one field; for a multi-valued field, the mean of its rows.

  Args:
    read: the reader passed to the model.
    table: name of the table.
    ids: [...], or [..., M] for a multi-valued field; padding is V.
    V: the number of ids, which is also the padding id.
    multi: whether the last axis of `ids` lists several values.

  Returns:
    [..., D].
  """
  rows = read(table, ids)
  if not multi:
    return rows
  count = jnp.sum(ids < V, axis=-1, keepdims=True).astype(rows.dtype)
  return jnp.sum(rows, axis=-2) / jnp.maximum(count, 1)


def embed(batch: dict[str, Array], read: Read, schema: Schema, dtype=jnp.float32) -> Inputs:
  """Reads every field of a batch and concatenates the rows of each entity.

  Args:
    batch: the arrays of `batches.py`: ids [B], histories [B, L], features `user.f`, `item.f`,
      `history.f`, `context.f`. `item` and its features may be [B, Q], candidates of each user.
    read: the reader passed to the model.
    schema: the features.
    dtype: of the result.

  Returns:
    Inputs.
  """
  V = dict(schema.vocabulary)
  B, L = batch['history'].shape

  def entity(*fields, lead):
    """Concatenated rows of (array of the batch, table) pairs: [*lead, D * len(fields)]."""
    rows = [
      read_field(read, table, batch[name], V[table], batch[name].ndim > len(lead))
      for name, table in fields
    ]
    return jnp.concatenate(rows, axis=-1).astype(dtype) if rows else jnp.zeros((*lead, 0), dtype)

  target = [(f, f) for f in schema.item]
  history = [(f.replace('item.', 'history.', 1), f) for f in schema.item]
  i_BQI = entity(('item', 'item'), *target, lead=batch['item'].shape)
  return Inputs(
    u_BU=entity(('user', 'user'), *[(f, f) for f in schema.user], lead=(B,)),
    i_BQI=i_BQI.reshape(B, -1, i_BQI.shape[-1]),
    c_BC=entity(*[(f, f) for f in schema.context], lead=(B,)),
    s_BLI=entity(('history', 'item'), *history, lead=(B, L)),
    mask_BL=jnp.arange(L)[None, :] < batch['length'][:, None],
  )


def candidates(batch: dict[str, Array], name: str) -> Array:
  """Returns ids of `item` or of its feature `name` with the candidate axis: [B, Q] or [B, Q, M]."""
  B, *Q = batch['item'].shape
  return batch[name].reshape(B, *(Q or [1]), *batch[name].shape[1 + len(Q) :])


def repeat(x_BD: Float[Array, 'B D'], Q: Size) -> Float[Array, 'B Q D']:
  """Repeats a vector of each user for Q candidates."""
  return jnp.broadcast_to(x_BD[:, None], (x_BD.shape[0], Q, x_BD.shape[1]))


def draw_positions(key: Array, length_B: Int[Array, 'B'], P: int) -> Int[Array, 'B P']:
  """Draws P uniform positions of each sequence: int32 in [0, max(1, length)).

  Args:
    key: PRNG key. length_B: int32, lengths. P: draws for each sequence.
  """
  uniform_BP = jax.random.uniform(key, (length_B.shape[0], P))
  # 1 - 2^-24, the largest uniform draw, times a long length may round up to the length itself.
  last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
  length_B1 = length_B[:, None].astype(jnp.float32)
  return jnp.minimum((uniform_BP * length_B1).astype(jnp.int32), last_B1)


def masked_mean(x_BLD: Float[Array, 'B L D'], mask_BL: Bool[Array, 'B L']) -> Array:
  """The mean over the real positions, `sum_l mask_l x_l / max(1, sum_l mask_l)`: [B, D]."""
  weight_BL = mask_BL.astype(x_BLD.dtype)
  # float32 for every compute type: bfloat16 has no odd numbers above 256.
  count_B1 = jnp.maximum(jnp.sum(mask_BL.astype(jnp.float32), axis=1, keepdims=True), 1)
  sum_BD = jnp.einsum('bl,bld->bd', weight_BL, x_BLD)
  return (sum_BD.astype(jnp.float32) / count_B1).astype(x_BLD.dtype)


ACTIVATIONS = {
  'relu': nn.relu,
  'leaky_relu': nn.leaky_relu,
  'silu': nn.silu,
  'gelu': nn.gelu,
  'sigmoid': nn.sigmoid,
}


class MLP(nn.Module):
  """Dense layers with an activation after each hidden layer.

  Attributes:
    hidden: widths of the hidden layers.
    final: width of a last layer without activation; 0 for none.
    activation: a key of ACTIVATIONS.
    dropout: share of hidden units dropped in training.
    dtype: compute type; parameters are float32.
    final_dtype: compute type of the last layer and type of its result; None is `dtype`.
  """

  hidden: tuple[int, ...]
  final: int = 0
  activation: str = 'relu'
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  final_dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: Float[Array, '... D'], train: bool = False) -> Float[Array, '... E']:
    for width in self.hidden:
      x = ACTIVATIONS[self.activation](nn.Dense(width, dtype=self.dtype)(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.final, dtype=self.final_dtype or self.dtype)(x) if self.final else x


def stop(x: Array) -> Array:
  """`jax.lax.stop_gradient`, with a name short enough for equations."""
  return jax.lax.stop_gradient(x)
