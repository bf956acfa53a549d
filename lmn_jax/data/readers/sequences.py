"""Logs with a row a user, or a row a session: lists of items and what goes with each of them.

In text a list is written in a cell, its values parted by `items_separator` or as a literal of
Python or JSON, `[11, 12]`. JSON lines and Parquet have lists of their own. Either way an event
becomes a row, and further columns give each event its own value if they hold lists.
"""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import ml_collections

from lmn_jax.data.readers import cells, paths
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.jsonl import JsonLines
from lmn_jax.data.readers.parquet import Parquet
from lmn_jax.data.readers.reader import LONGEST_HISTORY, Opened, Source
from lmn_jax.data.readers.table import Table, nothing
from lmn_jax.data.readers.text import Text, text
from lmn_jax.errors import UserError, one_of

TYPED = Parquet(), JsonLines()  # formats that have lists of their own
POSITION = '@position'  # the column made here of where an event stands in its list


def is_typed(pattern: str) -> bool:
  """Whether the files have lists of their own."""
  return any(paths.ending(pattern) in reader.endings for reader in TYPED)


class Sequences(Text):
  """Files of lists, by their ending: JSON lines, Parquet, or text."""

  name, delimiter, rows = 'sequences', '\t', False
  encoded = False  # of text alone, see is_text
  longest_line = LONGEST_HISTORY
  fields = ('times_source', 'items_separator')

  def is_text(self, source):
    return not is_typed(source)

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    data, positions = timed(data)
    return Opened(data, tables(source, data, db, scratch), positions=positions)

  def table(self, source, path, db, scratch):
    for reader in TYPED:
      if paths.ending(str(path)) in reader.endings:
        return reader.table(source, path, db, scratch)
    return text(source, path, scratch)


def timed(data: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, bool]:
  """The data config of sequences, and whether their times are the positions in them."""
  whole_lines = data.format == 'sequences' and not (data.header or data.fields)
  if whole_lines and not data.times_source and not is_typed(data.source):
    if data.time not in ('', 'time'):
      raise UserError(
        f'config.data.time={data.time!r} names a column, but the lines of {data.source} have none; '
        "set config.data.times_source, or config.data.time='' for the order in the line"
      )
    data.time = ''
  if data.times_source:
    data.time = data.time or 'time'
  positions = not data.time
  if positions:
    data.time, data.time_format = POSITION, ''
  return data, positions


def of_events(data: ml_collections.ConfigDict) -> list[str]:
  """The columns that may have a value for each event, beside the item."""
  named = [data.time, data.label, data.behaviour, data.order, data.split_column]
  return [name for name in dict.fromkeys(named) if name]


def spread(table: Table, data: ml_collections.ConfigDict) -> Table:
  """Returns a table with a row an event, of one whose item column holds lists.

  Args:
    table: the file; a column that holds lists is in its `lists`.
    data: config.data. Its columns of events, of features of items and of context without a
      separator in `multi` have a value for each event where they hold lists.

  Raises:
    UserError: when the SQL runs: two lists of a row differ in length.
  """
  features = [f for f in (*data.item_features, *data.context_features) if f not in data.multi]
  names = [data.item, *of_events(data), *features]
  spread_over = [n for n in dict.fromkeys(names) if n in table.lists and n in table.columns]
  if data.item not in spread_over:
    return table

  def relation(wanted: list[str]) -> str:
    asked = [name for name in spread_over if name in wanted]
    under = [name for name in dict.fromkeys([*wanted, data.item]) if name in table.columns]
    lists = ', '.join(f'{table.lists[name]} AS l{k}' for k, name in enumerate(asked))
    item = f'coalesce({table.lists[data.item]}, [{_or_null(table, data.item)}])'
    values = ''.join(
      f', unnest({_aligned(table, name, data.item, k)}) AS e{spread_over.index(name)}'
      for k, name in enumerate(asked)
    )
    inner = f"""(SELECT *, {item} AS events, row_number() OVER () AS line
      {', ' if lists else ''}{lists} FROM {table.relation(under)})"""
    return f'(SELECT *, unnest(range(len(events))) AS event_position{values} FROM {inner})'

  columns = table.columns | {name: f'e{k}' for k, name in enumerate(spread_over)}
  columns[POSITION] = 'CAST(event_position AS VARCHAR)'
  return table._replace(columns=columns, relation=relation, lists={})


def _or_null(table, name):
  """SQL of a column where it holds no list; it is not evaluated elsewhere."""
  return f'CASE WHEN {table.lists[name]} IS NULL THEN {table.columns[name]} END'


