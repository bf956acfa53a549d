"""Numbers as fields: each value becomes a row as wide as that of an id."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmn_jax.layers.basic import Number

SKIP = 0.1  # alpha of AutoDis


def standardised(x: Float[Array, '...'], number: Number) -> Float[Array, '...']:
  """Computes `(y - shift) / scale`, `y = sign(x) log(1 + |x|)` for the kind 'log' and x otherwise.

  Args:
    x: float32, values as in the log. number: with the statistics of y in training.
  """
  if number.kind == 'log':
    x = jnp.sign(x) * jnp.log1p(jnp.abs(x))
  return (x - number.shift) / number.scale


class NumberField(nn.Module):
  """The row of a number: linear in its standardised value v, or by AutoDis; missing: its own row.

      row(v)  = v w + b                          kinds 'standard' and 'log'; w, b in R^D
      row(v)  = AutoDis(v)                       kind 'autodis'
      row(NaN) = a learned row

  Attributes:
    number: the feature. width: D. scale: standard deviation of the initial w and rows.
    dtype: compute type of the products of AutoDis; the rows are float32, as those of ids.
  """

  number: Number
  width: int
  scale: float
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '... D']:
    """Returns the rows, float32. x: float32, values as in the log; NaN is a missing value."""
    missing = jnp.isnan(x)
    # NaN would also be in the gradient of w, so it is replaced before.
    v = standardised(jnp.where(missing, 0, x), self.number)
    if self.number.kind == 'autodis':
      row = AutoDis(self.number.count, self.width, self.scale, self.dtype, name='autodis')(v)
    else:
      row = v[..., None] * self._row('weight', x.ndim) + self._row('bias', x.ndim)
    return jnp.where(missing[..., None], self._row('missing', x.ndim), row)

  def _row(self, name, axes):
    row_D = self.param(name, nn.initializers.normal(self.scale), (self.width,))
    return row_D.reshape(*[1] * axes, self.width)


class AutoDis(nn.Module):
  """A soft choice among meta-embeddings (Guo et al., KDD 2021, section 3).

      h   = LeakyReLU(w v)                w in R^H
      z   = W h + alpha h                 W in R^{H x H}, alpha = .1: the skip connection
      p   = softmax(z / tau)              the automatic discretisation
      row = sum_k p_k M_k                 M in R^{H x D}, the meta-embeddings; a weighted average

  Guo, Chen, Tang, Zhang, Li & He, An Embedding Learning Framework for Numerical Features in CTR
  Prediction. In the paper a small network computes the temperature tau from the value and from
  statistics of its field. Here tau is 1: h is proportional to the size of w, which is learned, so
  that another constant would only change the initial scale. [ours: tau, alpha]

  Attributes:
    count: H. width: D. scale: standard deviation of the initial M.
    dtype: compute type of the products; the softmax is float32.
  """

  count: int
  width: int
  scale: float
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, v: Float[Array, '...']) -> Float[Array, '... D']:
    """Returns the rows, float32. v: float32, standardised values."""
    H, normal = self.count, nn.initializers.normal
    w_H = self.param('weight', normal(1.0), (H,))
    W_HH = self.param('mix', nn.initializers.lecun_normal(), (H, H))
    M_HD = self.param('meta', normal(self.scale), (H, self.width))
    h = nn.leaky_relu(v[..., None] * w_H.reshape(*[1] * v.ndim, H))
    mixed = jnp.matmul(h.astype(self.dtype), W_HH.astype(self.dtype)).astype(jnp.float32)
    p = nn.softmax(mixed + SKIP * h, axis=-1)
    return jnp.matmul(p.astype(self.dtype), M_HD.astype(self.dtype)).astype(jnp.float32)
