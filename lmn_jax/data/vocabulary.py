"""Codes of raw texts, in SQL and out of core: user records, vocabularies, codes of features.

DuckDB does the work and spills to disk; Python gets only counts and quantiles. The inputs are the
tables of `splits.place`, the outputs are tables of the same database:

  records(user, record, part, position)       every user, in the order of the raw ids
  vocabulary_<k>(id, code)                    codes 1.. in the order of the raw ids; 0 is unknown
  codes_<k>(raw, code)                        a feature's raw text -> its code, or list of codes
"""

from collections.abc import Sequence
from typing import NamedTuple

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data import texts
from lmn_jax.data.numeric import Numeric, fit, numeric_of
from lmn_jax.data.readers.cells import identifier
from lmn_jax.data.splits import person, scalar
from lmn_jax.errors import UserError, one_of

ROW_LIMIT = 2**31 - 1  # ids are int32 on the device, and V itself is the padding id


class Feature(NamedTuple):
  """One feature: of codes, or a number."""

  kind: str  # user | item | context | event
  name: str  # column of the log or of a side file
  table: int  # the number in the names of its DuckDB tables
  separator: str = ''  # between several tokens; '' for one token
  numeric: Numeric | None = None  # of config.data.numeric; None for tokens

  @property
  def key(self) -> str:
    return f'{self.kind}.{self.name}'

  @property
  def column(self) -> str:
    """The column of the staged table."""
    return event_column(self.name) if self.kind == 'event' else self.name

  @property
  def bins(self) -> int:
    """The number of quantile bins; 0 where the feature has none."""
    return self.numeric.count if self.numeric and self.numeric.kind == 'bins' else 0

  @property
  def coded(self) -> bool:
    """Whether a store has codes of a vocabulary; it has the numbers themselves otherwise."""
    return self.numeric is None or self.bins > 0


def event_column(name: str) -> str:
  """The column of an event feature in `interactions`, where columns may have its name already."""
  return f'event.{name}'


def features_of(data: ml_collections.ConfigDict) -> list[Feature]:
  """Returns the features of a config, in the order user, item, context, event.

  Raises:
    UserError: a name in `multi` or `numeric` is not a feature, or is in both, or how a number
      enters is unknown.
  """
  columns = [
    (kind, name)
    for kind in ('user', 'item', 'context', 'event')
    for name in data[f'{kind}_features']
  ]
  names = [name for _, name in columns]
  for field in ('multi', 'numeric'):
    for name in data[field]:
      one_of(f'config.data.{field}', name, names)
  for name in data.numeric:
    if name in data.multi:
      raise UserError(
        f'feature {name!r} is in config.data.multi and in config.data.numeric, but a list is no '
        'number; remove it from one'
      )
  numeric = {name: numeric_of(name, text) for name, text in data.numeric.items()}
  return [
    Feature(kind, name, table, data.multi.get(name, ''), numeric.get(name))
    for table, (kind, name) in enumerate(columns)
  ]


def number_users(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection) -> list[dict]:
  """Creates `records` of every user of the log and of the side file, in parts.

  A part is a range of users with about `rows_per_part` rows; a user is never divided.

  Returns:
    For each part a dict: `first`, its first record, and `users`, their number.

  Raises:
    UserError: if there are more users than int32 can number, or an id has two rows of features.
  """
  if data.rows_per_part < 1:
    raise UserError(f'config.data.rows_per_part={data.rows_per_part} must be at least 1')
  for table, key in (('users', 'user'), ('items', 'item')):
    duplicate = db.execute(
      f'SELECT {key} FROM {table} GROUP BY {key} HAVING count(*) > 1 ORDER BY {key} LIMIT 1'
    ).fetchone()
    if duplicate:
      raise UserError(f'config.data.{table}_source: {key} {duplicate[0]!r} has two rows; keep one')
  db.execute(
    f"""CREATE TABLE records AS
    SELECT user, record, record - min(record) OVER (PARTITION BY part) AS position, part FROM (
    SELECT user, record, dense_rank() OVER (ORDER BY range) - 1 AS part FROM (
      SELECT user, row_number() OVER (ORDER BY user) - 1 AS record,
        (sum(n + 1) OVER (ORDER BY user) - n - 1) // {data.rows_per_part:d} AS range
      FROM (
        SELECT user, sum(n) AS n FROM (
          SELECT user, count(*) AS n FROM placed GROUP BY user
          UNION ALL SELECT user, 0 FROM users
        ) GROUP BY user
      )
    ))"""
  )
  parts = db.execute(
    'SELECT min(record), count(*) FROM records GROUP BY part ORDER BY part'
  ).fetchall()
  check_rows('user records', sum(users for _, users in parts))
  return [dict(first=first, users=users) for first, users in parts]


