"""The specification of a table."""

from typing import NamedTuple


class TableSpec(NamedTuple):
  """A table that a model reads.

  rows: V, the number of ids; V is the padding id and reads as zeros.
  width: D. scale: standard deviation of the initial rows.
  group: the optimizer that updates it, 'embedding' or 'memory'; 'frozen' for none.
  count_reads: whether to count the reads of each row (memory health).
  """

  rows: int
  width: int
  scale: float
  group: str = 'embedding'
  count_reads: bool = False
