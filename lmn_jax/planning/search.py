"""Searches for the largest batch and the largest memory of LMN whose steps fit into a chip."""

import bisect
import logging
import math
from collections.abc import Callable, Iterator, Sequence

from lmn_jax.planning import plan as plans
from lmn_jax.planning.plan import Plan

log = logging.getLogger(__name__)


def search(p: Plan) -> Iterator[str]:
  """Yields a line on the largest batch, and one on the most slots, each when it is known."""
  yield most_examples(p)
  if 'slots_per_axis' in p.config.model:
    yield most_slots(p)


def share_of(p: Plan, field: str, size: int) -> float:
  """Returns the share of a chip's memory with a field changed; inf if it does not fit."""
  changed = p.config.copy_and_resolve_references()
  changed.update_from_flattened_dict({field: size})
  log.info('compiling with %s=%d: about %.0f s, longer for larger batches', field, size, p.seconds)
  share = plans.memory_share(plans.step(changed, p.setup, p.chip)[2], p.chip)
  part = 'more than 100%' if share > 1 else f'{share:.1%}'
  log.info('%s=%d takes %s of the memory', field, size, part)
  return share


def most_examples(p: Plan) -> str:
  """Returns a line on the largest batch: an estimate, because large ones compile for minutes."""
  small, large = p.config.batch_size, p.config.batch_size * 8
  if p.cost is None:
    return f'batch_size: {small:,} does not fit'
  share = plans.memory_share(p.cost, p.chip)
  above = share_of(p, 'batch_size', large)
  if above > 1:
    return f'batch_size: {small:,} fits, {large:,} does not'
  most = small + (1 - share) * (large - small) / max(above - share, 1e-9)
  data = p.setup.mesh.shape['data']
  return (
    f'batch_size: about {int(most) // data * data:,} would fit, extrapolated from {small:,} '
    f'({share:.1%} of the memory) and {large:,} ({above:.1%})'
  )


def most_slots(p: Plan) -> str:
  """Returns a line on the largest number of slots; both sizes in it were compiled."""
  start, field = p.config.model.slots_per_axis, 'model.slots_per_axis'
  # Slot ids are int32.
  sizes = [2**k for k in range(16) if 2**k >= p.config.model.top_k] + [math.isqrt(2**31 - 1)]
  sizes = sorted({start, *sizes})

  def share(size: int) -> float:
    return plans.memory_share(p.cost, p.chip) if size == start else share_of(p, field, size)

  fits, part = largest(sizes, start, share, 2)
  if fits is None:
    return f'{field}: not even {sizes[0]:,} fits'
  above = [f', {size:,} does not' for size in sizes if size > fits][:1]
  return f'{field}: {fits:,} fits ({part:.1%} of the memory){"".join(above)}'


def largest(
  sizes: Sequence[int], start: int, share: Callable[[int], float], degree: int
) -> tuple[int | None, float]:
  """Finds the largest size that fits into the memory, with few calls of `share`.

  Args:
    sizes: ascending. start: the size to try first. share: size -> share of the memory, ascending,
      about a + b * size**degree; inf for a size that does not fit.
    degree: see share.

  Returns:
    The size, or None if the smallest does not fit, and its share.
  """
  low, high, middle = -1, len(sizes), sizes.index(start)
  points = [(0, 0.0)]  # (size**degree, share) of the sizes that fit
  while True:
    size_share = share(sizes[middle])
    if size_share <= 1:
      low = middle
      points.append((sizes[middle] ** degree, size_share))
    else:
      high = middle
    if high - low == 1:
      return (sizes[low], points[-1][1]) if low >= 0 else (None, math.inf)
    middle = (low + high) // 2
    if len(points) > 1:
      (x0, y0), (x1, y1) = points[-2:]
      full = x1 + (1 - y1) * (x1 - x0) / max(y1 - y0, 1e-12)
      middle = bisect.bisect_right(sizes, full, key=lambda size: size**degree) - 1
    middle = min(max(middle, low + 1), high - 1)
