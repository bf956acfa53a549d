"""What the service does with a request: what is known of the user, the model's answer, new events.

history   of the request, else of the store of users, else of the export
state     (next-item models) of the store if this export made it, else made of the history
"""

import asyncio
import contextlib
import random
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from lmn_jax.data.times import Clock
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.serving.batcher import Batcher
from lmn_jax.serving.hot_swap import LiveExport, NotReady
from lmn_jax.serving.metrics import Meters
from lmn_jax.serving.users.history import merged
from lmn_jax.serving.users.records import NOBODY, Event, Record, UserStore

THREADS = 16  # that wait for the store of users and look ids up
TRIES = 20  # to write a user whom others write at the same time


class NoStore(Exception):
  """Events cannot be kept; the message is a line."""


class Question(NamedTuple):
  """A request of a user's. history: raw ids, oldest first; None: what is known of him."""

  user: str
  history: list[str] | None
  context: dict[str, str]
  profile: dict[str, str]


class Sent(NamedTuple):
  """An event as it was sent. time: a number or a text, None for none. id: '' for none."""

  item: str
  time: int | float | str | None
  id: str


class Known(NamedTuple):
  """What is known of a user. record: of the store. events: oldest first. state: None to be made."""

  record: Record
  events: list[Event]
  state: Any

  @property
  def items(self) -> list[str]:
    """Of the events."""
    return [event.item for event in self.events]


