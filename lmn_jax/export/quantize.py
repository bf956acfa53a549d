"""Rows of tables as an export stores them: float32, bfloat16 or int8."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lmn_jax.tables.spec import TableSpec

PRECISIONS = ('float32', 'bfloat16', 'int8')
ROWS = 2**18  # rows of a table that are rounded at a time

Stored = dict[str, Array]  # 'rows' [V, D], and 'scale' [V] where they are int8


def stored(rows_VD: np.ndarray, precision: str) -> dict[str, np.ndarray]:
  """Rows as a bundle holds them.

  Args:
    rows_VD: float32. precision: of PRECISIONS; bfloat16 rounds to nearest even, int8 to the nearest
      of 255 multiples of the row's largest absolute value / 127.
  """
  if precision == 'bfloat16':
    return {'rows': rows_VD.astype(jnp.bfloat16).view(np.uint16)}
  if precision == 'int8':
    scale_V = np.max(np.abs(rows_VD), axis=1) / np.float32(127)
    unit_V1 = np.where(scale_V > 0, scale_V, 1)[:, None]
    return {'rows': np.rint(rows_VD / unit_V1).astype(np.int8), 'scale': scale_V}
  return {'rows': rows_VD}


def restored(table: Stored) -> Array:
  """The float32 rows that stored ones stand for, exactly as they are read."""
  rows_VD = table['rows']
  if rows_VD.dtype == jnp.uint16:
    # The upper half of a float32. XLA on CPU would make float32 of a whole table of bfloat16.
    return jax.lax.bitcast_convert_type(rows_VD.astype(jnp.uint32) << 16, jnp.float32)
  if rows_VD.dtype == jnp.int8:
    return rows_VD.astype(jnp.float32) * table['scale'][..., None]
  return rows_VD


def stored_table(rows_RD: np.ndarray, spec: TableSpec, precision: str) -> dict[str, np.ndarray]:
  """A table as a bundle holds it: `stored` of its V rows, without what pads them in memory."""
  rows_VD = rows_RD[: spec.rows].astype(np.float32)
  pieces = [stored(rows_VD[k : k + ROWS], precision) for k in range(0, spec.rows, ROWS)]
  return {part: np.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}
