"""The service: it looks up a user's history, computes answers of the model, and stores new events.

history   of the request, otherwise of the store of users, otherwise of the export
state     (next-item models) of the store if this export computed it, otherwise from the history
"""

import asyncio
import contextlib
import json
import random
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from lmn_jax.data.times import Clock
from lmn_jax.export.runtime.histories import KnownEvent
from lmn_jax.export.runtime.labels import probability
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.serving.batcher import Batcher
from lmn_jax.serving.hot_swap import LiveExport, NotReady
from lmn_jax.serving.metrics import Metrics
from lmn_jax.serving.users.history import merged
from lmn_jax.serving.users.records import NO_RECORD, Event, Record, UserStore

THREADS = 16  # for the store of users and for looking up ids
TRIES = 20  # to write a user that other processes write at the same time


class NoStore(Exception):
  """There is no store of users; the message is one line."""


class Query(NamedTuple):
  """A request about a user.

  history: events as for `Bundle.ask`; None: the events known of the user. time: of the request, a
  number or a string; None for none.
  """

  user: str
  history: list[str | dict[str, Any]] | None
  context: dict[str, str]
  profile: dict[str, str]
  time: int | float | str | None = None


class SentEvent(NamedTuple):
  """An event of a request.

  time: a number or a string, None for none. id: '' for none. features: raw values by name.
  """

  item: str
  time: int | float | str | None
  id: str
  features: dict[str, str]


class User(NamedTuple):
  """A user's data.

  record: of the store. events: stored ones, or those that would be, oldest first. state: None if
  not computed yet. history: the events for `Bundle.ask`.
  """

  record: Record
  events: list[Event]
  state: Any
  history: Any


