"""The files of a log and its side files, opened but not read: which columns each of them has."""

import functools
import itertools
from pathlib import Path

import duckdb
import ml_collections

from lmn_jax.data import row_lists
from lmn_jax.data.readers import longctr, registry, sequences
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import AUTO, Opened, Reader, Source
from lmn_jax.data.readers.table import Settings, Table, holds_lists
from lmn_jax.data.splits import SPLITS
from lmn_jax.errors import UserError, one_of

OWN = ('row', 'user', 'item', 'time', 'label', 'history', 'example', 'split')
PART = longctr.PART  # the column made here of the split that a file is of


def open_log(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, scratch: Path
) -> Opened:
  """Opens all files of a log.

  Args:
    data: config.data. db: opens files. scratch: folder for copies.

  Raises:
    UserError: fields that do not go together, or a file that cannot be opened.
  """
  reader = registry.reader_of(data.source, data.format, 'config.data.source')
  _check_fields(data, reader)
  _check_split(data, reader)
  for field in ('candidates', 'row_history'):
    if data[field] and not reader.rows:
      raise UserError(
        f'config.data.{field}={data[field]!r} is for files of rows, not for {reader.name}'
      )
  source = Source(
    pattern=data.source,
    field='config.data.source',
    reader=reader,
    delimiter=data.delimiter,
    quote=data.quote,
    header=data.header,
    fields=tuple(data.fields),
    encoding=data.encoding,
    multi=dict(data.multi),
    skip=one_of('config.data.bad_lines', data.bad_lines, ('refuse', 'skip')) == 'skip',
  )
  users, items = (_side(data, source, kind, db, scratch) for kind in ('users', 'items'))
  given = data.valid_source or data.test_source
  opened = (_by_split if given else _files)(source, data, db, scratch)
  return opened._replace(users=users or opened.users, items=items or opened.items)


def _check_fields(data: ml_collections.ConfigDict, reader: Reader) -> None:
  """Refuses a field that says how to read what this log does not have."""
  typed = not reader.is_text(data.source)
  patterns = [data[f'{side}_source'] for side in ('users', 'items')]
  text_beside = any(p and not sequences.is_typed(p) for p in patterns)
  no_text = f'a log of the format {reader.name} has none'
  plain = not data.label and not (data.candidates and data.candidates_label_separator)
  sides = any(patterns)
  rules = [
    ('delimiter', data.delimiter and typed and not text_beside, no_text),
    ('quote', data.quote != AUTO and typed and not text_beside, no_text),
    ('header', not data.header and typed, no_text),
    ('fields', data.fields and typed, no_text),
    ('encoding', data.encoding != 'utf-8' and typed and not reader.encoded, no_text),
    ('fields', data.fields and data.header and not reader.headless,
     'the first line names the columns; set config.data.header=False where it does not'),
    ('times_source', data.times_source and 'times_source' not in reader.fields,
     "it is for format='sequences'"),
    ('items_separator', data.items_separator != ',' and 'items_separator' not in reader.fields,
     "it is for format='sequences'"),
    ('time_format', data.time_format and not data.time, "config.data.time='' reads no time"),
    ('label_threshold', data.label_threshold is not None and plain,
     "config.data.label='' reads no label"),
    ('positive_behaviours', data.positive_behaviours and data.label,
     f"config.data.label={data.label!r} tells the label; set config.data.label=''"),
    ('split_column', data.split_column and data.split.protocol != 'column',
     "set config.data.split.protocol='column'"),
    ('candidates_separator', data.candidates_separator != ' ' and not data.candidates,
     'set config.data.candidates'),
    ('candidates_label_separator', data.candidates_label_separator != '-' and not data.candidates,
     'set config.data.candidates'),
    ('history_separator', data.history_separator != ' ' and not data.row_history,
     'set config.data.row_history'),
    ('side_format', data.side_format and not sides, 'there is no side file'),
    ('side_encoding', data.side_encoding != 'utf-8' and not sides, 'there is no side file'),
  ]  # fmt: skip
  for field, wrong, reason in rules:
    if wrong:
      raise UserError(f'config.data.{field}={data[field]!r} is not read: {reason}')
  reader.check(data)


def _check_split(data: ml_collections.ConfigDict, reader: Reader) -> None:
  """Refuses a split by a column or by files without these, and these without such a split."""
  protocol = data.split.protocol
  given = {f: data[f] for f in ('valid_source', 'test_source') if data[f]}
  if protocol == 'column' and not (data.split_column or given or reader.tells_split):
    raise UserError(
      "config.data.split.protocol='column' needs config.data.split_column, the column's name, or "
      'the files config.data.valid_source and test_source'
    )
  if not given:
    return
  name, value = next(iter(given.items()))
  if protocol != 'column':
    raise UserError(
      f"config.data.{name}={value!r} needs config.data.split.protocol='column', not {protocol!r}"
    )
  if data.split_column:
    raise UserError(
      f'config.data.split_column={data.split_column!r} and the files of valid_source and '
      'test_source both say the split; name one of them'
    )
  if not reader.splits or data.times_source:
    raise UserError(
      f'config.data.{name}={value!r} is for files of rows, and of sequences without times_source'
    )


