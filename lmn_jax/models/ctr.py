"""What every click model shares: fields in, one head out; an encoder fills the middle.

A subclass says how it reads the history (`encode`), so that a table of models compares encoders
and not heads.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.errors import UserError
from lmn_jax.layers import MLP, Inputs, Read, Schema, embed, repeat


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


class Outputs(NamedTuple):
  """What a model makes of a batch.

  logit_B: float32 [B], the log-odds of a click; [B, Q] for Q candidates of each user. losses:
  float32 scalars by name, the model's own losses beside the click loss, in training only. monitors:
  scalars to log.
  """

  logit_B: Float[Array, 'B *Q']
  losses: dict[str, Float[Array, '']]
  monitors: dict[str, Float[Array, '']]


class Encoded(NamedTuple):
  """What an encoder hands to the head.

  x_BQE: features. losses: called in training with the logit [B], gives `Outputs.losses`; each name
  has its weight in config.loss, `NAME_weight`. monitors: scalars to log.
  """

  x_BQE: Float[Array, 'B Q E']
  losses: Callable[[Array], dict[str, Array]] = lambda logit_B: {}
  monitors: dict[str, Float[Array, '']] = {}


class CTRModel(nn.Module):
  """`logit = MLP([e_u ; e_i ; c ; encode(...)])`. [ours: the head]

  An encoder works on Q targets of each user, one in training. Candidates of a user are scored
  together by a batch whose `item` and its features are [B, Q]: the history is read once for all.

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
      batch: arrays of `batches.py`; with `item` and its features [B, Q], Q candidates of each user.
      read: `read(name, ids)` gives rows, `read(name, ids, weights)` their weighted sums.
      train: training behaviour (dropout, batch statistics, the model's own losses).

    Returns:
      Outputs.
    """
    x = embed(batch, read, self.schema, self.dtype)
    encoded = self.encode(x, batch, read, train)
    Q = x.i_BQI.shape[1]
    features_BQF = jnp.concatenate(
      [repeat(x.u_BU, Q), x.i_BQI, repeat(x.c_BC, Q), encoded.x_BQE], axis=-1
    )
    logit_BQ1 = MLP(self.hidden, 1, dropout=self.dropout, dtype=self.dtype, name='head')(
      features_BQF, train
    )
    logit = logit_BQ1.reshape(batch['item'].shape).astype(jnp.float32)
    return Outputs(logit, encoded.losses(logit) if train else {}, encoded.monitors)
