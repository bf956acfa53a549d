"""Target attention: targets attend to a behaviour history, without an array [B, L, 4D]."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers.basic import ACTIVATIONS


class Queries(NamedTuple):
  """q_BQD: Q queries of each example. m_BQD: a memory vector for each query, or None."""

  q_BQD: Float[Array, 'B Q D']
  m_BQD: Float[Array, 'B Q D'] | None


class Unit(NamedTuple):
  """The parameters of an activation unit: `a = w2 . act(W1 x + b1) + b2`."""

  w1_4DH: Float[Array, 'E H']
  b1_H: Float[Array, 'H']
  w2_H1: Float[Array, 'H 1']
  b2_1: Float[Array, '1']


def unit_scores(
  v_BLD: Float[Array, 'B L D'], queries: Queries, unit: Unit, activation: str
) -> tuple[Float[Array, 'B L Q'], Float[Array, 'B L D']]:
  """Computes `a_lq`, the activation unit of each position and query (see TargetAttention).

  It is one [L, D] x [D, Q h] product for each example. If the hidden layers have more than
  `unit_floats` numbers, or there are more than `unit_pairs` pairs of position and query
  (BlockSizes), examples and positions are processed in blocks, and the gradient recomputes their
  hidden layers: besides the gradient of the history, only the scores grow with B and L.

  Args:
    v_BLD: the history. queries: as in TargetAttention. unit: parameters. activation: a key of
      ACTIVATIONS.

  Returns:
    The scores, and the history. Later reads should use the returned history: its gradient then
    flows through this function, which adds its own in place, so that all passes of a model share
    one gradient [B, L, D].
  """
  if any(map(jax.export.is_symbolic_dim, (*v_BLD.shape, queries.q_BQD.shape[1]))):
    return _in_chunks(activation, v_BLD, queries, unit), v_BLD
  if block_shape(v_BLD, queries, unit) == v_BLD.shape[:2]:
    return _scores(activation, v_BLD, queries, unit), v_BLD
  return _blocked(activation, v_BLD, queries, unit)


def block_shape(v_BLD: Array, queries: Queries, unit: Unit) -> tuple[int, int]:
  """Returns (b, T), the examples and positions of a block."""
  B, L, _ = v_BLD.shape
  Q, H = queries.q_BQD.shape[1], unit.b1_H.size
  sizes = block_sizes.sizes()
  T = min(L, max(sizes.unit_positions, sizes.unit_pairs // Q))
  b = max(1, sizes.unit_floats // (T * Q * H))
  return B if B <= 2 * b else b, T  # a loop over two blocks does not pay off


def _scores(activation, v_BLD, queries, unit):
  Q = queries.q_BQD.shape[1]
  if jax.export.is_symbolic_dim(Q) or Q > 1:
    return _scores_of_many(activation, v_BLD, queries, unit)
  return _scores_of_few(activation, v_BLD, queries, unit)


def _scores_of_few(activation, v_BLD, queries, unit):
  (q_BQD, m_BQD), (w1_4DH, b1_H, w2_H1, b2_1) = queries, unit
  wa, wb, wc, wd = jnp.split(w1_4DH, 4)

  if m_BQD is None:
    term_BQH = q_BQD @ (wa + wc)
    mix_BQDH = (wb - wc)[None, None] + _diag(q_BQD, wd)
  else:
    term_BQH = q_BQD @ wa + m_BQD @ wc
    mix_BQDH = (-wa - wc)[None, None] + _diag(q_BQD, wb) + _diag(m_BQD, wd)
  term_BQH = term_BQH + b1_H[None, None]
  hidden_BLQH = ACTIVATIONS[activation](
    term_BQH[:, None] + jnp.einsum('bld,bqdh->blqh', v_BLD, mix_BQDH)
  )
  # A w2 for each example: for the gradient of a single w2, XLA on CPU transposes the hidden layers.
  w2_BH = jnp.broadcast_to(w2_H1[:, 0], (v_BLD.shape[0], w2_H1.shape[0]))
  return jnp.einsum('blqh,bh->blq', hidden_BLQH, w2_BH) + b2_1[None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores_of_many(activation, v_BLD, queries, unit):
  """`_scores` with the queries on the last axis, so that XLA on CPU adds hidden units as vectors.

  2.1 ms for 1,000 positions, 200 queries and 8 units; `_scores` for one query takes 3.2 ms. This is
  for candidates. In training the few targets of a request are scored by `_scores_of_few`: the
  gradient of the loop over units takes four times as long.
  """
  (q_BQD, m_BQD), (w1_4DH, b1_H, w2_H1, b2_1) = queries, unit
  (B, L, D), Q, H = v_BLD.shape, q_BQD.shape[1], b1_H.shape[0]
  q_BDQ = q_BQD.swapaxes(1, 2)
  wa, wb, wc, wd = jnp.split(w1_4DH, 4)

  def diag(x_BDQ, w_DH):
    return x_BDQ[:, :, None] * w_DH[None, :, :, None]

  if m_BQD is None:
    term_BHQ = jnp.einsum('bdq,dh->bhq', q_BDQ, wa + wc)
    mix_BDHQ = (wb - wc)[None, :, :, None] + diag(q_BDQ, wd)
  else:
    m_BDQ = m_BQD.swapaxes(1, 2)
    term_BHQ = jnp.einsum('bdq,dh->bhq', q_BDQ, wa) + jnp.einsum('bdq,dh->bhq', m_BDQ, wc)
    mix_BDHQ = (-wa - wc)[None, :, :, None] + diag(q_BDQ, wb) + diag(m_BDQ, wd)
  term_BHQ = term_BHQ + b1_H[None, :, None]
  hidden_BLHQ = (v_BLD @ mix_BDHQ.reshape(B, D, H * Q)).reshape(B, L, H, Q)
  a_BLQ = jnp.broadcast_to(b2_1[None, None], (B, L, Q))
  for h in range(H):
    unit_BLQ = ACTIVATIONS[activation](term_BHQ[:, None, h] + hidden_BLHQ[:, :, h])
    a_BLQ = a_BLQ + w2_H1[h, 0] * unit_BLQ
  return a_BLQ


def _scores_of_many_forward(activation, v_BLD, queries, unit):
  return jax.vjp(functools.partial(_scores_of_few, activation), v_BLD, queries, unit)


def _scores_of_many_backward(_activation, gradients_of, grad_BLQ):
  return gradients_of(grad_BLQ)


_scores_of_many.defvjp(_scores_of_many_forward, _scores_of_many_backward)


def _in_chunks(activation, v_BLD, queries, unit):
  """The scores in an export, where sizes are symbolic: in chunks of positions, no gradient."""
  B, L, D = v_BLD.shape
  sizes = block_sizes.sizes()
  if jax.export.is_symbolic_dim(L):  # a multiple of `unit_positions` and of `export_chunks`
    T = L // sizes.export_chunks if sizes.export_chunks else sizes.unit_positions
  else:
    T = -(-L // (sizes.export_chunks or -(-L * unit.b1_H.size // sizes.export_units)))
    v_BLD = jnp.pad(v_BLD, ((0, 0), (0, -L % T), (0, 0)))
  chunks = v_BLD.shape[1] // T
  v_NBTD = jnp.moveaxis(v_BLD.reshape(B, chunks, T, D), 1, 0)
  a_NBTQ = jax.lax.map(lambda v_BTD: _scores(activation, v_BTD, queries, unit), v_NBTD)
  return jnp.moveaxis(a_NBTQ, 0, 1).reshape(B, chunks * T, -1)[:, :L]


@jax.custom_vjp
def _diag(x_BQD, w_DH):
  """`diag(x) w` with gradients as products, which XLA on CPU computes faster than sums."""
  return x_BQD[..., None] * w_DH[None, None]


def _diag_backward(residuals, grad_BQDH):
  x_BQD, w_DH = residuals
  grad_x = jnp.einsum('bqdh,dh->bqd', grad_BQDH, w_DH)
  return grad_x, jnp.einsum('bqdh,bqd->dh', grad_BQDH, x_BQD)


_diag.defvjp(lambda x, w: (_diag(x, w), (x, w)), _diag_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(activation, v_BLD, queries, unit):
  def device_scores(v_BLD, queries, unit):
    shape = block_shape(v_BLD, queries, unit)

    def add_block(a_BLQ, begin):
      a_bTQ = _scores(activation, *_cut(v_BLD, queries, begin, shape), unit)
      return jax.lax.dynamic_update_slice(a_BLQ, a_bTQ, (*begin, 0)), None

    a_BLQ = jnp.zeros((*v_BLD.shape[:2], queries.q_BQD.shape[1]), v_BLD.dtype)
    return jax.lax.scan(add_block, a_BLQ, _blocks(v_BLD.shape, shape)[0])[0]

  # Each device loops over the blocks of its examples.
  in_specs = (meshes.BATCH, meshes.BATCH, meshes.REPLICATED)
  return meshes.each_device(device_scores, in_specs, meshes.BATCH)(v_BLD, queries, unit), v_BLD


def _blocked_forward(activation, v_BLD, queries, unit):
  return _blocked(activation, v_BLD, queries, unit), (v_BLD, queries, unit)


def _blocked_backward(activation, residuals, grads):
  """Recomputes the blocks and adds the gradient of each in place.

  Autodiff of a scan would store the history and its gradient a second time, in blocks. Sums are
  float32. Sums over the examples of all devices are computed after the loop.
  """

  def device_grads(v_BLD, queries, unit, grad_BLQ, grad_v):
    b, T = block_shape(v_BLD, queries, unit)

    def add_block(total, block):
      (grad_v, grad_queries, grad_unit), (begin, done) = total, block
      # The last block along an axis overlaps the block before it; that part is already done.
      done_bT = (jnp.arange(b) < done[0])[:, None] | (jnp.arange(T) < done[1])[None, :]
      grad_bTQ = jnp.where(done_bT[:, :, None], 0, _slice(grad_BLQ, begin, (b, T)))
      scores = functools.partial(_scores, activation)
      arguments = *_cut(v_BLD, queries, begin, (b, T)), unit
      dv, dqueries, dunit = jax.vjp(scores, *arguments)[1](grad_bTQ)
      return (
        _add(grad_v, dv, begin),
        jax.tree.map(lambda x, dx: _add(x, dx, begin[:1]), grad_queries, dqueries),
        jax.tree.map(lambda x, dx: x + dx.astype(x.dtype), grad_unit, dunit),
      ), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (queries, unit))
    blocks = _blocks(v_BLD.shape, (b, T))
    (grad_v, grad_queries, grad_unit), _ = jax.lax.scan(add_block, (grad_v, *zeros), blocks)
    return grad_v, grad_queries, jax.tree.map(lambda x: x[None], grad_unit)

  in_specs = (meshes.BATCH, meshes.BATCH, meshes.REPLICATED, meshes.BATCH, meshes.BATCH)
  run = meshes.each_device(device_grads, in_specs, meshes.BATCH)
  grad_v, grad_queries, grad_units = run(*residuals, *grads)
  grads = grad_v, grad_queries, jax.tree.map(lambda x: jnp.sum(x, axis=0), grad_units)
  return jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, residuals)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(shape, block):
  """Returns blocks [b, T] that cover [B, L], as two int32 [N, 2].

  The first is where each block begins. The last block along an axis ends at the end of the axis, so
  it may overlap the block before; the second is the number of overlapping examples and positions.
  """
  steps = [np.arange(0, size, step) for size, step in zip(shape, block, strict=False)]
  grid_N2 = np.stack(np.meshgrid(*steps, indexing='ij'), axis=-1).reshape(-1, 2)
  begins_N2 = np.minimum(grid_N2, np.subtract(shape[:2], block))
  return jnp.asarray(begins_N2, jnp.int32), jnp.asarray(grid_N2 - begins_N2, jnp.int32)


def _slice(x, begin, sizes):
  """Returns a slice of the first axes, and all of the other axes."""
  axes = len(sizes)
  return jax.lax.dynamic_slice(x, (*begin, *[0] * (x.ndim - axes)), (*sizes, *x.shape[axes:]))


def _cut(v_BLD, queries, begin, shape):
  """Returns history and queries of a block."""
  queries = jax.tree.map(lambda x: _slice(x, begin[:1], shape[:1]), queries)
  return _slice(v_BLD, begin, shape), queries


def _add(total, part, begin):
  """Adds `part` in place to the slice of `total` that starts at `begin`."""
  new = _slice(total, begin, part.shape[: len(begin)]) + part.astype(total.dtype)
  return jax.lax.dynamic_update_slice(total, new, (*begin, *[0] * (total.ndim - len(begin))))


@jax.custom_vjp
def weighted_sum(
  w_BLQ: Float[Array, 'B L Q'], v_BLD: Float[Array, 'B L D']
) -> Float[Array, 'B Q D']:
  """Computes `sum_l w_lq v_l`; the gradient of v has the layout of v.

  JAX would compute it as [B, D, L] and transpose it, which needs the memory of another history.
  """
  return jnp.einsum('blq,bld->bqd', w_BLQ, v_BLD)


def _weighted_sum_backward(residuals, grad_BQD):
  w_BLQ, v_BLD = residuals
  grad_w = jnp.einsum('bld,bqd->blq', v_BLD, grad_BQD)
  return grad_w, jnp.einsum('blq,bqd->bld', w_BLQ, grad_BQD)


weighted_sum.defvjp(lambda w, v: (weighted_sum(w, v), (w, v)), _weighted_sum_backward)


class SecondLayer(nn.Module):
  """The parameters of an `nn.Dense(1)`, [H, 1] and [1], for products computed in chunks."""

  hidden: int

  @nn.compact
  def __call__(self):
    kernel_H1 = self.param('kernel', nn.initializers.lecun_normal(), (self.hidden, 1))
    return kernel_H1, self.param('bias', nn.initializers.zeros, (1,))


class TargetAttention(nn.Module):
  """Weights the history for each query by a local activation unit, its first layer in blocks.

      a_j = w2 . act(W1 x_j + b1) + b2 + t_j        t_j: 0, or a bias by time (time_gaps.py)
      w_j = mask_j gate(a_j)
      out = sum_j w_j v_j

  Without a memory vector it is the unit of DIN (Zhou et al. 2018, section 4.3). With a memory
  vector m it is a pass of SAM, whose input has neither q, v_j nor m alone [code]:

      x_j = [q ; v_j ; q - v_j ; q * v_j]              x_j = [q - v_j ; q * v_j ; m - v_j ; m * v_j]

  With W1 = [Wa Wb Wc Wd], `W1 x_j` is a term of q and a product with v_j:

      (Wa + Wc) q + (Wb - Wc + Wd diag(q)) v_j
      Wa q + Wc m + (-Wa - Wc + Wb diag(q) + Wd diag(m)) v_j

  Attributes:
    hidden: h, width of the unit's hidden layer.
    activation: a key of ACTIVATIONS.
    gate: 'none' (DIN, which preserves the intensity of interest), 'sigmoid' (SAM), or 'softmax'
      over the history. [ours: softmax]
    dtype: compute type.
  """

  hidden: int = 32
  activation: str = 'sigmoid'
  gate: str = 'none'
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    q_BQD: Float[Array, 'B Q D'],
    v_BLD: Float[Array, 'B L D'],
    mask_BL: Bool[Array, 'B L'],
    m_BQD: Float[Array, 'B Q D'] | None = None,
    bias_BL: Float[Array, 'B L'] | None = None,
  ) -> tuple[Float[Array, 'B Q D'], Float[Array, 'B L Q'], Float[Array, 'B L D']]:
    """Returns the sum of each query, the weights, and the history for a next pass (unit_scores).

    Args:
      q_BQD: Q queries of each example. v_BLD: the history. mask_BL: True on real behaviours.
      m_BQD: a memory vector for each query, or None. bias_BL: t, or None.
    """
    D = q_BQD.shape[-1]
    # One initialiser over the whole 4D input, so that the blocks have the scale of the plain form.
    w1_4DH = self.param('w1', nn.initializers.lecun_normal(), (4 * D, self.hidden))
    b1_H = self.param('b1', nn.initializers.zeros, (self.hidden,))
    w2_H1, b2_1 = SecondLayer(self.hidden, name='Dense_0')()
    unit = jax.tree.map(lambda x: x.astype(self.dtype), Unit(w1_4DH, b1_H, w2_H1, b2_1))
    a_BLQ, v_BLD = unit_scores(v_BLD, Queries(q_BQD, m_BQD), unit, self.activation)
    if bias_BL is not None:
      a_BLQ = a_BLQ + bias_BL[:, :, None].astype(self.dtype)
    mask_BL1 = mask_BL[:, :, None]
    if self.gate == 'softmax':
      a_BLQ = jnp.where(mask_BL1, a_BLQ.astype(jnp.float32), -1e30)
      # For an empty history the weights are uniform here and masked to zero below.
      a_BLQ = nn.softmax(a_BLQ, axis=1).astype(self.dtype)
    elif self.gate == 'sigmoid':
      a_BLQ = nn.sigmoid(a_BLQ)
    w_BLQ = jnp.where(mask_BL1, a_BLQ, 0)
    return weighted_sum(w_BLQ, v_BLD), w_BLQ, v_BLD
