"""The base class of all models: shared fields, tables, and the outputs for a batch."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import Schema
from lmn_jax.layers.time_gaps import TIMES
from lmn_jax.tables.spec import TableSpec


class Outputs(NamedTuple):
  """The outputs of a model for a batch.

  value: float32. Click models: log-odds [B], or [B, Q] for Q candidates of each user; with K labels
  [B, K] or [B, Q, K]. Next-item models: vectors [B, T, D], or [B, P, D] at the requested positions;
  the product of a vector and the row of an item is the score of the item.
  losses: scalars by name, in training only: the loss `Model.objective` and auxiliary losses.
  monitors: scalars to log. carry: the state for the next batch of the same lanes (Model.carry).
  """

  value: Array
  losses: dict[str, Float[Array, '']]
  monitors: dict[str, Float[Array, '']] = {}
  carry: Any = {}


class Model(nn.Module):
  """Fields and methods of all models; `__call__(batch, read, carry, train)` returns Outputs.

  Attributes:
    schema: the store's features.
    width: D, width of each field's rows.
    scale: standard deviation of the initial rows.
    dropout: share of units dropped in training.
    bf16: compute products and activations in bfloat16, for GPU and TPU. Parameters, rows, optimizer
      states, carried states, softmax, statistics of norms, losses and scores stay float32.
    time: how the time from an event to the request enters: 'none'; 'buckets', a learned row of the
      event for each logarithmic bucket (fields.EventFields); or 'bias', a learned scalar for each
      bucket that is added to the scores of the attention to events.
    event_width: width of targets and events, which are then projected by one learned matrix; 0 for
      `width` for each field of an item. Models of next items have 0.
    tuned: vectors of the store, such as 'item.image', that training changes, as rows of the
      optimizer group 'embedding'; all others stay as they are.
  """

  schema: Schema
  width: int = 16
  scale: float = 0.05
  dropout: float = 0.0
  bf16: bool = False
  time: str = 'none'
  event_width: int = 0
  tuned: tuple[str, ...] = ()
  positive_fields: ClassVar[tuple[str, ...]] = ()
  objective: ClassVar[str] = ''  # name of the loss with weight 1
  # Whether the model has an attention to events whose scores get the bias of time='bias'.
  has_time_bias: ClassVar[bool] = False
  # Whether a trained model accepts histories padded to another length.
  any_length: ClassVar[bool] = False
  # Auxiliary losses and the defaults of their weights, config.loss.NAME_weight.
  loss_weights: ClassVar[dict[str, float]] = {}

  @property
  def dtype(self):
    """Compute type of the dense layers."""
    return jnp.bfloat16 if self.bf16 else jnp.float32

  def check(self) -> None:
    """Checks the fields before anything is built.

    Raises:
      UserError: a value is out of its bounds.
    """
    for field in ('width', *self.positive_fields):
      if getattr(self, field) < 1:
        raise UserError(f'config.model.{field}={getattr(self, field)} must be at least 1')
    if not 0 <= self.dropout < 1:
      raise UserError(f'config.model.dropout={self.dropout} must be in [0, 1)')
    if one_of('config.model.time', self.time, TIMES) == 'bias' and not self.has_time_bias:
      raise UserError(
        "config.model.time='bias' needs an attention to events whose scores can have a bias, and "
        f"{type(self).__name__} has none; use 'buckets' or 'none'"
      )
    if self.event_width < 0:
      raise UserError(
        f'config.model.event_width={self.event_width} must be 0 (the width of an item) or more'
      )

  def _setting(self):
    """The field of the config that names this class, for messages."""
    return f"config.model.name='{type(self).__module__}:{type(self).__name__}'"

  def _of_encode(self, kind: type, *arguments: Any) -> Any:
    """Returns what `encode` returns; an exception in a model of the user is explained.

    Raises:
      UserError: the model of the user raised an exception, or returned something else than `kind`.
    """
    if type(self).__module__.startswith('lmn_jax.'):
      return self.encode(*arguments)
    setting = self._setting()
    with plugins.explained(f'{setting}: encode()'):
      encoded = self.encode(*arguments)
    if not isinstance(encoded, kind):
      raise UserError(
        f'{setting}: encode() returned {encoded!r:.80}; it must return {kind.__module__}.'
        f'{kind.__name__}'
      )
    return encoded

  def _check_shape(self, what: str, array: Array, axes: str, expected: tuple[Any, ...]) -> None:
    """Checks the shape of a result of `encode`.

    Args:
      what: the result, for the message. array: the result. axes: names of its axes. expected: their
        sizes; None is any size. Sizes of an export are symbols.

    Raises:
      UserError: the shape differs.
    """
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(
      y not in (None, x) for x, y in zip(shape, expected, strict=True)
    ):
      sizes = ', '.join('any' if x is None else str(x) for x in expected)
      raise UserError(
        f'{self._setting()}: encode() returned {what} of the shape {shape}; it must be [{axes}] = '
        f'[{sizes}]'
      )

  def tables(self) -> dict[str, TableSpec]:
    """The tables that this model reads, by name."""
    raise TypeError(
      f'{type(self).__name__} has no tables(); a model must define the tables that it reads'
    )

  def vector_tables(self, *kinds: str) -> dict[str, TableSpec]:
    """Returns the tables of the vectors of some kinds; training.initial_state fills them.

    Raises:
      UserError: `tuned` names a vector that the store does not have.
    """
    for name in self.tuned:
      one_of('config.model.tuned', name, [key for key, _ in self.schema.vectors])
    rows = self.schema.vector_rows
    return {
      key: TableSpec(rows(kind), width, 0.0, 'embedding' if key in self.tuned else 'frozen')
      for key, width in self.schema.vectors
      if (kind := key.partition('.')[0]) in kinds
    }

  def carry(self, batch: dict[str, Any]) -> Any:
    """The carried state of the lanes of a batch (arrays or shapes) before any event: zeros."""
    return {}
