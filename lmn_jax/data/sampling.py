"""Items drawn for the sampled losses of the next item, and how likely each draw is.

A draw is a hash of its place in the batch, with keys of the seed and the step. It needs no state
and no arithmetic wider than 32 bits, and the same code draws the same items with numpy and with
jax.numpy.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt32

from lmn_jax.data.shuffle import mix
from lmn_jax.errors import UserError

BLOCK = 2**15  # draws that the host makes together; their arrays fit a cache
# Multipliers of two finalisers of 32 bits that scatter well (Wellons 2018, hash-prospector).
FIRST = tuple(np.uint32(x) for x in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))
SECOND = tuple(np.uint32(x) for x in (0x7FEB352D, 0x846CA68B))


@dataclasses.dataclass(frozen=True)
class Draws:
  """What is drawn for the targets of a batch.

  Attributes:
    name: 'uniform' | 'popularity' | 'in_batch', see Sampler. V: items of the vocabulary.
    negatives: N, drawn for each target.
  """

  name: str
  V: int
  negatives: int

  def fields(
    self,
    keys: UInt32[Any, '4'],
    target_BT: Int32[Any, 'B T'],
    lane_B: UInt32[Any, 'B'],
    tables: dict[str, Any],
  ) -> dict[str, Any]:
    """The fields `negative`, `log_q` and `negative_log_q` of a batch, see lanes.py.

    Args:
      keys: of the step. target_BT: item rows. lane_B: numbers of the lanes in the global batch.
      tables: of the Sampler; all arrays are of numpy, or all of jax.
    """
    fields = {}
    if self.name != 'in_batch':
      fields['negative'] = self._negatives(keys, lane_B, target_BT.shape[1], tables)
    if self.name != 'uniform':
      fields['log_q'] = tables['log_q'][target_BT]
    if self.name == 'popularity':
      fields['negative_log_q'] = tables['log_q'][fields['negative']]
    return fields

  def _negatives(
    self, keys: Any, lane_B: Any, T: int, tables: dict[str, Any]
  ) -> Int32[Any, 'B T N']:
    """Draw k of target t of lane b is that of counter (b T + t) N + k."""
    xp = lane_B.__array_namespace__()
    size = T * self.negatives
    begin_B = lane_B * np.uint32(size) + keys[0]
    word = _hash(begin_B[:, None] + xp.arange(size, dtype=np.uint32)[None, :], keys[1])
    if self.name == 'uniform':
      item = (_scaled(word, self.V - 1, keys[3]) + 1).view(np.int32)
    else:  # the alias method: each row keeps a share of its draws and gives the rest to another row
      row = _scaled(word, self.V, keys[3]).view(np.int32)
      own = _rehash(word + keys[2]) < tables['threshold'][row]
      item = xp.where(own, row, tables['alias'][row])
    return item.reshape(-1, T, self.negatives)


def _hash(x: Any, key: Any) -> Any:
  """A bijection of uint32 that scatters its bits, a different one for each key."""
  x = (x ^ (x >> 17)) * FIRST[0]
  x = ((x ^ (x >> 11)) + key) * FIRST[1]
  x = (x ^ (x >> 15)) * FIRST[2]
  return x ^ (x >> 14)


def _rehash(x: Any) -> Any:
  """A bijection of uint32 that scatters its bits."""
  x = (x ^ (x >> 16)) * SECOND[0]
  x = (x ^ (x >> 15)) * SECOND[1]
  return x ^ (x >> 16)


def _scaled(word: Any, size: int, low: Any) -> Any:
  """floor((word size + low) / 2^32) for low < size < 2^31: uint32 [...], below `size`."""
  size_high, size_low = np.uint32(size >> 16), np.uint32(size & 0xFFFF)
  word_high, word_low = word >> 16, word & 0xFFFF
  # Halves of 16 bits, so that no product or sum exceeds 32 bits.
  lowest = word_low * size_low + (low & 0xFFFF)
  middle = word_high * size_low + (low >> 16) + (lowest >> 16)
  if not size_high:
    return middle >> 16
  other = word_low * size_high + (middle & 0xFFFF)
  return word_high * size_high + (middle >> 16) + (other >> 16)


class Sampler:
  """The draws of a training split, with the tables that they need.

  The draws of a step are for the lanes of all hosts, so those of a lane do not depend on the
  number of hosts.

  Attributes:
    draws: what is drawn.
    tables: log_q float32 [V + 1], unless 'uniform'; threshold uint32 [V] and alias int32 [V], for
      'popularity'.
  """

  def __init__(
    self,
    name: str,
    V: int,
    count_V: Int[np.ndarray, 'V'] | None,
    shape: tuple[int, int, int],
    seed: int,
  ):
    """Computes the distribution.

    Args:
      name: 'uniform' draws from the vocabulary, 'popularity' as often as items occur; 'in_batch'
        draws nothing and yields only `log_q`.
      V: items of the vocabulary; rows 1..V-1 can be drawn.
      count_V: how often each item occurs in what training reads; None for 'uniform'.
      shape: lanes of all hosts, positions of a segment, negatives of each target.
      seed: of the draws.

    Raises:
      UserError: a step has more than 2^32 draws, or the counts are too many.
    """
    lanes, T, negatives = shape
    if lanes * T * negatives > 2**32:
      raise UserError(
        f'config.model.negatives={negatives} for {lanes} lanes of {T} events are '
        f'{lanes * T * negatives:,} draws a step, at most {2**32:,} are possible; lower it'
      )
    if name == 'popularity' and V * int(np.sum(count_V)) >= 2**63:
      raise UserError(
        f'{V:,} items with {int(np.sum(count_V)):,} training events are too many for '
        "config.model.sampler='popularity', at most 2^63 as a product; use 'uniform'"
      )
    self.draws, self._seed, self.tables = Draws(name, V, negatives), seed, {}
    self._block = max(1, BLOCK // (T * max(1, negatives)))  # lanes
    if count_V is not None:
      share_V = np.maximum(count_V, 1) / np.sum(count_V)
      # 0 for the padding.
      self.tables['log_q'] = np.append(np.log(share_V), 0).astype(np.float32)
    if name == 'popularity':
      self.tables['threshold'], self.tables['alias'] = alias_tables(count_V)

  def keys(self, step: Int[np.ndarray, 'S']) -> UInt32[np.ndarray, 'S 4']:
    """The keys of steps: three of the hashes, and `low` of `_scaled`.

    With the words of 32 bits alone, items would differ in probability by a factor of up to
    1 + size / 2^32. With 32 more bits, which all draws of a step share, this is 1 + size / 2^64.
    """
    base = mix(step.astype(np.uint64) ^ mix(np.array([self._seed % 2**64], np.uint64)))
    words = mix(base[:, None] + np.arange(2, dtype=np.uint64)[None, :])
    keys = np.stack([words >> np.uint64(32), words & np.uint64(2**32 - 1)], axis=-1).reshape(-1, 4)
    size = self.draws.V - (self.draws.name == 'uniform')
    keys[:, 3] = keys[:, 3] * np.uint64(size) >> np.uint64(32)
    return keys.astype(np.uint32)

  def sample(
    self, step: int, target_BT: Int[np.ndarray, 'B T'], rows: Int[np.ndarray, 'B']
  ) -> dict[str, np.ndarray]:
    """The fields of `Draws.fields` for the lanes of this host.

    Args:
      step: of the batch. target_BT: item rows. rows: the lanes.
    """
    keys, lanes = self.keys(np.array([step]))[0], rows.astype(np.uint32)
    blocks = [
      self.draws.fields(
        keys, target_BT[k : k + self._block], lanes[k : k + self._block], self.tables
      )
      for k in range(0, len(rows), self._block)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def alias_tables(
  count_V: Int[np.ndarray, 'V'],
) -> tuple[UInt32[np.ndarray, 'V'], Int32[np.ndarray, 'V']]:
  """The tables of the alias method (Walker 1977) for draws in proportion to counts.

  Each of V equally likely rows keeps the share threshold / 2^32 of its draws and gives the rest to
  its alias. Rows with less than the mean count are filled up in turn from a row with more; a row
  that has given more than it had left over is filled up from the next one. Which these are follows
  from the running sums of what is missing and of what is left over, without a loop.

  The probability of an item of count c is exact up to a factor of 1 +- mean / (c 2^32).

  Args:
    count_V: at least one is not 0; V times their sum is below 2^63.
  """
  V, total = len(count_V), int(np.sum(count_V))
  weight_V = count_V.astype(np.int64) * V  # the mean is `total`
  alias_V, kept_V = np.arange(V, dtype=np.int32), np.minimum(weight_V, total)
  (light,), (heavy,) = np.nonzero(weight_V < total), np.nonzero(weight_V > total)
  missing = np.cumsum(total - weight_V[light])
  left_over = np.cumsum(weight_V[heavy] - total)
  # A light row is filled up from the first heavy row that has something left before it.
  before = missing - (total - weight_V[light])
  alias_V[light] = heavy[np.searchsorted(left_over, before, side='right')]
  # What a heavy row has given beyond what it had left over, with the last light row it filled up.
  excess = missing[np.searchsorted(missing, left_over)] - left_over
  (gave,) = np.nonzero(excess)  # never the last heavy row: the sums end at the same value
  kept_V[heavy[gave]] -= excess[gave]
  alias_V[heavy[gave]] = heavy[gave + 1]
  threshold_V = np.minimum(np.floor(kept_V / total * 2**32), 2**32 - 1).astype(np.uint32)
  return threshold_V, alias_V
