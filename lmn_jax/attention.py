"""Attention of targets over a behaviour history, without the [B, L, 4D] tensor."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.layers import ACTIVATIONS

# A unit's hidden layer is held for so many pairs of position and query of an example at a time.
PAIRS = 2048
LEAST_CHUNK = 64  # positions, so that many queries still make a large product


class Weights(NamedTuple):
  """An activation unit of Q queries of each example.

  own_BQH, mix_BQDH: what the queries make of the first layer, the term of their own and the factor
  of the history. w2_H1, b2_1: the second layer.
  """

  own_BQH: Float[Array, 'B Q H']
  mix_BQDH: Float[Array, 'B Q D H']
  w2_H1: Float[Array, 'H 1']
  b2_1: Float[Array, '1']


def unit_scores(
  v_BLD: Float[Array, 'B L D'], weights: Weights, activation: str
) -> tuple[Float[Array, 'B L Q'], Float[Array, 'B L D']]:
  """`a_lq = w2 . act(own_q + v_l mix_q) + b2`, an activation unit of Q queries over L positions.

  One [L, D] x [D, Q h] product for each example. Where there are more than PAIRS pairs of position
  and query the history goes through in chunks, and the gradient computes their hidden layers anew:
  beside the history's own gradient, memory does not grow with L but by the scores.

  Args:
    v_BLD: the history. weights: of the unit. activation: key of ACTIVATIONS.

  Returns:
    The scores, and the history again: what reads it from here hands its gradient to these scores,
    which add theirs in place. So all passes of a model share one [B, L, D] of gradient.
  """
  if v_BLD.shape[1] <= chunk_length(weights):
    return _scores(activation, v_BLD, weights), v_BLD
  return _chunked(activation, v_BLD, weights)


def chunk_length(weights: Weights) -> int:
  """T, positions of a history whose hidden layers are held at a time."""
  return max(LEAST_CHUNK, PAIRS // weights.own_BQH.shape[1])


def _scores(activation, v_BLD, weights):
  own_BQH, mix_BQDH, w2_H1, b2_1 = weights
  hidden_BLQH = ACTIVATIONS[activation](
    own_BQH[:, None] + jnp.einsum('bld,bqdh->blqh', v_BLD, mix_BQDH)
  )
  return jnp.einsum('blqh,h->blq', hidden_BLQH, w2_H1[:, 0]) + b2_1[None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(activation, v_BLD, weights):
  T = chunk_length(weights)

  def add_chunk(a_BLQ, begin):
    a_BTQ = _scores(activation, _cut(v_BLD, begin, T), weights)
    return jax.lax.dynamic_update_slice_in_dim(a_BLQ, a_BTQ, begin, axis=1), None

  B, L, _ = v_BLD.shape
  a_BLQ = jnp.zeros((B, L, weights.own_BQH.shape[1]), v_BLD.dtype)
  return jax.lax.scan(add_chunk, a_BLQ, _begins(L, T))[0], v_BLD


def _chunked_forward(activation, v_BLD, weights):
  return _chunked(activation, v_BLD, weights), (v_BLD, weights)


def _chunked_backward(activation, kept, grads):
  """The chunks again, each with its gradient, which is added in place.

  Under autodiff a scan would hold the history and its gradient once more, cut into chunks. The
  second layer's gradients stay by example until the loop is over: a sum over examples in it would
  be one over devices for each chunk.
  """
  v_BLD, weights = kept
  grad_BLQ, grad_v = grads
  B, L, _ = v_BLD.shape
  T = chunk_length(weights)

  def pull(v_TD, own_QH, mix_QDH, grad_TQ):
    """What one example adds to the gradients of v and of each of the weights."""

    def scores(v_TD, own_QH, mix_QDH, *second_layer):
      of_one = Weights(own_QH[None], mix_QDH[None], *second_layer)
      return _scores(activation, v_TD[None], of_one)[0]

    return jax.vjp(scores, v_TD, own_QH, mix_QDH, weights.w2_H1, weights.b2_1)[1](grad_TQ)

  def add_chunk(grads, chunk):
    begin, done = chunk
    # The last chunk reaches back into the one before, whose positions have had their turn.
    grad_BTQ = jnp.where(jnp.arange(T)[None, :, None] < done, 0, _cut(grad_BLQ, begin, T))
    own_v, *own = jax.vmap(pull)(_cut(v_BLD, begin, T), weights.own_BQH, weights.mix_BQDH, grad_BTQ)
    own_v = own_v + _cut(grads[0], begin, T)
    return (
      jax.lax.dynamic_update_slice_in_dim(grads[0], own_v, begin, axis=1),
      jax.tree.map(lambda total, x: total + x.astype(jnp.float32), grads[1], own),
    ), None

  begins_N = _begins(L, T)
  done_N = jnp.arange(begins_N.size) * T - begins_N
  shapes = [weights.own_BQH.shape, weights.mix_BQDH.shape, (B, *weights.w2_H1.shape), (B, 1)]
  zeros = [jnp.zeros(shape, jnp.float32) for shape in shapes]
  (grad_v, (own_BQH, mix_BQDH, w2_BH1, b2_B1)), _ = jax.lax.scan(
    add_chunk, (grad_v, zeros), (begins_N, done_N)
  )
  grad_weights = Weights(own_BQH, mix_BQDH, jnp.sum(w2_BH1, axis=0), jnp.sum(b2_B1, axis=0))
  return grad_v, jax.tree.map(lambda g, x: g.astype(x.dtype), grad_weights, weights)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _begins(L, T):
  """Where chunks of T positions begin that cover L: the last one ends with the history."""
  return jnp.minimum(jnp.arange(-(-L // T)) * T, L - T)


def _cut(x_BLD, begin, T):
  return jax.lax.dynamic_slice_in_dim(x_BLD, begin, T, axis=1)


@jax.custom_vjp
def weighted_sum(
  w_BLQ: Float[Array, 'B L Q'], v_BLD: Float[Array, 'B L D']
) -> Float[Array, 'B Q D']:
  """`sum_l w_lq v_l`; the gradient of v is made as v lies.

  JAX makes it [B, D, L] and turns it: a history in memory once more.
  """
  return jnp.einsum('blq,bld->bqd', w_BLQ, v_BLD)


def _weighted_sum_backward(kept, grad_BQD):
  w_BLQ, v_BLD = kept
  grad_w = jnp.einsum('bld,bqd->blq', v_BLD, grad_BQD)
  return grad_w, jnp.einsum('blq,bqd->bld', w_BLQ, grad_BQD)


weighted_sum.defvjp(lambda w, v: (weighted_sum(w, v), (w, v)), _weighted_sum_backward)


class SecondLayer(nn.Module):
  """The parameters of an `nn.Dense(1)`, [H, 1] and [1], for products that are made in chunks."""

  hidden: int

  @nn.compact
  def __call__(self):
    kernel_H1 = self.param('kernel', nn.initializers.lecun_normal(), (self.hidden, 1))
    return kernel_H1, self.param('bias', nn.initializers.zeros, (1,))


class TargetAttention(nn.Module):
  """A local activation unit weighs the history for each query, its first layer in blocks.

      a_j = w2 . act(W1 x_j + b1) + b2
      w_j = mask_j gate(a_j)
      out = sum_j w_j v_j

  Without a memory it is DIN's (Zhou et al. 2018, section 4.3), with a memory vector m a pass of
  SAM's, where neither q, v_j nor m stand alone [code]:

      x_j = [q ; v_j ; q - v_j ; q * v_j]              x_j = [q - v_j ; q * v_j ; m - v_j ; m * v_j]

  W1 = [Wa Wb Wc Wd] splits by block, so that `W1 x_j` is a term of q and a product with v_j:

      (Wa + Wc) q + (Wb - Wc + Wd diag(q)) v_j
      Wa q + Wc m + (-Wa - Wc + Wb diag(q) + Wd diag(m)) v_j

  Attributes:
    hidden: h, width of the unit's hidden layer.
    activation: key of ACTIVATIONS.
    gate: 'none' (DIN: the intensity of interest is kept), 'sigmoid' (SAM), or 'softmax' over the
      history. [ours: softmax]
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
  ) -> tuple[Float[Array, 'B Q D'], Float[Array, 'B L Q'], Float[Array, 'B L D']]:
    """Returns what each query reads, the weights, and the history for a next pass (unit_scores).

    Args:
      q_BQD: Q queries of each example. v_BLD: the history. mask_BL: True on real behaviours.
      m_BQD: a memory vector for each query, or None.
    """
    D = q_BQD.shape[-1]
    # One initialiser over the whole 4D input, so that the blocks have the plain form's scale.
    w1_4DH = self.param('w1', nn.initializers.lecun_normal(), (4 * D, self.hidden))
    b1_H = self.param('b1', nn.initializers.zeros, (self.hidden,))
    w2_H1, b2_1 = SecondLayer(self.hidden, name='Dense_0')()
    wa, wb, wc, wd = jnp.split(w1_4DH.astype(self.dtype), 4)

    def diag(x_BQD, w_DH):
      return jnp.einsum('bqd,dh->bqdh', x_BQD, w_DH)

    if m_BQD is None:
      own_BQH = q_BQD @ (wa + wc)
      mix_BQDH = (wb - wc)[None, None] + diag(q_BQD, wd)
    else:
      own_BQH = q_BQD @ wa + m_BQD @ wc
      mix_BQDH = (-wa - wc)[None, None] + diag(q_BQD, wb) + diag(m_BQD, wd)
    own_BQH = own_BQH + b1_H.astype(self.dtype)[None, None]
    w2_H1, b2_1 = w2_H1.astype(self.dtype), b2_1.astype(self.dtype)
    a_BLQ, v_BLD = unit_scores(v_BLD, Weights(own_BQH, mix_BQDH, w2_H1, b2_1), self.activation)
    mask_BL1 = mask_BL[:, :, None]
    if self.gate == 'softmax':
      a_BLQ = jnp.where(mask_BL1, a_BLQ.astype(jnp.float32), -1e30)
      # A history without events: all weights equal, then masked to zero below.
      a_BLQ = nn.softmax(a_BLQ, axis=1).astype(self.dtype)
    elif self.gate == 'sigmoid':
      a_BLQ = nn.sigmoid(a_BLQ)
    w_BLQ = jnp.where(mask_BL1, a_BLQ, 0)
    return weighted_sum(w_BLQ, v_BLD), w_BLQ, v_BLD
