"""The base class of click models: embedded fields, an encoder and a head.

A subclass defines the encoder of the history (`encode`). The head is the same for all models, so
that a table of results compares encoders.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import MLP, Inputs, Label, Read, repeat
from lmn_jax.layers.click_losses import grouped_share
from lmn_jax.layers.fields import Fields
from lmn_jax.layers.id_dropout import drop_item_ids
from lmn_jax.layers.label_heads import KINDS, LabelHeads
from lmn_jax.layers.time_gaps import TimeBias, bucket
from lmn_jax.models.base import Model, Outputs
from lmn_jax.models.ctr import objectives
from lmn_jax.tables.spec import TableSpec


class Encoded(NamedTuple):
  """The result of an encoder.

  x_BQE: features for the head. losses: called in training with the logit [B] of the main label, or
  [B, Q] of requests, returns auxiliary losses by name, with weights config.loss.NAME_weight.
  monitors: scalars to log.
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
    id_dropout: share of the targets whose item has the row of the unknown item in training, beside
      its features and vectors, so that this row can stand for items that training never saw.
    loss: 'bce' | 'focal' | 'pairwise' | 'listwise' | 'jrc' of clicks, 'mse' | 'huber' of numbers
      (layers/click_losses.py), or MODULE:FUNCTION of (score [N], label [N], weight [N], 0 on filler
      rows) that returns a float32 scalar; the score is the logit or the predicted number, N is B,
      or B * Q with targets of requests.
    gamma: of 'focal': how little the well-predicted examples count; 0 is 'bce'.
    ranking: r in `(1 - r) BCE + r L_rank` of 'pairwise', 'listwise' and 'jrc', which compare the
      examples of one user in the batch, or of one request. With r = 1 the first two are not
      calibrated: the score orders, and is no log-odds.
    delta: of 'huber': the error from which it is linear, in deviations of the label over training.
    label_head: of several labels: 'shared' | 'mmoe' | 'ple' (layers/label_heads.py). Experts have
      the widths `hidden`.
    tower: widths of the hidden layers of each label.
    experts: number of experts of 'mmoe', and of shared experts of a level of 'ple'.
    label_experts: number of experts of each label in a level of 'ple'.
    expert_levels: levels of 'ple'.
    label_weights: weight of the loss of each label in the sum; () is 1 for each.
  """

  hidden: tuple[int, ...] = (128, 64)
  id_dropout: float = 0.0
  loss: str = 'bce'
  gamma: float = 2.0
  ranking: float = 0.5
  delta: float = 1.0
  label_head: str = 'shared'
  tower: tuple[int, ...] = ()
  experts: int = 4
  label_experts: int = 1
  expert_levels: int = 1
  label_weights: tuple[float, ...] = ()
  objective = 'click'
  any_length = True

  def check(self):
    super().check()
    self._check_id_dropout()
    objectives.loss_of(self.loss)
    objectives.check_settings(self._settings())
    objectives.check_kind(self.loss, self.schema.labels[0].kind)
    self._check_labels()

  def _check_id_dropout(self):
    """Checks that items without their row still differ."""
    if not 0 <= self.id_dropout <= 1:  # also refuses nan
      raise UserError(f'config.model.id_dropout={self.id_dropout} must be in [0, 1]')
    if self.id_dropout and not self.schema.fields('item'):
      raise UserError(
        f'config.model.id_dropout={self.id_dropout} leaves an item nothing, as the store has no '
        'config.data.item_features and item_vectors; name some, or set it to 0'
      )

  def _check_clicks(self, remedy: str) -> None:
    """Refuses labels that are numbers, for a model whose auxiliary loss is one of clicks.

    Args:
      remedy: what the user can do.
    """
    if self.schema.labels[0].kind != 'click':
      raise UserError(
        f"config.data.label_kind='number': an auxiliary loss of {type(self).__name__} learns from "
        f'clicks; {remedy}'
      )

  def _check_labels(self):
    """Checks the fields of several labels."""
    K = len(self.schema.labels)
    one_of('config.model.label_head', self.label_head, KINDS)
    for field in ('experts', 'label_experts', 'expert_levels'):
      if getattr(self, field) < 1:
        raise UserError(f'config.model.{field}={getattr(self, field)} must be at least 1')
    if len(self.label_weights) not in (0, K):
      raise UserError(
        f'config.model.label_weights={self.label_weights} must have a number for each label, {K}'
      )
    single = {'label_head': 'shared', 'tower': (), 'label_weights': ()}
    for field, default in single.items():
      if K == 1 and getattr(self, field) != default:
        raise UserError(
          f'config.model.{field}={getattr(self, field)!r} is not read: there is one label; name '
          f'several in config.data.labels, or leave it at {default!r}'
        )

  def _settings(self) -> objectives.Settings:
    """The fields that losses read."""
    return objectives.Settings(self.gamma, self.ranking, self.delta)

  def tables(self) -> dict[str, TableSpec]:
    """The tables that this model reads: those of all vocabularies and vectors of the store."""
    tables = {name: TableSpec(V, self.width, self.scale) for name, V in self.schema.vocabulary}
    return tables | self.vector_tables('user', 'item')

  @property
  def histories(self) -> tuple[str, ...]:
    """The named histories that the model reads in place of the main one; () for the main one."""
    return ()

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
      batch: arrays of `batches.py`; with `item` and its features [B, Q], Q candidates of each user,
        or Q labelled targets of a request.
      read: `read(name, ids)` returns rows, `read(name, ids, weights)` their weighted sums.
      carry: unused; every batch has whole histories.
      train: training behaviour (dropout, batch statistics, losses).

    Returns:
      Outputs of the shape of `item`: log-odds, or where labels are numbers predictions in their
      unit.
    """
    del carry
    if train and self.id_dropout:
      V = dict(self.schema.vocabulary)['item']
      batch = drop_item_ids(self.make_rng('dropout'), batch, self.id_dropout, V)
    fields = Fields(
      self.schema, self.width, self.scale, self.time == 'buckets', self.dtype, self.event_width,
      self.histories, name='field_embedding',
    )  # fmt: skip
    x = fields(batch, read)
    K = len(self.schema.labels)
    # An encoder and its auxiliary losses see the main label.
    of_main = batch if K == 1 or not train else batch | {'label': batch['label'][..., 0]}
    encoded = self._of_encode(Encoded, x, of_main, read, train)
    Q = x.i_BQI.shape[1]
    self._check_shape('Encoded.x_BQE', encoded.x_BQE, 'B, Q, E', (*x.i_BQI.shape[:2], None))
    features_BQF = jnp.concatenate([repeat(x.u_BU, Q), x.i_BQI, x.c_BQC, encoded.x_BQE], axis=-1)
    loss, shape = objectives.loss_of(self.loss), batch['item'].shape
    z_BQKO = self._head(features_BQF, loss.outputs, train)
    score = z_BQKO if loss.outputs == 1 else jnp.diff(z_BQKO)
    if self.schema.labels[0].kind == 'number':  # the head predicts standardised numbers [ours]
      shift_K, scale_K = (jnp.float32([label[k] for label in self.schema.labels]) for k in (2, 3))
      score = shift_K[None, None, :, None] + scale_K[None, None, :, None] * score
    score = score.reshape(shape if K == 1 else (*shape, K))
    if not train:
      return Outputs(score, {}, encoded.monitors)
    click, monitors = self._click_loss(loss, z_BQKO, batch)
    auxiliary = encoded.losses(score if K == 1 else score[..., 0])
    return Outputs(score, {'click': click} | auxiliary, encoded.monitors | monitors)

  def _head(
    self, features_BQF: Float[Array, 'B Q F'], outputs: int, train: bool
  ) -> Float[Array, 'B Q K O']:
    """The outputs of the head for each label, O numbers each."""
    # Log-odds are float32 for every compute type: with the 8 bits of bfloat16, examples would tie.
    K, dropout = len(self.schema.labels), self.dropout
    if K == 1:
      head = MLP(
        self.hidden, outputs, dropout=dropout, dtype=self.dtype, final_dtype=jnp.float32,
        name='head',
      )  # fmt: skip
      return head(features_BQF, train)[:, :, None]
    heads = LabelHeads(
      K, outputs, self.label_head, self.hidden, self.tower, self.experts, self.label_experts,
      self.expert_levels, dropout, self.dtype, name='label_heads',
    )  # fmt: skip
    return heads(features_BQF, train)

  def _click_loss(
    self, loss: objectives.Loss, z_BQKO: Float[Array, 'B Q K O'], batch: dict[str, Array]
  ) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
    """The sum of the losses of the labels, and the monitors."""
    labels, values, monitors = self.schema.labels, [], {}
    K = len(labels)
    for k, x in enumerate(objectives.examples_of(batch, K, loss.grouped)):
      z = z_BQKO if K == 1 else z_BQKO[:, :, k]
      z = z.reshape(x.label_N.shape if loss.outputs == 1 else (-1, loss.outputs))
      if labels[k].kind == 'number':
        z, x = self._of_numbers(loss, labels[k], z, x)
      values.append(loss.function(z, x, self._settings()))
      if loss.grouped:
        monitors[f'{labels[k].name}/grouped' if K > 1 else 'grouped'] = grouped_share(*x)
    if K == 1:
      return values[0], monitors
    monitors |= {f'{label.name}/loss': value for label, value in zip(labels, values, strict=True)}
    weights = self.label_weights or (1.0,) * K
    return sum(w * value for w, value in zip(weights, values, strict=True)), monitors

  def _of_numbers(
    self, loss: objectives.Loss, label: Label, z_N: Float[Array, 'N'], x: objectives.Examples
  ) -> tuple[Float[Array, 'N'], objectives.Examples]:
    """Predictions and labels that a loss of numbers compares.

    They are standardised for a built-in loss, which then has the same size for every unit, and in
    the unit of the label for one of the user.
    """
    if loss.kind == 'number':
      return z_N, x._replace(label_N=(x.label_N - label.shift) / label.scale)
    return label.shift + label.scale * z_N, x
