"""The base class of next-item models: a vector after each event, and a loss over items."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.layers import losses
from lmn_jax.layers.basic import Read, rows_at
from lmn_jax.layers.fields import CONSTANTS, EventFields, ItemFields
from lmn_jax.layers.time_gaps import Times
from lmn_jax.models.base import Model, Outputs
from lmn_jax.tables.spec import TableSpec

LOSSES = ('softmax', 'sampled_softmax', 'bce', 'gbce')
SAMPLERS = ('uniform', 'popularity', 'in_batch')


class Events(NamedTuple):
  """The input of an encoder.

  x_BTD: the embedded events (`embed`), oldest first; in training with `dropout`, which an encoder
  does not apply again. mask_BT: True on real events. u_BD: the user's row, if `reads_user`.
  begin_BT: if `packs`, the position at which the window of each event begins; None if each lane has
  one window. output_BP: if `picks`, the positions of the requested vectors; None for all. times:
  with time='bias', of the events and of the requests that follow them, else None.
  """

  x_BTD: Float[Array, 'B T D']
  mask_BT: Bool[Array, 'B T']
  u_BD: Float[Array, 'B D'] | None = None
  begin_BT: Int[Array, 'B T'] | None = None
  output_BP: Int[Array, 'B P'] | None = None
  times: Times | None = None

  def with_positions(self, positions_TD: Float[Array, 'T D']) -> Float[Array, 'B T D']:
    """`sqrt(D) x_t + P_t`, t the index in the window (Kang & McAuley 2018; sqrt(D) [code]).

    Args:
      positions_TD: P.
    """
    T, D = positions_TD.shape
    if self.begin_BT is None:
      return self.x_BTD * D**0.5 + positions_TD[None]
    return self.x_BTD * D**0.5 + positions_TD[jnp.arange(T)[None] - self.begin_BT]


class Vectors(NamedTuple):
  """The result of an encoder.

  v_BTD: vectors after each event, or at the requested positions; the product of a vector and the
  row of an item is its score. carry: the state for the next segments of the lanes. losses:
  auxiliary losses, in training. monitors: scalars to log.
  """

  v_BTD: Float[Array, 'B P D']
  carry: Any = {}
  losses: dict[str, Float[Array, '']] = {}
  monitors: dict[str, Float[Array, '']] = {}


class NextItemModel(Model):
  """`score(i) = v_t . e_i` for the item after event t; e are also the rows of the events.

      x_t = e_t + r_t        the input of the encoder
      e_i = row_i + c_i      the row of an item, as an event and as a candidate

  r_t has the event features and, with time='buckets', the time from the event to its request, the
  next event of the user (fields.EventFields); without these it is absent. [ours] c_i has the
  features of the item, if `item_fields` (fields.ItemFields), otherwise it is absent. RecTools adds
  the rows of an item's categories to that of its id, for events and candidates alike; SASRecF of
  RecBole concatenates and projects, for events alone. Here the rows are concatenated, projected and
  added, in both places, so that an item has one vector. [ours]

  Attributes:
    item_fields: whether items have their coded features, numbers and vectors beside their ids.
    loss: 'softmax' over all items; 'sampled_softmax', 'bce' or 'gbce' over the target and
      negatives; or MODULE:FUNCTION of the scores of targets [B, T], the scores of negatives
      [B, T, N], the mask of negatives [B, T, N] and weights [B, T], 0 without a target, that
      returns a float32 scalar.
    negatives: number of negatives for each event.
    sampler: 'uniform' or 'popularity' draws negatives; 'in_batch' uses the other targets of the
      batch.
    calibration: t of gBCE; 0 is BCE, and with 1 the scores are logits of calibrated probabilities.
  """

  width: int = 64
  item_fields: bool = False
  loss: str = 'softmax'
  negatives: int = 100
  sampler: str = 'uniform'
  calibration: float = 0.75
  positive_fields = ('negatives',)
  objective = 'next_item'
  # True: whole histories in segments, with a carried state. False: independent windows (lanes.py).
  whole: ClassVar[bool] = False
  packs: ClassVar[bool] = False  # whether a lane may have several windows
  picks: ClassVar[bool] = False  # whether the encoder computes only the requested vectors
  reads_user: ClassVar[bool] = False  # whether the model reads the user's row

  def check(self):
    super().check()
    if plugins.is_plugin(self.loss):
      plugins.load_function('config.model.loss', self.loss)
    else:
      one_of('config.model.loss', self.loss, [*LOSSES, 'MODULE:FUNCTION'])
    one_of('config.model.sampler', self.sampler, SAMPLERS)
    if self.event_width:
      raise UserError(
        f'config.model.event_width={self.event_width} must be 0: the events of a next-item model '
        'are as wide as the rows of the items, config.model.width'
      )
    if self.tuned and not (self.item_fields and all(x.startswith('item.') for x in self.tuned)):
      raise UserError(
        f'config.model.tuned={self.tuned!r}: next-item models read only vectors of items, such as '
        f"'item.image', and these with config.model.item_fields=True; it is {self.item_fields}"
      )
    if not 0 <= self.calibration <= 1:
      raise UserError(f'config.model.calibration={self.calibration} must be in [0, 1]')

  @property
  def items(self) -> int:
    """V, the number of ids of items; V is also the padding id."""
    return dict(self.schema.vocabulary)['item']

  def tables(self) -> dict[str, TableSpec]:
    """The tables of items, coded event features, users if `reads_user`, and features of items.

    Raises:
      UserError: `item_fields` for items without features, or an unknown name in `tuned`.
    """
    V = dict(self.schema.vocabulary)
    names = ('item', *(('user',) if self.reads_user else ()), *self.schema.event)
    tables = {name: TableSpec(V[name], self.width, self.scale) for name in names}
    if not self.item_fields:
      return tables
    if not self.schema.fields('item'):
      raise UserError(
        'config.model.item_fields=True, but the items have no features; set it to False, or name '
        'features in config.data.item_features or config.data.item_vectors'
      )
    tables |= {name: TableSpec(V[name], self.width, self.scale) for name in self.schema.item}
    return tables | self.vector_tables('item')

  def start(self, batch: dict[str, Array]) -> Any:
    """The carried state of a lane at the first segment of a user."""
    return self.carry(batch)

  def embed(self, events: Events) -> Float[Array, 'B T D']:
    """The input to which dropout is applied before `encode`: the rows, or with positions."""
    return events.x_BTD

  def encode(self, events: Events, carry: Any, train: bool) -> Vectors:
    """Encodes the events of a segment into vectors; subclasses define it.

    Args:
      events: of the segment. carry: the carried state. train: training behaviour.
    """
    raise TypeError(f'{type(self).__name__} has no encode(); a next-item model must define one')

  @nn.compact
  def __call__(
    self, batch: dict[str, Array], read: Read, carry: Any = None, train: bool = False
  ) -> Outputs:
    """Processes a segment of every lane.

    Args:
      batch: arrays of `lanes.py`, with those of event features and times. read: the reader.
      carry: the state after earlier segments.
      train: training behaviour (dropout, losses).

    Returns:
      Outputs with float32 vectors [B, T, D], or [B, P, D] if the batch has `asked`, and the carried
      state.
    """
    if self.item_fields and not train:
      raise TypeError('scores need the rows of training/item_rows.py: call fold_item_fields first')
    item_BT, V = batch['item'], self.items
    rows = self._item_reader(read)
    x_BTD = self._add_fields(rows(item_BT), batch, read)

    def begin(new, old):
      return jnp.where(batch['first'].reshape(-1, *[1] * (old.ndim - 1)), new, old)

    carry = jax.tree.map(begin, self.start(batch), carry)
    u_BD = read('user', batch['user']) if self.reads_user else None
    output_BP = batch.get('asked')
    times = Times(batch['time'], batch['time_gap']) if self.time == 'bias' else None
    events = Events(x_BTD, item_BT < V, u_BD, batch.get('begin'), output_BP, times)
    x_BTD = nn.Dropout(self.dropout, deterministic=not train)(self.embed(events))
    vectors = self._of_encode(Vectors, events._replace(x_BTD=x_BTD), carry, train)
    B, T, D = x_BTD.shape
    P = output_BP.shape[1] if output_BP is not None and self.picks else T
    self._check_shape('Vectors.v_BTD', vectors.v_BTD, 'B, T, D', (B, P, D))
    v_BTD = vectors.v_BTD.astype(jnp.float32)
    if output_BP is not None and not self.picks:
      v_BTD = rows_at(v_BTD, output_BP)
    losses = {}
    if train:
      losses = {'next_item': self._loss(v_BTD, batch, rows)} | vectors.losses
    return Outputs(v_BTD, losses, vectors.monitors, vectors.carry)

  def _fields_of_items(self, parent):
    return ItemFields(
      self.schema, self.width, self.scale, False, self.dtype, self.width, name='item_fields',
      parent=parent,
    )  # fmt: skip

  def item_rows(self, variables: Any, ids: Int[Array, '...'], read: Read) -> Float[Array, '... D']:
    """Returns e of items, float32, outside of a call of the model; only with `item_fields`.

    Args:
      variables: of the model. ids: of items; V is the padding. read: the reader.
    """
    of_fields = {
      name: variables[name]['item_fields'] for name in ('params', CONSTANTS) if name in variables
    }
    return read('item', ids) + self._fields_of_items(None).apply(of_fields, ids, read)

  def without_item_fields(self) -> 'NextItemModel':
    """Returns the model whose table of items has e, see training/item_rows.py."""
    return self.clone(item_fields=False)

  def _item_reader(self, read: Read) -> Callable[[Array], Array]:
    """Returns a function of ids [...] that returns e [..., D]; called once, in a compact method."""
    if not self.item_fields:
      return functools.partial(read, 'item')
    V, fields = self.items, self._fields_of_items(self)

    @functools.cache
    def all_fields():
      return fields(jnp.arange(V, dtype=jnp.int32), read)

    def rows(ids):
      # The softmax needs the features of all items. So they are computed once, for events too; and
      # for every loss where a batch would read more items than there are.
      if self.loss == 'softmax' or ids.size >= V:
        return read('item', ids) + all_fields().at[ids].get(mode='fill', fill_value=0)
      return read('item', ids) + fields(ids, read)

    return rows

  def _add_fields(self, x_BTD, batch, read):
    """Adds event features and the bucket of the time to the rows of the items."""
    fields = EventFields(
      self.schema, self.width, self.scale, self.time == 'buckets', self.dtype, self.width,
      name='event_fields',
    )  # fmt: skip
    if not fields.exist:
      return x_BTD
    return x_BTD + fields(batch, read, batch['item'] < self.items).astype(jnp.float32)

  def _loss(self, v_BTD, batch, rows):
    V, target_BT = self.items, batch['target']
    # Row 0 stands for all items outside the vocabulary: it is neither a target nor a candidate.
    weight_BT = ((target_BT > 0) & (target_BT < V)).astype(jnp.float32)
    if self.loss == 'softmax':
      rows_VD = rows(jnp.arange(V, dtype=jnp.int32))
      return losses.softmax_loss(v_BTD, target_BT, weight_BT, rows_VD, self.dtype)
    target_BTD = rows(target_BT)
    positive_BT = jnp.sum(v_BTD * target_BTD, axis=-1)
    if self.sampler == 'in_batch':
      D = v_BTD.shape[-1]
      id_BTN = target_BT.reshape(1, 1, -1)
      negative_BTN = jnp.einsum('btd,nd->btn', v_BTD, target_BTD.reshape(-1, D))
    else:
      id_BTN = batch['negative']
      negative_BTN = jnp.einsum('btd,btnd->btn', v_BTD, rows(id_BTN))
    # Neither padding nor the target itself is a negative.
    mask_BTN = (id_BTN > 0) & (id_BTN < V) & (id_BTN != target_BT[:, :, None])
    if self.loss == 'sampled_softmax':
      if self.sampler != 'uniform':  # correct for the sampling probabilities
        positive_BT = positive_BT - batch['log_q']
        log_q_BTN = (
          batch['log_q'].reshape(1, 1, -1)
          if self.sampler == 'in_batch'
          else batch['negative_log_q']
        )
        negative_BTN = negative_BTN - log_q_BTN
      return losses.sampled_softmax_loss(positive_BT, negative_BTN, mask_BTN, weight_BT)
    if plugins.is_plugin(self.loss):
      mask_BTN = jnp.broadcast_to(mask_BTN, negative_BTN.shape)
      return losses.custom_loss(self.loss, positive_BT, negative_BTN, mask_BTN, weight_BT)
    # There are V - 1 items, because row 0 is not an item, and one of them is the target.
    alpha = mask_BTN.shape[-1] / max(V - 2, 1)
    t = self.calibration if self.loss == 'gbce' else 0.0
    return losses.gbce_loss(positive_BT, negative_BTN, mask_BTN, weight_BT, alpha, t)
