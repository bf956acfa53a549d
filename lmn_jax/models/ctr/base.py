"""The base class of click models: embedded fields, an encoder and a head.

A subclass defines the encoder of the history (`encode`). The head is the same for all models, so
that a table of results compares encoders.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax import plugins
from lmn_jax.errors import one_of
from lmn_jax.layers.basic import MLP, Inputs, Read, embed, repeat
from lmn_jax.layers.losses import click_loss, custom_loss
from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables.spec import TableSpec

LOSSES = {'bce': click_loss}


class Encoded(NamedTuple):
  """The result of an encoder.

  x_BQE: features for the head. losses: called in training with the logit [B], or [B, Q] of
  requests, returns auxiliary losses by name, with weights config.loss.NAME_weight. monitors:
  scalars to log.
  """

  x_BQE: Float[Array, 'B Q E']
  losses: Callable[[Array], dict[str, Array]] = lambda logit: {}
  monitors: dict[str, Float[Array, '']] = {}


class CTRModel(Model):
  """`logit = MLP([e_u ; e_i ; c ; encode(...)])`. [ours: the head]

  An encoder works on Q targets of each user, and reads the history once: Q candidates, or in
  training the Q examples of a request (data/requests.py), some of them padding with weight 0.

  Attributes:
    hidden: widths of the hidden layers of the head.
    dropout: share of hidden units dropped in the head in training.
    loss: 'bce', or MODULE:FUNCTION of (logit [N], label [N], weight [N], 0 on filler rows) that
      returns a float32 scalar; N targets, B or B * Q of requests.
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
      batch: arrays of `batches.py`; with `item` and its features [B, Q], Q candidates of each user,
        or Q labelled targets of a request.
      read: `read(name, ids)` returns rows, `read(name, ids, weights)` their weighted sums.
      carry: unused; every batch has whole histories.
      train: training behaviour (dropout, batch statistics, losses).

    Returns:
      Outputs with log-odds, of the shape of `item`.
    """
    del carry
    x = embed(batch, read, self.schema, self.dtype)
    encoded = self._of_encode(Encoded, x, batch, read, train)
    Q = x.i_BQI.shape[1]
    self._check_shape('Encoded.x_BQE', encoded.x_BQE, 'B, Q, E', (*x.i_BQI.shape[:2], None))
    features_BQF = jnp.concatenate([repeat(x.u_BU, Q), x.i_BQI, x.c_BQC, encoded.x_BQE], axis=-1)
    # Log-odds are float32 for every compute type: with the 8 bits of bfloat16, examples would tie.
    head = MLP(
      self.hidden, 1, dropout=self.dropout, dtype=self.dtype, final_dtype=jnp.float32, name='head'
    )
    logit = head(features_BQF, train).reshape(batch['item'].shape)
    losses = {}
    if train:
      arguments = logit, batch['label'], batch['weight']
      if self.loss in LOSSES:
        click = LOSSES[self.loss](*arguments)
      else:
        click = custom_loss(self.loss, *(x.reshape(-1) for x in arguments))
      losses = {'click': click} | encoded.losses(logit)
    return Outputs(logit, losses, encoded.monitors)
