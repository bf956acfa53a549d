"""The base class of click models: embedded fields, an encoder and a head.

A subclass defines the encoder of the history (`encode`). The head is the same for all models, so
that a table of results compares encoders.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax import plugins
from lmn_jax.errors import one_of
from lmn_jax.layers.basic import MLP, Inputs, Read, repeat
from lmn_jax.layers.fields import Fields
from lmn_jax.layers.losses import click_loss, custom_loss
from lmn_jax.layers.time_gaps import TimeBias, bucket
from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables.spec import TableSpec

LOSSES = {'bce': click_loss}


class Encoded(NamedTuple):
  """The result of an encoder.

  x_BQE: features for the head. losses: called in training with the logit [B], returns auxiliary
  losses by name, with weights config.loss.NAME_weight. monitors: scalars to log.
  """

  x_BQE: Float[Array, 'B Q E']
  losses: Callable[[Array], dict[str, Array]] = lambda logit_B: {}
  monitors: dict[str, Float[Array, '']] = {}


class CTRModel(Model):
  """`logit = MLP([e_u ; e_i ; c ; encode(...)])`. [ours: the head]

  An encoder works on Q targets of each user, one in training. Q candidates of a user are scored
  together if `item` and its features are [B, Q]; the history is then read once.

  Attributes:
    hidden: widths of the hidden layers of the head.
    dropout: share of hidden units dropped in the head in training.
    loss: 'bce', or MODULE:FUNCTION of (logit [B], label [B], weight [B], 0 on filler rows) that
      returns a float32 scalar.
  """

  hidden: tuple[int, ...] = (128, 64)
  loss: str = 'bce'
  objective = 'click'
  any_length = True

  def check(self):
    super().check()
    if plugins.is_plugin(self.loss):
      plugins.load_function('config.model.loss', self.loss)
    else:
      one_of('config.model.loss', self.loss, [*LOSSES, 'MODULE:FUNCTION'])

  def tables(self) -> dict[str, TableSpec]:
    """The tables that this model reads: one for each vocabulary of the store."""
    return {name: TableSpec(V, self.width, self.scale) for name, V in self.schema.vocabulary}

  @property
  def item_width(self) -> int:
    """I, the width of a target and of an event."""
    return self.event_width or self.width * (1 + len(self.schema.fields('item')))

  @property
  def user_width(self) -> int:
    """U, the width of a user."""
    return self.width * (1 + len(self.schema.fields('user')))

  def time_bias(self, batch: dict[str, Array]) -> Float[Array, 'B L'] | None:
    """The bias of the attention to each event, float32; None unless `time` is 'bias'."""
    if self.time != 'bias':
      return None
    return TimeBias(name='bias_by_time')()[bucket(batch['time_gap'])]

  def encode(self, x: Inputs, batch: dict[str, Array], read: Read, train: bool) -> Encoded:
    """Encodes the history (and memory) into features for the head; subclasses define it.

    Args:
      x: the embedded batch. batch: its arrays. read: the reader. train: training behaviour.
    """
    raise TypeError(f'{type(self).__name__} has no encode(); a click model must define one')

  @nn.compact
  def __call__(
    self, batch: dict[str, Array], read: Read, carry: Any = None, train: bool = False
  ) -> Outputs:
    """Scores a batch.

    Args:
      batch: arrays of `batches.py`; with `item` and its features [B, Q], Q candidates of each user.
      read: `read(name, ids)` returns rows, `read(name, ids, weights)` their weighted sums.
      carry: unused; every batch has whole histories.
      train: training behaviour (dropout, batch statistics, losses).

    Returns:
      Outputs with log-odds.
    """
    del carry
    fields = Fields(
      self.schema, self.width, self.scale, self.time == 'buckets', self.dtype, self.event_width,
      name='field_embedding',
    )  # fmt: skip
    x = fields(batch, read)
    encoded = self._of_encode(Encoded, x, batch, read, train)
    Q = x.i_BQI.shape[1]
    self._check_shape('Encoded.x_BQE', encoded.x_BQE, 'B, Q, E', (*x.i_BQI.shape[:2], None))
    features_BQF = jnp.concatenate(
      [repeat(x.u_BU, Q), x.i_BQI, repeat(x.c_BC, Q), encoded.x_BQE], axis=-1
    )
    # Log-odds are float32 for every compute type: with the 8 bits of bfloat16, examples would tie.
    head = MLP(
      self.hidden, 1, dropout=self.dropout, dtype=self.dtype, final_dtype=jnp.float32, name='head'
    )
    logit = head(features_BQF, train).reshape(batch['item'].shape)
    losses = {}
    if train:
      function = LOSSES.get(self.loss) or functools.partial(custom_loss, self.loss)
      click = function(logit, batch['label'], batch['weight'])
      losses = {'click': click} | encoded.losses(logit)
    return Outputs(logit, losses, encoded.monitors)
