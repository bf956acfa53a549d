"""What every model is: tables it reads, fields, and what it makes of a batch."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Schema
from lmn_jax.tables.spec import TableSpec


class Outputs(NamedTuple):
  """What a model makes of a batch.

  value: float32. A click model's log-odds [B], or [B, Q] for Q candidates of each user; a next-item
  model's vectors [B, T, D], or [B, P, D] of what is asked, whose product with an item's row is its
  score. losses: scalars by name,
  in training only: that of `Model.objective`, and whatever a model has beside it. monitors: scalars
  to log. carry: what goes on to the next batch of the same lanes (Model.carry).
  """

  value: Array
  losses: dict[str, Float[Array, '']]
  monitors: dict[str, Float[Array, '']] = {}
  carry: Any = {}


class Model(nn.Module):
  """Fields and properties that all models share; `__call__(batch, read, carry, train) -> Outputs`.

  Attributes:
    schema: the store's features.
    width: D, width of each field's rows.
    scale: standard deviation of the initial rows.
    dropout: share of units dropped in training.
    bf16: compute in bfloat16; parameters, rows and scores stay float32.
  """

  schema: Schema
  width: int = 16
  scale: float = 0.05
  dropout: float = 0.0
  bf16: bool = False
  positive_fields: ClassVar[tuple[str, ...]] = ()
  objective: ClassVar[str] = ''  # name of the loss that weighs 1
  # Whether a model that was trained takes histories of another length, padded.
  any_length: ClassVar[bool] = False
  # Other losses of the model, and what they weigh unless config.loss.NAME_weight says otherwise.
  loss_weights: ClassVar[dict[str, float]] = {}

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
    """The tables this model reads, by name."""
    raise TypeError(f'{type(self).__name__} has no tables(); a model must say what it reads')

  def carry(self, batch: dict[str, Any]) -> Any:
    """What the lanes of a batch, or of its shapes, carry before anything was read: zeros."""
    return {}
