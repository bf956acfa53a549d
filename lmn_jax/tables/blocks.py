"""Blocks of ids and weights, for sums over K gathered rows without an array of all K rows."""

import jax.numpy as jnp
from jaxtyping import Array

BLOCK = 8  # rows or keys that are gathered together


def in_blocks(x: Array, fill: int = 0) -> Array:
  """Splits the last axis into blocks: [..., K] -> [blocks, b, ...], b = min(K, BLOCK).

  Args:
    x: [..., K]. fill: pads the last block.
  """
  K = x.shape[-1]
  b = min(K, BLOCK)
  filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % b)], constant_values=fill)
  return jnp.moveaxis(filled, -1, 0).reshape(-1, b, *x.shape[:-1])
