"""Logs with one row per user or session: lists of items, and lists with a value for each item.

In text a list is the content of a cell, its values separated by `items_separator` or written as a
literal of Python or JSON, `[11, 12]`. JSON lines and Parquet have lists of their own. In each case
an event becomes a row, and a further column that holds lists gives each event its own value.
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
from lmn_jax.data.readers.table import Table, empty_table
from lmn_jax.data.readers.text import Text, text_table
from lmn_jax.errors import UserError, one_of

TYPED = Parquet(), JsonLines()  # formats with lists of their own
POSITION = '@position'  # the column added here: the position of an event in its list


def is_typed(pattern: str) -> bool:
  """Whether the files have lists of their own."""
  return any(paths.ending(pattern) in reader.endings for reader in TYPED)


class Sequences(Text):
  """Lists of items, one row per user or session, in JSON lines, Parquet or text."""

  name, delimiter, rows = 'sequences', '\t', False
  encoded = False  # config.data.encoding is read where `is_text`
  longest_line = LONGEST_HISTORY
  fields = ('times_source', 'items_separator')

  def is_text(self, source):
    return not is_typed(source)

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    data, positions = resolve_time(data)
    return Opened(data, tables(source, data, db, scratch), positions=positions)

  def table(self, source, path, db, scratch):
    for reader in TYPED:
      if paths.ending(str(path)) in reader.endings:
        return reader.table(source, path, db, scratch)
    return text_table(source, path, scratch)


def resolve_time(data: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, bool]:
  """Sets the time column of sequences; returns config.data, and whether times are positions."""
  whole_lines = data.format == 'sequences' and not (data.header or data.fields)
  if whole_lines and not data.times_source and not is_typed(data.source):
    if data.time not in ('', 'time'):
      raise UserError(
        f'config.data.time={data.time!r} names a column, but the lines of {data.source} have no '
        "columns; set config.data.times_source, or config.data.time='' for the order in the line"
      )
    data.time = ''
  if data.times_source:
    data.time = data.time or 'time'
  positions = not data.time
  if positions:
    data.time, data.time_format = POSITION, ''
  return data, positions


def event_columns(data: ml_collections.ConfigDict) -> list[str]:
  """Returns the columns besides the item that may have a value for each event."""
  names = [data.time, data.label, *data.labels, data.weight, data.behaviour, data.order]
  names += [data.split_column, *(name for name in data.event_features if name not in data.multi)]
  return [name for name in dict.fromkeys(names) if name]


def explode(table: Table, data: ml_collections.ConfigDict) -> Table:
  """Returns a table with one row per event, of a table whose item column holds lists.

  Args:
    table: the file; `lists` has SQL of the columns that hold lists.
    data: config.data. Event columns, and features of items and context without a separator in
      `multi`, have a value for each event where they hold lists.

  Raises:
    UserError: when the SQL runs, if two lists of a row differ in length.
  """
  features = [f for f in (*data.item_features, *data.context_features) if f not in data.multi]
  names = [data.item, *event_columns(data), *features]
  exploded = [n for n in dict.fromkeys(names) if n in table.lists and n in table.columns]
  if data.item not in exploded:
    return table

  def relation(names: list[str]) -> str:
    selected = [name for name in exploded if name in names]
    inputs = [name for name in dict.fromkeys([*names, data.item]) if name in table.columns]
    lists = ', '.join(f'{table.lists[name]} AS l{k}' for k, name in enumerate(selected))
    item = f'coalesce({table.lists[data.item]}, [{_value_if_no_list(table, data.item)}])'
    values = ''.join(
      f', unnest({_aligned(table, name, data.item, k)}) AS e{exploded.index(name)}'
      for k, name in enumerate(selected)
    )
    inner = f"""(SELECT *, {item} AS events, row_number() OVER () AS line
      {', ' if lists else ''}{lists} FROM {table.relation(inputs)})"""
    return f'(SELECT *, unnest(range(len(events))) AS event_position{values} FROM {inner})'

  columns = table.columns | {name: f'e{k}' for k, name in enumerate(exploded)}
  columns[POSITION] = 'CAST(event_position AS VARCHAR)'
  return table._replace(columns=columns, relation=relation, lists={})


def _value_if_no_list(table, name):
  """Returns SQL of a column where it holds no list; its SQL is not evaluated elsewhere."""
  return f'CASE WHEN {table.lists[name]} IS NULL THEN {table.columns[name]} END'


def _aligned(table, name, item, k):
  """Returns SQL of a list with one value per event."""
  if name == item:
    return 'events'
  message = f"""{literal(f'{table.name}: row ')} || line ||
    {literal(f': column {name!r} has ')} || len(l{k}) || {literal(f' values, column {item!r} ')}
    || len(events) || '; give both the same number'"""
  repeated = f'list_transform(events, lambda x: {_value_if_no_list(table, name)})'
  return f"""CASE WHEN l{k} IS NULL THEN {repeated}
    WHEN len(l{k}) = len(events) THEN l{k} ELSE error({message}) END"""


def tables(
  source: Source,
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
) -> Iterator[Table]:
  """Yields a table of events for each file with lists of items, the oldest event first.

  In text without a header and without `source.fields`, a line is the user and then the items, all
  joined by the separator. The file of times has the same form as the file of items.

  Args:
    source: the sequences. data: config.data, with the names of the columns.
    db: opens files. scratch: folder for copies.

  Raises:
    UserError: if the files differ in number or a column is missing; when the SQL runs, if two lists
      of a row differ in length.
  """
  item_paths = paths.files(source.pattern, source.field)
  time_paths = [None] * len(item_paths)
  if data.times_source:
    time_paths = paths.files(data.times_source, 'config.data.times_source')
  if len(time_paths) != len(item_paths):
    raise UserError(
      f'config.data.times_source={data.times_source!r} matches {len(time_paths)} files, '
      f'{source.field} {len(item_paths)}; each file of items needs one file of times'
    )
  for path, time_path in zip(item_paths, time_paths, strict=True):
    table = _lines(source, path, data, data.item, db, scratch)
    if time_path and not table.empty:
      times = _lines(source, time_path, data, data.time, db, scratch)
      table = _with_times(table, times, str(time_path), data)
    yield table if table.empty else explode(table, data)


def _lines(source, path, data, values, db, scratch):
  """Returns the table of a file, with SQL of the lists in its cells."""
  separator = data.items_separator
  if not is_typed(str(path)) and not source.header and not source.fields:
    # No text contains the delimiter \x01, so a line is one column.
    whole = source._replace(fields=('line',), delimiter='\x01', quote='')
    table = text_table(whole, path, scratch)
    if table.empty:
      return table
    lines = f"(SELECT * FROM {table.relation([])} WHERE trim(s0) <> '')"
    tokens = tokens_of('s0', separator)
    return table._replace(
      columns={data.user: f'{tokens}[1]', values: 's0'},
      lists={values: f'{tokens}[2:]'},
      relation=lambda _: lines,
    )
  if not path.stat().st_size:
    return empty_table(path)
  table = source.reader.table(source, path, db, scratch)
  if table.empty:
    return table
  for column, name in (('config.data.user', data.user), ('the sequence', values)):
    one_of(f'{path}: column of {column}', name, table.columns)
  lists = dict(table.lists)
  for name in [values, *event_columns(data)]:
    if name in table.columns:
      tokens = tokens_of(table.columns[name], separator)
      # A single value applies to all events of the row, but a single time does not.
      if name not in (values, data.time):
        tokens = f'CASE WHEN len({tokens}) > 1 THEN {tokens} END'
      lists[name] = f'coalesce({lists[name]}, {tokens})' if name in lists else tokens
  return table._replace(lists=lists)


def _with_times(table, times_table, name, data):
  """Returns the table with the lists of a second file as its time column, line by line."""
  user, item, time = data.user, data.item, data.time

  def relation(names: list[str]) -> str:
    del names
    return f"""(SELECT a.*, b.* FROM (SELECT * FROM {table.relation([])}) a
      POSITIONAL JOIN (SELECT {times_table.columns[user]} AS time_owner,
      {times_table.lists[time]} AS times FROM {times_table.relation([])}) b)"""

  owner, items = table.columns[user], table.lists[item]
  times = f"""CASE WHEN ({owner}, len({items})) IS NOT DISTINCT FROM (time_owner, len(times))
    THEN times ELSE error({literal(f'{name}: the line of user ')} ||
    coalesce(time_owner, '(none)') || ' has ' || coalesce(len(times), 0) ||
    ' times, but the same line of the items has user ' || coalesce({owner}, '(none)') || ' and ' ||
    coalesce(len({items}), 0) || ' items; align the two files line by line') END"""
  return table._replace(
    columns=table.columns | {time: 'NULL'}, lists=table.lists | {time: times}, relation=relation
  )


def tokens_of(expression: str, separator: str) -> str:
  """Returns SQL of the list of values in a cell: of a literal, or of separated values."""
  parts = f'string_split(trim({expression}), {literal(separator)})'
  separated = f"list_filter({parts}, lambda token: token <> '')"
  return f'coalesce({cells.literal_list(expression)}, {separated}, [])'
