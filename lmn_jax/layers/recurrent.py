"""Gated recurrent units over a history: one product for all inputs, then a scan over time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lmn_jax.distributed import mesh as meshes


def product(x: Float[Array, '... D'], weight_DE: Float[Array, 'D E']) -> Float[Array, '... E']:
  """Computes `x weight` in the dtype of the weight; returns float32."""
  return jnp.matmul(x.astype(weight_DE.dtype), weight_DE).astype(jnp.float32)


def gru_cell(
  x: Float[Array, '... G'],
  h: Float[Array, '... E'],
  recurrent_EG: Float[Array, 'E G'],
  attention: Float[Array, '...'] | None = None,
) -> Float[Array, '... E']:
  """One step of a GRU or, with attention, of an AUGRU (Zhou et al. 2019, equations 2-5, 11, 12).

      u  = sigmoid(x_u + h U_u)
      r  = sigmoid(x_r + h U_r)
      n  = tanh(x_n + r * (h U_n))
      h' = (1 - a u) * h + a u * n                a = 1 without attention

  The reset gate r is applied after the product with U_n. flax.linen.GRUCell, which SAM uses
  (models/ctr/sam.py), does the same but has a bias inside the product, r * (h U_n + b_n), an update
  gate z = 1 - u, and a state in the compute type. Its parameters differ, so both cells are needed.

  Args:
    x: the inputs' part of the G = 3 E gates, [x_u ; x_r ; x_n], with biases.
    h: float32, the state before the step; hundreds of steps would accumulate rounding errors.
    recurrent_EG: [U_u U_r U_n], in the compute type.
    attention: a, one number for each state.

  Returns:
    float32, the state after the step.
  """
  h_u, h_r, h_n = jnp.split(product(h, recurrent_EG), 3, axis=-1)
  x_u, x_r, x_n = jnp.split(x.astype(jnp.float32), 3, axis=-1)
  u = nn.sigmoid(x_u + h_u)
  if attention is not None:
    u = attention[..., None] * u
  n = jnp.tanh(x_n + nn.sigmoid(x_r + h_r) * h_n)
  return (1 - u) * h + u * n


def time_major(x: Array) -> Array:
  """Swaps the first two axes, [B, L, ...] <-> [L, B, ...], because a scan runs over the first."""
  return jnp.swapaxes(x, 0, 1)


class GRU(nn.Module):
  """A GRU or AUGRU (`gru_cell`) over a history.

  Attributes:
    width: E, width of the state.
    dtype: compute type of the products; the state is float32.
  """

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BLD: Float[Array, 'B L D'],
    mask_BL: Bool[Array, 'B L'],
    attention_BLQ: Float[Array, 'B L Q'] | None = None,
    start_BE: Float[Array, 'B E'] | None = None,
  ) -> tuple[Float[Array, 'B L Q E'], Float[Array, 'B Q E']]:
    """Runs over L for each of Q queries; returns all states and the last ones.

    Args:
      x_BLD: inputs. mask_BL: False keeps the state, so that the last state is that of the newest
        event, and the start state for an empty history.
      attention_BLQ: for an AUGRU; a GRU has Q = 1. start_BE: the start state; None for zeros.
    """
    E = self.width
    x_BLG = nn.Dense(3 * E, dtype=self.dtype, name='input')(x_BLD.astype(self.dtype))
    recurrent_EG = self.param('recurrent', nn.initializers.lecun_normal(), (E, 3 * E))

    def run(recurrent_EG, inputs):
      def step(h_BQE, inputs):
        x_BG, real_B, attention_BQ = inputs
        new_BQE = gru_cell(x_BG[:, None], h_BQE, recurrent_EG, attention_BQ)
        h_BQE = jnp.where(real_B[:, None, None], new_BQE, h_BQE)
        return h_BQE, h_BQE

      *inputs, start_BE = inputs
      B, Q = inputs[0].shape[0], 1 if inputs[2] is None else inputs[2].shape[2]
      start_BE = jnp.zeros((B, E)) if start_BE is None else start_BE
      start_BQE = jnp.broadcast_to(start_BE[:, None], (B, Q, E))
      last_BQE, h_LBQE = jax.lax.scan(step, start_BQE, jax.tree.map(time_major, inputs))
      return time_major(h_LBQE), last_BQE

    # On each device separately: XLA would sum the weights' gradient over all devices at every step.
    run = meshes.each_device(run, (meshes.REPLICATED, meshes.BATCH), meshes.BATCH)
    return run(recurrent_EG.astype(self.dtype), (x_BLG, mask_BL, attention_BLQ, start_BE))
