"""The order of rows besides their time: a user's lines, and rows with equal times."""

from typing import Any

from lmn_jax.data import texts
from lmn_jax.data.raw_log import Log


def join_lines(log: Log, position: str) -> dict[str, Any]:
  """Numbers the events of a user's lines consecutively, the earlier lines first.

  Args:
    log: the log. position: the column with the position of an event in its line, from 0.
  """
  user, place = texts.value_sql(log.columns[log.data.user], log.data.missing), log.columns[position]
  (users,) = log.db.execute(
    f"""SELECT count(*) FROM (SELECT {user} AS user FROM raw WHERE {place} = '0' GROUP BY 1
    HAVING count(*) > 1) WHERE user IS NOT NULL"""
  ).fetchone()
  if users:
    log.db.execute(
      f"""CREATE OR REPLACE TABLE raw AS SELECT * REPLACE (CAST(row_number() OVER (
        PARTITION BY {user} ORDER BY rowid) - 1 AS VARCHAR) AS {place}) FROM raw ORDER BY rowid"""
    )
  return {'users_on_several_lines': users}


def set_rank(log: Log) -> None:
  """Sets `rank` of `valid_rows` to the order of the column config.data.order, if there is one.

  Raises:
    UserError: if the values are neither all numbers nor all times.
  """
  if not log.data.order:
    return
  text = texts.strip_sql(log.columns[log.data.order])
  integer, double, time = (
    f'try_cast({text} AS {kind})' for kind in ('HUGEINT', 'DOUBLE', 'TIMESTAMPTZ')
  )
  # Whole numbers are compared exactly, others as 64-bit floating point.
  whole = f"CASE WHEN regexp_full_match({text}, '[+-]?[0-9]+([.]0*)?') THEN {integer} END"
  kinds = (whole, double, time)
  selected = ', '.join(f'count({kind})' for kind in kinds)
  counts = log.db.execute(f'SELECT {selected} FROM valid_rows').fetchone()
  value = kinds[counts.index(max(counts))]
  log.reject(
    'order',
    f'{value} IS NULL',
    'a number or a time is expected in every row, to order the rows of one user and time',
  )
  log.db.execute(
    f"""CREATE TEMP TABLE ranks AS
      SELECT row, row_number() OVER (ORDER BY {value}, row) - 1 AS rank FROM valid_rows;
    CREATE OR REPLACE TEMP VIEW valid_rows AS SELECT unordered_rows.*, ranks.rank
      FROM unordered_rows JOIN ranks ON ranks.row = unordered_rows.row"""
  )
