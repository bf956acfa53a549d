"""Blocks of ids and weights, for sums over K gathered rows without an array of all K rows."""

import jax.numpy as jnp
from jaxtyping import Array


def in_blocks(x: Array, size: int) -> Array:
  """Splits the last axis into blocks: [..., K] -> [blocks, b, ...], b = min(K, size).

  Args:
    x: [..., K]. size: of a block; the last one is padded with 0.
  """
  K = x.shape[-1]
  b = min(K, size)
  filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % b)])
  return jnp.moveaxis(filled, -1, 0).reshape(-1, b, *x.shape[:-1])
