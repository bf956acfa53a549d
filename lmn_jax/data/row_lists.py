"""Rows that bring lists along: the candidates that were shown, and the history up to then.

MIND's `N7-1 N8-0` is an impression of two candidates, with the label of each; the columns of
FuxiCTR's sets give each row the user's history as one text. A candidate becomes a row. A history of
a row becomes events of a user record of its own: users may have several, with one embedding row.
"""

from typing import Any

import ml_collections

from lmn_jax.data import texts
from lmn_jax.data.columns import Log
from lmn_jax.data.readers import sequences
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.table import Table
from lmn_jax.errors import UserError, one_of

CLICKED = '@label'  # the column made here of a candidate's label
LOOKED_AT = 10_000  # rows whose items are looked at for lists
MARK = '\x1f'  # between the items of a history, where it is a text


# What an item is not: the form of a list, what stands between its values, how it is read.
LISTS = (
  (r'\[.*\]', ',', "lists such as {!r}; config.data.format='sequences' reads a row a user"),
  ('[^ ]+-[01]( [^ ]+-[01])*', ' ', 'lists of candidates such as {!r}; name the column in '
   'config.data.candidates'),
)  # fmt: skip


def refuse_lists(log: Log) -> None:
  """Refuses an item column that holds lists in most of its first rows: each would be one item."""
  for form, between, what in LISTS:
    lists, rows, example = log.db.execute(
      f"""SELECT count(*) FILTER (is_list), count(*),
        first(item) FILTER (is_list AND contains(item, {literal(between)})) FROM (
        SELECT item, regexp_full_match(item, {literal(form)}) AS is_list
        FROM (SELECT item FROM kept LIMIT {LOOKED_AT}))"""
    ).fetchone()
    if example is not None and 2 * lists > rows:
      raise UserError(
        f'{log.data.source}: the column of config.data.item={log.data.item!r} holds '
        + what.format(example[:80])
      )


