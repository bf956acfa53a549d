"""What every click model shares: fields in, one head out; an encoder fills the middle.

A subclass says how it reads the history (`encode`), so that a table of models compares encoders
and not heads.
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.errors import UserError
from lmn_jax.layers import MLP, Inputs, Read, Schema, embed


class TableSpec(NamedTuple):
  """A table a model reads.

  rows: V, number of ids; V is the padding id and reads as zeros.
  width: D. scale: standard deviation of the initial rows.
  group: 'embedding' or 'memory', which optimizer moves it; 'frozen' for none.
  count_reads: keep a counter of reads for each row (memory health).
  """

  rows: int
  width: int
  scale: float
  group: str = 'embedding'
  count_reads: bool = False


class Recall(NamedTuple):
  """What the memory gave back for sampled history positions, and what it should have.

  recalled_BPV, target_BPV: float [B, P, Dv]. weight_BP: float [B, P], 0 on padded positions.
  """

  recalled_BPV: Float[Array, 'B P V']
  target_BPV: Float[Array, 'B P V']
  weight_BP: Float[Array, 'B P']


class Search(NamedTuple):
  """What teaches a search that the click loss cannot reach (loss.search_loss); one of the two.

  logit_B: float32 [B], the search's own log-odds of a click. log_prob_B: float32 [B], the
  log-probability of what it drew.
  """

  logit_B: Float[Array, 'B'] | None = None
  log_prob_B: Float[Array, 'B'] | None = None


class Outputs(NamedTuple):
  """logit_B: float32 [B], the log-odds of a click. recall: for the memory loss, or None.

  monitors: scalars to log. auxiliary: float32 scalar, a loss of the encoder's own, or None.
  search: for the search loss, or None.
  """

  logit_B: Float[Array, 'B']
  recall: Recall | None
  monitors: dict[str, Float[Array, '']]
  auxiliary: Float[Array, ''] | None = None
  search: Search | None = None


class Encoded(NamedTuple):
  """What an encoder hands to the head: features [B, E], and the rest of `Outputs`."""

  x_BE: Float[Array, 'B E']
  recall: Recall | None = None
  monitors: dict[str, Float[Array, '']] = {}
  auxiliary: Float[Array, ''] | None = None
  search: Search | None = None


class CTRModel(nn.Module):
  """`logit = MLP([e_u ; e_i ; c ; encode(...)])`. [ours: the head]

  Attributes:
    schema: the store's features.
    width: D, width of each field's rows.
    scale: standard deviation of the initial rows.
    hidden: widths of the head.
    dropout: in the head.
    bf16: compute in bfloat16; parameters, rows and the logit stay float32.
  """

  schema: Schema
  width: int = 16
  scale: float = 0.05
  hidden: tuple[int, ...] = (128, 64)
  dropout: float = 0.0
  bf16: bool = False
  positive_fields: ClassVar[tuple[str, ...]] = ()

  @property
  def dtype(self):
    """Compute type of the dense layers."""
    return jnp.bfloat16 if self.bf16 else jnp.float32

  def check(self) -> None:
    """Refuses values out of their bounds, before anything is built.

    Raises:
      UserError: naming the field, its value and the bound.
    """
    for field in ('width', *self.positive_fields):
      if getattr(self, field) < 1:
        raise UserError(f'config.model.{field}={getattr(self, field)} must be at least 1')
    if not 0 <= self.dropout < 1:
      raise UserError(f'config.model.dropout={self.dropout} must be in [0, 1)')

  def tables(self) -> dict[str, TableSpec]:
    """The tables this model reads: one for each vocabulary of the store."""
    return {name: TableSpec(V, self.width, self.scale) for name, V in self.schema.vocabulary}

  def new_window(self, key: Array, params: dict, reads: dict[str, Array]) -> dict:
    """The parameters with which a new window between validations begins: here, those there are.

    Args:
      key: PRNG key. params: dense parameters. reads: by table, int32 [R], reads of each row in the
        window that ends, for the tables that count them.

    Returns:
      The parameters; where a weight was changed, its optimizer state starts anew.
    """
    return params

  def encode(self, x: Inputs, batch: dict[str, Array], read: Read, train: bool) -> Encoded:
    """The model proper: history (and memory) to features for the head."""
    raise TypeError(f'{type(self).__name__} has no encode(); a click model must define one')

  @nn.compact
  def __call__(self, batch: dict[str, Array], read: Read, train: bool = False) -> Outputs:
    """Scores a batch.

    Args:
      batch: arrays of `batches.py`.
      read: `read(name, ids)` gives rows, `read(name, ids, weights)` their weighted sums.
      train: training behaviour (dropout, batch statistics, injection).

    Returns:
      Outputs.
    """
    x = embed(batch, read, self.schema, self.dtype)
    encoded = self.encode(x, batch, read, train)
    features_BF = jnp.concatenate([x.u_BU, x.i_BI, x.c_BC, encoded.x_BE], axis=-1)
    logit_B1 = MLP(self.hidden, 1, dropout=self.dropout, dtype=self.dtype, name='head')(
      features_BF, train
    )
    return Outputs(logit_B1[:, 0].astype(jnp.float32), *encoded[1:])
