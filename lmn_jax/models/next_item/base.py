"""What every next-item model shares: events in, a vector after each out, one loss over items."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.layers import losses
from lmn_jax.layers.basic import Read, rows_at
from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables.spec import TableSpec

LOSSES = ('softmax', 'sampled_softmax', 'bce', 'gbce')
SAMPLERS = ('uniform', 'popularity', 'in_batch')


class Events(NamedTuple):
  """What an encoder reads.

  x_BTD: the events, oldest first, as the model takes them in (`take_in`), in training with
  `dropout`: an encoder drops none of them again. mask_BT: True on real ones.
  u_BD: the user's row, where the model asks for it (`reads_user`). begin_BT: for one that `packs`,
  where the window of each event begins; None if each lane has one. output_BP: for one that `picks`,
  positions after which vectors are asked; None for all.
  """

  x_BTD: Float[Array, 'B T D']
  mask_BT: Bool[Array, 'B T']
  u_BD: Float[Array, 'B D'] | None = None
  begin_BT: Int[Array, 'B T'] | None = None
  output_BP: Int[Array, 'B P'] | None = None

  def placed(self, positions_TD: Float[Array, 'T D']) -> Float[Array, 'B T D']:
    """`sqrt(D) x_t + P_t`, t the event's place in its window (Kang & McAuley 2018; sqrt(D) [code]).

    Args:
      positions_TD: P.
    """
    T, D = positions_TD.shape
    if self.begin_BT is None:
      return self.x_BTD * D**0.5 + positions_TD[None]
    return self.x_BTD * D**0.5 + positions_TD[jnp.arange(T)[None] - self.begin_BT]


class Vectors(NamedTuple):
  """What an encoder hands on.

  v_BTD: after each event, or each that is asked, whose product with an item's row is its score.
  carry: for the lanes' next segments. losses: the model's own, in training. monitors: scalars to
  log.
  """

  v_BTD: Float[Array, 'B P D']
  carry: Any = {}
  losses: dict[str, Float[Array, '']] = {}
  monitors: dict[str, Float[Array, '']] = {}


class NextItemModel(Model):
  """`score(i) = v_t . e_i` for the item after event t; the rows e are also what is read as events.

  Attributes:
    loss: 'softmax' over all items; 'sampled_softmax', 'bce' or 'gbce' over the target and others;
      or MODULE:FUNCTION of the scores of targets [B, T] and of others [B, T, N], which others are
      there [B, T, N] and weights [B, T], 0 where there is no target; it gives a float32 scalar.
    negatives: how many others for each event.
    sampler: 'uniform' or 'popularity' draws them, 'in_batch' takes the batch's other targets.
    calibration: t of gBCE: 0 is BCE, 1 makes scores logits of true probabilities.
  """

  width: int = 64
  loss: str = 'softmax'
  negatives: int = 100
  sampler: str = 'uniform'
  calibration: float = 0.75
  positive_fields = ('negatives',)
  in_bfloat16: ClassVar[bool] = False  # whether `bf16` is heeded
  objective = 'next_item'
  # Whole histories, from which something is carried on, or windows for themselves (lanes.py).
  whole: ClassVar[bool] = False
  packs: ClassVar[bool] = False  # whether a lane may hold several windows side by side
  picks: ClassVar[bool] = False  # whether its encoder makes the vectors that are asked alone
  reads_user: ClassVar[bool] = False

  def check(self):
    super().check()
    if self.bf16 and not self.in_bfloat16:
      raise UserError(
        f'config.model.bf16=True: {type(self).__name__} computes in float32 only; leave it False'
      )
    if plugins.is_plugin(self.loss):
      plugins.load_function('config.model.loss', self.loss)
    else:
      one_of('config.model.loss', self.loss, [*LOSSES, 'MODULE:FUNCTION'])
    one_of('config.model.sampler', self.sampler, SAMPLERS)
    if not 0 <= self.calibration <= 1:
      raise UserError(f'config.model.calibration={self.calibration} must be in [0, 1]')

  @property
  def items(self) -> int:
    """V, the ids of items; V is also the padding id."""
    return dict(self.schema.vocabulary)['item']

  def tables(self) -> dict[str, TableSpec]:
    """The items, as events and as candidates, and the users where they are asked for."""
    V = dict(self.schema.vocabulary)
    names = ('item', 'user') if self.reads_user else ('item',)
    return {name: TableSpec(V[name], self.width, self.scale) for name in names}

  def start(self, batch: dict[str, Array]) -> Any:
    """What a user begins with: `carry` of a lane whose segment is its user's first."""
    return self.carry(batch)

  def take_in(self, events: Events) -> Float[Array, 'B T D']:
    """What is dropped, once, and then encoded: the rows, or what a model makes of them."""
    return events.x_BTD

  def encode(self, events: Events, carry: Any, train: bool) -> Vectors:
    """The model proper: events of a segment, and what is carried, to vectors."""
    raise TypeError(f'{type(self).__name__} has no encode(); a next-item model must define one')

  @nn.compact
  def __call__(
    self, batch: dict[str, Array], read: Read, carry: Any = None, train: bool = False
  ) -> Outputs:
    """Reads a segment of every lane.

    Args:
      batch: arrays of `lanes.py`. read: the reader. carry: of the segments before.
      train: training behaviour (dropout, losses).

    Returns:
      Outputs with vectors [B, T, D], float32, or [B, P, D] where the batch has `asked`, and what is
      carried on.
    """
    item_BT, V = batch['item'], self.items
    x_BTD = read('item', item_BT)

    def begin(new, old):
      return jnp.where(batch['first'].reshape(-1, *[1] * (old.ndim - 1)), new, old)

    carry = jax.tree.map(begin, self.start(batch), carry)
    u_BD = read('user', batch['user']) if self.reads_user else None
    output_BP = batch.get('asked')
    events = Events(x_BTD, item_BT < V, u_BD, batch.get('begin'), output_BP)
    x_BTD = nn.Dropout(self.dropout, deterministic=not train)(self.take_in(events))
    found = self.encode(events._replace(x_BTD=x_BTD), carry, train)
    v_BTD = found.v_BTD.astype(jnp.float32)
    if output_BP is not None and not self.picks:
      v_BTD = rows_at(v_BTD, output_BP)
    losses = {}
    if train:
      losses = {'next_item': self._loss(v_BTD, batch, read)} | found.losses
    return Outputs(v_BTD, losses, found.monitors, found.carry)

  def _loss(self, v_BTD, batch, read):
    V, target_BT = self.items, batch['target']
    # Row 0 is all the items that are not in the vocabulary: none to learn, none to score.
    weight_BT = ((target_BT > 0) & (target_BT < V)).astype(jnp.float32)
    if self.loss == 'softmax':
      rows_VD = read('item', jnp.arange(V, dtype=jnp.int32))
      return losses.softmax_loss(v_BTD, target_BT, weight_BT, rows_VD)
    target_BTD = read('item', target_BT)
    own_BT = jnp.sum(v_BTD * target_BTD, axis=-1)
    if self.sampler == 'in_batch':
      D = v_BTD.shape[-1]
      id_BTN = target_BT.reshape(1, 1, -1)
      other_BTN = jnp.einsum('btd,nd->btn', v_BTD, target_BTD.reshape(-1, D))
    else:
      id_BTN = batch['negative']
      other_BTN = jnp.einsum('btd,btnd->btn', v_BTD, read('item', id_BTN))
    # Padding is nobody's negative, and neither is the target itself.
    there_BTN = (id_BTN > 0) & (id_BTN < V) & (id_BTN != target_BT[:, :, None])
    if self.loss == 'sampled_softmax':
      if self.sampler != 'uniform':  # what is drawn more often weighs less
        own_BT = own_BT - batch['log_q']
        log_q_BTN = (
          batch['log_q'].reshape(1, 1, -1)
          if self.sampler == 'in_batch'
          else batch['negative_log_q']
        )
        other_BTN = other_BTN - log_q_BTN
      return losses.sampled_softmax_loss(own_BT, other_BTN, there_BTN, weight_BT)
    if plugins.is_plugin(self.loss):
      there_BTN = jnp.broadcast_to(there_BTN, other_BTN.shape)
      function = plugins.load_function('config.model.loss', self.loss)
      return function(own_BT, other_BTN, there_BTN, weight_BT)
    # V - 1 are items, for row 0 is none, and one of them is the target.
    alpha = there_BTN.shape[-1] / max(V - 2, 1)
    t = self.calibration if self.loss == 'gbce' else 0.0
    return losses.gbce_loss(own_BT, other_BTN, there_BTN, weight_BT, alpha, t)