def _by_split(source, data, db, scratch):
  """The files of the three splits, one after the other, with a column that says which it is."""
  tables, told = [], None
  for part in SPLITS:
    field = 'source' if part == 'train' else f'{part}_source'
    if data[field]:
      reader = registry.reader_of(data[field], data.format, f'config.data.{field}')
      own = source._replace(pattern=data[field], field=f'config.data.{field}', reader=reader)
      opened = _files(own, data, db, scratch)
      if told not in (None, (opened.data.time, opened.positions)):
        raise UserError(
          f'config.data.{field}={data[field]!r}: its rows hold lists of events and those of '
          "config.data.source do not, or the other way round; set config.data.format='sequences'"
        )
      told = (opened.data.time, opened.positions)
      tables.append(map(functools.partial(_marked, part), opened.log))
  opened.data.split_column = PART
  return opened._replace(log=itertools.chain(*tables))


def _marked(part, table):
  """A table with the column of its split."""
  return table._replace(
    columns=table.columns | {PART: literal(part)},
    relation=lambda names: table.relation([name for name in names if name != PART]),
  )


def _files(source, data, db, scratch):
  """The files of a source; where their rows hold lists, an event a row."""
  opened = source.reader.open(source, ml_collections.ConfigDict(data), db, scratch)
  if not source.reader.rows:
    return opened
  data, log = opened.data, opened.log
  if data.candidates or data.row_history:
    data = row_lists.columns(data)
    log = (table if table.empty else row_lists.spread(table, data) for table in log)
    return opened._replace(data=data, log=log)
  # Lists of items in the first file with rows: a row is a user with all their events.
  head = []
  for table in log:
    head.append(table)
    if not table.empty:
      break
  log = itertools.chain(head, log)
  if not head or data.item not in head[-1].lists:
    return opened._replace(log=log)
  if not holds_lists(head[-1], data.item, db):
    return opened._replace(log=log)
  data, positions = sequences.timed(data)
  log = (table if table.empty else sequences.spread(table, data) for table in log)
  return opened._replace(data=data, log=log, positions=positions)


def _side(
  data: ml_collections.ConfigDict,
  source: Source,
  kind: str,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
) -> list[Table]:
  """Opens the files of `users_source` or `items_source`; none if there are none."""
  pattern, fields = data[f'{kind}_source'], tuple(data[f'{kind}_fields'])
  own = {name: data[f'{kind}_{name}'] for name in ('format', 'delimiter', 'encoding')}
  if not pattern:
    for name, value in (own | {'fields': fields}).items():
      if value:
        raise UserError(
          f'config.data.{kind}_{name}={value!r} needs config.data.{kind}_source, the file it is of'
        )
    return []
  field = f'config.data.{kind}_source'
  settings = Settings(
    format=f'config.data.{kind}_format',
    delimiter=f'config.data.{kind}_delimiter',
    header=f'config.data.{kind}_fields',
    fields=f'config.data.{kind}_fields',
    encoding=f'config.data.{kind}_encoding (config.data.side_encoding is for both side files)',
  )
  named = own['format'] or data.side_format
  reader = source.reader
  if named or sequences.is_typed(pattern) or not reader.delimiter:
    reader = registry.reader_of(pattern, named, field, settings)
  as_log = not (own['format'] or data.side_format)
  side = source._replace(
    pattern=pattern,
    field=field,
    reader=reader,
    delimiter=own['delimiter'] or (source.delimiter if as_log else ''),
    header=not fields,
    fields=fields,
    encoding=own['encoding'] or data.side_encoding,
    settings=settings,
  )
  tables = list(side.reader.tables(side, db, scratch))
  if all(table.empty for table in tables):
    raise UserError(f'{field}={pattern!r}: no file has a row; at least one is expected')
  return tables


def wanted(data: ml_collections.ConfigDict, opened: Opened) -> dict[str, str]:
  """The columns to read from the log, each with the field that asks for it."""
  found = {data.user: 'config.data.user', data.item: 'config.data.item'}
  for field in ('time', 'label', 'behaviour', 'order'):
    if data[field]:
      found.setdefault(data[field], f"config.data.{field} ('' if the log has none)")
  if data.row_history:
    found.setdefault(data.row_history, 'config.data.row_history')
  # The columns that decide a label.
  told_by = (data.label or (data.behaviour if data.positive_behaviours else ''), data.candidates)
  if data.split_column:
    found.setdefault(data.split_column, 'config.data.split_column')
  for kind, tables in (('user', opened.users), ('item', opened.items), ('context', [])):
    own = [*OWN] if kind == 'context' else [kind]
    for feature in data[f'{kind}_features']:
      if feature.lower() in own:
        raise UserError(
          f'config.data.{kind}_features: {feature!r} is named twice or like one of the own columns '
          f'{", ".join(own)} (case does not count); rename the column'
        )
      own.append(feature.lower())
      if not any(feature in table.columns for table in tables):
        if feature in told_by:
          raise UserError(
            f'config.data.{kind}_features: the column {feature!r} is what labels are made of, so '
            'it would tell every label; take it out'
          )
        found.setdefault(feature, f'config.data.{kind}_features')
  return found
