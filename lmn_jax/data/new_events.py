"""Events of users in the order in which they happened: all of a store, or the new ones of a log."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data import interactions, vocabulary
from lmn_jax.data.arrow_files import numbers_of
from lmn_jax.data.histories import users_of
from lmn_jax.data.numeric import value_sql
from lmn_jax.data.readers import paths, registry
from lmn_jax.data.readers.cells import identifier
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.files import sha256_of_files


class Events(NamedTuple):
  """New events of N users, in the order of the raw ids.

  user: raw ids. row: embedding rows. items: item rows of each user, oldest first. times: of these,
  int64 as in the store (`Clock.seconds` converts them). features: 'event.f' -> of these, int32 [E]
  or [E, M], or float32 [E].
  """

  user: list[str]
  row: np.ndarray
  items: list[np.ndarray]
  times: list[np.ndarray]
  features: dict[str, list[np.ndarray]]


def events_of_store(store: Store, size: int) -> Iterator[Events]:
  """Yields the whole histories of all users of a store, `size` users at a time."""
  users, first = users_of(store), 0
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for begin in range(0, len(names), size):
      chunk = range(begin, min(begin + size, len(names)))
      spans = [slice(*part.users['offset'][n] + (0, part.users['count'][n])) for n in chunk]
      yield Events(
        names[begin : begin + size],
        users.row[first + begin : first + begin + len(chunk)],
        [part.history['item'][span] for span in spans],
        [part.history['time'][span] for span in spans],
        {key: [part.history[key][span] for span in spans] for key in store.fields('event')},
      )
    first += len(names)


def log_of(data: ml_collections.ConfigDict, events: str) -> tuple[ml_collections.ConfigDict, str]:
  """Returns the config of a log of new events, and the sha256 of its content (not of its names).

  The log has the form of the store's log, but no split, no features except those of events, and no
  side files.

  Args:
    data: config.data. events: the value of --events.

  Raises:
    UserError: if the source is not a file, or the log has a form that new events cannot have.
  """
  data = data.copy_and_resolve_references()
  if data.times_source:
    raise UserError(
      f'--events={events}: the store was made with config.data.times_source='
      f'{data.times_source!r}, a second file, but new events are read from one; write times as a '
      'column of both'
    )
  for name in ('candidates', 'row_history'):
    if data[name]:
      raise UserError(
        f'--events={events}: with config.data.{name}={data[name]!r} a row is not an event, and new '
        f"events cannot be read; prepare a store with config.data.{name}=''"
      )
  if data.split.protocol == 'column':
    data.split.protocol, data.split_column = 'global_time', ''
  for name in ('user_features', 'item_features', 'context_features'):
    data[name] = ()
  for name in ('multi', 'numeric'):
    data[name] = {f: x for f, x in data[name].items() if f in data.event_features}
  data.source, data.valid_source, data.test_source = events, '', ''
  data.side_format, data.side_encoding = '', 'utf-8'
  for side in ('users', 'items'):
    data[f'{side}_fields'] = ()
    for name in ('source', 'format', 'delimiter', 'encoding'):
      data[f'{side}_{name}'] = ''
  reader = registry.reader_of(events, data.format, '--events')
  if not reader.splits:
    raise UserError(f'--events={events} has the format {reader.name}; give files of rows')
  return data, sha256_of_files(paths.files(events, '--events'))


def events_of_log(
  data: ml_collections.ConfigDict, store: Store, scratch: Path, size: int
) -> Iterator[Events]:
  """Yields the events of a log, read as the store's log was, about `size` users at a time.

  A user or item that is not in the store's vocabulary has row 0, the unknown id.

  Args:
    data: of `log_of`. store: for the vocabulary. scratch: an empty folder.

  Raises:
    UserError: if the log is invalid, or a time does not fit the store's clock (`times.Clock`).
  """
  with interactions.connect(scratch / 'stage.duckdb', data.memory_limit, scratch / 'spill') as db:
    interactions.stage(data, db, scratch, store.clock)
    for kind in ('user', 'item'):
      vocabulary.create_lookup(db, kind, store.raw_ids(kind), store.spelt)
    features = [f for f in vocabulary.features_of(data) if f.kind == 'event']
    for feature in features:
      _create_values(db, data, store, feature)
    selected = ''.join(f', list(v{f.table}.value ORDER BY time, log.row)' for f in features)
    joins = ' '.join(f'LEFT JOIN v{f.table} ON v{f.table}.row = log.row' for f in features)
    events = db.sql(
      f"""SELECT log.user, coalesce(lookup_user.code, 0) AS row, list(coalesce(lookup_item.code, 0)
        ORDER BY time, log.row) AS items, list(time ORDER BY time, log.row) AS times {selected}
      FROM interactions AS log LEFT JOIN lookup_user ON lookup_user.id = log.user
      LEFT JOIN lookup_item ON lookup_item.id = log.item {joins}
      WHERE history GROUP BY log.user, lookup_user.code ORDER BY log.user"""
    )
    for batch in events.to_arrow_reader(size):
      user, row, items, times, *columns = batch.columns
      yield Events(
        user.to_pylist(),
        row.to_numpy(),
        *([values.values.to_numpy() for values in lists] for lists in (items, times)),
        {f.key: _arrays(f, store, x) for f, x in zip(features, columns, strict=True)},
      )


def _create_values(
  db: duckdb.DuckDBPyConnection,
  data: ml_collections.ConfigDict,
  store: Store,
  feature: vocabulary.Feature,
) -> None:
  """Creates `v<k>(row, value)` of a feature of the events: code, list of codes, or number."""
  k, key = feature.table, feature.key
  raws = f'(SELECT row AS place, {identifier(feature.column)} AS raw FROM interactions)'
  query, values = f'SELECT place, {value_sql("raw")} AS code FROM {raws}', []
  if feature.coded:
    vocabulary.create_lookup(db, str(k), store.raw_ids(key), store.spelt)
    edges = store.manifest['bins'].get(key, ())
    tokens, values = vocabulary.tokens_of(feature, edges, data.missing)
    query = vocabulary.codes_sql(feature, tokens, store.vocabulary[key], store.widths[key], raws)
  width = store.widths.get(key, 0)
  value = 'code' if width or not feature.coded else 'code[1]'
  db.execute(
    f'CREATE TEMP TABLE v{k} AS SELECT place AS row, {value} AS value FROM ({query})', values
  )


def _arrays(feature: vocabulary.Feature, store: Store, lists: pa.ListArray) -> list[np.ndarray]:
  """The values of the events of each user: int32 [E] or [E, M], or float32 [E]."""
  if not feature.coded:
    return [numbers_of(pa.table({'value': values.values}), 'value') for values in lists]
  width = store.widths[feature.key]
  if not width:
    return [values.values.to_numpy() for values in lists]
  return [values.values.flatten().to_numpy().reshape(-1, width) for values in lists]
