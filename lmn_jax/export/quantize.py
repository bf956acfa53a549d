"""Rounding of tables to the precision in which an export stores them."""

import jax.numpy as jnp
import numpy as np

from lmn_jax.tables.spec import TableSpec

PRECISIONS = ('float32', 'bfloat16', 'int8')
ROWS = 2**18  # rows of a table that are rounded at a time


def stored(rows_VD: np.ndarray, precision: str) -> dict[str, np.ndarray]:
  """Returns rows as an export stores them, see stored_rows.py.

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


def stored_table(rows_RD: np.ndarray, spec: TableSpec, precision: str) -> dict[str, np.ndarray]:
  """Returns a table as an export stores it: its V rows, without the rows that pad it in memory."""
  rows_VD = rows_RD[: spec.rows].astype(np.float32)
  pieces = [stored(rows_VD[k : k + ROWS], precision) for k in range(0, spec.rows, ROWS)]
  return {part: np.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}
