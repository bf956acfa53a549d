"""Padding of requests to the few shapes that programs are compiled for."""

from collections.abc import Iterator, Sequence

import numpy as np


def pieces(numbers: Sequence, sizes: Sequence[int]) -> Iterator[Sequence]:
  """Cuts a sequence in pieces of these sizes, the largest that fits first.

  The last piece may be shorter than the least of the sizes.
  """
  while len(numbers):
    size = max((size for size in sizes if size <= len(numbers)), default=len(numbers))
    yield numbers[:size]
    numbers = numbers[size:]


def least(sizes: Sequence[int], n: int) -> int:
  """The least of the ascending sizes that holds n."""
  return next(size for size in sizes if size >= n)


def padded(rows: Sequence | np.ndarray, shape: tuple[int, ...], fill: int | bool) -> np.ndarray:
  """Rows as an array of the shape: shorter rows and missing ones are filled up.

  Args:
    rows: scalars or arrays; integers become int32. shape: of the result. fill: for what is missing.
  """
  first = np.asarray(rows[0])
  array = np.full(shape, fill, np.int32 if first.dtype.kind == 'i' else first.dtype)
  for n, row in enumerate(rows):
    if array.ndim == 1:
      array[n] = row
    else:
      array[n, : len(row)] = row
  return array
