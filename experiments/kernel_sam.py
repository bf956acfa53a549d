"""A Pallas kernel (Triton, for a GPU) of a pass of SAM, a contestant of kernels.py.

    x_l = [q - v_l ; q * v_l ; m - v_l ; m * v_l]
    w_l = mask_l sigmoid(w2 . sigmoid(W1 x_l + b1) + b2)
    p = sum_l w_l v_l

It computes what layers/target_attention.py computes for one query, a memory vector and the sigmoid
gate. The hidden layer of a block of positions stays in registers, forward and backward. XLA
computes the two arrays by which W1 is applied, and their gradients (see TargetAttention):

    W1 x_l + b1 = term + mix^T v_l

Lower-case sizes are of a block. Triton needs powers of two, and at least 16 for a product, so
blocks are rounded up and masks cut them to the arrays. `interpret` runs a kernel without a GPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lmn_jax.layers.target_attention import Unit


class PassBlocks(NamedTuple):
  """Sizes of `sam_pass`.

  positions: l, a power of two, at least 16. splits: programs of an example, each for a part of the
  positions. warps: of a program. tf32: whether products of float32 round their factors to 10 bits,
  as XLA does on a GPU.
  """

  positions: int = 64
  splits: int = 1
  warps: int = 4
  tf32: bool = True


class Parts(NamedTuple):
  """What the kernel reads beside the history. mask_BL: True on real behaviours.

  mix_BDH, term_BH: W1 and b1 for the query and memory of an example. w2_H, b2_1: second layer.
  """

  mask_BL: Array
  mix_BDH: Array
  term_BH: Array
  w2_H: Array
  b2_1: Array


def sam_pass(
  v_BLD: Array,
  mask_BL: Array,
  q_BD: Array,
  m_BD: Array,
  unit: Unit,
  blocks: PassBlocks,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """Returns p, the weights w, and the history for a next pass, as TargetAttention does.

  The gradient of the returned history is added to in place, so that all passes share one array.

  Args:
    v_BLD: the history, float32 or bfloat16. mask_BL: True on real behaviours. q_BD: the query.
      m_BD: the memory. unit: parameters. All floats have one dtype, which is that of the result;
      sums are float32. blocks: sizes. interpret: whether to run without a GPU.
  """
  mix_BDH, term_BH = mixed(q_BD, m_BD, unit)
  parts = Parts(mask_BL, mix_BDH, term_BH, unit.w2_H1[:, 0], unit.b2_1)
  return _sam_pass(blocks, interpret, v_BLD, parts)


def mixed(q_BD: Array, m_BD: Array, unit: Unit) -> tuple[Array, Array]:
  """Returns (mix, term) of the module's docstring."""
  wa, wb, wc, wd = jnp.split(unit.w1_4DH, 4)
  mix_BDH = (-wa - wc)[None] + q_BD[:, :, None] * wb[None] + m_BD[:, :, None] * wd[None]
  return mix_BDH, q_BD @ wa + m_BD @ wc + unit.b1_H[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sam_pass(blocks, interpret, v_BLD, parts):
  (B, L, D), S = v_BLD.shape, blocks.splits
  p_BSD, w_BL = _call(
    _forward, blocks, interpret, B, 'sam_pass',
    jax.ShapeDtypeStruct((B, S, D), jnp.float32), jax.ShapeDtypeStruct((B, L), v_BLD.dtype),
  )(v_BLD, *parts)  # fmt: skip
  return jnp.sum(p_BSD, axis=1).astype(v_BLD.dtype), w_BL, v_BLD


def _sam_pass_forward(blocks, interpret, v_BLD, parts):
  return _sam_pass(blocks, interpret, v_BLD, parts), (v_BLD, parts)


def _sam_pass_backward(blocks, interpret, residuals, grads):
  (v_BLD, parts), S = residuals, blocks.splits
  B, D, H = parts.mix_BDH.shape
  sums = (B, S, D, H), (B, S, H), (B, S, H), (B, S)
  grad_v_BLD, *sums = _call(
    _backward, blocks, interpret, B, 'sam_pass_backward',
    jax.ShapeDtypeStruct(v_BLD.shape, v_BLD.dtype),
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums),
    aliases={8: 0},  # the gradient of the history
  )(v_BLD, *parts, *grads)  # fmt: skip
  mix_BDH, term_BH, w2_BH, b2_B = (jnp.sum(x, axis=1) for x in sums)
  grad_parts = mix_BDH, term_BH, jnp.sum(w2_BH, axis=0), jnp.sum(b2_B, keepdims=True)
  cast = (grad.astype(x.dtype) for grad, x in zip(grad_parts, parts[1:], strict=True))
  return grad_v_BLD, Parts(None, *cast)


