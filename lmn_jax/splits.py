"""Which labelled row trains, which validates, which tests; in SQL and out of core.

Gives the tables that the coding starts from:

  placed(row, user, item, time, label, history, example, split, ...)   split and cut applied
  trained                                     a view: placed, and `lmn_train`: the row is training
"""

import math

import duckdb
import ml_collections

from lmn_jax.errors import UserError, one_of

SPLITS = ('train', 'valid', 'test')  # in the order of their numbers
PROTOCOLS = ('global_time', 'user_ratio', 'leave_one_out', 'column')


def place(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection) -> str:
  """Gives every labelled row its split, and cuts histories to `max_history`.

  The order is (time, original row). A row that is only a history event counts as training (for
  the vocabularies) if a training example can have it in its history: by the global cut, by its
  own split column, or by being earlier than the user's last training example.

  Args:
    data: the data config.
    db: holds `interactions`; gets the table `placed` and the view `trained`.

  Returns:
    The protocol as a sentence, to be printed beside every number.

  Raises:
    UserError: impossible shares, or no example is left for training.
  """
  protocol = one_of('config.data.split.protocol', data.split.protocol, PROTOCOLS)
  valid, test = data.split.valid, data.split.test
  if not (valid >= 0 and test >= 0 and valid + test < 1):
    raise UserError(
      f'config.data.split.valid={valid} and test={test} must be shares >= 0 with a sum below 1'
    )
  if data.max_history < 0:
    raise UserError(f'config.data.max_history={data.max_history} must be 0 (keep all) or more')
  count = scalar(db, 'SELECT count(*) FROM interactions WHERE example')
  if not count:
    raise UserError(f'{data.source}: no labelled row to learn from; check the column mapping')

  newest_first = f'PARTITION BY {person(data)}, example ORDER BY time DESC, row DESC'
  before = 'placed.time < last_training.last'
  if protocol == 'global_time':
    first_valid = _cut(db, 1 - valid - test, count)
    first_test = _cut(db, 1 - test, count)
    split = f'CASE WHEN time < {first_valid} THEN 0 WHEN time < {first_test} THEN 1 ELSE 2 END'
    # A history-only row without a training example may still be one: the cut decides alone.
    before = f'placed.time < {first_valid}'
    text = (
      f'global time split: training before {first_valid}, validation from {first_valid}, '
      f'test from {first_test}'
    )
  elif protocol == 'user_ratio':
    place_of = f'row_number() OVER (PARTITION BY {person(data)}, example ORDER BY time, row)'
    of = f'count(*) OVER (PARTITION BY {person(data)}, example)'
    # 0.8 * 5 must be 4 also where floating point makes it 4.000000000000001.
    split = (
      f'CASE WHEN {place_of} <= ceil({of} * {1 - valid - test!r} - 1e-9) THEN 0'
      f' WHEN {place_of} <= ceil({of} * {1 - test!r} - 1e-9) THEN 1 ELSE 2 END'
    )
    text = f"user split: each user's last {test:.0%} test, the {valid:.0%} before validation"
  elif protocol == 'leave_one_out':
    click = '(example AND label > 0)::INT'
    later = f'sum({click}) OVER ({newest_first} ROWS UNBOUNDED PRECEDING)'
    of = f'sum({click}) OVER (PARTITION BY {person(data)}, example)'
    split = f'CASE WHEN {of} < 3 OR {later} > 2 THEN 0 WHEN {later} = 2 THEN 1 ELSE 2 END'
    text = (
      "leave one out: each user's last positive test, the second last validation, negatives with "
      'the positive that follows; users with fewer than 3 positives are training only'
    )
  else:
    missing = scalar(db, 'SELECT count(*) FROM interactions WHERE example AND split IS NULL')
    if missing:
      raise UserError(
        f'config.data.split.protocol=column: {missing} labelled rows have no split; name the '
        'column in config.data.split_column (train | valid | test)'
      )
    split = 'split'
    text = "split as in the log's own column"
  if protocol != 'column':
    split = f'CASE WHEN example THEN {split} END'
  kept = 'history'
  if data.max_history:
    newest = 'row_number() OVER (PARTITION BY user, history ORDER BY time DESC, row DESC)'
    kept = f'(history AND {newest} <= {data.max_history:d})'
    text += f'; only the newest {data.max_history} events of a user are kept'
  text += "; a history is the user's events strictly before the example's time, by (time, row)"
  if data.negatives:
    text += f"; {data.negatives} sampled negatives a positive, never from the user's past"

  db.execute(
    f"""CREATE TABLE placed AS
    SELECT * REPLACE ({kept} AS history, ({split})::TINYINT AS split)
    FROM interactions WHERE history OR example"""
  )
  db.execute(
    f"""CREATE TABLE last_training AS
    SELECT user, max(time) AS last FROM placed WHERE example AND split = 0 GROUP BY user;
    CREATE VIEW trained AS
    SELECT placed.*,
      CASE WHEN placed.split IS NOT NULL THEN placed.split = 0
        ELSE coalesce({before}, false) END AS lmn_train
    FROM placed LEFT JOIN last_training ON last_training.user = placed.user"""
  )
  if not scalar(db, 'SELECT count(*) FROM last_training'):
    raise UserError(
      f'{data.source}: none of {count} examples is left for training by '
      f'config.data.split.protocol={protocol}; choose another protocol or smaller shares'
    )
  return text


def _cut(db: duckdb.DuckDBPyConnection, share: float, count: int) -> int:
  """The first time stamp with at least `share` of the examples before it; ties stay together."""
  return scalar(
    db,
    """SELECT coalesce(min(time) FILTER (WHERE upto - n >= $1), max(time) + 1)
    FROM (SELECT time, n, sum(n) OVER (ORDER BY time) AS upto FROM (
      SELECT time, count(*) AS n FROM interactions WHERE example GROUP BY time))""",
    [math.ceil(share * count - 1e-9)],
  )


def person(data: ml_collections.ConfigDict, user: str = 'user') -> str:
  """SQL of the raw id of a record's user; with `row_history` a user has several records."""
  return f'split_part({user}, chr(0), 1)' if data.row_history else user


def scalar(db: duckdb.DuckDBPyConnection, query: str, values: list | None = None):
  """The first column of the first row of a query."""
  return db.execute(query, values or []).fetchall()[0][0]
