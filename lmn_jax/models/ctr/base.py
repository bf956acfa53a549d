"""The base class of click models: embedded fields, an encoder and a head.

A subclass defines the encoder of the history (`encode`). The head is the same for all models, so
that a table of results compares encoders.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.layers.basic import MLP, Inputs, Read, embed, repeat
from lmn_jax.layers.click_losses import grouped_share
from lmn_jax.models.base import Model, Outputs
from lmn_jax.models.ctr import objectives
from lmn_jax.tables.spec import TableSpec


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
    loss: 'bce' | 'focal' | 'pairwise' | 'listwise' | 'jrc' (layers/click_losses.py), or
      MODULE:FUNCTION of (logit [B], label [B], weight [B], 0 on filler rows) that returns a float32
      scalar.
    gamma: of 'focal': how little the well-predicted examples count; 0 is 'bce'.
    ranking: r in `(1 - r) BCE + r L_rank` of 'pairwise', 'listwise' and 'jrc', which compare the
      examples of one user in the batch, or of one request. With r = 1 the first two are not
      calibrated: the score orders, and is no log-odds.
  """

  hidden: tuple[int, ...] = (128, 64)
  loss: str = 'bce'
  gamma: float = 2.0
  ranking: float = 0.5
  objective = 'click'
  any_length = True

  def check(self):
    super().check()
    objectives.loss_of(self.loss)
    objectives.check_settings(self._settings())

  def _settings(self) -> objectives.Settings:
    """The fields that losses read."""
    return objectives.Settings(self.gamma, self.ranking)

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
      batch: arrays of `batches.py`; with `item` and its features [B, Q], Q candidates of each user.
      read: `read(name, ids)` returns rows, `read(name, ids, weights)` their weighted sums.
      carry: unused; every batch has whole histories.
      train: training behaviour (dropout, batch statistics, losses).

    Returns:
      Outputs with log-odds.
    """
    del carry
    x = embed(batch, read, self.schema, self.dtype)
    encoded = self._of_encode(Encoded, x, batch, read, train)
    Q = x.i_BQI.shape[1]
    self._check_shape('Encoded.x_BQE', encoded.x_BQE, 'B, Q, E', (*x.i_BQI.shape[:2], None))
    features_BQF = jnp.concatenate(
      [repeat(x.u_BU, Q), x.i_BQI, repeat(x.c_BC, Q), encoded.x_BQE], axis=-1
    )
    loss = objectives.loss_of(self.loss)
    # Log-odds are float32 for every compute type: with the 8 bits of bfloat16, examples would tie.
    head = MLP(
      self.hidden, loss.outputs, dropout=self.dropout, dtype=self.dtype, final_dtype=jnp.float32,
      name='head',
    )  # fmt: skip
    z_BQO, shape = head(features_BQF, train), batch['item'].shape
    logit = z_BQO.reshape(shape) if loss.outputs == 1 else jnp.diff(z_BQO)[..., 0].reshape(shape)
    losses, monitors = {}, encoded.monitors
    if train:
      examples = objectives.examples_of(batch)
      z = z_BQO.reshape(examples.label_N.shape if loss.outputs == 1 else (-1, loss.outputs))
      losses = {'click': loss.function(z, examples, self._settings())} | encoded.losses(logit)
      if loss.grouped:
        monitors = monitors | {'grouped': grouped_share(*examples)}
    return Outputs(logit, losses, monitors)
