"""Events of users in the order they happened: all of a store, or the new ones of a log."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from lmn_jax.data import interactions, vocabulary
from lmn_jax.data.histories import users_of
from lmn_jax.data.readers import paths, registry
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.files import sha256_of_files


class Events(NamedTuple):
  """New events of N users, in the order of the raw ids: item rows and times, oldest first."""

  user: list[str]
  row: np.ndarray
  items: list[np.ndarray]
  times: list[np.ndarray]


def events_of_store(store: Store, size: int) -> Iterator[Events]:
  """The whole histories of all users of a store, `size` users at a time."""
  users, at = users_of(store), 0
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for begin in range(0, len(names), size):
      own = range(begin, min(begin + size, len(names)))
      spans = [slice(*part.users['offset'][n] + (0, part.users['count'][n])) for n in own]
      yield Events(
        names[begin : begin + size],
        users.row[at + begin : at + begin + len(own)],
        [part.history['item'][span] for span in spans],
        [part.history['time'][span] for span in spans],
      )
    at += len(names)


def log_of(data: ml_collections.ConfigDict, events: str) -> tuple[ml_collections.ConfigDict, str]:
  """A log of new events: how it is read, and the sha256 of what it holds, whatever it is called.

  It has the form of the store's log, but no split, no features and no side files.

  Args:
    data: config.data. events: of --events.

  Raises:
    UserError: a source that is no file, or a log that comes in two files.
  """
  data = data.copy_and_resolve_references()
  if data.times_source:
    raise UserError(
      f'--events={events}: the log of config.data.times_source={data.times_source!r} comes in two '
      'files, and new events in one; give times as a column of both'
    )
  for name in ('candidates', 'row_history'):
    if data[name]:
      raise UserError(
        f'--events={events}: rows of config.data.{name}={data[name]!r} are no events; new events '
        'cannot be read in this form'
      )
  if data.split.protocol == 'column':
    data.split.protocol, data.split_column = 'global_time', ''
  for name in ('user_features', 'item_features', 'context_features'):
    data[name] = ()
  data.source, data.valid_source, data.test_source = events, '', ''
  data.side_format, data.side_encoding = '', 'utf-8'
  for side in ('users', 'items'):
    data[f'{side}_fields'] = ()
    for name in ('source', 'format', 'delimiter', 'encoding'):
      data[f'{side}_{name}'] = ''
  reader = registry.reader_of(events, data.format, '--events')
  if not reader.splits:
    raise UserError(f'--events={events} is of the form {reader.name}; give files of rows')
  return data, sha256_of_files(paths.files(events, '--events'))


def events_of_log(
  data: ml_collections.ConfigDict, store: Store, scratch: Path, size: int
) -> Iterator[Events]:
  """The events of a log, read as that of the store was, `size` users or somewhat more at a time.

  What the store's vocabulary does not have is row 0, the unknown.

  Args:
    data: of `log_of`. store: for the vocabulary. scratch: an
      empty folder.

  Raises:
    UserError: of the log; a time that is none of the store's log (`times.Clock`).
  """
  with interactions.connect(scratch / 'stage.duckdb', data.memory_limit, scratch / 'spill') as db:
    interactions.stage(data, db, scratch, store.clock)
    for kind in ('user', 'item'):
      vocabulary.make_known(db, kind, store.raw_ids(kind), store.spelt)
    found = db.sql(
      """SELECT log.user, coalesce(known_user.code, 0) AS row, list(coalesce(known_item.code, 0)
        ORDER BY time, log.row) AS items, list(time ORDER BY time, log.row) AS times
      FROM interactions AS log LEFT JOIN known_user ON known_user.id = log.user
      LEFT JOIN known_item ON known_item.id = log.item
      WHERE history GROUP BY log.user, known_user.code ORDER BY log.user"""
    )
    for batch in found.to_arrow_reader(size):
      user, row, items, times = (batch.column(k) for k in range(4))
      yield Events(
        user.to_pylist(),
        row.to_numpy(),
        *([one.values.to_numpy() for one in lists] for lists in (items, times)),
      )