class Service:
  """Answers requests with an export and a store of users; used in one event loop.

  Attributes:
    settings: see serving/settings.py. metrics: of the process. live: the export. store: of users,
      or None. stopping: whether the service is being stopped.
  """

  def __init__(
    self,
    settings: ml_collections.ConfigDict,
    export: Path,
    open_bundle: Callable[[Path], Any],
    store: UserStore | None,
  ):
    """Opens nothing yet.

    Args:
      settings: see serving/settings.py. export: the folder, or a link to it. open_bundle: opens
        the Bundle of a folder. store: of users.
    """
    self.settings, self.store = settings, store
    self.metrics, self.stopping = Metrics(), False
    self.live = LiveExport(export, open_bundle, settings.watch_s, self.metrics)
    self._locks = weakref.WeakValueDictionary()

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """A context in which requests are answered, as soon as the export is open."""
    x = self.settings
    self._batcher = Batcher(x.max_batch, x.wait_ms / 1000, x.max_queue, self._note_batch)
    self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix='users')
    try:
      async with self.live.watching():
        yield
    finally:
      self.stopping = True
      await self._batcher.close()
      self._threads.shutdown()
      if self.store:
        self.store.close()

  def _note_batch(self, size):
    self.metrics.batches.observe(size)
    self.live.note_compiled()

  async def _compute(self, run, function, request, deadline):
    """Returns an answer of the model. run: a method of the batcher."""
    self.metrics.queue.set(len(self._batcher) + 1)
    try:
      return await run(function, request, deadline)
    finally:
      self.metrics.queue.set(len(self._batcher))

  async def _in_steps(self, steps, request, deadline):
    """Returns an answer that takes long: others are computed between its steps."""
    return await self._compute(self._batcher.run_steps, steps, request, deadline)

  async def _scores(self, answers, request, candidates, deadline):
    """Returns scores; requests with few candidates do not wait for those with many."""
    sizes = answers.bundle.candidate_sizes
    if candidates > sizes[-1]:
      return await self._in_steps(answers.score_pieces, request, deadline)
    function = answers.score if candidates <= sizes[0] else answers.score_many
    return await self._compute(self._batcher.run, function, request, deadline)

  # Users.

  async def _blocking(self, function, *arguments):
    """Runs a function that waits for a disk or the network."""
    return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

  def _user(self, bundle, user, all_events):
    """Returns the User. all_events: whether events, with times, are needed besides a state."""
    record = self.store.get(user) if self.store else NO_RECORD
    if not record.version:
      return _exported(bundle, user, all_events)
    state = None
    if record.state is not None and record.tag == bundle.fingerprint:
      # A damaged state is computed again from the events.
      with contextlib.suppress(RequestError):
        state = bundle.unpack(record.state)
    if state is not None and not all_events:
      return User(record, [], state, [])
    most = self.store.keep
    if bundle.task == 'click' and not all_events:
      most = min(most, bundle.length)
    events = self.store.events(user, most)
    return User(record, events, state, history_of(events, bundle))

  def _met(self, user):
    """Returns the items that a user of the store has met."""
    if not self.store:
      return []
    return [event.item for event in self.store.events(user, self.store.keep)] + self.store.met(user)

  async def _ask(self, answers, query, candidates, deadline):
    """Returns (the request in rows, the User)."""
    bundle, name = answers.bundle, query.user
    if query.history is None:
      user = await self._blocking(self._user, bundle, name, False)
    else:
      user = User(NO_RECORD, [], None, query.history)
    if query.time is not None:
      parsed('time', query.time, answers.clock)
    state = user.state
    if state is None and bundle.whole:  # the model reads a history that may be long
      state = await self._in_steps(answers.state, (name, None, user.history), deadline)
    arguments = (candidates, user.history, query.context, query.profile, state, query.time)
    return await self._blocking(bundle.ask, name, *arguments), user

  def _flags(self, bundle, request, user, degraded):
    if degraded:
      self.metrics.degraded.inc()
    return {
      'user_known': request.user_known or user.record.version > 0,
      'events': request.events,
      'unknown_features': request.unknown_features,
      **({'missing': request.missing} if request.missing else {}),
      'model': bundle.model,
      'export': bundle.fingerprint,
      'degraded': degraded,
    }

  # Requests.

  async def score(self, query: Query, candidates: list[str], deadline: float) -> dict[str, Any]:
    """Returns a schemas.ScoreAnswer. deadline: in time of the event loop."""
    answers = self.live.answers()
    request, user = await self._ask(answers, query, candidates, deadline)
    scores = await self._scores(answers, request, len(candidates), deadline)
    log_odds = answers.bundle.labels.log_odds
    answer = scores_of(scores.values, log_odds)
    if scores.labels:
      answer['labels'] = {name: scores_of(x, log_odds) for name, x in scores.labels.items()}
    answer['unknown_candidates'] = request.unknown
    if request.cold:
      answer['cold_candidates'] = request.cold
    return answer | self._flags(answers.bundle, request, user, scores.degraded)

  async def recommend(
    self,
    query: Query,
    k: int,
    exclude: list[str],
    exclude_seen: bool | None,
    by: str | dict[str, Any] | None,
    deadline: float,
  ) -> dict[str, Any]:
    """Returns a schemas.RecommendAnswer.

    by: see `Bundle.recommend`. deadline: in time of the event loop.
    """
    answers = self.live.answers()
    request, user = await self._ask(answers, query, None, deadline)
    if exclude_seen is None:
      exclude_seen = answers.bundle.exclude_seen
    if exclude_seen:
      exclude = exclude + await self._blocking(self._met, query.user)
    arguments = (request, k, exclude, exclude_seen, by)
    pairs, degraded = await self._in_steps(answers.recommend, arguments, deadline)
    answer = {'items': [{'item': item, 'score': finite(score)} for item, score in pairs]}
    return answer | self._flags(answers.bundle, request, user, degraded)

  async def update(self, user: str, events: list[SentEvent], deadline: float) -> dict[str, Any]:
    """Stores new events, and returns a schemas.UpdateAnswer.

    Args:
      user: raw id. events: all with times, or all without, newest last. deadline: in time of the
        event loop.

    Raises:
      RequestError: a time of another form than those of the log. NoStore: there is no store.
      NotReady: other processes kept writing this user.
    """
    if self.store is None:
      raise NoStore('the service has no store of users; start it with --serve.users=PATH.sqlite')
    answers = self.live.answers()
    new = [event_of(n, event, answers) for n, event in enumerate(events)]
    # The lock orders the requests of this process, the version those of all processes.
    lock = self._locks.setdefault(user, asyncio.Lock())
    async with lock:
      for _ in range(TRIES):
        answer = await self._update(answers, user, new, deadline)
        if answer is not None:
          return answer
        await asyncio.sleep(random.uniform(0, 0.01))
    raise NotReady(f'user {user!r} is being written by other processes; try again in a moment')

  async def _update(self, answers, user, new, deadline):
    """Tries once; returns None if another process wrote the user first."""
    bundle, clock = answers.bundle, answers.clock
    record, held, state, _ = await self._blocking(self._user, bundle, user, True)
    begin = 0
    if not bundle.whole:
      state = None  # it is computed from the newest window
    elif state is not None:
      # New events are placed among the events after the last full segment, or after them: the
      # model has read the others for good.
      folded, recent = bundle.folded(state)
      begin = len(held) - recent
      if begin < 0:
        begin = len(held)
      else:
        state = folded
    placed = merged(held, new, begin)
    answer = {
      'events_taken': placed.taken,
      'events_repeated': placed.repeated,
      'events_late': placed.late,
      'time_form': clock.form,
      'time_unit': clock.unit,
      'user_known': record.version > 0 or bool(held),
      'model': bundle.model,
      'export': bundle.fingerprint,
    }
    if not placed.taken:
      return answer
    packed, tag = None, ''
    if bundle.task == 'next_item':
      events = held[begin : placed.first] + placed.events
      most = self.store.keep if bundle.whole else bundle.length
      history = history_of(events if state is not None else events[-most:], bundle)
      state = await self._in_steps(answers.state, (user, state, history), deadline)
      packed, tag = bundle.pack(state), bundle.fingerprint
    # A user who is new to the store is stored with their events in the export.
    replaced = len(held) - placed.first if record.version else 0
    written = placed.events if record.version else held[: placed.first] + placed.events
    put = self.store.put
    done = await self._blocking(put, user, record.version, replaced, written, tag, packed)
    return answer if done else None


