"""Columns, times and checks of sizes that the generated logs have in common."""

import numpy as np
import pyarrow as pa

from lmn_jax.errors import UserError

START, HOUR, DAY = 1_700_000_000, 3_600, 86_400  # seconds


def texts(numbers: np.ndarray) -> pa.Array:
  """Numbers as a column of texts."""
  return pa.array(numbers).cast(pa.string())


def item_table(items: int, categories: int) -> pa.Table:
  """Items and their categories: item i is of category i mod categories."""
  item_I = np.arange(items)
  return pa.table({'item': texts(item_I), 'category': texts(item_I % categories)})


def check_size(name: str, value: int | float, bound: int | float = 1, what: str = '') -> None:
  """Raises a UserError if a size is below its bound. what: the size that sets the bound, if any."""
  if value < bound:
    raise UserError(f'config.data.synthetic.{name}={value} must be at least {what}{bound}')
