"""The platforms that exports are compiled for, and how requests are joined on each of them."""

from typing import NamedTuple

PLATFORMS = ('cpu', 'cuda', 'tpu')  # names of jax.export


class Joining(NamedTuple):
  """How requests are joined into calls of compiled programs.

  batch_sizes: users of the programs, ascending. candidate_sizes: candidates of each user; those of
  a request are padded to one of these. pads: whether a batch is padded to the next number of users,
  or cut into such numbers. wait_ms: milliseconds that a request waits for others.
  """

  batch_sizes: tuple[int, ...]
  candidate_sizes: tuple[int, ...]
  pads: bool
  wait_ms: float


# An accelerator computes a padded request for nearly nothing, but takes seconds to compile each
# program. On an H100 LMN needs .77 ms to score 256 pairs of a user and an item, nearly all of it
# for starting kernels, and 6.8 ms for a whole training step of 16,384; a program of it takes up to
# 5 s to compile (experiments/LOG.md). So few numbers of users, and batches that are padded. These
# numbers are not measured against others on a GPU, and on a TPU not at all.
_ACCELERATOR = Joining((1, 8, 32), (256, 1024), pads=True, wait_ms=0.5)
JOINING = {
  # On CPU the time of a call grows with all that is computed, also with padding.
  'cpu': Joining((1, 2, 4, 8), (64, 256, 1024), pads=False, wait_ms=0.5),
  'cuda': _ACCELERATOR,
  'tpu': _ACCELERATOR,
}
