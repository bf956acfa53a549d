"""The lengths of histories in training: short ones for most steps, so that a step costs less.

A step reads the newest l events of each history, l at most L, the length of the evaluation. All
histories of a step have one l, from a ladder of few lengths, as each is compiled: L, L/2, ... L/16.

    x ~ Beta(a, b),  E[l] = E[x] L            a = b = 1: the uniform law of suffixes
                                              a = m, b = 1 - m: U-shaped, E[x] = m

(Guan et al. 2025, arXiv 2511.06077, train on lengths of a U-shaped Beta law.) x L is rounded to one
of the two rungs beside it at random, so that its mean stays; below L/16 it is L/16. [ours: the
ladder, one length for a whole step, and a + b = 1]

BLOCK steps have the same length, since the host sends several steps at once and a compiled loop has
one shape. The first block has length L: memory that does not suffice is noticed at once. The length
is a hash of the seed and the block, so the step alone is the position in the data.
"""

import numpy as np
import scipy.special
from jaxtyping import Float

from lmn_jax.data.shuffle import mix
from lmn_jax.errors import UserError, one_of

LAWS = ('full', 'suffix', 'beta')
RUNGS = 5
BLOCK = 8  # steps
MEAN = 0.5
SALT = np.uint64(0x74726C656E677468)  # other numbers than those of the order of the examples


class TrainLengths:
  """The length of each step.

  Attributes:
    ladder: the possible lengths, ascending; the last is L. shares: of the steps, by length.
  """

  def __init__(self, law: str, mean: float, length: int, seed: int):
    """Computes the shares.

    Args:
      law: 'full' reads L in every step, 'suffix' and 'beta' as above. mean: m of 'beta'. length: L.
      seed: of the draws.

    Raises:
      UserError: there is no such law, or the mean is out of its bounds or has no effect.
    """
    one_of('config.train_length', law, LAWS)
    if not 0 < mean < 1:
      raise UserError(f'config.train_length_mean={mean} must be between 0 and 1, such as 0.5')
    if law != 'beta' and mean != MEAN:
      raise UserError(
        f"config.train_length_mean={mean} is for train_length='beta'; with {law!r} leave it {MEAN}"
      )
    rungs = 1 if law == 'full' else RUNGS
    self.ladder = tuple(sorted({max(1, length >> k) for k in range(rungs)}))
    a, b = (mean, 1 - mean) if law == 'beta' else (1.0, 1.0)
    self.shares = shares_of(np.array(self.ladder) / length, a, b)
    self._law, self._seed = law, np.uint64(seed % 2**64)

  def ladder_of(self, length: int) -> tuple[int, ...]:
    """The possible lengths of another history: for each rung about the same share of its length."""
    return tuple(max(1, length >> k) for k in reversed(range(len(self.ladder))))

  def at(self, step: int) -> int:
    """The length of a step."""
    return self.ladder[self.rung(step)]

  def rung(self, step: int) -> int:
    """The place in the ladder of the length of a step."""
    block = step // BLOCK
    if not block:
      return len(self.ladder) - 1
    word = mix(np.array([block], np.uint64) ^ mix(np.array([self._seed ^ SALT])))[0]
    uniform = float(word >> np.uint64(11)) * 2.0**-53
    return int(np.searchsorted(np.cumsum(self.shares)[:-1], uniform, side='right'))

  def describe(self) -> str:
    """One line: the share of the steps for each length, and the mean."""
    shares = ', '.join(
      f'{length:,} ({share:.0%})' for length, share in zip(self.ladder, self.shares, strict=True)
    )
    mean = float(np.dot(self.ladder, self.shares)) / self.ladder[-1]
    return f'training reads histories of {shares} events, {mean:.2f} of the full length on average'


def shares_of(rung_K: Float[np.ndarray, 'K'], a: float, b: float) -> Float[np.ndarray, 'K']:
  """The probability of each rung, for a variable of the law Beta(a, b) that is rounded at random.

  Between two rungs, x becomes the upper one with the probability (x - lower) / (upper - lower).

  Args:
    rung_K: ascending; the last is 1.
  """
  edge_K1 = np.append(0, rung_K)
  mass = np.diff(scipy.special.betainc(a, b, edge_K1))  # of each interval
  moment = np.diff(scipy.special.betainc(a + 1, b, edge_K1)) * a / (a + b)
  up = (moment[1:] - rung_K[:-1] * mass[1:]) / np.diff(rung_K)
  return np.append(mass[0], up) + np.append(mass[1:] - up, 0)