def columns(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The data config with the label's column, where the candidates bring the labels.

  Raises:
    UserError: fields that do not go together.
  """
  if data.candidates and not data.time and not data.row_history:
    raise UserError(
      f'config.data.candidates={data.candidates!r} needs config.data.time, as the candidates of a '
      'row are of one time, or config.data.row_history'
    )
  if data.row_history and data.history_behaviours:
    raise UserError(
      f'config.data.history_behaviours={data.history_behaviours!r} has no meaning with '
      f'config.data.row_history={data.row_history!r}, which brings the events'
    )
  if data.row_history and data.history != 'positive':
    raise UserError(
      f'config.data.history={data.history!r} has no meaning with '
      f'config.data.row_history={data.row_history!r}, which brings the events'
    )
  data = ml_collections.ConfigDict(data)
  if data.candidates and data.candidates_label_separator:
    data.label = CLICKED
  return data


def spread(table: Table, data: ml_collections.ConfigDict) -> Table:
  """Returns a table with a row a candidate, and the row's history as a text that MARK parts.

  Args:
    table: a file. data: of `columns`.

  Raises:
    UserError: a column is missing, or the item has a column beside that of the candidates.
  """
  own, lists = dict(table.columns), {}
  if data.row_history:
    own[data.row_history] = history_sql(table, data)
  if data.candidates:
    tokens = _tokens(table, data.candidates, data.candidates_separator, 'candidates')
    if data.item in table.columns and data.item != data.candidates:
      raise UserError(
        f'{table.name}: the items are in the column of config.data.item={data.item!r} and in that '
        f'of config.data.candidates={data.candidates!r}; name one of them'
      )
    own[data.item], lists[data.item] = 'NULL', tokens
    if data.label == CLICKED:
      end = literal(data.candidates_label_separator)
      size = len(data.candidates_label_separator)
      # What stands before and behind the last separator.
      last = f'len(token) - strpos(reverse(token), reverse({end})) - {size - 1}'
      lists[data.item] = (
        f'list_transform({tokens}, lambda token: CASE WHEN contains(token, {end}) '
        f'THEN left(token, {last}) ELSE token END)'
      )
      missing = literal(
        f'of {data.candidates!r} has no label behind {data.candidates_label_separator!r}; '
        "config.data.candidates_label_separator='' reads candidates without labels"
      )
      own[CLICKED] = 'NULL'
      lists[CLICKED] = (
        f'list_transform({tokens}, lambda token: CASE WHEN contains(token, {end}) '
        f'THEN right(token, strpos(reverse(token), reverse({end})) - 1) '
        f"ELSE error('candidate ' || token || ' ' || {missing}) END)"
      )
  made = {data.item, CLICKED} if data.candidates else set()

  def relation(names: list[str]) -> str:
    under = [name for name in names if name not in made]
    return table.relation([*under, *([data.candidates] if data.candidates else [])])

  found = table._replace(columns=own, lists=lists, relation=relation)
  return sequences.spread(found, data) if data.candidates else found


def history_sql(table: Table, data: ml_collections.ConfigDict) -> str:
  """SQL of the history that a row of a file brings along, as a text that MARK parts.

  Raises:
    UserError: the column is missing.
  """
  tokens = _tokens(table, data.row_history, data.history_separator, 'row_history')
  return f'array_to_string({tokens}, {literal(MARK)})'


def _tokens(table, column, separator, field):
  one_of(f'{table.name}: column config.data.{field}', column, table.columns)
  text = sequences.tokens_of(table.columns[column], separator)
  return f'coalesce({table.lists[column]}, {text})' if column in table.lists else text


def own_histories(log: Log, time: str) -> dict[str, Any]:
  """Gives each history of the rows a user record with its events, just before its first example.

  In `interactions` the user of a row becomes the name of its record: the user's id where the record
  is the newest one of the user, else the id, a null byte and a number. The rows are examples alone.

  Args:
    log: the log. time: SQL of the time over `kept`.
  """
  db, data = log.db, log.data
  history = f"coalesce({log.columns[data.row_history]}, '')"
  db.execute(
    f"""CREATE TEMP TABLE told AS SELECT rank AS row, {history} AS events FROM kept;
    CREATE TEMP TABLE owners AS
      SELECT user, events, first, user || CASE WHEN age = 0 THEN '' ELSE chr(0) || age END AS owner
      FROM (SELECT user, events, min(time) AS first, row_number() OVER (PARTITION BY user
          ORDER BY max(time) DESC, max(row) DESC) - 1 AS age
        FROM interactions JOIN told USING (row) GROUP BY user, events);
    CREATE OR REPLACE TABLE interactions AS
      SELECT interactions.* REPLACE (owner AS user, false AS history)
      FROM interactions JOIN told ON told.row = interactions.row
      JOIN owners ON owners.user = interactions.user AND owners.events = told.events"""
  )
  (last,) = db.execute('SELECT max(row) FROM interactions').fetchone()
  item = texts.value_sql('item', data.missing)
  db.execute(
    f"""INSERT INTO interactions BY NAME SELECT {last} + row_number() OVER (ORDER BY owner, place)
      AS row, owner AS user, {item} AS item, first - 1 AS time, 1 AS label, true AS history,
      false AS example
    FROM (SELECT owner, first, unnest(string_split(events, {literal(MARK)})) AS item,
        generate_subscripts(string_split(events, {literal(MARK)}), 1) AS place FROM owners)
    WHERE {item} IS NOT NULL"""
  )
  users, records, events = db.execute(
    """SELECT count(DISTINCT user), count(*), (SELECT count(*) FROM interactions WHERE history)
    FROM owners"""
  ).fetchone()
  db.execute('DROP TABLE told; DROP TABLE owners')
  return {'users_of_row_histories': users, 'row_histories': records, 'row_history_events': events}
