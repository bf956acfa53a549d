"""Padding of requests to the few shapes that programs are compiled for."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def pieces(numbers: Sequence, sizes: Sequence[int], pads: bool) -> Iterator[Sequence]:
  """Yields pieces of a sequence, to be padded to one of these sizes.

  Args:
    numbers: the sequence. sizes: ascending. pads: whether a piece has as many elements as the
      largest size takes; otherwise as many as the largest size that needs no padding, if there is
      one.
  """
  while len(numbers):
    fits = sizes[-1:] if pads else [size for size in sizes if size <= len(numbers)]
    size = max(fits, default=len(numbers))
    yield numbers[:size]
    numbers = numbers[size:]


def least(sizes: Sequence[int], n: int) -> int:
  """Returns the smallest of the ascending sizes that is at least n."""
  return next(size for size in sizes if size >= n)


def padded(rows: Sequence | np.ndarray, shape: tuple[int, ...], fill: Any) -> np.ndarray:
  """Returns rows as an array of the shape, with short and missing rows filled up.

  Args:
    rows: scalars or arrays; integers become int32. shape: of the result. fill: the padding value,
      which may have the last axes.
  """
  first = np.asarray(rows[0])
  array = np.full(shape, fill, np.int32 if first.dtype.kind == 'i' else first.dtype)
  for n, row in enumerate(rows):
    if array.ndim == 1:
      array[n] = row
    else:
      array[n, : len(row)] = row
  return array
