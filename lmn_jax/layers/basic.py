"""Small building blocks that every model shares: embeddings of the fields, masked mean, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# read(name, ids) -> rows [..., D];  read(name, ids [..., K], weights [..., K]) -> sums [..., D]
Read = Callable[..., Array]
Size = Any  # of an axis: int, or a symbol while a function for any size is exported


class Schema(NamedTuple):
  """What the batches of a store hold; static and hashable, so a module field.

  `vocabulary` lists (table, V) with V the number of ids, the padding id being V: 'user', 'item'
  and every feature. `user`, `item`, `context` name the features beside the ids, as 'item.category'.
  """

  vocabulary: tuple[tuple[str, int], ...]
  user: tuple[str, ...] = ()
  item: tuple[str, ...] = ()
  context: tuple[str, ...] = ()


class Inputs(NamedTuple):
  """The embedded batch: what an encoder works on.

  u_BU: user id row beside the profile's rows. i_BQI: target items. c_BC: context.
  s_BLI: behaviours, oldest first, zero where padded. mask_BL: True on real behaviours.
  """

  u_BU: Float[Array, 'B U']
  i_BQI: Float[Array, 'B Q I']
  c_BC: Float[Array, 'B C']
  s_BLI: Float[Array, 'B L I']
  mask_BL: Bool[Array, 'B L']


def rows_at(x_BTD: Float[Array, 'B T D'], at_BP: Int[Array, 'B P']) -> Float[Array, 'B P D']:
  """What stands at P positions of each sequence."""
  return jnp.take_along_axis(x_BTD, at_BP[:, :, None], axis=1)


def read_field(read: Read, table: str, ids: Int[Array, '...'], V: int, multi: bool) -> Array:
  """Reads the rows of one field; a multi-valued field gives the mean of its rows.

  Args:
    read: the reader handed to the model.
    table: name of the table.
    ids: [...] or, multi-valued, [..., M]; padding is V.
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
  """Reads every field of a batch and lays the rows of one entity side by side.

  Args:
    batch: the arrays of `batches.py`: ids [B], histories [B, L], features `user.f`, `item.f`,
      `history.f`, `context.f`. `item` and its features may be [B, Q], candidates of each user.
    read: the reader handed to the model.
    schema: which features there are.
    dtype: what the rows are computed in.

  Returns:
    Inputs.
  """
  V = dict(schema.vocabulary)
  B, L = batch['history'].shape

  def entity(*fields, lead):
    """Rows of (array of the batch, table) pairs, side by side: [*lead, D * len(fields)]."""
    rows = [
      read_field(read, table, batch[name], V[table], batch[name].ndim > len(lead))
      for name, table in fields
    ]
    return jnp.concatenate(rows, axis=-1).astype(dtype) if rows else jnp.zeros((*lead, 0), dtype)

  own = [(f, f) for f in schema.item]
  past = [(f.replace('item.', 'history.', 1), f) for f in schema.item]
  i_BQI = entity(('item', 'item'), *own, lead=batch['item'].shape)
  return Inputs(
    u_BU=entity(('user', 'user'), *[(f, f) for f in schema.user], lead=(B,)),
    i_BQI=i_BQI.reshape(B, -1, i_BQI.shape[-1]),
    c_BC=entity(*[(f, f) for f in schema.context], lead=(B,)),
    s_BLI=entity(('history', 'item'), *past, lead=(B, L)),
    mask_BL=jnp.arange(L)[None, :] < batch['length'][:, None],
  )


def candidates(batch: dict[str, Array], name: str) -> Array:
  """Ids of `item` or a feature of it with the axis of candidates: [B, Q] or [B, Q, M]."""
  B, *Q = batch['item'].shape
  return batch[name].reshape(B, *(Q or [1]), *batch[name].shape[1 + len(Q) :])


def repeat(x_BD: Float[Array, 'B D'], Q: Size) -> Float[Array, 'B Q D']:
  """What a user has, beside each of Q candidates."""
  return jnp.broadcast_to(x_BD[:, None], (x_BD.shape[0], Q, x_BD.shape[1]))


def masked_mean(x_BLD: Float[Array, 'B L D'], mask_BL: Bool[Array, 'B L']) -> Array:
  """Mean over the real positions, `sum_l mask_l x_l / max(1, sum_l mask_l)`: [B, D]."""
  weight_BL = mask_BL.astype(x_BLD.dtype)
  count_B1 = jnp.maximum(jnp.sum(weight_BL, axis=1, keepdims=True), 1)
  return jnp.einsum('bl,bld->bd', weight_BL, x_BLD) / count_B1


ACTIVATIONS = {
  'relu': nn.relu,
  'leaky_relu': nn.leaky_relu,
  'silu': nn.silu,
  'gelu': nn.gelu,
  'sigmoid': nn.sigmoid,
}


class MLP(nn.Module):
  """Dense layers with an activation after each but, where `final` is set, the last.

  Attributes:
    hidden: widths of the hidden layers.
    final: width of a last layer without activation; 0 for none.
    activation: a key of ACTIVATIONS.
    dropout: share of hidden units dropped in training.
    dtype: compute type; parameters are float32.
  """

  hidden: tuple[int, ...]
  final: int = 0
  activation: str = 'relu'
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '... D'], train: bool = False) -> Float[Array, '... E']:
    for width in self.hidden:
      x = ACTIVATIONS[self.activation](nn.Dense(width, dtype=self.dtype)(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.final, dtype=self.dtype)(x) if self.final else x


def stop(x: Array) -> Array:
  """`jax.lax.stop_gradient`, short enough to be read inside an equation."""
  return jax.lax.stop_gradient(x)
