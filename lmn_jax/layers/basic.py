"""Building blocks of all models: the fields of a batch, masked mean, MLP."""

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


class Number(NamedTuple):
  """A feature that is a number; static and hashable.

  key: such as 'item.price'. kind: 'standard', 'log' or 'autodis'. shift, scale: fitted on training
  rows, see `numeric.standardised`; scale is above 0. count: meta-embeddings of 'autodis'.
  """

  key: str
  kind: str
  shift: float
  scale: float
  count: int = 0


class Schema(NamedTuple):
  """The fields of a store's batches; static and hashable, so that it can be a module field.

  vocabulary: (table, V) of 'user', 'item' and every coded feature; V is the number of ids and also
  the padding id. user, item, context: keys of the coded features beside the ids, such as
  'item.category'. event: those of the events of a history, such as 'event.dwell', which a target
  does not have. numbers: the features that are numbers, of all four kinds. vectors: (key, width) of
  the vectors of items and users, such as 'item.image'; they are rows of a table of that name, by
  the index of the item (data/item_index.py) or the row of the user. labels: the main one first.
  cold_items: C, items with features or vectors and without a row. widths: (key, M) of the coded
  features that are lists of M codes.
  """

  vocabulary: tuple[tuple[str, int], ...]
  user: tuple[str, ...] = ()
  item: tuple[str, ...] = ()
  context: tuple[str, ...] = ()
  event: tuple[str, ...] = ()
  numbers: tuple[Number, ...] = ()
  vectors: tuple[tuple[str, int], ...] = ()
  labels: tuple[Label, ...] = (Label(),)
  cold_items: int = 0
  widths: tuple[tuple[str, int], ...] = ()

  def fields(self, kind: str) -> tuple[str, ...]:
    """Returns the keys of the fields of a kind: coded ones first, then numbers, then vectors."""
    others = [x.key for x in self.numbers] + [key for key, _ in self.vectors]
    return *getattr(self, kind), *(key for key in others if key.partition('.')[0] == kind)

  def vector_rows(self, kind: str) -> int:
    """Returns the number of rows of the tables of vectors of 'user' or 'item'."""
    V, C = dict(self.vocabulary)[kind], self.cold_items
    return V + 1 + C if kind == 'item' and C else V


class Inputs(NamedTuple):
  """An embedded batch, the input of an encoder.

  u_BU: rows of the user id and the user's features, concatenated. i_BQI: target items. c_BQC:
  context of each target. s_BLI: behaviours, oldest first, zeros on padding: items, with their event
  features and times if there are any (fields.py). mask_BL: True on real behaviours. real_BQ: True
  on the targets that a request has; None if there is no padding. named: of a model of several
  histories, by name, each as (s_BLI, mask_BL) with an L of its own; s_BLI and mask_BL above, of the
  main history, then have no positions.
  """

  u_BU: Float[Array, 'B U']
  i_BQI: Float[Array, 'B Q I']
  c_BQC: Float[Array, 'B Q C']
  s_BLI: Float[Array, 'B L I']
  mask_BL: Bool[Array, 'B L']
  real_BQ: Bool[Array, 'B Q'] | None = None
  named: dict[str, tuple[Float[Array, 'B L I'], Bool[Array, 'B L']]] = {}


def rows_at(x_BTD: Float[Array, 'B T D'], at_BP: Int[Array, 'B P']) -> Float[Array, 'B P D']:
  """Returns the vectors at P positions of each sequence."""
  return jnp.take_along_axis(x_BTD, at_BP[:, :, None], axis=1)


def candidates(batch: dict[str, Array], name: str) -> Array:
  """Returns ids of `item` or of its feature `name` with the candidate axis: [B, Q] or [B, Q, M]."""
  B, *Q = batch['item'].shape
  return batch[name].reshape(B, *(Q or [1]), *batch[name].shape[1 + len(Q) :])


def history_weight(batch: dict[str, Array]) -> Float[Array, 'B']:
  """The weight of each history: that of its example, or the sum over the targets of a request."""
  weight = batch['weight']
  return weight if weight.ndim == 1 else jnp.sum(weight, axis=1)


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
