"""Seeded random orders and hashes that are computed at single points, without any state."""

import numpy as np

LEAST_BITS = 8  # of the network; with 2 to 4 bits, few examples are visibly not uniform
ROUNDS = 8  # of the Feistel network; even, so that halves of unequal width end in their places


def permute(index: np.ndarray, epoch: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Evaluates a seeded permutation of range(n), a different one for each epoch, at single points.

  A Feistel network over the 2^b >= n numbers of b bits, with halves of alternating width, is a
  bijection whatever its round function is. Following its cycle until the result is below n makes
  it a bijection of range(n) (Black and Rogaway 2002). On average this takes fewer than 2 steps,
  except for n < 128.

  Args:
    index: int64 [B], in range(n).
    epoch: int64 [B], the number of the permutation.
    n: size of the permutation, at least 1.
    seed: of the config.

  Returns:
    int64 [B], in range(n).
  """
  bits = max(LEAST_BITS, (n - 1).bit_length())
  low, high = bits // 2, bits - bits // 2
  # A batch spans few epochs: the round keys of each are computed once and looked up.
  epochs, epoch_number = np.unique(epoch, return_inverse=True)
  base = mix(epochs.astype(np.uint64) ^ mix(np.array([seed % 2**64], np.uint64)))
  keys = mix(base[:, None] + np.arange(ROUNDS, dtype=np.uint64)[None, :])
  out = index.astype(np.uint64)
  key = keys[epoch_number] if len(epochs) > 1 else keys
  walking = np.arange(len(out))
  while len(walking):
    x = _feistel(out[walking], key[walking] if len(epochs) > 1 else key, low, high)
    out[walking] = x
    walking = walking[x >= n]
  return out.astype(np.int64)


def _feistel(x: np.ndarray, key: np.ndarray, low: int, high: int) -> np.ndarray:
  """uint64 [B] of low + high bits and keys [B or 1, ROUNDS] -> uint64 [B]."""
  left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
  left_bits, right_bits = high, low
  for k in range(ROUNDS):
    scattered = (right ^ key[:, k]) * np.uint64(0x9E3779B97F4A7C15)
    scattered = (scattered ^ (scattered >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    left, right = right, left ^ (scattered >> np.uint64(64 - left_bits))
    left_bits, right_bits = right_bits, left_bits
  return (left << np.uint64(low)) | right


def mix(x: np.ndarray) -> np.ndarray:
  """A bijection of uint64 that scatters its bits (the finaliser of SplitMix64, Steele 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
