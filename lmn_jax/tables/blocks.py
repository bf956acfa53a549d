"""Blocks of ids and weights, for sums over K gathered rows without an array of all K rows."""

import jax.numpy as jnp
from jaxtyping import Array


def in_blocks(x: Array, size: int, fill: int = 0) -> Array:
  """Splits the last axis into blocks: [..., K] -> [blocks, b, ...], b = min(K, size).

  Args:
    x: [..., K]. size: of a block. fill: pads the last block.
  """
  K = x.shape[-1]
  b = min(K, size)
  filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % b)], constant_values=fill)
  return jnp.moveaxis(filled, -1, 0).reshape(-1, b, *x.shape[:-1])
