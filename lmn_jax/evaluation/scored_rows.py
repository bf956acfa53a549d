"""A file with the scores or ranks of all rows of a split.

A row has the log's columns of user, item and time with raw ids (none for an item that the store
does not have: not in the training, and not a cold item), the number of events before it, and

  label, score, probability   of clicks: 0 or 1, log-odds float32, sigmoid(score); with several
                              labels each with its name, such as score.order; where labels are
                              numbers, the predicted one and no probability
  rank                        of next items: 1 for the best of all candidates

in the order of the store: by user, then by time. The metrics of the report are computed from these
rows.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.evaluation.part_files import Parts

log = logging.getLogger(__name__)
ROWS = 2**18  # of a part
RESERVED = ('label', 'score', 'probability', 'rank', 'events')


def write(
  data: ml_collections.ConfigDict,
  store: Store,
  split: str,
  rows: Iterator[dict[str, np.ndarray]],
  output: Path,
) -> None:
  """Writes the rows of a split, a part at a time.

  Args:
    data: config.data. store: of the rows. split: its name, for the log message.
    rows: columns of successive rows, from `Task.rows`: 'user' records, 'item' indices, 'time' as in
      the store, and further columns that are written unchanged.
    output: a path that ends in .parquet or .csv.

  Raises:
    UserError: a column of the log has the name of a column that is added, or the disk is full.
  """
  reserved = {*RESERVED, *(f'{kind}.{label}' for kind in RESERVED[:3] for label in store.labels)}
  names = {'user': data.user, 'item': data.item, 'time': data.time or 'time'}
  for name in names.values():
    if name in reserved:
      raise UserError(
        f'--output={output}: the column {name!r} of the log has the name of a column that is '
        'added; rename it in the log'
      )
  users, items = store.raw_users(), store.raw_items()
  tables = (
    pa.table(
      {
        names['user']: users.take(pa.array(columns['user'])),
        names['item']: items.take(pa.array(columns['item'])),
        names['time']: store.raw_times(columns['time']),
      }
      | {name: x for name, x in columns.items() if name not in names}
    )
    for part in rows
    for columns in _pieces(part)
  )
  parts, count = Parts(output), 0
  for table in tables:
    parts.add(table, {'rows': len(table)})
    count += len(table)
  users = parts.join(data.user, data.memory_limit)
  log.info('%s: all %s rows of %s, %s users', output, f'{count:,}', split, f'{users:,}')


def _pieces(columns):
  for begin in range(0, len(columns['user']), ROWS):
    yield {name: x[begin : begin + ROWS] for name, x in columns.items()}
