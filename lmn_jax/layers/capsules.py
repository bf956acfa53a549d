"""Dynamic routing between capsules, by which a memory takes in what is new (Sabour et al. 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.errors import one_of

MAPS = ('shared', 'per_capsule', 'per_pair')
# u_ij = W_ij x_i of I primary capsules for J interest capsules, by the number of axes of W.
VOTES = {2: 'bid,de->bie', 3: 'bid,jde->bije', 4: 'bid,ijde->bije'}


def squash(s: Float[Array, '... D']) -> Float[Array, '... D']:
  """`|s|^2 / (1 + |s|^2) s / |s|` (DMAN, equation 8): the direction, with a length below 1."""
  square = jnp.sum(jnp.square(s), axis=-1, keepdims=True)
  # The root of a zero vector's square has no gradient: the sum is kept off zero.
  return s * square / ((1 + square) * jnp.sqrt(square + 1e-12))


def votes(x_BID: Float[Array, 'B I D'], w: Array) -> Float[Array, 'B I *J E']:
  """`u_ij = W_ij x_i`.

  Args:
    x_BID: primary capsules. w: [D, E] one map for all pairs, [J, D, E] one for each interest
      capsule, or [I, J, D, E] one for each pair.

  Returns:
    [B, I, E] where all interest capsules have the same votes, or [B, I, J, E].
  """
  return jnp.einsum(VOTES[w.ndim], x_BID, w)


def route(
  u: Float[Array, 'B I *J D'],
  start_BJD: Float[Array, 'B J D'],
  mask_BI: Bool[Array, 'B I'],
  iterations: int = 3,
) -> Float[Array, 'B J D']:
  """Interest capsules that agree with the votes for them (DMAN, equations 6-8).

      b_ij = x_j . u_ij                                              6, u_ij = W_ij x_i
      s_j  = sum_i alpha_ij u_ij,  alpha_ij = softmax_j(b_ij)        7
      x_j  = squash(s_j)                                             8

  The paper's denominator runs over the m + T primary capsules, of which there are not as many as
  indices j: as in the cited CapsNet, what a primary capsule gives is shared out among the interest
  capsules. [ours: so we read it]

  Args:
    u: votes, the same for all interest capsules without the axis J. start_BJD: x_j before the first
      iteration; where all were equal, they would stay so. [ours: the paper does not say]
    mask_BI: primary capsules that there are. iterations: 3 in the paper.
  """
  alike = 'bid' if u.ndim == 3 else 'bijd'
  x_BJD = start_BJD
  for _ in range(iterations):
    b_BIJ = jnp.einsum(f'bjd,{alike}->bij', x_BJD, u)
    alpha_BIJ = jnp.where(mask_BI[:, :, None], jax.nn.softmax(b_BIJ, axis=2), 0)
    x_BJD = squash(jnp.einsum(f'bij,{alike}->bjd', alpha_BIJ, u))
  return x_BJD


class Routing(nn.Module):
  """`f_abs`: a memory and what leaves the window in, the new memory out (DMAN, equation 4).

  Old memory and events are normed before the votes: squashed, a slot is shorter than 1 and would
  weigh little beside events of the residual stream's size. The maps begin as the identity: what is
  kept from segment to segment goes through the map each time, and a random one would turn it anew.
  [ours; reasoned, and measured to matter little: the log, 2026-11-25]

  Attributes:
    map: key of MAPS: how many W_ij there are.
    iterations: of the routing.
    dtype: compute type of the votes; the routing is float32.
  """

  map: str = 'shared'
  iterations: int = 3
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    memory_BMD: Float[Array, 'B M D'],
    past_BTD: Float[Array, 'B T D'],
    past_BT: Bool[Array, 'B T'],
  ) -> Float[Array, 'B M D']:
    """The memory after the events `past`, of which those count where the mask is True."""
    one_of('config.model.routing_map', self.map, MAPS)
    norm_M, norm_T = nn.LayerNorm(name='norm_memory'), nn.LayerNorm(name='norm_past')
    x_BID = jnp.concatenate([norm_M(memory_BMD), norm_T(past_BTD)], axis=1)
    kept_BM = jnp.ones(memory_BMD.shape[:2], bool)
    (primary, D), J = x_BID.shape[1:], memory_BMD.shape[1]
    shape = {'shared': (), 'per_capsule': (J,), 'per_pair': (primary, J)}[self.map]

    def init(key, shape):
      del key
      return jnp.broadcast_to(jnp.eye(D), shape)

    w = self.param('map', init, (*shape, D, D)).astype(self.dtype)
    u = votes(x_BID.astype(self.dtype), w).astype(jnp.float32)
    return route(u, memory_BMD, jnp.concatenate([kept_BM, past_BT], axis=1), self.iterations)
