"""Logs with one line a user: all items, oldest first, and perhaps a second file of their times."""

from collections.abc import Iterator
from pathlib import Path

from lmn_jax import readers
from lmn_jax.errors import UserError, one_of


def tables(
  source: readers.Source, roles: tuple[str, str, str], separator: str, times: str, scratch: Path
) -> Iterator[readers.Table]:
  """Yields a Table of events for each file that has one line a user, oldest event first.

  Without a header and without `source.fields`, a line is the user and the items, all joined by
  `separator`. The file of times has the same form as the file of items.

  Args:
    source: the sequences.
    roles: names of the columns of the user, the items and the time. The time's column is made
      here: from the file of times, otherwise the position in the line, 0..n-1.
    separator: between the items.
    times: the file or glob with the times, aligned line by line; '' if there is none.
    scratch: folder for copies.

  Raises:
    UserError: if the files differ in number; if lines differ, when the SQL runs.
  """
  user, item, time = roles
  item_files = readers.files(source.pattern, source.field)
  time_files = (
    readers.files(times, 'config.data.times_source') if times else [None] * len(item_files)
  )
  if len(time_files) != len(item_files):
    raise UserError(
      f'config.data.times_source={times!r} matches {len(time_files)} files, {source.field} '
      f'{len(item_files)}; they are read side by side and must be as many'
    )
  for path, time_path in zip(item_files, time_files, strict=True):
    columns, lines = _lines(source, path, user, item, separator, scratch)
    stamps = 'range(len(tokens))'
    if time_path:
      _, time_lines = _lines(source, time_path, user, time, separator, scratch)
      lines = f"""(SELECT a.*, b.owner AS time_owner, b.tokens AS times
        FROM {lines} a POSITIONAL JOIN {time_lines} b)"""
      stamps = f"""CASE WHEN (owner, len(tokens)) IS NOT DISTINCT FROM (time_owner, len(times))
        THEN times ELSE error({readers.literal(f'{time_path}: the line of user ')} ||
        coalesce(time_owner, '(none)') || ' has ' || coalesce(len(times), 0) ||
        ' times, but its items are of user ' || coalesce(owner, '(none)') || ' and are ' ||
        coalesce(len(tokens), 0) || '; the two files must be aligned line by line') END"""
    events = f"""(SELECT * EXCLUDE (tokens), unnest(tokens) AS event_item,
      CAST(unnest({stamps}) AS VARCHAR) AS event_time FROM {lines})"""
    columns |= {user: 'owner', item: 'event_item', time: 'event_time'}
    yield readers.Table(str(path), columns, lambda _, events=events: events)


def _lines(
  source: readers.Source, path: Path, user: str, values: str, separator: str, scratch: Path
) -> tuple[dict[str, str], str]:
  """Returns the columns of a file of sequences and its lines as SQL, with owner and tokens."""
  if source.header or source.fields:
    table = readers.text(source, path, scratch)
    for role, name in (('config.data.user', user), ('the sequence', values)):
      one_of(f'{path}: column of {role}', name, table.columns)
    owner, tokens, lines = table.columns[user], _tokens(table.columns[values], separator), ''
  else:
    # A delimiter that no text holds, so that a line is one column.
    whole = source._replace(fields=('line',), delimiter='\x01', quote='')
    table = readers.text(whole, path, scratch)
    owner, tokens = f'{_tokens("s0", separator)}[1]', f'{_tokens("s0", separator)}[2:]'
    lines = 'WHERE s0 IS NOT NULL'  # a blank line
  return (
    dict(table.columns),
    f"""(SELECT *, {owner} AS owner, {tokens} AS tokens
    FROM {table.relation([])} {lines})""",
  )


def _tokens(expression: str, separator: str) -> str:
  parts = f'string_split(trim({expression}), {readers.literal(separator)})'
  return f"list_filter({parts}, lambda token: token <> '')"