def _aligned(table, name, item, k):
  """SQL of a list of a value for each event."""
  if name == item:
    return 'events'
  said = f"""{literal(f'{table.name}: row ')} || line ||
    {literal(f': column {name!r} has ')} || len(l{k}) || {literal(f' values, column {item!r} ')}
    || len(events) || '; give both as many'"""
  return f"""CASE WHEN l{k} IS NULL THEN list_transform(events, lambda x: {_or_null(table, name)})
    WHEN len(l{k}) = len(events) THEN l{k} ELSE error({said}) END"""


def tables(
  source: Source,
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
) -> Iterator[Table]:
  """Yields a table of events for each file that has lists of items, oldest event first.

  Text without a header and without `source.fields` has lines of the user and the items, all joined
  by the separator. The file of times has the same form as the file of items.

  Args:
    source: the sequences. data: config.data, with the names of the columns.
    db: opens files. scratch: folder for copies.

  Raises:
    UserError: if the files differ in number or a column is missing; if two lists of a row differ in
      length, when the SQL runs.
  """
  found = paths.files(source.pattern, source.field)
  times = paths.files(data.times_source, 'config.data.times_source') if data.times_source else []
  if times and len(times) != len(found):
    raise UserError(
      f'config.data.times_source={data.times_source!r} matches {len(times)} files, {source.field} '
      f'{len(found)}; they are read side by side and must be as many'
    )
  for path, time_path in zip(found, times or [None] * len(found), strict=True):
    table = _lines(source, path, data, data.item, db, scratch)
    if time_path and not table.empty:
      aligned = _lines(source, time_path, data, data.time, db, scratch)
      table = _with_times(table, aligned, str(time_path), data)
    yield table if table.empty else spread(table, data)


def _lines(source, path, data, values, db, scratch):
  """The table of a file as it is, with SQL of the lists in its cells."""
  separator = data.items_separator
  if not is_typed(str(path)) and not source.header and not source.fields:
    # A delimiter that no text holds, so that a line is one column.
    whole = source._replace(fields=('line',), delimiter='\x01', quote='')
    table = text(whole, path, scratch)
    if table.empty:
      return table
    under = f"(SELECT * FROM {table.relation([])} WHERE trim(s0) <> '')"
    tokens = tokens_of('s0', separator)
    return table._replace(
      columns={data.user: f'{tokens}[1]', values: 's0'},
      lists={values: f'{tokens}[2:]'},
      relation=lambda _: under,
    )
  if not path.stat().st_size:
    return nothing(path)
  table = source.reader.table(source, path, db, scratch)
  if table.empty:
    return table
  for role, name in (('config.data.user', data.user), ('the sequence', values)):
    one_of(f'{path}: column of {role}', name, table.columns)
  lists = dict(table.lists)
  for name in [values, *of_events(data)]:
    if name in table.columns:
      tokens = tokens_of(table.columns[name], separator)
      # One value of another column is of all events; one time is not.
      many = (
        tokens if name in (values, data.time) else f'CASE WHEN len({tokens}) > 1 THEN {tokens} END'
      )
      lists[name] = f'coalesce({lists[name]}, {many})' if name in lists else many
  return table._replace(lists=lists)


def _with_times(table, aligned, name, data):
  """The table with the lists of a second file, line by line, as its column of times."""
  user, item, time = data.user, data.item, data.time

  def relation(wanted: list[str]) -> str:
    return f"""(SELECT a.*, b.* FROM (SELECT * FROM {table.relation([])}) a
      POSITIONAL JOIN (SELECT {aligned.columns[user]} AS time_owner, {aligned.lists[time]} AS times
      FROM {aligned.relation([])}) b)"""

  owner, items = table.columns[user], table.lists[item]
  times = f"""CASE WHEN ({owner}, len({items})) IS NOT DISTINCT FROM (time_owner, len(times))
    THEN times ELSE error({literal(f'{name}: the line of user ')} ||
    coalesce(time_owner, '(none)') || ' has ' || coalesce(len(times), 0) ||
    ' times, but its items are of user ' || coalesce({owner}, '(none)') || ' and are ' ||
    coalesce(len({items}), 0) || '; the two files must be aligned line by line') END"""
  return table._replace(
    columns=table.columns | {time: 'NULL'}, lists=table.lists | {time: times}, relation=relation
  )


def tokens_of(expression: str, separator: str) -> str:
  """SQL of the values in a cell, none in an empty one: a literal, else parted by the separator."""
  parts = f'string_split(trim({expression}), {literal(separator)})'
  plain = f"list_filter({parts}, lambda token: token <> '')"
  return f'coalesce({cells.literal_list(expression)}, {plain}, [])'
