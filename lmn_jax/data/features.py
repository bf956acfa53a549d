"""Features of users and items, from side files and from columns of the log."""

import logging
from collections.abc import Sequence
from typing import Any

from lmn_jax.data import texts
from lmn_jax.data.columns import feature_sql
from lmn_jax.data.numeric import expected, invalid_sql, numeric_of
from lmn_jax.data.raw_log import Log, place
from lmn_jax.data.readers import table as tables
from lmn_jax.data.readers.cells import identifier
from lmn_jax.errors import UserError

logger = logging.getLogger(__name__)


def create_features(
  log: Log, kind: str, names: Sequence[str], side: list[tables.Table], time: str
) -> dict[str, Any]:
  """Creates the table `users` or `items` of features; returns its counts.

  Args:
    log: the log.
    kind: 'user' or 'item'.
    names: the features.
    side: the side files; a feature that they have is read from them, others from the log.
    time: SQL of the time; a feature of the log has its earliest value.

  Raises:
    UserError: a side file has a text in place of a number.
  """
  db, data = log.db, log.data
  side_features = [f for f in names if any(f in table.columns for table in side)]
  log_features = [f for f in names if f not in side_features]
  sources, duplicates, counts = [], 0, {}
  if side_features:
    duplicates, counts = _load_side(log, kind, side_features, side)
    sources.append(f'side_features_{kind}')
  if log_features:
    values = ''.join(
      f', arg_min({feature_sql(data, f, log.columns[f])}, ({time}, rank)) AS {identifier(f)}'
      for f in log_features
    )
    sources.append(f'(SELECT {kind}{values} FROM valid_rows GROUP BY {kind})')
  selected = ''.join(f', {identifier(f)}' for f in names)
  joined = ' FULL JOIN '.join(sources) + (f' USING ({kind})' if len(sources) == 2 else '')
  joined = joined or '(SELECT user, item FROM interactions LIMIT 0)'
  db.execute(f'CREATE TABLE {kind}s AS SELECT {kind}{selected} FROM {joined}')
  if side_features:
    db.execute(f'DROP TABLE side_features_{kind}')
  return {f'duplicate_{kind}s': duplicates} | counts


def _load_side(log, kind, features, side):
  """Creates `side_features_<kind>`; returns the number of duplicate ids, and counts of lines."""
  db, data = log.db, log.data
  columns = {data[kind]: f'config.data.{kind}'}
  columns |= {f: f'config.data.{kind}_features' for f in features}
  files = tables.load(db, f'side_{kind}', side, columns)
  lines = tables.count_irregular_lines(files)
  rejected = _reject_numbers(log, kind, features, files)
  if rejected:
    lines['rows_skipped'] = rejected
  values = ''.join(
    f', arg_min({feature_sql(data, f, f"c{k}")}, rowid) AS {identifier(f)}'
    for k, f in enumerate(features, 1)
  )
  raw_id = texts.value_sql('c0', data.missing)
  db.execute(
    f"""CREATE TABLE side_features_{kind} AS SELECT {raw_id} AS {kind}{values}
    FROM side_{kind} GROUP BY 1 HAVING {kind} IS NOT NULL"""
  )
  (duplicates,) = db.execute(
    f"""SELECT count({raw_id}) - (SELECT count(*) FROM side_features_{kind})
    FROM side_{kind}"""
  ).fetchone()
  db.execute(f'DROP TABLE side_{kind}')
  return duplicates, {f'{name}_of_{kind}s': count for name, count in lines.items()}


def _reject_numbers(
  log: Log, kind: str, features: Sequence[str], files: list[tables.FileCounts]
) -> int:
  """Refuses, or removes and counts, rows of a side file with a text in place of a number."""
  db, data, rejected = log.db, log.data, 0
  for k, name in enumerate(features, 1):
    if name not in data.numeric:
      continue
    entry = numeric_of(name, data.numeric[name])
    invalid = invalid_sql(texts.value_sql(f'c{k}', data.missing), entry.kind)
    first = db.execute(
      f'SELECT rowid, c{k} FROM side_{kind} WHERE {invalid} ORDER BY rowid LIMIT 1'
    ).fetchone()
    if not first:
      continue
    row, value = first
    where = place([(file.name, file.rows) for file in files], row)
    remedy = expected(name, data.numeric[name])
    message = f'{where}: the column {name!r} holds {value!r}; {remedy}'
    if data.bad_lines != 'skip':
      raise UserError(message)
    logger.warning('skipped rows with an invalid %s, the first: %s', name, message)
    rejected += db.execute(f'DELETE FROM side_{kind} WHERE {invalid}').fetchall()[0][0]
  return rejected