def make_vocabulary(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, kind: str
) -> int:
  """Creates `seen_<kind>(id, n)`, the training rows of each id, and `vocabulary_<kind>`.

  Args:
    data: config.data. db: the database. kind: 'user' or 'item'.

  Returns:
    V: the number of ids seen at least `min_count` times, and one for unknown ids.
  """
  name = person(data) if kind == 'user' else kind
  db.execute(
    f'CREATE TABLE seen_{kind} AS SELECT {name} AS id, count(*) AS n FROM trained WHERE lmn_train '
    'GROUP BY 1'
  )
  return _number(data, db, kind, f'SELECT id, n FROM seen_{kind}')


def encode(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, feature: Feature
) -> dict:
  """Creates `vocabulary_<k>` and `codes_<k>` of one feature; a token counts once per training row.

  Returns:
    dict with `vocabulary` (V), `width` (0, or the longest list M of a multi-valued feature) and
    `edges` (upper edges of the bins, or empty).
  """
  k = feature.table
  db.execute(f"""CREATE TEMP TABLE raws AS
    SELECT * FROM ({_raw_values(feature)}) WHERE raw IS NOT NULL AND raw <> ''""")
  edges = _edges(db, feature) if feature.bins else []
  tokens, values = tokens_of(feature, edges, data.missing)
  db.execute(f'CREATE TEMP TABLE tokens AS SELECT raw, n, {tokens} AS tokens FROM raws', values)
  rows = _number(
    data,
    db,
    str(k),
    'SELECT id, sum(n) AS n FROM (SELECT unnest(list_distinct(tokens)) AS id, n FROM tokens) '
    'GROUP BY id',
  )
  # A list without a token has one unknown token, like a missing value.
  db.execute(f"""CREATE TEMP TABLE lists AS
    SELECT raw, coalesce(codes, [0]) AS codes FROM tokens LEFT JOIN (
      SELECT raw, list(coalesce(code, 0)::INTEGER ORDER BY position) AS codes FROM (
        SELECT raw, unnest(tokens) AS id, generate_subscripts(tokens, 1) AS position FROM tokens
      ) LEFT JOIN vocabulary_{k} USING (id) GROUP BY raw
    ) USING (raw)""")
  width, code = 0, 'codes[1]'
  if feature.separator:
    width = scalar(db, 'SELECT coalesce(max(len(codes)), 1) FROM lists')
    code = f'list_resize(codes, {width}, {rows}::INTEGER)'
  db.execute(f'CREATE TABLE codes_{k} AS SELECT raw, {code} AS code FROM lists')
  db.execute('DROP TABLE raws; DROP TABLE tokens; DROP TABLE lists')
  return dict(vocabulary=rows, width=width, edges=edges)


def fit_number(db: duckdb.DuckDBPyConnection, feature: Feature) -> dict:
  """Returns what a number's entry in the manifest has, see `numeric.fit`."""
  return fit(db, feature.key, feature.numeric, _raw_values(feature))


def _raw_values(feature: Feature) -> str:
  """Returns SQL of the distinct raw texts of a feature, and the number n of their training rows."""
  column = identifier(feature.column)
  if feature.kind in ('context', 'event'):
    rows = 'example' if feature.kind == 'context' else 'history'
    return (
      f'SELECT trained.{column} AS raw, count(*) FILTER (WHERE lmn_train) AS n FROM trained '
      f'WHERE {rows} GROUP BY trained.{column}'
    )
  return (
    f'SELECT side.{column} AS raw, coalesce(sum(seen.n), 0) AS n FROM {feature.kind}s AS side '
    f'LEFT JOIN seen_{feature.kind} AS seen ON seen.id = side.{feature.kind} '
    f'GROUP BY side.{column}'
  )


def create_lookup(
  db: duckdb.DuckDBPyConnection, name: str, ids: pa.ChunkedArray, spelt: bool
) -> None:
  """Creates `lookup_<name>(id, code)` of a store's raw ids; the position of an id is its code.

  Args:
    db: gets the table or view; the ids are not copied.
    name: the name of the lookup.
    ids: in the order of the codes.
    spelt: whether the ids are written as in the log (`Store.spelt`) and not by the rule of
      texts.py; of several ids with one value the first is used.
  """
  table = pa.table({'id': ids, 'code': pa.array(np.arange(len(ids), dtype=np.int32))})
  if not spelt:
    db.register(f'lookup_{name}', table)
    return
  db.register(f'spelt_{name}', table)
  db.execute(
    f"""CREATE TEMP VIEW lookup_{name} AS
    SELECT {texts.value_sql('id', ())} AS id, min(code) AS code FROM spelt_{name} GROUP BY 1"""
  )


