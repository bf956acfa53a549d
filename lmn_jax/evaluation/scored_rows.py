"""What an evaluation gives each row of a split, as a file.

A row has the log's columns of user, item and time, by raw ids (an item that training did not see
has none), the events before it, and

  label, score, probability   of clicks: 0 or 1, log-odds float32, sigmoid(score)
  rank                        of next items: 1 for the best of all candidates

in the order of the store: by user, then by time. The metrics of the report are of these rows.
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
    data: config.data. store: of the rows. split: of the rows, for the log.
    rows: columns of some rows each, of `Task.rows`: 'user' records, 'item' rows, 'time' as in the
      store, and what is written as it is.
    output: of the ending .parquet or .csv.

  Raises:
    UserError: a column of the log has the name of another one of the file; no room on the disk.
  """
  names = {'user': data.user, 'item': data.item, 'time': data.time or 'time'}
  for name in names.values():
    if name in RESERVED:
      raise UserError(
        f'--output={output}: the column {name!r} of the log has the name of one that is added; '
        'rename it in the log'
      )
  users, items = store.raw_users(), store.raw_ids('item')
  tables = (
    pa.table(
      {
        names['user']: users.take(pa.array(columns['user'])),
        names['item']: items.take(pa.array(columns['item'])),
        names['time']: store.raw_times(columns['time']),
      }
      | {name: x for name, x in columns.items() if name not in names}
    )
    for whole in rows
    for columns in _pieces(whole)
  )
  parts, count = Parts(output), 0
  for table in tables:
    parts.add(table, {'rows': len(table)})
    count += len(table)
  users = parts.join(data.user, data.memory_limit)
  log.info('%s: %s rows of %s users, all of %s', output, f'{count:,}', f'{users:,}', split)


def _pieces(columns):
  for begin in range(0, len(columns['user']), ROWS):
    yield {name: x[begin : begin + ROWS] for name, x in columns.items()}