def _exported(bundle, user, all_events):
  """Returns a User who is not in the store, with their events in the export."""
  if bundle.rich and all_events:
    known = bundle.known_events(user)
    events = [Event(x.item, x.time, '', json_of(x.features)) for x in known]
    return User(NO_RECORD, events, None, known)
  if bundle.rich:
    return User(NO_RECORD, [], None, bundle.exported(user))
  items = bundle.known_history(user)
  times = bundle.known_times(user) if all_events else [None] * len(items)
  return User(NO_RECORD, list(map(Event, items, times)), None, items)


def history_of(events: Sequence[Event], bundle: Any) -> list:
  """Returns stored events as the model reads them: items, with times and features if it does."""
  if not bundle.rich:
    return [event.item for event in events]
  return [
    KnownEvent(event.item, event.time, json.loads(event.features) if event.features else {})
    for event in events
  ]


def json_of(features: Mapping[str, Any]) -> str:
  """Returns features as they are stored: a JSON object without missing values, '' for none."""
  present = {name: x for name, x in features.items() if x is not None}
  return json.dumps(present, ensure_ascii=False) if present else ''


def event_of(number: int, sent: SentEvent, answers: Any) -> Event:
  """Returns an event with its time as an integer of the log.

  Args:
    number: for the message. sent: the event. answers: hot_swap.Answers of the export in use.

  Raises:
    RequestError: a time of another form than those of the log, or a feature that the model does not
      have or cannot read.
  """
  time = sent.time
  if time is not None:
    time = parsed(f'events.{number}.time', time, answers.clock)
  try:
    answers.bundle.check_event(sent.features, time)
  except RequestError as error:
    raise RequestError(f'events.{number}: {error}') from None
  return Event(sent.item, time, sent.id, json_of(sent.features))


def parsed(name: str, time: int | float | str, clock: Clock) -> int:
  """Returns a time as an integer of the log. name: for the message.

  Raises:
    RequestError: it has another form than those of the log.
  """
  try:
    return clock.parse(time)
  except ValueError as error:
    raise RequestError(f'{name}={time!r}: {error}') from None


def scores_of(values: np.ndarray, log_odds: bool) -> dict[str, list[float | None]]:
  """Returns scores [C] for an answer, with probabilities if they are log-odds."""
  answer = {'scores': [finite(x) for x in values.tolist()]}
  if log_odds:
    answer['probabilities'] = [finite(x) for x in probability(values).tolist()]
  return answer


def finite(x: float) -> float | None:
  """Returns a number for JSON, which has no NaN: None instead."""
  return x if np.isfinite(x) else None
