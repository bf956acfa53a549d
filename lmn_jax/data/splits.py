"""Assigns labelled rows to training, validation and test, in SQL and out of core.

Creates the tables that `vocabulary` starts from:

  placed(row, user, item, time, label, history, example, split, ...)   with split and cut histories
  trained                                 a view: placed, and `lmn_train`: the row is training

The sentences about the protocol are part of a store's manifest and of its fingerprint.
"""

import logging
import math
from typing import Any

import duckdb
import ml_collections

from lmn_jax.data import times
from lmn_jax.errors import UserError, one_of

SPLITS = ('train', 'valid', 'test')  # in the order of their numbers
log = logging.getLogger(__name__)
FAR = 0.05  # difference between a split's share and the requested one that is logged
PROTOCOLS = ('global_time', 'user_ratio', 'leave_one_out', 'column')


def held_out(split: ml_collections.ConfigDict) -> list[str]:
  """Which of validation and test are requested: by a time, or by a share that is not 0.

  Args:
    split: config.data.split, of any protocol except `column`, where the log has the splits.
  """
  begins = begins_of(split)
  requested = begins if any(begins.values()) else split
  return [name for name in SPLITS[1:] if requested[name]]


def begins_of(split: ml_collections.ConfigDict) -> dict[str, str]:
  """The times at which validation and test begin, as in the config; '' for none."""
  return {name: split.get(f'{name}_from', '') for name in SPLITS[1:]}


def place(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, notes: dict[str, Any]
) -> str:
  """Assigns every labelled row to a split, and cuts histories to `max_history`.

  The order is (time, original row). A row that is only a history event counts as training (for
  the vocabularies) if a training example can have it in its history: by the global cut, by its
  own split column, or because it is earlier than the user's last training example.

  Args:
    data: the data config.
    db: has `interactions`; gets the table `placed` and the view `trained`.
    notes: of the reading; `time` is the log's clock.

  Returns:
    The protocol as a sentence, printed beside every metric.

  Raises:
    UserError: impossible shares or times, or no example is left for training.
  """
  protocol, by_time = _checked_protocol(data)
  count = scalar(db, 'SELECT count(*) FROM interactions WHERE example')
  if not count:
    raise UserError(f'{data.source}: no labelled row to learn from; check the column mapping')
  rule = dict(
    global_time=_at_times if by_time else _global_time, user_ratio=_user_ratio,
    leave_one_out=_leave_one_out, column=_column,
  )[protocol]  # fmt: skip
  split, before, text = rule(data, db, count, notes)
  if protocol != 'column':
    split = f'CASE WHEN example THEN {split} END'
  history, cut = _cut_history(data)
  _create_tables(db, split, history, before)
  if not scalar(db, 'SELECT count(*) FROM last_training'):
    raise UserError(
      f'{data.source}: none of {count} examples is left for training by '
      f'config.data.split.protocol={protocol}; choose another protocol, or smaller shares (0 '
      'leaves a split out)'
    )
  if protocol == 'global_time' and not by_time:
    _warn_of_shares(data, db)
  text += (
    f"{cut}; a history is the user's events strictly before the example's time, by (time, row)"
  )
  if data.negatives:
    text += (
      f'; {data.negatives} sampled negatives a positive, uniform over the items that the user has '
      'met as the positive: never, or before'
    )
  return text


def _checked_protocol(data: ml_collections.ConfigDict) -> tuple[str, bool]:
  """Checks the fields of the split; returns the protocol, and whether it splits at given times."""
  protocol = one_of('config.data.split.protocol', data.split.protocol, PROTOCOLS)
  valid, test = data.split.valid, data.split.test
  if not (valid >= 0 and test >= 0 and valid + test < 1):
    raise UserError(
      f'config.data.split.valid={valid} and test={test} must be shares >= 0 with a sum below 1'
    )
  if data.max_history < 0:
    raise UserError(f'config.data.max_history={data.max_history} must be 0 (keep all) or more')
  by_time = any(begins_of(data.split).values())
  if by_time and protocol != 'global_time':
    raise UserError(
      f'config.data.split.valid_from and test_from are of protocol=global_time, not of {protocol}; '
      "leave them ''"
    )
  return protocol, by_time


