"""Rows with lists: the candidates of an impression, and the user's history before it.

MIND's `N7-1 N8-0` is an impression of two candidates, each with its label; in FuxiCTR's data sets a
column has the user's history as text. A candidate becomes a row. A history becomes the events of
its own user record: a user may have several records, which share one embedding row.
"""

from typing import Any

import ml_collections

from lmn_jax.data import texts
from lmn_jax.data.raw_log import Log
from lmn_jax.data.readers import sequences
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.table import Table
from lmn_jax.errors import UserError, one_of

LABEL = '@label'  # the column added here: a candidate's label
ROWS_CHECKED = 10_000  # rows whose items are checked for lists
MARK = '\x1f'  # separates the items of a history written as text


# Lists that are not an item: pattern, a separator that they contain, message for an example.
LISTS = (
  (r'\[.*\]', ',', "holds lists such as {!r}; config.data.format='sequences' reads a row per user"),
  ('[^ ]+-[01]( [^ ]+-[01])*', ' ', 'holds lists of candidates such as {!r}; name the column in '
   'config.data.candidates'),
)  # fmt: skip


def refuse_lists(log: Log) -> None:
  """Refuses an item column with lists in most of its first rows, as each list would be one item."""
  for pattern, separator, message in LISTS:
    lists, rows, example = log.db.execute(
      f"""SELECT count(*) FILTER (is_list), count(*),
        first(item) FILTER (is_list AND contains(item, {literal(separator)})) FROM (
        SELECT item, regexp_full_match(item, {literal(pattern)}) AS is_list
        FROM (SELECT item FROM valid_rows LIMIT {ROWS_CHECKED}))"""
    ).fetchone()
    if example is not None and 2 * lists > rows:
      raise UserError(
        f'{log.data.source}: the column of config.data.item={log.data.item!r} '
        + message.format(example[:80])
      )


