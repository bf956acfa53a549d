"""The files of a log and its side files, opened but not read, and the columns that they have."""

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
from lmn_jax.data.vocabulary import event_column
from lmn_jax.errors import UserError, one_of

# Columns of the table `interactions`, which no context feature may be called.
RESERVED = ('row', 'user', 'item', 'time', 'label', 'history', 'example', 'split')
PART = longctr.PART  # the column added here: the split of a file


def open_log(
  data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, scratch: Path
) -> Opened:
  """Opens all files of a log.

  Args:
    data: config.data. db: opens files. scratch: folder for copies.

  Raises:
    UserError: if fields of the config contradict each other, or a file cannot be opened.
  """
  reader = registry.reader_of(data.source, data.format, 'config.data.source')
  _check_fields(data, reader)
  _check_split(data, reader)
  for field in ('candidates', 'row_history'):
    if data[field] and not reader.rows:
      raise UserError(
        f'config.data.{field}={data[field]!r} is for files of rows, not for {reader.name}; remove '
        'it or set another config.data.format'
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
  users, items = (_open_side(data, source, kind, db, scratch) for kind in ('users', 'items'))
  by_split = data.valid_source or data.test_source
  opened = (_open_by_split if by_split else _open_files)(source, data, db, scratch)
  return opened._replace(users=users or opened.users, items=items or opened.items)


def _check_fields(data: ml_collections.ConfigDict, reader: Reader) -> None:
  """Refuses a field that this log does not read."""
  typed = not reader.is_text(data.source)
  sides = [data[f'{side}_source'] for side in ('users', 'items')]
  text_side = any(pattern and not sequences.is_typed(pattern) for pattern in sides)
  no_label = not data.label and not (data.candidates and data.candidates_label_separator)
  not_text = f'the format {reader.name} does not use it; remove it'
  only_sequences = "only config.data.format='sequences' uses it; remove it or set this format"
  no_side = 'there is no side file; set config.data.users_source or items_source'
  # Field, whether it is set without effect, and the reason with the remedy.
  rules = [
    ('delimiter', data.delimiter and typed and not text_side, not_text),
    ('quote', data.quote != AUTO and typed and not text_side, not_text),
    ('header', not data.header and typed, not_text),
    ('fields', data.fields and typed, not_text),
    ('encoding', data.encoding != 'utf-8' and typed and not reader.encoded, not_text),
    ('fields', data.fields and data.header and not reader.headless,
     'the first line names the columns; set config.data.header=False if it does not'),
    ('times_source', data.times_source and 'times_source' not in reader.fields, only_sequences),
    ('items_separator', data.items_separator != ',' and 'items_separator' not in reader.fields,
     only_sequences),
    ('time_format', data.time_format and not data.time,
     "config.data.time='' reads no time; name the column"),
    ('label_threshold', data.label_threshold is not None and no_label,
     "config.data.label='' reads no label; name the column"),
    ('positive_behaviours', data.positive_behaviours and data.label,
     f"config.data.label={data.label!r} gives the label; set config.data.label=''"),
    ('split_column', data.split_column and data.split.protocol != 'column',
     "set config.data.split.protocol='column'"),
    ('candidates_separator', data.candidates_separator != ' ' and not data.candidates,
     'set config.data.candidates'),
    ('candidates_label_separator', data.candidates_label_separator != '-' and not data.candidates,
     'set config.data.candidates'),
    ('history_separator', data.history_separator != ' ' and not data.row_history,
     'set config.data.row_history'),
    ('event_features', data.event_features and data.row_history,
     f'config.data.row_history={data.row_history!r} has the items of the events alone; remove one '
     'of them'),
    ('side_format', data.side_format and not any(sides), no_side),
    ('side_encoding', data.side_encoding != 'utf-8' and not any(sides), no_side),
  ]  # fmt: skip
  for field, without_effect, reason in rules:
    if without_effect:
      raise UserError(f'config.data.{field}={data[field]!r} is not read: {reason}')
  reader.check(data)


def _check_split(data: ml_collections.ConfigDict, reader: Reader) -> None:
  """Refuses a split by column without a column or files, and these without such a split."""
  protocol = data.split.protocol
  sources = {f: data[f] for f in ('valid_source', 'test_source') if data[f]}
  if protocol == 'column' and not (data.split_column or sources or reader.defines_split):
    raise UserError(
      "config.data.split.protocol='column' needs config.data.split_column, the column's name, or "
      'the files config.data.valid_source and test_source'
    )
  if not sources:
    return
  name, value = next(iter(sources.items()))
  if protocol != 'column':
    raise UserError(
      f"config.data.{name}={value!r} needs config.data.split.protocol='column', not {protocol!r}"
    )
  if data.split_column:
    raise UserError(
      f'config.data.split_column={data.split_column!r} and the files of valid_source and '
      'test_source both define the split; remove one of them'
    )
  if not reader.splits or data.times_source:
    raise UserError(
      f'config.data.{name}={value!r} is only for files of rows, and of sequences without '
      'times_source; use config.data.split_column or another split.protocol'
    )


def _open_by_split(source, data, db, scratch):
  """Opens the files of the three splits one after the other, and adds a column of the split."""
  tables, layout = [], None
  for part in SPLITS:
    field = 'source' if part == 'train' else f'{part}_source'
    if data[field]:
      reader = registry.reader_of(data[field], data.format, f'config.data.{field}')
      part_source = source._replace(
        pattern=data[field], field=f'config.data.{field}', reader=reader
      )
      opened = _open_files(part_source, data, db, scratch)
      if layout not in (None, (opened.data.time, opened.positions)):
        raise UserError(
          f'config.data.{field}={data[field]!r}: only its rows or only those of '
          "config.data.source hold lists of events; set config.data.format='sequences'"
        )
      layout = (opened.data.time, opened.positions)
      tables.append(map(functools.partial(_with_split, part), opened.log))
  opened.data.split_column = PART
  return opened._replace(log=itertools.chain(*tables))


def _with_split(part, table):
  """Returns a table with a column of its split."""
  return table._replace(
    columns=table.columns | {PART: literal(part)},
    relation=lambda names: table.relation([name for name in names if name != PART]),
  )


def _open_files(source, data, db, scratch):
  """Opens the files of a source; where their rows hold lists, an event becomes a row."""
  opened = source.reader.open(source, ml_collections.ConfigDict(data), db, scratch)
  if not source.reader.rows:
    return opened
  data, log = opened.data, opened.log
  if data.candidates or data.row_history:
    data = row_lists.with_label_column(data)
    log = (table if table.empty else row_lists.explode(table, data) for table in log)
    return opened._replace(data=data, log=log)
  # If the first file with rows has lists of items, a row is a user with all their events.
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
  data, positions = sequences.resolve_time(data)
  log = (table if table.empty else sequences.explode(table, data) for table in log)
  return opened._replace(data=data, log=log, positions=positions)


def _open_side(
  data: ml_collections.ConfigDict,
  source: Source,
  kind: str,
  db: duckdb.DuckDBPyConnection,
  scratch: Path,
) -> list[Table]:
  """Opens the files of `users_source` or `items_source`; returns [] if it is not set."""
  pattern, fields = data[f'{kind}_source'], tuple(data[f'{kind}_fields'])
  options = {n: data[f'{kind}_{n}'] for n in ('format', 'delimiter', 'encoding')}
  if not pattern:
    for name, value in (options | {'fields': fields}).items():
      if value:
        raise UserError(
          f'config.data.{kind}_{name}={value!r} needs config.data.{kind}_source, the side file'
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
  side_format = options['format'] or data.side_format
  reader = source.reader
  if side_format or sequences.is_typed(pattern) or not reader.delimiter:
    reader = registry.reader_of(pattern, side_format, field, settings)
  side = source._replace(
    pattern=pattern,
    field=field,
    reader=reader,
    delimiter=options['delimiter'] or ('' if side_format else source.delimiter),
    header=not fields,
    fields=fields,
    encoding=options['encoding'] or data.side_encoding,
    settings=settings,
  )
  tables = list(side.reader.tables(side, db, scratch))
  if all(table.empty for table in tables):
    raise UserError(f'{field}={pattern!r}: no file has a row; at least one is expected')
  return tables


def columns_to_read(data: ml_collections.ConfigDict, opened: Opened) -> dict[str, str]:
  """Returns the columns to read from the log, each with the config field that names it.

  Raises:
    UserError: if a feature is named twice or has a reserved name, or would reveal the label.
  """
  columns = {data.user: 'config.data.user', data.item: 'config.data.item'}
  for field in ('time', 'label', 'weight', 'behaviour', 'order'):
    if data[field]:
      columns.setdefault(data[field], f"config.data.{field} ('' if the log has none)")
  for name in data.labels:
    columns.setdefault(name, 'config.data.labels')
  if data.row_history:
    columns.setdefault(data.row_history, 'config.data.row_history')
  label_columns = (
    data.label or (data.behaviour if data.positive_behaviours else ''), data.candidates,
    *data.labels,
  )  # fmt: skip
  if data.weight and data.weight in label_columns:
    raise UserError(
      f'config.data.weight={data.weight!r} is also the column of the labels; name another column'
    )
  if data.split_column:
    columns.setdefault(data.split_column, 'config.data.split_column')
  staged = [*RESERVED, *(event_column(name).lower() for name in data.event_features)]
  for kind, tables, names in (
    ('user', opened.users, ['user']),
    ('item', opened.items, ['item']),
    ('context', [], staged),
    ('event', [], []),
  ):
    before = set()
    for feature in data[f'{kind}_features']:
      if feature.lower() in before:
        raise UserError(
          f'config.data.{kind}_features: {feature!r} is named twice (case is ignored); name it once'
        )
      if feature.lower() in names:
        raise UserError(
          f'config.data.{kind}_features: {feature!r} is one of the reserved names '
          f'{", ".join(names)} (case is ignored); rename the column'
        )
      before.add(feature.lower())
      if not any(feature in table.columns for table in tables):
        # The label of an event is of an earlier row than the example that reads the event.
        if feature in label_columns and kind != 'event':
          raise UserError(
            f'config.data.{kind}_features: labels are computed from the column {feature!r}, so as '
            'a feature it would reveal them; remove it'
          )
        columns.setdefault(feature, f'config.data.{kind}_features')
  return columns
