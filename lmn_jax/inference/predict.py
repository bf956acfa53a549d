"""--mode=predict: scores of a file's rows by the best checkpoint of a run, or users' best items.

Rows of a user and an item get the columns

  score        float32; log-odds of click models, or the number that they predict; a dot product of
               next-item models
  probability  of click models: sigmoid(score); with several labels `score.NAME` and
               `probability.NAME` of each label, and best items are those of the main label
  known_user, known_item    whether training saw the id, so that it has an embedding row
  cold_item    only with config.data.cold_items: whether training did not see the item, and its
               features or vectors are known
  events       number of the user's events that the score is based on
  as_of        time of the newest known event, if the rows have no times of their own

With --top_k=K a user's row becomes K rows, or fewer where there are fewer candidates: with `rank`,
1 to K, the raw id of the item, and the columns above but known_item. All columns and the order of
the file are kept. Ids are raw ids, in the input and in the output.

  a user of the store that training did not see   embedding row 0, their profile and history
  a user that is not in the store, or missing     row 0, unknown profile, no history
  an item that training did not see, or missing   clicks: the unknown item's score, of a cold item
                                                  by its features; next items: null
  a user without events                           next items: score 0 for all

A click model reads the newest events of a history, a next-item model all. The latter continues from
the states that --mode=states keeps, which may hold newer events; their items count as met as far as
the state holds them. States keep no times of newer events: a row whose time is among these is
scored on the store's events only, and counted. scorers.py describes candidates and ties,
data/input_rows.py how a file is read.

A file with the log's column of times, config.data.time, is scored without the future: each row on
the events of its user strictly before its time, as an example of the store is, and its best items
leave out items met before that time. A file without this column is scored on all known events. If
it is made of the log's rows, these include the rows' own events, so scores have seen what they
predict. The printed line and `as_of` give the time of the newest event that was read.

A model that reads times (config.model.time) has the gaps from the events to the time of the row.
Where rows have no times it is the newest time that is known, that of `as_of`; where the log has no
times, the newest position of the store. Features of events are those of the store and the states.

Where config.data.row_history names a column of histories, a file with this column is scored on
these and not on the store; its times are not used. A file without it is scored on the newest
history of each user in the store, and must have no times.

The file is first copied into a table in the workdir, about as large as the file and deleted at the
end. Its rows are scored in chunks, and each chunk is written as a part into OUTPUT.parts; the
same command, repeated, continues after the last part. At the end the parts are joined.
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

from lmn_jax.data import input_rows, interactions, labels
from lmn_jax.data.input_rows import Chunk, Coder, Context, RawRows
from lmn_jax.data.readers import paths
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.evaluation.part_files import Parts, check_output
from lmn_jax.inference import state_table
from lmn_jax.inference.queries import Queries
from lmn_jax.inference.scorers import Scorer, make_scorer
from lmn_jax.inference.stored_users import StoredUsers
from lmn_jax.training import trained_run
from lmn_jax.training.tasks import TASKS

log = logging.getLogger(__name__)
ROWS = 2**16  # of a part, about
UNKNOWN = 'unknown '  # before the key of a feature: counts rows with a value new to training


class Request(NamedTuple):
  """input: files, a path or a glob. output: .parquet or .csv. top_k: K; None scores pairs."""

  input: str
  output: Path
  top_k: int | None = None


class Predictor(NamedTuple):
  """Scores chunks of a file.

  config, store, top_k: of the command. scorer: of the model. coder: of raw ids and values. users:
  of the store. now: time of the newest known event, as in the store. as_of: the same for the column
  of this name; None for no column.
  """

  config: ml_collections.ConfigDict
  store: Store
  top_k: int | None
  scorer: Scorer
  coder: Coder
  users: StoredUsers
  now: int
  as_of: pa.Scalar | None


def check(request: Request) -> None:
  """Refuses a request that is wrong whatever the data are.

  Raises:
    UserError: the flag, its value and the bound.
  """
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=predict runs on one host, and {jax.process_count()} were started; start one'
    )
  if not request.input:
    raise UserError('--input is missing; give the rows to score, or the users with --top_k')
  input_rows.reader_of(request.input)
  paths.files(request.input, input_rows.FIELD)
  if request.top_k is not None:
    if isinstance(request.top_k, bool) or not isinstance(request.top_k, int | np.integer):
      raise UserError(f'--top_k={request.top_k!r:.80} must be a whole number')
    if request.top_k < 1:
      raise UserError(f'--top_k={request.top_k} must be at least 1')
  check_output(request.output)


def predict(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, request: Request
) -> dict[str, Any]:
  """Scores a file, or continues to.

  Args:
    config: of a trained run. workdir: of the run. store: its data. request: input and output.

  Returns:
    Counts of the rows of the input, see `answer`; 'users', distinct ones in the output; 'scored',
    the rows that this call scored, and its 'seconds'; 'path' and 'top_k'; 'time' and 'history', the
    columns that were used, '' for none; 'now', see `Predictor`.

  Raises:
    UserError: a wrong request; no checkpoint; a run that another command uses; an input that cannot
      be read or has no row; parts of another prediction.
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
  start, data, spill = time.monotonic(), config.data, scratch / 'spill'
  with (
    interactions.connect(scratch / 'input.duckdb', data.memory_limit, spill) as input_db,
    interactions.connect(scratch / 'ids.duckdb', data.memory_limit, spill) as ids_db,
  ):
    columns = required_columns(config, request)
    rows = RawRows(data, request.input, columns, store.clock, input_db, scratch)
    check_columns(config, request, rows)
    setup, best = trained_run.best_of(config, workdir, store)
    weights = state_table.fingerprint(best.state)
    table = state_table.open_complete(config, workdir, store, setup, weights)
    try:
      size = max(1, ROWS // (request.top_k or 1))
      run = {
        'step': best.step,
        'weights': weights,
        'store': store.fingerprint,
        'states': None if table is None else table.logs(),
        'devices': setup.mesh.size,
        'config': config.to_dict(),
      }
      parts = Parts(request.output, run | _origin(request, rows, size))
      scorer = make_scorer(config, store, setup, best.state, table)
      coder, users = Coder(data, store, ids_db), StoredUsers(store)
      now = state_table.newest_time(store, table, setup.sources['train'].reads)
      as_of = _as_of(store, rows, now)
      predictor = Predictor(config, store, request.top_k, scorer, coder, users, now, as_of)
      before = parts.done * size
      if before:
        log.info('%s: continues after %d finished parts', parts.folder, parts.done)
      for begin in range(before, rows.count, size):
        parts.add(*answer(predictor, rows.chunk(begin, size)))
    finally:
      if table is not None:
        table.close()
  return parts.counts() | dict(
    path=str(request.output),
    users=parts.join(data.user, data.memory_limit),
    seconds=time.monotonic() - start,
    scored=max(0, rows.count - before),
    top_k=request.top_k,
    time=rows.time,
    history=rows.history,
    now=None if as_of is None else str(as_of),
  )


def _origin(request, rows, size):
  """Returns what the parts depend on, besides the run."""
  return {
    'input': input_rows.fingerprint(request.input),
    'top_k': request.top_k,
    'time': rows.time,
    'history': rows.history,
    'rows': size,
  }


def _as_of(store, rows, now):
  """Returns the newest time in the form of the log, for rows without times; otherwise None."""
  if not store.clock.timed or rows.time or rows.history:
    return None
  return store.raw_times(np.array([now]))[0]


def required_columns(config: ml_collections.ConfigDict, request: Request) -> dict[str, str]:
  """Returns the columns that the input must have, each with the field that names it."""
  data = config.data
  columns = {data.user: 'config.data.user'}
  if request.top_k is None:
    columns[data.item] = 'config.data.item'
  if TASKS[config.task].context:
    columns |= {name: 'config.data.context_features' for name in data.context_features}
  return columns


def check_columns(config: ml_collections.ConfigDict, request: Request, rows: RawRows) -> None:
  """Refuses an input without rows, or whose columns contradict those of the output.

  Raises:
    UserError: no row, times without the histories that the model needs, or a column whose name the
      output adds.
  """
  if not rows.count:
    raise UserError(f'--input={request.input} has no rows; at least one is expected')
  if rows.time and config.data.row_history and not rows.history:
    raise UserError(
      f'--input={request.input} has the column of times {rows.time!r} but not the column of '
      f'histories {config.data.row_history!r} (config.data.row_history) that the model was trained '
      "on; add it, or remove the times to score on each user's newest history in the store"
    )
  added = [
    'known_user',
    'events',
    *(name.lower() for name in _score_columns(config, request.top_k)),
  ]
  added += ['known_item'] if request.top_k is None else ['rank', config.data.item.lower()]
  added += ['cold_item'] if config.data.cold_items else []
  added += [] if rows.time or rows.history else ['as_of']
  for name in rows.names:
    if name.lower() in added:
      raise UserError(
        f'--input={request.input}: the output adds a column of the name {name!r}, which the input '
        'has too; rename it or leave it out'
      )


def answer(predictor: Predictor, chunk: Chunk) -> tuple[pa.Table, dict[str, int]]:
  """Returns the part of a chunk, and its counts.

  Returns:
    The table, and counts of the chunk's rows: 'rows', 'unknown_users', 'unknown_items' and those of
    them without an id, 'no_user' and 'no_item'; of pairs with cold items 'cold_items'; 'cut_lists'
    and 'unknown context.f', see `Coder.context`; 'among', see `Scores`.
  """
  config, store, K = predictor.config, predictor.store, predictor.top_k
  queries, context = _queries(predictor, chunk)
  if K is None:
    scores = predictor.scorer.pairs(queries)
  else:
    items = store.vocabulary['item'] - 1 + store.cold_items
    scores = predictor.scorer.best(queries, max(1, min(K, items)))
  known_user, item = predictor.users.rows(queries.record) > 0, queries.item
  counts = dict(
    rows=len(known_user),
    unknown_users=int(np.sum(~known_user)),
    unknown_items=0 if item is None else int(np.sum(item == 0)),
    no_user=queries.user.null_count,
    no_item=0 if item is None else chunk.texts[config.data.item].null_count,
    cut_lists=context.cut,
    among=scores.among,
    **{f'{UNKNOWN}{key}': rows for key, rows in context.unknown.items()},
  )
  if item is not None:
    counts |= {'cold_items': int(np.sum(_is_cold(store, item)))} if store.cold_items else {}
    columns = _columns(predictor, scores.score, known_user, scores.events, item)
    return _joined(chunk.rows, columns), counts
  row, place = np.nonzero(np.isfinite(scores.score))
  best = scores.item[row, place]
  columns = {
    'rank': place.astype(np.int32) + np.int32(1),
    config.data.item: store.raw_items().take(pa.array(best)),
    **_columns(predictor, scores.score[row, place], known_user[row], scores.events[row], best),
  }
  return _joined(chunk.rows.take(pa.array(row)), columns), counts


def _queries(predictor: Predictor, chunk: Chunk) -> tuple[Queries, Context]:
  """Returns the rows of a chunk in the ids of the store, and the context features with counts."""
  data, coder, users = predictor.config.data, predictor.coder, predictor.users
  name, item, context = chunk.texts[data.user], None, Context({}, {}, 0)
  if TASKS[predictor.config.task].context:
    context = coder.context(chunk.texts)
  record = coder.records(name)
  if predictor.top_k is None:
    item = coder.items(chunk.texts[data.item])
  history = None if chunk.history is None else coder.histories(chunk.history)
  if history is not None:
    end = history.counts()
  else:
    end = users.counts(record) if chunk.time is None else users.before(record, chunk.time)
  now, codes = predictor.now, context.codes
  return Queries(name, record, end, chunk.time, now, item, codes, history), context


def _score_columns(config, top_k) -> list[str]:
  """Returns the columns of scores and probabilities that the output adds."""
  names = labels.names(config.data)
  suffixes = [''] if len(names) == 1 or top_k is not None else [f'.{name}' for name in names]
  kinds = ('score', 'probability') if TASKS[config.task].probability(config) else ('score',)
  return [f'{kind}{suffix}' for suffix in suffixes for kind in kinds]


def _is_cold(store, item):
  return item > store.vocabulary['item']


def _columns(predictor, score, known_user, events, item):
  """Returns the columns that are added. item: indices of the pairs, or of the best items."""
  columns, store = {}, predictor.store
  names = _score_columns(predictor.config, predictor.top_k)
  by_label = score if score.ndim > 1 else score[:, None]
  for k, name in enumerate(name for name in names if name.startswith('score')):
    of_label = by_label[:, k]
    columns[name] = pa.array(of_label, mask=np.isnan(of_label))
    probability = name.replace('score', 'probability', 1)
    if probability in names:
      columns[probability] = scipy.special.expit(of_label)
  columns['known_user'] = known_user
  if predictor.top_k is None:
    columns['known_item'] = (item > 0) & ~_is_cold(store, item)
  if predictor.config.data.cold_items:
    columns['cold_item'] = _is_cold(store, item)
  columns['events'] = events
  as_of = predictor.as_of
  return columns if as_of is None else columns | {'as_of': pa.repeat(as_of, len(events))}


def _joined(table, columns):
  for name, column in columns.items():
    table = table.append_column(name, column if isinstance(column, pa.ChunkedArray) else [column])
  return table


def line_of(report: dict[str, Any]) -> str:
  """Returns a line about the result of `predict`."""

  def unknown(kind):
    missing = f' ({report[f"no_{kind}"]:,} of them without one)' if report[f'no_{kind}'] else ''
    return f'{report[f"unknown_{kind}s"]:,} rows of unknown {kind}s{missing}'

  phrases = [f'{report["rows"]:,} rows of {report["users"]:,} users', unknown('user')]
  if report['top_k'] is None:
    phrases.append(unknown('item'))
  if report.get('cold_items'):
    phrases.append(f'{report["cold_items"]:,} rows of cold items, scored by features and vectors')
  for key, rows in report.items():
    if key.startswith(UNKNOWN) and rows:
      feature = key.removeprefix(f'{UNKNOWN}context.')
      phrases.append(f'{rows:,} rows with a {feature} that training did not see')
  if report['cut_lists']:
    phrases.append(f'{report["cut_lists"]:,} lists longer than those of the log, cut')
  if report['history']:
    phrases.append(f'each scored on the history in its {report["history"]!r}')
  elif report['time']:
    phrases.append(f'each scored on the events strictly before its {report["time"]!r}')
  elif report['now'] is None:
    phrases.append('scored as of the end of the log, which has no times')
  else:
    phrases.append(f'scored as of {report["now"]}, the newest event')
  if report['among']:
    phrases.append(
      f"{report['among']:,} rows have times among events newer than the store's, and are scored "
      'without these'
    )
  if before := report['rows'] - report['scored']:
    phrases.append(f'{before:,} of the rows were scored before')
  speed = report['scored'] / max(report['seconds'], 1e-9)
  phrases += [f'{report["seconds"]:.1f} s', f'{speed:,.0f} rows a second']
  return f'{report["path"]}: {"; ".join(phrases)}'
