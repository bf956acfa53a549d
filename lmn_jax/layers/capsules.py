"""Dynamic routing between capsules, which updates a memory with new events (Sabour et al. 2017)."""

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
  """Computes `|s|^2 / (1 + |s|^2) s / |s|` (DMAN, equation 8): the direction, a length below 1."""
  square = jnp.sum(jnp.square(s), axis=-1, keepdims=True)
  # The norm has no gradient at zero, so a small number is added.
  return s * square / ((1 + square) * jnp.sqrt(square + 1e-12))


def votes(x_BID: Float[Array, 'B I D'], w: Array) -> Float[Array, 'B I *J E']:
  """Computes the votes `u_ij = W_ij x_i`.

  Args:
    x_BID: primary capsules. w: [D, E] for all pairs, [J, D, E] for each interest capsule, or
      [I, J, D, E] for each pair.

  Returns:
    [B, I, E] if all interest capsules have the same votes, or [B, I, J, E].
  """
  return jnp.einsum(VOTES[w.ndim], x_BID, w)


def route(
  u: Float[Array, 'B I *J D'],
  start_BJD: Float[Array, 'B J D'],
  mask_BI: Bool[Array, 'B I'],
  iterations: int = 3,
) -> Float[Array, 'B J D']:
  """Computes interest capsules from votes by routing by agreement (DMAN, equations 6-8).

      b_ij = x_j . u_ij                                              6, u_ij = W_ij x_i
      s_j  = sum_i alpha_ij u_ij,  alpha_ij = softmax_j(b_ij)        7
      x_j  = squash(s_j)                                             8

  In the paper, the denominator of the softmax sums over the m + T primary capsules, which does not
  match the index j. As in the cited CapsNet, the softmax here is over the interest capsules. [ours]

  Args:
    u: votes; without the axis J, the same for all interest capsules. start_BJD: x_j before the
      first iteration; equal starts would stay equal. [ours: the paper does not say]
    mask_BI: True on real primary capsules. iterations: 3 in the paper.
  """
  axes = 'bid' if u.ndim == 3 else 'bijd'
  x_BJD = start_BJD
  for _ in range(iterations):
    b_BIJ = jnp.einsum(f'bjd,{axes}->bij', x_BJD, u)
    alpha_BIJ = jnp.where(mask_BI[:, :, None], jax.nn.softmax(b_BIJ, axis=2), 0)
    x_BJD = squash(jnp.einsum(f'bij,{axes}->bjd', alpha_BIJ, u))
  return x_BJD


class Routing(nn.Module):
  """`f_abs`: computes the new memory from the old memory and past events (DMAN, equation 4).

  Memory and events are normalised before the votes: a squashed slot is shorter than 1 and would
  have little weight beside events of the residual stream. The maps start as the identity: a slot
  passes through its map at every segment, and a random map would rotate it each time. [ours;
  reasoned, and measured to matter little: the log, 2026-11-25]

  Attributes:
    map: a key of MAPS, the number of maps W_ij.
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
    """Returns the memory after the past events; past_BT is True on real events."""
    one_of('config.model.routing_map', self.map, MAPS)
    norm_M, norm_T = nn.LayerNorm(name='norm_memory'), nn.LayerNorm(name='norm_past')
    x_BID = jnp.concatenate([norm_M(memory_BMD), norm_T(past_BTD)], axis=1)
    memory_BM = jnp.ones(memory_BMD.shape[:2], bool)
    (primary, D), J = x_BID.shape[1:], memory_BMD.shape[1]
    shape = {'shared': (), 'per_capsule': (J,), 'per_pair': (primary, J)}[self.map]

    def init(key, shape):
      del key
      return jnp.broadcast_to(jnp.eye(D), shape)

    w = self.param('map', init, (*shape, D, D)).astype(self.dtype)
    u = votes(x_BID.astype(self.dtype), w).astype(jnp.float32)
    return route(u, memory_BMD, jnp.concatenate([memory_BM, past_BT], axis=1), self.iterations)
