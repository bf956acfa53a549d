"""--mode=states: computes the states of all users, and updates them with new events.

A log of new events is added in one transaction: all of it or nothing. The first command reads all
histories of the store, later ones the new events only.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from lmn_jax.data.new_events import Events, events_of_log, events_of_store, log_of
from lmn_jax.data.reads import seconds_of
from lmn_jax.data.store import Store
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError
from lmn_jax.inference.state_table import (
  CHUNK,
  FILE,
  OLDEST,
  Newest,
  StateTable,
  fingerprint,
  open_table,
  store_log,
)
from lmn_jax.inference.user_states import StatefulModel, stateful_model
from lmn_jax.training import trained_run
from lmn_jax.training.item_rows import fold_item_fields
from lmn_jax.training.program import State
from lmn_jax.training.tasks import TASKS

COUNTS = ('users', 'events', 'new_users', 'old_events')


def new_events(items: np.ndarray, times: np.ndarray, newest: Newest | None) -> np.ndarray:
  """Returns which events of a user were not added before.

  These are the events newer than the newest one held, and events of the same time beyond those of
  the same item that are held.
  """
  if newest is None:
    return np.ones(len(times), bool)
  new = times > newest.time
  if newest.items is not None:
    held = Counter(newest.items.tolist())
    for n in np.flatnonzero(times == newest.time):
      new[n] = not held[items[n]]
      held[items[n]] -= not new[n]
  return new


def newest_of(
  items: np.ndarray, times: np.ndarray, newest: Newest | None, new: np.ndarray
) -> Newest:
  """Returns a user's newest events after the `new` ones of these events are added."""
  before = newest or Newest(OLDEST, np.zeros(0, np.int32))
  time = max([before.time, *times[new][-1:].tolist()])
  latest = items[new & (times == time)]
  if time == before.time:
    return Newest(time, None if before.items is None else np.concatenate([before.items, latest]))
  return Newest(time, latest)


def add_events(
  table: StateTable, model: StatefulModel, state: State, events: Iterator[Events], clock: Clock
) -> dict[str, int]:
  """Updates the states with new events, within `writing`.

  Args:
    table: of the states. model, state: the model and its weights. events: of users, each user once.
    clock: of the store. Events that were added before, by their times and items, are skipped; see
      `new_events`. Where a log has no times all events are new.

  Returns:
    Counts: 'users' and 'events' added, 'new_users', and 'old_events' skipped.
  """
  counts = dict.fromkeys(COUNTS, 0)
  for chunk in events:
    states, newest = table.get(chunk.user, model.empty(chunk.row))
    users = list(zip(chunk.items, chunk.times, newest, strict=True))
    masks = [new_events(*user) if clock.timed else np.ones(len(user[0]), bool) for user in users]
    added = [_selected(model.reads, chunk, n, new, clock) for n, new in enumerate(masks)]
    latest = [newest_of(*user, new) for user, new in zip(users, masks, strict=True)]
    table.put(chunk.user, model.update(state, states, added), latest)
    counts['users'] += len(chunk.user)
    counts['new_users'] += newest.count(None)
    counts['events'] += sum(int(np.sum(new)) for new in masks)
    counts['old_events'] += sum(int(np.sum(~new)) for new in masks)
  return counts


def _selected(reads, chunk, user, new, clock):
  """Returns the `new` ones of a user's events, as segment_states.py has them."""
  events = {'item': chunk.items[user][new]}
  events |= {key: chunk.features[key][user][new] for key in reads.events}
  return events | ({'time': seconds_of(clock, chunk.times[user][new])} if reads.time else {})


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses, before anything is read, a command that cannot have states.

  Raises:
    UserError: a task without states, or several hosts.
  """
  if not TASKS[config.task].states:
    raise UserError(
      f"--mode=states needs config.task='next_item'; models of this run's task, {config.task!r}, "
      'keep no states'
    )
  if jax.process_count() > 1:
    raise UserError(
      f'--mode=states runs on one host, and {jax.process_count()} were started; start one'
    )


def update_states(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, events: str
) -> dict[str, Any]:
  """Computes the states of all users of the store, or updates them with the events of a log.

  Args:
    config: of a trained run. workdir: of the run. store: its data.
    events: a log of new events, see `log_of`; '' for none.

  Returns:
    Counts of `add_events`, None where there was nothing to read, with 'path', 'users_in_all' and
    'seconds'.

  Raises:
    UserError: a task without states; no checkpoint; states of another model; a log that was added
      before; a run that another command uses.
  """
  check(config)
  trained_run.check_trained(workdir)
  with trained_run.only_command(workdir):
    return _update_states(config, workdir, store, events)


def _update_states(config, workdir, store, events):
  start = time.monotonic()
  trained, best = trained_run.best_of(config, workdir, store)
  setup, state = fold_item_fields(trained, best.state)
  model = stateful_model(config, setup)
  if events and model.reads.time and not store.clock.timed:
    raise UserError(
      f'--events={events}: the log of the store has no times, so the time from its events to new '
      f'ones is not known, which config.model.time={config.model.time!r} needs; train with '
      "config.model.time='none', or on a log with times"
    )
  table = open_table(workdir, store, model, fingerprint(best.state))
  size, clock = CHUNK * config.eval_batch_size, store.clock
  scratch = workdir / '.states'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a command that was killed
  try:
    with table.writing():
      counts = dict.fromkeys(COUNTS)
      if table.note(store_log(store)):
        counts = add_events(table, model, state, events_of_store(store, size), clock)
      if events:
        data, content = log_of(config.data, events)
        if not table.note(content):
          raise UserError(
            f'--events={events}: these events were added before; nothing was changed; give a log '
            'of newer events'
          )
        log = events_of_log(data, store, scratch, size)
        counts = add_events(table, model, state, log, clock)
    users = table.users()
  finally:
    table.close()
    shutil.rmtree(scratch, ignore_errors=True)
  return counts | {
    'path': str(workdir / FILE),
    'users_in_all': users,
    'seconds': time.monotonic() - start,
  }


def line_of(report: dict[str, Any]) -> str:
  """Returns a line about the result of `update_states`."""
  if report['events'] is None:
    return (
      f'{report["path"]}: {report["users_in_all"]:,} users; up to date, no new events were given'
    )
  old = f', {report["old_events"]:,} skipped as older' if report['old_events'] else ''
  return (
    f'{report["path"]}: {report["events"]:,} events of {report["users"]:,} users added, '
    f'{report["new_users"]:,} of them new{old}; {report["users_in_all"]:,} users in all; '
    f'{report["seconds"]:.1f} s'
  )