_sam_pass.defvjp(_sam_pass_forward, _sam_pass_backward)


def _call(kernel, blocks, interpret, B, name, *out_shape, aliases=None):
  return pl.pallas_call(
    functools.partial(kernel, blocks),
    out_shape=out_shape,
    grid=(B, blocks.splits),
    input_output_aliases=aliases or {},
    compiler_params=triton.CompilerParams(num_warps=blocks.warps),
    interpret=interpret,
    name=name,
  )


def _forward(blocks, v_ref, mask_ref, mix_ref, term_ref, w2_ref, b2_ref, p_ref, w_ref):
  (_, L, D), b, split = v_ref.shape, pl.program_id(0), pl.program_id(1)
  unit = _load_unit(b, mix_ref, term_ref, w2_ref, b2_ref)

  def add(l_l, sum_ld):
    mask_l = triton.load(mask_ref.at[b, l_l], mask=l_l < L, other=False)
    v_ld = _vectors(v_ref, b, l_l, mask_l)
    _, w_l = _weights(v_ld, mask_l, unit, blocks)
    triton.store(w_ref.at[b, l_l], w_l.astype(w_ref.dtype), mask=l_l < L)
    return sum_ld + w_l[:, None] * v_ld.astype(jnp.float32)

  sum_ld = _fold(add, jnp.zeros((blocks.positions, _size(D)), jnp.float32), L, blocks)
  d_d = jnp.arange(_size(D))
  triton.store(p_ref.at[b, split, d_d], jnp.sum(sum_ld, axis=0), mask=d_d < D)


def _backward(
  blocks, v_ref, mask_ref, mix_ref, term_ref, w2_ref, b2_ref, grad_p_ref, grad_w_ref, later_ref,
  grad_v_ref, grad_mix_ref, grad_term_ref, grad_w2_ref, grad_b2_ref,
):  # fmt: skip
  """later_ref: the gradient of the history by later passes, the same memory as grad_v_ref."""
  (_, L, D), H, positions = v_ref.shape, term_ref.shape[1], blocks.positions
  b, split, d, h = pl.program_id(0), pl.program_id(1), _size(D), _size(H)
  unit = mix_dh, _, w2_h, _ = _load_unit(b, mix_ref, term_ref, w2_ref, b2_ref)
  d_d, h_h = jnp.arange(d), jnp.arange(h)
  grad_p_d = triton.load(grad_p_ref.at[b, d_d], mask=d_d < D, other=0).astype(jnp.float32)

  def add(l_l, sums):
    mix_sum_dh, term_sum_lh, w2_sum_lh, b2_sum_l = sums
    mask_l = triton.load(mask_ref.at[b, l_l], mask=l_l < L, other=False)
    v_ld = _vectors(v_ref, b, l_l, mask_l)
    hidden_lh, w_l = _weights(v_ld, mask_l, unit, blocks)
    grad_w_l = triton.load(grad_w_ref.at[b, l_l], mask=mask_l, other=0).astype(jnp.float32)
    grad_w_l += jnp.sum(v_ld.astype(jnp.float32) * grad_p_d[None], axis=1)
    grad_a_l = grad_w_l * w_l * (1 - w_l)
    grad_z_lh = grad_a_l[:, None] * w2_h[None] * hidden_lh * (1 - hidden_lh)
    factor_lh = grad_z_lh.astype(v_ld.dtype)
    grad_v_ld = w_l[:, None] * grad_p_d[None] + _dot(factor_lh, mix_dh, (1, 1), blocks)
    # Positions of padding keep the gradient that they have.
    later_ld = _vectors(later_ref, b, l_l, mask_l).astype(jnp.float32)
    place, mask_ld = _at(grad_v_ref, b, l_l, mask_l)
    triton.store(place, (later_ld + grad_v_ld).astype(grad_v_ref.dtype), mask=mask_ld)
    return (
      mix_sum_dh + _dot(v_ld, factor_lh, (0, 0), blocks),
      term_sum_lh + grad_z_lh,
      w2_sum_lh + grad_a_l[:, None] * hidden_lh,
      b2_sum_l + grad_a_l,
    )

  shapes = (d, h), (positions, h), (positions, h), (positions,)
  sums = _fold(add, tuple(jnp.zeros(shape, jnp.float32) for shape in shapes), L, blocks)
  mix_sum_dh, term_sum_lh, w2_sum_lh, b2_sum_l = sums
  mask_dh = (d_d < D)[:, None] & (h_h < H)[None]
  triton.store(grad_mix_ref.at[b, split, d_d[:, None], h_h[None]], mix_sum_dh, mask=mask_dh)
  for ref, sum_lh in ((grad_term_ref, term_sum_lh), (grad_w2_ref, w2_sum_lh)):
    triton.store(ref.at[b, split, h_h], jnp.sum(sum_lh, axis=0), mask=h_h < H)
  triton.store(grad_b2_ref.at[b, split], jnp.sum(b2_sum_l))