class Service:
  """An export, users and a queue of requests; used in one event loop.

  Attributes:
    settings: see serving/settings.py. meters: of the process. live: the export. store: of users or
    None.
    stopping: whether it is being stopped.
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
      settings: see serving/settings.py. export: the folder, or a link to it. open_bundle: gives the
        Bundle of a folder. store: of users.
    """
    self.settings, self.store = settings, store
    self.meters, self.stopping = Meters(), False
    self.live = LiveExport(export, open_bundle, settings.watch_s, self.meters)
    self._locks = weakref.WeakValueDictionary()

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """While it lasts requests are answered, as soon as the export is open."""
    few = self.settings
    self._batcher = Batcher(few.max_batch, few.wait_ms / 1000, few.max_queue, self._note_batch)
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
    self.meters.batches.observe(size)
    self.live.note_compiled()

  async def _compute(self, run, function, request, deadline):
    """An answer of the model's. run: of the batcher."""
    self.meters.queue.set(len(self._batcher) + 1)
    try:
      return await run(function, request, deadline)
    finally:
      self.meters.queue.set(len(self._batcher))

  async def _in_steps(self, steps, request, deadline):
    """An answer that takes long: others are answered between its steps."""
    return await self._compute(self._batcher.run_steps, steps, request, deadline)

  async def _scores(self, answers, asked, candidates, deadline):
    """Scores of so many candidates: few wait neither for many nor for very many."""
    sizes = answers.bundle.candidate_sizes
    if candidates > sizes[-1]:
      return await self._in_steps(answers.score_pieces, asked, deadline)
    function = answers.score if candidates <= sizes[0] else answers.score_many
    return await self._compute(self._batcher.run, function, asked, deadline)

  # Users.

  async def _blocking(self, function, *arguments):
    """Runs what waits for a disk or the network."""
    return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

  def _known(self, bundle, user, all_events):
    """Known of a user. all_events: whether they are needed, with times, besides a state."""
    record = self.store.get(user) if self.store else NOBODY
    if not record.version:
      items = bundle.known_history(user)
      times = bundle.known_times(user) if all_events else [None] * len(items)
      return Known(record, list(map(Event, items, times)), None)
    state = None
    if record.state is not None and record.tag == bundle.fingerprint:
      # Of the same fingerprint and not of its size: spoilt, and made anew.
      with contextlib.suppress(RequestError):
        state = bundle.unpack(record.state)
    if state is not None and not all_events:
      return Known(record, [], state)
    most = self.store.keep
    if bundle.task == 'click' and not all_events:
      most = min(most, bundle.length)
    return Known(record, self.store.events(user, most), state)

  def _met(self, user):
    """Items that a user of the store has met."""
    if not self.store:
      return []
    return [event.item for event in self.store.events(user, self.store.keep)] + self.store.met(user)

  async def _ask(self, answers, question, candidates, deadline):
    """(the request in rows, what is known of the user)."""
    bundle, user = answers.bundle, question.user
    if question.history is None:
      known = await self._blocking(self._known, bundle, user, False)
    else:
      known = Known(NOBODY, list(map(Event, question.history)), None)
    state = known.state
    if state is None and bundle.whole:  # long histories are read by the model
      state = await self._in_steps(answers.state, (user, None, known.items), deadline)
    asked = await self._blocking(
      bundle.ask, user, candidates, known.items, question.context, question.profile, state
    )
    return asked, known

  def _flags(self, bundle, asked, known, degraded):
    if degraded:
      self.meters.degraded.inc()
    return {
      'user_known': asked.user_known or known.record.version > 0,
      'events': asked.events,
      'unknown_features': asked.unknown_features,
      'model': bundle.model,
      'export': bundle.fingerprint,
      'degraded': degraded,
    }

  # Requests.

  async def score(
    self, question: Question, candidates: list[str], deadline: float
  ) -> dict[str, Any]:
    """Scores of candidates, see api.ScoreAnswer. deadline: in time of the event loop."""
    answers = self.live.answers()
    asked, known = await self._ask(answers, question, candidates, deadline)
    values, degraded = await self._scores(answers, asked, len(candidates), deadline)
    found = {'scores': [finite(x) for x in values.tolist()]}
    if answers.bundle.task == 'click':
      odds = np.exp(-np.abs(values.astype(np.float64)))
      chance = np.where(values < 0, odds, 1.0) / (1.0 + odds)
      found['probabilities'] = [finite(x) for x in chance.tolist()]
    found['unknown_candidates'] = asked.unknown
    return found | self._flags(answers.bundle, asked, known, degraded)

  async def recommend(
    self, question: Question, k: int, exclude: list[str], exclude_seen: bool | None, deadline: float
  ) -> dict[str, Any]:
    """The best items, see api.RecommendAnswer. deadline: in time of the event loop."""
    answers = self.live.answers()
    asked, known = await self._ask(answers, question, None, deadline)
    if exclude_seen is None:
      exclude_seen = answers.bundle.exclude_seen
    if exclude_seen:
      exclude = exclude + await self._blocking(self._met, question.user)
    request = (asked, k, exclude, exclude_seen)
    pairs, degraded = await self._in_steps(answers.recommend, request, deadline)
    found = {'items': [{'item': item, 'score': finite(score)} for item, score in pairs]}
    return found | self._flags(answers.bundle, asked, known, degraded)

  async def update(self, user: str, sent: list[Sent], deadline: float) -> dict[str, Any]:
    """Takes new events in, see api.UpdateAnswer.

    Args:
      user: raw id. sent: events; all have times, or none has: then they are in their order.
      deadline: in time of the event loop.

    Raises:
      RequestError: a time that cannot be one of the log's. NoStore: there is none. NotReady: others
        write this user all the time.
    """
    if self.store is None:
      raise NoStore('events are not kept here; start the service with --serve.users=PATH.sqlite')
    answers = self.live.answers()
    new = [event_of(n, one, answers.clock) for n, one in enumerate(sent)]
    # Requests of this process take their turns; the version is for other processes.
    lock = self._locks.setdefault(user, asyncio.Lock())
    async with lock:
      for _ in range(TRIES):
        found = await self._update(answers, user, new, deadline)
        if found is not None:
          return found
        await asyncio.sleep(random.uniform(0, 0.01))
    raise NotReady(f'user {user!r} is being written by others; try again in a moment')

  async def _update(self, answers, user, new, deadline):
    """One try; None if somebody else was faster."""
    bundle, clock = answers.bundle, answers.clock
    known = await self._blocking(self._known, bundle, user, True)
    record, held, state = known
    begin = 0
    if not bundle.whole:
      state = None  # made of the newest window
    elif state is not None:
      # A new event stands among those that the state has not read for good, or after them.
      folded, still_open = bundle.folded(state)
      begin = len(held) - still_open
      if begin < 0:
        begin = len(held)
      else:
        state = folded
    placed = merged(held, new, begin)
    found = {
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
      return found
    packed, tag = None, ''
    if bundle.task == 'next_item':
      events = held[begin : placed.first] + placed.events
      most = self.store.keep if bundle.whole else bundle.length
      items = [event.item for event in (events if state is not None else events[-most:])]
      state = await self._in_steps(answers.state, (user, state, items), deadline)
      packed, tag = bundle.pack(state), bundle.fingerprint
    # Who is new to the store brings what the export knew of them.
    replaced = len(held) - placed.first if record.version else 0
    written = placed.events if record.version else held[: placed.first] + placed.events
    put = self.store.put
    done = await self._blocking(put, user, record.version, replaced, written, tag, packed)
    return found if done else None


def event_of(number: int, sent: Sent, clock: Clock) -> Event:
  """An event that was sent, its time as the store of the log has times.

  Raises:
    RequestError: it cannot be a time of the log.
  """
  if sent.time is None:
    return Event(sent.item, None, sent.id)
  try:
    return Event(sent.item, clock.parse(sent.time), sent.id)
  except ValueError as error:
    raise RequestError(f'events.{number}.time={sent.time!r}: {error}') from None


def finite(x: float) -> float | None:
  """A number of JSON, which has no NaN: null instead."""
  return x if np.isfinite(x) else None
