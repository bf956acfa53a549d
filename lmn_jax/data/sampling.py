"""Items drawn for the sampled losses of the next item, and how likely each draw is."""

import numpy as np
from jaxtyping import Int


class Sampler:
  """Draws negatives for each target of a training batch.

  The draws of a step are for the lanes of all hosts, so those of a lane do not depend on the
  number of hosts.
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
    """
    self._name, self._V, self._shape, self._seed = name, V, shape, seed
    if count_V is not None:
      self._upto_V = np.cumsum(count_V)
      share_V = np.maximum(count_V, 1) / self._upto_V[-1]
      self._log_q = np.append(np.log(share_V), 0).astype(np.float32)  # 0 for the padding

  def sample(
    self, step: int, target_BT: Int[np.ndarray, 'B T'], rows: Int[np.ndarray, 'B']
  ) -> dict[str, np.ndarray]:
    """The fields `negative`, `log_q` and `negative_log_q` of a batch, see lanes.py.

    Args:
      step: of the batch.
      target_BT: item rows.
      rows: the lanes of this host.
    """
    fields = {}
    if self._name != 'in_batch':
      rng = np.random.default_rng((self._seed, step))
      if self._name == 'uniform':
        drawn = rng.integers(1, self._V, self._shape, np.int32)
      else:
        place = rng.integers(0, self._upto_V[-1], self._shape)
        drawn = np.searchsorted(self._upto_V, place, side='right').astype(np.int32)
      fields['negative'] = drawn[rows]
    if self._name != 'uniform':
      fields['log_q'] = self._log_q[target_BT]
    if self._name == 'popularity':
      fields['negative_log_q'] = self._log_q[fields['negative']]
    return fields
