"""Scores of a file's rows by the best checkpoint of a run, and the best items of a file's users.

Pairs of a user and an item get the columns

  score        float32; of click models log-odds, of next-item models a dot product
  probability  of click models: sigmoid(score)
  known_user, known_item    whether training saw the id: it has an embedding row of its own
  events       of the user's history, on which the score is based
  as_of        the time of the newest event that is known, if the rows have no times of their own

and with the K best items asked, each user's row becomes K rows with `rank`, 1 to K, the item's raw
id and these columns but known_item; fewer, where there are fewer candidates. All columns of the
file are kept, and its order. Ids are raw ones, in and out.

  a user of the store that training did not see   embedding row 0, their profile and history
  a user that the store does not have, or none    row 0, unknown profile, no history
  an item that training did not see, or none      clicks: the unknown item's score; next items: null
  a user without events                           next items: score 0 for all

Of a history a click model reads the newest events, a next-item model all; it goes on from the
users' states where `--mode=states` keeps them, which may know newer events. Of these the items
count as met as far as the state still holds them. The times of newer events are not kept: a row
whose time lies among them is scored on the store's events alone, and counted. What scores are made
of (candidates, ties) is said in scorers.py, how a file is read in data/input_rows.py.

A file that has the log's column of times, config.data.time, is scored without the future: each row
on the events of its user strictly before its time, as an example of the store is, whatever came
later; also its best items, of which those met before that time are left out. A file without that
column is scored on all that is known, the rows' own events as well, if it is made of the log's
rows: then a score has seen what it is to predict. The last line and `as_of` say as of when.

Where config.data.row_history says that a row brings its user's history along, a file that has this
column is scored on what it says there, and on nothing of the store; its times say nothing then. One
without it is scored on the newest history that the store has of the user, and must have no times.

A file is copied into a table in the workdir (it takes the disk what the file does, until the end),
and its rows are scored in chunks, each written as a part into OUTPUT.parts; a command that is given
again goes on after the last part that is there. At the end the parts are joined.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import pyarrow as pa
import scipy.special

from lmn_jax.data import input_rows, interactions
from lmn_jax.data.input_rows import Chunk, Coder, Context, RawRows
from lmn_jax.data.readers import paths
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.evaluation.part_files import Parts, check_output
from lmn_jax.inference import state_table
from lmn_jax.inference.scorers import Asked, People, Scorer, kept_states, make_scorer
from lmn_jax.training import trained_run
from lmn_jax.training.tasks import TASKS

log = logging.getLogger(__name__)
ROWS = 2**16  # of a part, about
UNKNOWN = 'unknown '  # before the key of a feature: rows with a value that training did not see


class Request(NamedTuple):
  """input: files, a path or a glob. output: .parquet or .csv. top_k: K; None scores pairs."""

  input: str
  output: Path
  top_k: int | None = None


def check(request: Request) -> None:
  """Refuses what is wrong with a request whatever the data are.

  Raises:
    UserError: naming the flag, its value and the bound.
  """
  if jax.process_count() > 1:
    raise UserError(f'--mode=predict runs on one host, and these are {jax.process_count()}')
  if not request.input:
    raise UserError('--input is missing: the rows to score, or with --top_k the users')
  input_rows.reader_of(request.input)
  paths.files(request.input, input_rows.FIELD)
  if request.top_k is not None and request.top_k < 1:
    raise UserError(f'--top_k={request.top_k} must be at least 1')
  check_output(request.output)


def predict(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, request: Request
) -> dict[str, Any]:
  """Scores a file, or goes on with it.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data. request: what is asked.

  Returns:
    Counts of rows of the input, as `answer` gives them; 'users', different ones in the output;
    'seconds', and 'scored', the rows that were scored in them; 'path' and 'top_k'.

  Raises:
    UserError: of the request; no checkpoint; a run in use; an input that cannot be read or has no
      row; parts of another prediction.
  """
  check(request)
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    scratch = workdir / '.predict'
    shutil.rmtree(scratch, ignore_errors=True)  # left by a command that was killed
    try:
      return _predict(config, workdir, store, request, scratch)
    finally:
      shutil.rmtree(scratch, ignore_errors=True)


def _predict(config, workdir, store, request, scratch):
  began, data = time.monotonic(), config.data
  with (
    interactions.connect(scratch / 'input.duckdb', data.memory_limit, scratch / 'spill') as reading,
    interactions.connect(scratch / 'ids.duckdb', data.memory_limit, scratch / 'spill') as looking,
  ):
    size = max(1, ROWS // (request.top_k or 1))
    clock = store.clock
    rows = RawRows(data, request.input, wanted(config, request), clock, reading, scratch)
    if not rows.count:
      raise UserError(f'--input={request.input} holds no row; at least one is expected')
    check_columns(config, request, rows)
    setup, best = trained_run.best_of(config, workdir, store)
    weights = state_table.fingerprint(best.state)
    table = kept_states(config, workdir, store, setup, weights)
    try:
      made_of = {
        'input': input_rows.fingerprint(request.input),
        'step': best.step,
        'weights': weights,
        'store': store.fingerprint,
        'states': None if table is None else table.logs(),
        'top_k': request.top_k,
        'time': rows.time,
        'history': rows.history,
        'rows': size,
        'devices': setup.mesh.size,
        'config': config.to_dict(),
      }
      parts = Parts(request.output, made_of)
      now = None
      if clock.timed and not rows.time and not rows.history:
        newest = state_table.OLDEST if table is None else table.newest_of_all()
        now = store.raw_times(np.array([max(clock.last, newest)]))[0]
      scorer = make_scorer(config, store, setup, best.state, table)
      coder, people = Coder(data, store, looking), People(store)
      before = parts.done * size
      if before:
        log.info('%s: %d parts are there', parts.folder, parts.done)
      for begin in range(before, rows.count, size):
        chunk = rows.chunk(begin, size)
        parts.add(*answer(config, store, request, scorer, coder, people, chunk, now))
    finally:
      if table is not None:
        table.close()
  counts = parts.counts()
  users = parts.join(data.user, data.memory_limit)
  seconds = time.monotonic() - began
  return counts | dict(
    path=str(request.output),
    users=users,
    seconds=seconds,
    scored=max(0, rows.count - before),
    top_k=request.top_k,
    time=rows.time,
    history=rows.history,
    now=None if now is None else str(now),
  )


def wanted(config: ml_collections.ConfigDict, request: Request) -> dict[str, str]:
  """The columns that the input must have, each with the field that names it."""
  data = config.data
  columns = {data.user: 'config.data.user'}
  if request.top_k is None:
    columns[data.item] = 'config.data.item'
  if TASKS[config.task].context:
    columns |= {name: 'config.data.context_features' for name in data.context_features}
  return columns


def check_columns(config: ml_collections.ConfigDict, request: Request, rows: RawRows) -> None:
  """Refuses an input that has a column of the name of one that is added.

  Raises:
    UserError: naming it.
  """
  if rows.time and config.data.row_history and not rows.history:
    raise UserError(
      f'--input={request.input}: its rows have the times {rows.time!r} but not the histories '
      f'{config.data.row_history!r} (config.data.row_history) on which the model was trained; add '
      'them, or leave the times out: the newest history in the store of each user is then read'
    )
  added = ['score', 'known_user', 'events']
  added += ['known_item'] if request.top_k is None else ['rank', config.data.item.lower()]
  added += ['probability'] if TASKS[config.task].probability else []
  added += [] if rows.time or rows.history else ['as_of']
  for name in rows.names:
    if name.lower() in added:
      raise UserError(
        f'--input={request.input}: its column {name!r} has the name of one that is added to the '
        'output; rename it or leave it out'
      )


def answer(
  config: ml_collections.ConfigDict,
  store: Store,
  request: Request,
  scorer: Scorer,
  coder: Coder,
  people: People,
  chunk: Chunk,
  now: pa.Scalar | None,
) -> tuple[pa.Table, dict[str, int]]:
  """The part of a chunk, and its counts.

  Args:
    config, store, request: of the command. scorer, coder, people: of the store. chunk: of the rows.
    now: the time of the newest event that is known, for the column `as_of`; None for no column.

  Returns:
    The table, and counts of the chunk's rows: 'rows', 'unknown_users', 'unknown_items' and of these
    'no_user', 'no_item', without any; 'cut_lists' and 'unknown context.f', of `Coder.context`;
    'among', of `Scored`.
  """
  data, K = config.data, request.top_k
  name, none = chunk.texts[data.user], 0
  context = coder.context(chunk.texts) if TASKS[config.task].context else Context({}, {}, 0)
  record, item = coder.records(name), None
  if K is None:
    item, none = coder.items(chunk.texts[data.item]), chunk.texts[data.item].null_count
  history = None if chunk.history is None else coder.histories(chunk.history)
  if history is not None:
    end = history.counts()
  else:
    end = people.counts(record) if chunk.time is None else people.before(record, chunk.time)
  asked = Asked(name, record, end, chunk.time, item, context.codes, history)
  found = scorer.pairs(asked) if K is None else scorer.best(asked, _most(K, store))
  known_user = people.rows(record) > 0
  counts = dict(
    rows=len(record),
    unknown_users=int(np.sum(~known_user)),
    unknown_items=0 if item is None else int(np.sum(item == 0)),
    no_user=name.null_count,
    no_item=none,
    cut_lists=context.cut,
    among=found.among,
    **{f'{UNKNOWN}{key}': rows for key, rows in context.unknown.items()},
  )
  if K is None:
    columns = _columns(config, now, found.score, known_user, found.events, item > 0)
    return _beside(chunk.kept, columns), counts
  row, place = np.nonzero(np.isfinite(found.score))
  columns = {
    'rank': place.astype(np.int32) + np.int32(1),
    data.item: store.raw_ids('item').take(pa.array(found.item[row, place])),
    **_columns(config, now, found.score[row, place], known_user[row], found.events[row]),
  }
  return _beside(chunk.kept.take(pa.array(row)), columns), counts


def _most(K, store):
  return max(1, min(K, store.vocabulary['item'] - 1))


def _columns(config, now, score, known_user, events, known_item=None):
  columns = {'score': pa.array(score, mask=np.isnan(score))}
  if TASKS[config.task].probability:
    columns['probability'] = scipy.special.expit(score)
  columns['known_user'] = known_user
  if known_item is not None:
    columns['known_item'] = known_item
  columns['events'] = events
  return columns if now is None else columns | {'as_of': pa.repeat(now, len(events))}


def _beside(kept, columns):
  for name, column in columns.items():
    kept = kept.append_column(name, column if isinstance(column, pa.ChunkedArray) else [column])
  return kept


def line_of(found: dict[str, Any]) -> str:
  """What `predict` did, in a line."""

  def unknown(what):
    none = f' ({found[f"no_{what}"]:,} of them without one)' if found[f'no_{what}'] else ''
    return f'{found[f"unknown_{what}s"]:,} rows of unknown {what}s{none}'

  said = [f'{found["rows"]:,} rows of {found["users"]:,} users', unknown('user')]
  if found['top_k'] is None:
    said.append(unknown('item'))
  for key, rows in found.items():
    if key.startswith(UNKNOWN) and rows:
      feature = key.removeprefix(f'{UNKNOWN}context.')
      said.append(f'{rows:,} rows with a {feature} that training did not see')
  if found['cut_lists']:
    said.append(f'{found["cut_lists"]:,} lists longer than those of the log, cut')
  if found['history']:
    said.append(f'each on the history of its {found["history"]!r}')
  elif found['time']:
    said.append(f'each as of its {found["time"]!r}, on the events strictly before')
  elif found['now'] is None:
    said.append('as of the end of the log, which has no times')
  else:
    said.append(f'as of {found["now"]}, the newest event')
  if found['among']:
    said.append(
      f'{found["among"]:,} rows lie among events newer than those of the store, which are left out'
    )
  if before := found['rows'] - found['scored']:
    said.append(f'{before:,} of the rows were scored before')
  speed = found['scored'] / max(found['seconds'], 1e-9)
  said += [f'{found["seconds"]:.1f} s', f'{speed:,.0f} rows a second']
  return f'{found["path"]}: {"; ".join(said)}'