def with_label_column(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns config.data with the label column added here, if candidates have labels.

  Raises:
    UserError: if fields contradict each other.
  """
  if data.candidates and not data.time and not data.row_history:
    raise UserError(
      f'config.data.candidates={data.candidates!r} needs config.data.time, because the candidates '
      'of a row share a time, or config.data.row_history'
    )
  if data.row_history and data.history_behaviours:
    raise UserError(
      f'config.data.history_behaviours={data.history_behaviours!r} has no effect with '
      f'config.data.row_history={data.row_history!r}, which has the events; remove one of them'
    )
  if data.row_history and data.history != 'positive':
    raise UserError(
      f'config.data.history={data.history!r} has no effect with '
      f'config.data.row_history={data.row_history!r}, which has the events; remove one of them'
    )
  data = ml_collections.ConfigDict(data)
  if data.candidates and data.candidates_label_separator:
    data.label = LABEL
  return data


def explode(table: Table, data: ml_collections.ConfigDict) -> Table:
  """Returns a table with one row per candidate, and the row's history as text separated by MARK.

  Args:
    table: a file. data: of `with_label_column`.

  Raises:
    UserError: if a column is missing, or items are both in a column and in the candidates.
  """
  columns, lists = dict(table.columns), {}
  if data.row_history:
    columns[data.row_history] = history_sql(table, data)
  if not data.candidates:
    return table._replace(columns=columns, lists=lists)
  tokens = _tokens(table, data.candidates, data.candidates_separator, 'candidates')
  if data.item in table.columns and data.item != data.candidates:
    raise UserError(
      f'{table.name}: items are in the column of config.data.item={data.item!r} and in that '
      f'of config.data.candidates={data.candidates!r}; remove one of them'
    )
  columns[data.item], lists[data.item] = 'NULL', tokens
  if data.label == LABEL:
    columns[LABEL] = 'NULL'
    lists[data.item], lists[LABEL] = _items_and_labels(tokens, data)

  def relation(names: list[str]) -> str:
    inputs = [name for name in names if name not in (data.item, LABEL)]
    return table.relation([*inputs, data.candidates])

  return sequences.explode(table._replace(columns=columns, lists=lists, relation=relation), data)


def _items_and_labels(tokens: str, data: ml_collections.ConfigDict) -> tuple[str, str]:
  """Returns SQL of the lists of items and of labels: the texts around the last separator."""
  separator = literal(data.candidates_label_separator)
  behind = f'strpos(reverse(token), reverse({separator})) - 1'  # length of the label
  before = f'len(token) - ({behind}) - {len(data.candidates_label_separator)}'
  no_label = literal(
    f'of {data.candidates!r} has no label after {data.candidates_label_separator!r}; set '
    "config.data.candidates_label_separator='' for candidates without labels"
  )
  has_label = f'CASE WHEN contains(token, {separator})'
  item = f'{has_label} THEN left(token, {before}) ELSE token END'
  label = (
    f'{has_label} THEN right(token, {behind}) '
    f"ELSE error('candidate ' || token || ' ' || {no_label}) END"
  )
  return (
    f'list_transform({tokens}, lambda token: {item})',
    f'list_transform({tokens}, lambda token: {label})',
  )


def history_sql(table: Table, data: ml_collections.ConfigDict) -> str:
  """Returns SQL of the history in a row of a file, as text separated by MARK.

  Raises:
    UserError: if the column is missing.
  """
  tokens = _tokens(table, data.row_history, data.history_separator, 'row_history')
  return f'array_to_string({tokens}, {literal(MARK)})'


def _tokens(table, column, separator, field):
  one_of(f'{table.name}: column config.data.{field}', column, table.columns)
  tokens = sequences.tokens_of(table.columns[column], separator)
  return f'coalesce({table.lists[column]}, {tokens})' if column in table.lists else tokens


def add_row_histories(log: Log) -> dict[str, Any]:
  """Gives each distinct history of a user its own record, with its events before its first example.

  In `interactions` the user of a row becomes the name of its record: the user's id for the newest
  record of the user, otherwise the id, a null byte and a number. The rows of the log are examples
  only; the events of histories are added.
  """
  db, data = log.db, log.data
  history = f"coalesce({log.columns[data.row_history]}, '')"
  db.execute(
    f"""CREATE TEMP TABLE row_histories AS SELECT rank AS row, {history} AS events FROM valid_rows;
    CREATE TEMP TABLE owners AS
      SELECT user, events, first, user || CASE WHEN age = 0 THEN '' ELSE chr(0) || age END AS owner
      FROM (SELECT user, events, min(time) AS first, row_number() OVER (PARTITION BY user
          ORDER BY max(time) DESC, max(row) DESC) - 1 AS age
        FROM interactions JOIN row_histories USING (row) GROUP BY user, events);
    CREATE OR REPLACE TABLE interactions AS
      SELECT interactions.* REPLACE (owner AS user, false AS history)
      FROM interactions JOIN row_histories ON row_histories.row = interactions.row
      JOIN owners ON owners.user = interactions.user AND owners.events = row_histories.events"""
  )
  (last,) = db.execute('SELECT max(row) FROM interactions').fetchone()
  item, tokens = texts.value_sql('item', data.missing), f'string_split(events, {literal(MARK)})'
  db.execute(
    f"""INSERT INTO interactions BY NAME SELECT {last} + row_number() OVER (ORDER BY owner, place)
      AS row, owner AS user, {item} AS item, first - 1 AS time, 1 AS label, true AS history,
      false AS example
    FROM (SELECT owner, first, unnest({tokens}) AS item,
        generate_subscripts({tokens}, 1) AS place FROM owners)
    WHERE {item} IS NOT NULL"""
  )
  users, records, events = db.execute(
    """SELECT count(DISTINCT user), count(*), (SELECT count(*) FROM interactions WHERE history)
    FROM owners"""
  ).fetchone()
  db.execute('DROP TABLE row_histories; DROP TABLE owners')
  return {'users_of_row_histories': users, 'row_histories': records, 'row_history_events': events}
