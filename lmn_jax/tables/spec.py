"""What a model says of a table that it reads."""

from typing import NamedTuple


class TableSpec(NamedTuple):
  """A table a model reads.

  rows: V, number of ids; V is the padding id and reads as zeros.
  width: D. scale: standard deviation of the initial rows.
  group: 'embedding' or 'memory', which optimizer moves it; 'frozen' for none.
  count_reads: keep a counter of reads for each row (memory health).
  """

  rows: int
  width: int
  scale: float
  group: str = 'embedding'
  count_reads: bool = False
