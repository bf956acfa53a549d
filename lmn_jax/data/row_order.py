"""The order of rows beside their time: of a user's lines, and of rows of one time."""

from typing import Any

from lmn_jax.data import texts
from lmn_jax.data.columns import Log


def join_lines(log: Log, position: str) -> dict[str, Any]:
  """Lets the events of a user's later lines stand behind those of the earlier ones.

  Args:
    log: the log. position: the column of where an event stands in its line, from 0.
  """
  user, place = texts.value_sql(log.columns[log.data.user], log.data.missing), log.columns[position]
  several = log.db.execute(
    f"""SELECT count(*) FROM (SELECT {user} AS user FROM raw WHERE {place} = '0' GROUP BY 1
    HAVING count(*) > 1) WHERE user IS NOT NULL"""
  ).fetchone()[0]
  if several:
    log.db.execute(
      f"""CREATE OR REPLACE TABLE raw AS SELECT * REPLACE (CAST(row_number() OVER (
        PARTITION BY {user} ORDER BY rowid) - 1 AS VARCHAR) AS {place}) FROM raw ORDER BY rowid"""
    )
  return {'users_on_several_lines': several}


def order(log: Log) -> None:
  """Lets `rank` of the view `kept` follow the column that orders rows of one time, if there is one.

  Raises:
    UserError: a value is neither a number, as all others are, nor a time, as all others are.
  """
  if not log.data.order:
    return
  text = texts.strip_sql(log.columns[log.data.order])
  kinds = [f'try_cast({text} AS {kind})' for kind in ('HUGEINT', 'DOUBLE', 'TIMESTAMPTZ')]
  # A whole number as it is, others as what is nearest in 64 bits.
  whole = f"CASE WHEN regexp_full_match({text}, '[+-]?[0-9]+([.]0*)?') THEN {kinds[0]} END"
  counts = ', '.join(f'count({kind})' for kind in (whole, *kinds[1:]))
  *found, total = log.db.execute(f'SELECT {counts}, count(*) FROM kept').fetchone()
  best = found.index(max(found))
  value = (whole, *kinds[1:])[best]
  log.refuse(
    'order',
    f'{value} IS NULL',
    'a number or a time is expected in every row, to order those of one user and time',
  )
  log.db.execute(
    f"""CREATE TEMP TABLE ranks AS
      SELECT row, row_number() OVER (ORDER BY {value}, row) - 1 AS rank FROM kept;
    CREATE OR REPLACE TEMP VIEW kept AS SELECT listed.*, ranks.rank
      FROM listed JOIN ranks ON ranks.row = listed.row"""
  )