def codes_sql(feature: Feature, tokens: str, V: int, width: int, rows: str) -> str:
  """Returns SQL of the codes of texts in a store: place, code, length (of the list), unknown.

  A token that is not in the vocabulary and a text without a token have the code 0. A list is cut
  to its first M tokens and padded with V.

  Args:
    feature: the feature; `lookup_<k>` has its vocabulary.
    tokens: SQL of the tokens of `raw`, of `tokens_of`.
    V, width: as in the store; width is M, or 0 for a single token.
    rows: SQL of a relation (place, raw).
  """
  return f"""SELECT place, len(tokens) AS length,
      list_resize(coalesce(codes, [0::INTEGER]), {max(1, width)}, {V}::INTEGER) AS code,
      raw IS NOT NULL AND (coalesce(list_contains(codes, 0), false)
        OR ({feature.bins > 0} AND len(tokens) = 0)) AS unknown
    FROM (SELECT place, raw, {tokens} AS tokens FROM {rows}) LEFT JOIN (
      SELECT place, list(coalesce(code, 0)::INTEGER ORDER BY position) AS codes FROM (
        SELECT place, unnest(tokens) AS id, generate_subscripts(tokens, 1) AS position
        FROM (SELECT place, {tokens} AS tokens FROM {rows})
      ) LEFT JOIN lookup_{feature.table} USING (id) GROUP BY place
    ) USING (place)"""


def tokens_of(feature: Feature, edges: Sequence[float], missing: Sequence[str]) -> tuple[str, list]:
  """Returns SQL of the list of tokens of a text `raw`, and the values of its parameters.

  The token of a bin is the number of edges below the value, padded to the same width for all. A
  text that is not a number has no token.

  Args:
    feature: the feature. edges: of its bins, ascending; empty if it has no bins. missing:
      config.data.missing.
  """
  if feature.bins:
    digits = len(str(len(edges)))
    number = 'TRY_CAST(raw AS DOUBLE)'
    tokens = (
      f'CASE WHEN NOT isnan({number}) THEN [lpad(len(list_filter($1::DOUBLE[], '
      f"lambda edge: edge < {number}))::VARCHAR, {digits}, '0')] ELSE [] END"
    )
    return tokens, [list(edges)]
  if feature.separator:
    return texts.tokens_sql('raw', feature.separator, missing), []
  return '[raw]', []


def _edges(db: duckdb.DuckDBPyConnection, feature: Feature) -> list[float]:
  """Returns the distinct quantiles k/bins, k = 1..bins-1, of the values of training rows."""
  return [
    edge
    for (edge,) in db.execute(
      """SELECT DISTINCT (
        SELECT min(value) FROM (
          SELECT value, sum(n) OVER (ORDER BY value) AS upto, sum(n) OVER () AS total
          FROM (SELECT raw::DOUBLE AS value, sum(n) AS n FROM raws WHERE n > 0
                AND NOT isnan(raw::DOUBLE) GROUP BY value)
        ) WHERE upto * $1 >= total * k
      ) AS edge FROM range(1, $1) AS steps(k) WHERE edge IS NOT NULL ORDER BY edge""",
      [feature.bins],
    ).fetchall()
  ]


def _number(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, name: str, counted: str
) -> int:
  """Creates `vocabulary_<name>(id, code)` of a query of (id, n); returns V = 1 + number of ids."""
  db.execute(f"""CREATE TABLE vocabulary_{name} AS
    SELECT id, row_number() OVER (ORDER BY id) AS code
    FROM ({counted}) WHERE n >= {max(1, data.min_count):d}""")
  rows = 1 + scalar(db, f'SELECT count(*) FROM vocabulary_{name}')
  check_rows(f'vocabulary {name}', rows)
  return rows


def check_rows(name: str, rows: int) -> None:
  """Refuses more rows than int32 can number."""
  if rows >= ROW_LIMIT:
    raise UserError(
      f'{name}: {rows} rows do not fit int32 (below {ROW_LIMIT}); raise config.data.min_count or '
      'split the log'
    )