def _load_unit(b, mix_ref, term_ref, w2_ref, b2_ref):
  """Returns mix [d, h] in its dtype, and term [h], w2 [h], b2 in float32, zeros past the ends.

  A hidden unit past the end adds nothing: its weight w2 is zero.
  """
  _, D, H = mix_ref.shape
  d_d1, h_1h = jnp.arange(_size(D))[:, None], jnp.arange(_size(H))[None]
  h_h = jnp.arange(_size(H))
  mix_dh = triton.load(mix_ref.at[b, d_d1, h_1h], mask=(d_d1 < D) & (h_1h < H), other=0)
  term_h = triton.load(term_ref.at[b, h_h], mask=h_h < H, other=0).astype(jnp.float32)
  w2_h = triton.load(w2_ref.at[h_h], mask=h_h < H, other=0).astype(jnp.float32)
  return mix_dh, term_h, w2_h, b2_ref[0].astype(jnp.float32)


def _weights(v_ld, mask_l, unit, blocks):
  """Returns (hidden layer [l, h], weights [l]) of a block, float32."""
  mix_dh, term_h, w2_h, b2 = unit
  hidden_lh = jax.lax.logistic(_dot(v_ld, mix_dh, (1, 0), blocks) + term_h[None])
  a_l = jnp.sum(hidden_lh * w2_h[None], axis=1) + b2
  return hidden_lh, jnp.where(mask_l, jax.lax.logistic(a_l), 0)


def _dot(x, y, axes, blocks):
  """Returns the float32 product of two matrices over one axis of each."""
  precision = jax.lax.Precision.DEFAULT if blocks.tf32 else jax.lax.Precision.HIGHEST
  dimensions = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(
    x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _fold(add, start, L, blocks):
  """Folds `add(positions [l], sums)` over the blocks of positions of this program."""
  count = pl.cdiv(pl.cdiv(L, blocks.positions), blocks.splits)
  first = pl.program_id(1) * count

  def add_block(i, sums):
    return add((first + i) * blocks.positions + jnp.arange(blocks.positions), sums)

  return jax.lax.fori_loop(0, count, add_block, start)


def _at(ref, b, l_l, mask_l):
  """Returns (vectors of an example at some positions, their mask [l, d]), for a load or store."""
  d_1d = jnp.arange(_size(ref.shape[2]))[None]
  return ref.at[b, l_l[:, None], d_1d], mask_l[:, None] & (d_1d < ref.shape[2])


def _vectors(ref, b, l_l, mask_l):
  place, mask_ld = _at(ref, b, l_l, mask_l)
  return triton.load(place, mask=mask_ld, other=0)


def _size(n):
  return max(16, pl.next_power_of_2(n))
