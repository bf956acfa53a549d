"""Sums over K gathered rows, a block of them at a time."""

import jax.numpy as jnp
from jaxtyping import Array

BLOCK = 8  # of K rows or keys, gathered together


def in_blocks(x: Array, fill: int = 0) -> Array:
  """[..., K] -> [blocks, b, ...] with b = min(K, BLOCK), the last block filled up.

  For sums over K gathered rows that never make an array of all K of them.
  """
  K = x.shape[-1]
  b = min(K, BLOCK)
  filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % b)], constant_values=fill)
  return jnp.moveaxis(filled, -1, 0).reshape(-1, b, *x.shape[:-1])