def _cut_history(data: ml_collections.ConfigDict) -> tuple[str, str]:
  """SQL of whether a row is an event after the cut to `max_history`, and the cut as a sentence."""
  if not data.max_history:
    return 'history', ''
  # All rows are counted, because the count must not depend on labels: if only positives were
  # counted, an example of label 1 would take a place from its own history and so reveal its label.
  # The events of row histories are no examples and are counted on their own.
  group = 'user, history' if data.row_history else 'user'
  newest = f'row_number() OVER (PARTITION BY {group} ORDER BY time DESC, row DESC)'
  text = (
    f'; only the newest {data.max_history} events of a history are kept'
    if data.row_history
    else f"; events older than a user's newest {data.max_history} rows are left out"
  )
  return f'(history AND {newest} <= {data.max_history:d})', text


def _create_tables(db: duckdb.DuckDBPyConnection, split: str, history: str, before: str) -> None:
  """Creates `placed`, `last_training` and `trained`.

  Args:
    db: has `interactions`.
    split: SQL of an example's split.
    history: SQL of whether a row is an event.
    before: SQL of whether a row that is only an event is training.
  """
  # A row without a split, such as one after a user's held-out click, is no example.
  db.execute(
    f"""CREATE TABLE placed AS
    SELECT * REPLACE (example AND split IS NOT NULL AS example) FROM (
      SELECT * REPLACE ({history} AS history, ({split})::TINYINT AS split)
      FROM interactions WHERE history OR example)"""
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


def _warn_of_shares(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection) -> None:
  """Logs the shares of the splits if they are far from the requested ones."""
  share = 'avg((split = {})::INT) FILTER (WHERE example)'
  train, *shares = db.execute(
    f'SELECT {", ".join(share.format(k) for k in range(len(SPLITS)))} FROM placed'
  ).fetchall()[0]
  requested = [data.split.valid, data.split.test]
  if any(abs(x - y) > FAR for x, y in zip(shares, requested, strict=True)):
    log.warning(
      'config.data.split: rows of one time stay together, so validation has %.3f and test %.3f of '
      'the examples, where valid=%s and test=%s were requested; training has %.3f',
      *shares, *requested, train,
    )  # fmt: skip


# Each rule below returns SQL of an example's split, SQL of whether a row that is only a history
# event is training, and the rule as a sentence.
BEFORE_LAST = 'placed.time < last_training.last'


def _global_time(data, db, count, notes):
  """By time, at the shares of the config."""
  cuts = _cuts(db, data.split.valid, data.split.test, count)
  return _cut_at(*cuts, bool(data.split.test))


def _at_times(data, db, count, notes):
  """By time, at the times of the config; a split without a time is left out."""
  first, last = db.execute(
    'SELECT min(time), max(time) FROM interactions WHERE example'
  ).fetchall()[0]
  clock = times.clock_of(notes, data.time_format, first, last)
  begins, cuts = begins_of(data.split), {}
  for name, begin in begins.items():
    field, share = f'config.data.split.{name}_from', data.split[name]
    if not begin and share:
      raise UserError(
        f"{field}='' but config.data.split.{name}={share}: if one split begins at a time, the "
        f'other must, too; set {name}_from, or {name}=0.0'
      )
    try:
      cuts[name] = clock.parse(begin) if begin else None
    except ValueError as error:
      raise UserError(f'{field}={begin!r} is no time of this log: {error}') from None
  first_test = last + 1 if cuts['test'] is None else cuts['test']
  first_valid = first_test if cuts['valid'] is None else cuts['valid']
  for name, begin, end in (('valid', first_valid, first_test), ('test', first_test, last + 1)):
    between = 'SELECT count(*) FROM interactions WHERE example AND time >= $1 AND time < $2'
    if begins[name] and not scalar(db, between, [begin, end]):
      raise UserError(
        f'config.data.split.{name}_from={begins[name]!r}: {name} has no example then; the examples '
        f'of the log are from {first} to {last} ({clock.unit or clock.form})'
      )
  return _cut_at(first_valid, first_test, bool(begins['test']))


def _cut_at(first_valid: int, first_test: int, test: bool) -> tuple[str, str, str]:
  """The rule that cuts at two times. test: whether there is a test split."""
  split = f'CASE WHEN time < {first_valid} THEN 0 WHEN time < {first_test} THEN 1 ELSE 2 END'
  text = f'global time split: training before {first_valid}'
  if first_valid < first_test:
    text += f', validation from {first_valid}'
  if test:
    text += f', test from {first_test}'
  # The cut alone decides for a row that is only an event: its user may have no training example.
  return split, f'placed.time < {first_valid}', text


def _user_ratio(data, db, count, notes):
  """By the order of each user's examples, at the shares of the config."""
  valid, test = data.split.valid, data.split.test
  number = f'row_number() OVER (PARTITION BY {person(data)}, example ORDER BY time, row)'
  total = f'count(*) OVER (PARTITION BY {person(data)}, example)'
  # 0.8 * 5 must be 4, also where floating point gives 4.000000000000001.
  split = (
    f'CASE WHEN {number} <= ceil({total} * {1 - valid - test!r} - 1e-9) THEN 0 '
    f'WHEN {number} <= ceil({total} * {1 - test!r} - 1e-9) THEN 1 ELSE 2 END'
  )
  text = f"user split: each user's last {test:.0%} test, the {valid:.0%} before validation"
  return split, BEFORE_LAST, text


def _leave_one_out(data, db, count, notes):
  """Each user's last positives, one for each split whose share is not 0.

  A label 0 between or after them is no example: its place, and how many there are, depend on the
  places of the positives, so they would reveal its label.
  """
  names = held_out(data.split)[::-1]  # newest first
  if not names:
    return '0', BEFORE_LAST, 'no split: every example is training'
  click = '(example AND label > 0)::INT'
  newest_first = f'PARTITION BY {person(data)}, example ORDER BY time DESC, row DESC'
  later = f'sum({click}) OVER ({newest_first} ROWS UNBOUNDED PRECEDING)'
  total = f'sum({click}) OVER (PARTITION BY {person(data)}, example)'
  split = (
    f'CASE WHEN {total} <= {len(names)} OR {later} > {len(names)} THEN 0 '
    f'WHEN label > 0 THEN CASE {later} '
    + ' '.join(f'WHEN {k} THEN {SPLITS.index(name)}' for k, name in enumerate(names, 1))
    + ' END END'
  )
  words = {'test': 'test', 'valid': 'validation'}
  text = (
    "leave one out: each user's last positive "
    + ', the second last '.join(words[name] for name in names)
    + f'; users with fewer than {len(names) + 1} positives are training only; negatives behind the '
    'last positive of training are no examples'
  )
  return split, BEFORE_LAST, text


def _column(data, db, count, notes):
  """By the log's own column."""
  missing = scalar(db, 'SELECT count(*) FROM interactions WHERE example AND split IS NULL')
  if missing:
    raise UserError(
      f'config.data.split.protocol=column: {missing} labelled rows have no split; name the '
      f'column in config.data.split_column ({" | ".join(SPLITS)})'
    )
  return 'split', BEFORE_LAST, "split as in the log's own column"


def _cuts(db: duckdb.DuckDBPyConnection, valid: float, test: float, count: int) -> tuple[int, int]:
  """The first times of validation and of test, so that each has its share and none is empty.

  Rows of one time stay together. If few times have many rows, a split is smaller than its share,
  but has at least the last time that remains; `_warn_of_shares` logs its size.
  """
  last = scalar(db, 'SELECT max(time) FROM interactions WHERE example')
  first_test = min(_cut(db, 1 - test, count), last) if test else last + 1
  if not valid:
    return first_test, first_test
  earlier = scalar(
    db, 'SELECT max(time) FROM interactions WHERE example AND time < $1', [first_test]
  )
  if earlier is None:
    return first_test, first_test
  return min(_cut(db, 1 - valid - test, count), earlier), first_test


def _cut(db: duckdb.DuckDBPyConnection, share: float, count: int) -> int:
  """The first time with at least `share` of the examples before it."""
  return scalar(
    db,
    """SELECT coalesce(min(time) FILTER (WHERE upto - n >= $1), max(time) + 1)
    FROM (SELECT time, n, sum(n) OVER (ORDER BY time) AS upto FROM (
      SELECT time, count(*) AS n FROM interactions WHERE example GROUP BY time))""",
    [math.ceil(share * count - 1e-9)],
  )


def person(data: ml_collections.ConfigDict, user: str = 'user') -> str:
  """SQL of the raw user id of a record; with `row_history` a user has several records."""
  return f'split_part({user}, chr(0), 1)' if data.row_history else user


def scalar(db: duckdb.DuckDBPyConnection, query: str, values: list | None = None):
  """The first column of the first row of a query."""
  return db.execute(query, values or []).fetchall()[0][0]
