"""The rows of tables in an export, and the float32 rows that they encode.

float32 rows are stored as they are, bfloat16 rows as their bits in uint16, int8 rows beside the
scale of each row. NumPy only: a shard restores its rows without JAX.
"""

from typing import Any

import numpy as np

Stored = dict[str, Any]  # arrays: 'rows' [V, D], and 'scale' [V] where the rows are int8


def restored(table: Stored) -> Any:
  """Returns the float32 rows of stored ones, for arrays of NumPy and, within jit, of JAX."""
  rows_VD = table['rows']
  if rows_VD.dtype == np.uint16:
    # The bits are the upper half of a float32. With bfloat16 arrays XLA on CPU would convert the
    # whole table to float32.
    return (rows_VD.astype(np.uint32) << 16).view(np.float32)
  if rows_VD.dtype == np.int8:
    return rows_VD.astype(np.float32) * table['scale'][..., None]
  return rows_VD
