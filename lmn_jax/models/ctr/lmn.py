"""LMN: a large memory of slots shared by all users.

Lu et al., Large Memory Network for Recommendation, WWW 2025. The paper's formulas for the query and
for the target of the memory loss are not public: [ours] marks our choices, which are fields.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import Inputs, masked_mean, repeat, stop
from lmn_jax.layers.losses import Recall, memory_loss
from lmn_jax.layers.product_keys import product_top_k, sample_positions
from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded
from lmn_jax.tables.spec import TableSpec

QUERIES = ('user_item', 'item', 'product', 'axes')
NORMS = ('layer', 'batch', 'none')
BASES = ('none', 'pooling', 'din')


class NormOfFirst(nn.Module):
  """Batch norm of several arrays with the statistics of the first array.

  So the injected queries do not change the statistics of the scored queries. [ours] Parameters,
  moving statistics, momentum and epsilon are those of nn.BatchNorm, which computes statistics over
  everything that it normalises.
  """

  @nn.compact
  def __call__(self, arrays: list[Array], train: bool, real_BQ: Array | None = None) -> list[Array]:
    """Normalises arrays [B, Q, H, D]; real_BQ is False on padding of the first one, or None."""
    width = arrays[0].shape[-1:]
    scale = self.param('scale', nn.initializers.ones, width)
    bias = self.param('bias', nn.initializers.zeros, width)
    moving_mean = self.variable('batch_stats', 'mean', jnp.zeros, width)
    moving_var = self.variable('batch_stats', 'var', jnp.ones, width)
    mean, var = moving_mean.value, moving_var.value
    if train:
      axes = tuple(range(arrays[0].ndim - 1))
      real = None if real_BQ is None else real_BQ[:, :, None, None]
      mean, var = jnp.mean(arrays[0], axes, where=real), jnp.var(arrays[0], axes, where=real)
      if not self.is_initializing():
        moving_mean.value = 0.99 * moving_mean.value + 0.01 * mean
        moving_var.value = 0.99 * moving_var.value + 0.01 * var
    factor = scale * jax.lax.rsqrt(var + 1e-5)

    def normalise(x):
      shift, by, to = (v.reshape(*[1] * (x.ndim - 1), -1) for v in (mean, factor, bias))
      return (x - shift) * by + to

    return [normalise(x) for x in arrays]


class LMN(CTRModel):
  """Extraction from and injection into one memory of n = N * N slots.

      q(u, i) = norm(W2 act(W1 [e_u ; e_i]))                              [ours]
      J       = topK over all slots of q . [R_x ; C_y]
      M(q)    = sum_{j in J} softmax(S_J)_j value_j
      encode  = [s_base ; M(q(u, i))]                                      [ours]
      z_t     = stop_gradient([e_{s_t} ; e_u])                             [ours]
      L       = BCE + lambda L_mem                 lambda = config.loss.memory_weight
      L_mem   = mean_t SmoothL1(M(q(u, s_t)) - z_t), the injection, over P sampled positions t of
                each history (losses.memory_loss)

  e_{s_t} is the whole event, with its event features and its time if there are any: they are in the
  injected queries and in the memory's values. [ours]

  Attributes:
    slots_per_axis: N; the memory has N * N slots.
    top_k: K, slots read for each query and head.
    heads: H query nets and key sets over the same values; their reads are summed
      (Lample et al. 2019, section 3.3).
    query_width: D_q, width of a query; even.
    query_hidden: width of the query net's hidden layer.
    query: 'user_item' for the formula above; 'item' without the user; 'product' for W [e_u' * e_i']
      of projections to one width; 'axes' with the user on the row axis and the item on the column
      axis.
    query_context: whether the context of the target (the search query) is an input of the query.
    query_norm: 'layer', 'batch' or 'none'.
    positions: P, sampled history positions injected for each example; 0 disables injection.
    base: the encoder of the history beside the memory: 'none', 'pooling' or 'din'.
    attention, softmax: of DIN's unit, for base='din' (models/ctr/din.py).
    value_scale: standard deviation of the initial values.
    freeze_values: a control: values keep their random start.
    shuffle_user: a control: the query gets another user of the batch.
  """

  slots_per_axis: int = 256
  top_k: int = 32
  heads: int = 1
  query_width: int = 32
  query_hidden: int = 128
  query: str = 'user_item'
  query_context: bool = False
  query_norm: str = 'batch'
  positions: int = 4
  base: str = 'din'
  attention: int = 32
  softmax: bool = False
  value_scale: float = 0.05
  freeze_values: bool = False
  shuffle_user: bool = False
  positive_fields = ('slots_per_axis', 'top_k', 'heads', 'query_width', 'query_hidden', 'attention')
  loss_weights = {'memory': 0.1}  # lambda
  has_time_bias = True

  def check(self):
    super().check()
    one_of('config.model.query', self.query, QUERIES)
    one_of('config.model.query_norm', self.query_norm, NORMS)
    one_of('config.model.base', self.base, BASES)
    if self.query_width % 2:
      raise UserError(
        f'config.model.query_width={self.query_width} must be even, half for each axis; use '
        f'{self.query_width + 1}'
      )
    if self.top_k > self.slots_per_axis:
      raise UserError(
        f'config.model.top_k={self.top_k} is larger than slots_per_axis={self.slots_per_axis}; use '
        f'a top_k of at most {self.slots_per_axis}'
      )
    if self.slots_per_axis > 46_340:
      raise UserError(
        f'config.model.slots_per_axis={self.slots_per_axis} must be at most 46340: slot ids are '
        'int32'
      )
    if self.time == 'bias' and self.base != 'din':
      raise UserError(
        f"config.model.time='bias' is of the attention of base='din', and config.model.base="
        f"{self.base!r}; use base='din', or a time of none or buckets"
      )
    if self.positions < 0:
      raise UserError(f'config.model.positions={self.positions} must be 0 (no injection) or more')

  def tables(self):
    tables = super().tables()
    width = self.item_width + self.user_width
    group = 'frozen' if self.freeze_values else 'memory'
    n = self.slots_per_axis**2
    return tables | {'memory': TableSpec(n, width, self.value_scale, group, count_reads=True)}

  def read_memory(self, inputs, read, train, real_BQ=None) -> tuple[list[Array], Array]:
    """Computes M(q(u, i)) for several groups of Q pairs of a user and an item.

    Each group has its own lookup, so that the results of the first group are the same bits with and
    without other groups.

    Args:
      inputs: (users [B, Q, U], items with contexts [B, Q, I]) of each group; the first group is
        scored. read: the reader. train: whether to update the batch statistics. real_BQ: False on
        padding of the first group, which reads nothing; None if it has none.

    Returns:
      [B, Q, Dv] of each group, and the mean weight of the best slot in the first group, a scalar.
    """
    H, K, N = self.heads, self.top_k, self.slots_per_axis
    # Scores select the slots: float32 from here on for every compute type.
    queries = [q_BQHD.astype(jnp.float32) for q_BQHD in self._queries(inputs)]
    if self.query_norm == 'layer':
      norm = nn.LayerNorm(name='query_norm')
      queries = [norm(q_BQHD) for q_BQHD in queries]
    elif self.query_norm == 'batch':
      queries = NormOfFirst(name='query_norm')(queries, train, real_BQ)
    keys_H2NE = self.param(
      'keys',
      nn.initializers.normal((self.query_width / 2) ** -0.5),
      (H, 2, N, self.query_width // 2),
    )
    reads, top1 = [], []
    for q_BQHD, real in zip(queries, (real_BQ, *[None] * (len(queries) - 1)), strict=True):
      B, Q = q_BQHD.shape[:2]
      slots_THK, scores_THK = product_top_k(q_BQHD.reshape(B * Q, H, -1), keys_H2NE, K)
      weights_THK = nn.softmax(scores_THK, axis=-1)
      if real is not None:
        real = real.reshape(B * Q, 1, 1)
        slots_THK = jnp.where(real, slots_THK, N * N)
      # The reads of the heads are summed, so they are one weighted read of H * K slots.
      M_TV = read('memory', slots_THK.reshape(B * Q, H * K), weights_THK.reshape(B * Q, H * K))
      reads.append(M_TV.reshape(B, Q, -1))
      top1.append(jnp.mean(weights_THK[..., 0], where=None if real is None else real[..., 0]))
    return reads, top1[0]

  def _queries(self, inputs):
    """The queries of each group before their norm: [B, Q, H, D_q]."""
    H, D = self.heads, self.query_width
    users, items = zip(*inputs, strict=True)

    def net(inputs, width, name):
      first = nn.Dense(self.query_hidden, dtype=self.dtype, name=f'{name}_1')
      # Batch norm would remove a bias.
      last = nn.Dense(H * width, self.query_norm != 'batch', dtype=self.dtype, name=f'{name}_2')
      return [last(nn.relu(first(x))).reshape(*x.shape[:2], H, width) for x in inputs]

    if self.query == 'item':
      return net(items, D, 'query')
    if self.query == 'product':
      # e_u and e_i differ in width: both are projected to the hidden width first.
      of_user = nn.Dense(self.query_hidden, dtype=self.dtype, name='query_user')
      of_item = nn.Dense(self.query_hidden, dtype=self.dtype, name='query_item')
      return net([of_user(u) * of_item(i) for u, i in inputs], D, 'query')
    if self.query == 'axes':
      halves = zip(net(users, D // 2, 'query_user'), net(items, D // 2, 'query_item'), strict=True)
      return [jnp.concatenate(pair, axis=-1) for pair in halves]
    return net([jnp.concatenate(pair, axis=-1) for pair in inputs], D, 'query')

  def encode(self, x: Inputs, batch, read, train):
    u_BU = x.u_BU
    if self.shuffle_user:
      u_BU = jnp.roll(u_BU, 1, axis=0)
    Q, P = x.i_BQI.shape[1], self.positions
    c_BQC = x.c_BQC[..., : x.c_BQC.shape[-1] if self.query_context else 0]
    inputs = [(repeat(u_BU, Q), jnp.concatenate([x.i_BQI, c_BQC], axis=-1))]
    inject = train and P > 0
    if inject:
      position_BP, weight_BP = sample_positions(self.make_rng('positions'), batch['length'], P)
      if x.real_BQ is not None:  # as often as the history would be read for each target by itself
        weight_BP = weight_BP * jnp.sum(x.real_BQ.astype(jnp.float32), axis=1, keepdims=True)
      s_BPI = jnp.take_along_axis(x.s_BLI, position_BP[:, :, None], axis=1)
      # Histories have no contexts, so the injected queries have zeros there. [ours]
      zeros_BPC = jnp.zeros((*s_BPI.shape[:2], c_BQC.shape[-1]), c_BQC.dtype)
      inputs.append((repeat(u_BU, P), jnp.concatenate([s_BPI, zeros_BPC], axis=-1)))
    (M_BQV, *recalled), top1 = self.read_memory(inputs, read, train, x.real_BQ)
    losses, monitors = {}, {'memory/top1_weight': top1}
    if inject:
      target_BPV = jnp.concatenate([s_BPI, repeat(x.u_BU, P)], axis=-1)
      recall = Recall(recalled[0], stop(target_BPV), weight_BP)
      losses['memory'], monitors['loss/memory_of_mean'] = memory_loss(recall)
    features = [M_BQV.astype(self.dtype)]
    if self.base == 'pooling':
      features.append(repeat(masked_mean(x.s_BLI, x.mask_BL), Q))
    elif self.base == 'din':
      gate = 'softmax' if self.softmax else 'none'
      unit = TargetAttention(self.attention, gate=gate, dtype=self.dtype, name='attention')
      features.append(unit(x.i_BQI, x.s_BLI, x.mask_BL, bias_BL=self.time_bias(batch))[0])
    return Encoded(jnp.concatenate(features, axis=-1), lambda logit: losses, monitors)
