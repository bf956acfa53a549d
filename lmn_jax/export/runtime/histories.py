"""Histories of requests, as the arrays of events that a model reads (see segment_states.py).

An event of a request is the raw id of an item, or a dict with names of the log:

    {'item': 'i7', 'time': 1700000000, 'dwell': 3.5}

`time` has the form of the log's times; the other names are event features. What is missing takes a
neutral value, and its key is in `History.missing`: the code of the unknown value, NaN for a number,
and for an event without a time a gap of 0, as of an event at the time of the request.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmn_jax.data.times import Clock
from lmn_jax.export.runtime.click import GAP
from lmn_jax.export.runtime.raw_values import RawValues, RequestError, listed, shown
from lmn_jax.inference.segment_states import UNTIMED

EVENT = ('item', 'time', 'id')  # names of an event that are no features of it
MOST = 2**31 - 1  # seconds from the earliest time of the log


class KnownEvent(NamedTuple):
  """An event of the export, or of a store of users.

  item: raw id. time: an integer of the log, as of `Bundle.known_times`; None if it is not known.
  features: raw values by name; those that the model does not have are not read.
  """

  item: str
  time: int | None
  features: Mapping[str, Any]


class History(NamedTuple):
  """Events as arrays.

  events: by name, oldest first, `item` and what else the model reads. newest: the newest time of
  the events, in seconds; UNTIMED for none. now: the time of a request that has none; None if the
  model reads no times. missing: keys of the fields that some event lacks. unknown: keys of features
  with a value that training did not see.
  """

  events: dict[str, np.ndarray]
  newest: int = UNTIMED
  now: int | None = None
  missing: Sequence[str] = ()
  unknown: Sequence[str] = ()

  def last(self, count: int) -> 'History':
    """Returns the newest events, at most `count`."""
    return self._replace(events={name: x[-count:] for name, x in self.events.items()})

  def at(self, request: int | None) -> dict[str, np.ndarray]:
    """Returns the events with the gap to a request in place of their time, float32 seconds."""
    events = dict(self.events)
    if 'time' in events:
      time = events.pop('time').astype(np.int64)
      events[GAP] = np.where(time == UNTIMED, 0, request - time).astype(np.float32)
    return events


class Histories:
  """Converts histories.

  Attributes:
    keys: of the event features of the model. timed: whether it reads times. padding: by name the
      value of a missing event, [] or [M].
  """

  def __init__(self, manifest: dict[str, Any], raw: RawValues):
    self._raw, self.keys = raw, raw.keys('event')
    self.timed: bool = manifest.get('reads_time', False)
    self.padding = {'item': np.array(manifest['vocabulary']['item'], np.int32)}
    self.padding |= {key: raw.padding(key) for key in self.keys}
    if self.timed:
      self.padding['time'] = np.array(0, np.int32)
      self._clock = Clock(**manifest['time'])

  @property
  def rich(self) -> bool:
    """Whether the model reads anything of an event besides its item."""
    return len(self.padding) > 1

  def check(self, features: Mapping[str, Any], time: int | None) -> None:
    """Refuses a new event that the model cannot read.

    Args:
      features: raw values by name. time: an integer of the log, or None.

    Raises:
      RequestError: a feature that the model does not have, a wrong value, or a time that is too far
        from those of the log.
    """
    for name, raw in features.items():
      self._raw.read(self._key(name), raw)
    if self.timed and time is not None:
      self._seconds(time)

  def rows(self, history: Sequence | np.ndarray | History) -> np.ndarray:
    """Returns the rows of the items of a history, int32 [E].

    Raises:
      RequestError: an event without an item.
    """
    if isinstance(history, History):
      return history.events['item']
    return self._raw.item_rows([_item(n, event) for n, event in enumerate(history)], 0)

  def read(self, history: Sequence | np.ndarray | History, newest: int | None = None) -> History:
    """Returns a history as arrays.

    Args:
      history: raw ids of items and dicts, or KnownEvents only, oldest first; or a History.
      newest: how many of the newest events are read; None for all.

    Raises:
      RequestError: an event feature that the model does not have, a wrong value, or a time before
        that of the event before.
    """
    if isinstance(history, History):
      return history if newest is None else history.last(newest)
    history = listed('history', history)
    history = history if newest is None else history[-newest:]
    kinds = set(map(type, history))
    if not self.rich and dict not in kinds and KnownEvent not in kinds:
      return History({'item': self._raw.item_rows(history, 0)})
    known = kinds == {KnownEvent}
    if KnownEvent in kinds and not known:
      raise RequestError('history: known events are mixed with others; give dicts of all')
    features = self._features(history, known)
    events, missing, unknown = {'item': self.rows(history)}, [], []
    for key in self.keys:
      column = self._column(key, [x.get(key.partition('.')[2]) for x in features], known)
      events[key] = column.codes
      missing += [key] * column.missing
      unknown += [key] * (not column.known)
    if self.timed:
      events['time'] = self._times(history, known)
    return self._history(events, missing, known)._replace(unknown=unknown)

  def exported(
    self, item: np.ndarray, features: Mapping[str, np.ndarray], times: np.ndarray
  ) -> History:
    """Returns events of the export, from its arrays. times: integers of the log, int64."""
    events = {'item': item, **features}
    if self.timed:
      events['time'] = self._clock.seconds(times).astype(np.int32)
    return self._history(events, [], known=True)

  def _history(self, events, missing, known):
    if not self.timed:
      return History(events, missing=missing)
    newest = int(events['time'].max(initial=UNTIMED))
    missing = missing + ['time'] * bool(np.any(events['time'] == UNTIMED))
    now = newest if newest > UNTIMED and not known else self._after(newest)
    return History(events, newest, now, missing)

  def of_state(self, newest: int) -> History:
    """Returns the history of a state. newest: of its events, in seconds."""
    return History({'item': np.zeros(0, np.int32)}, newest, self._after(newest))

  def request(self, history: History, raw: Any) -> int | None:
    """Returns the time of a request in seconds, as the times of the events.

    Args:
      history: of the request. raw: in the form of the log's times; None for none.

    Returns:
      None if the model reads no times.

    Raises:
      RequestError: a time of another form, or before the newest event.
    """
    if raw is None or not self.timed:
      return history.now
    seconds = self._parsed('time', raw)
    if history.newest > seconds:
      raise RequestError(
        f'time={shown(raw)} is {history.newest - seconds:,} s before the newest event; give a '
        'later time, or the events before it as the history'
      )
    return seconds

  def _after(self, newest):
    """Returns the newest time of the export and of events; None if the model reads no times."""
    if not self.timed:
      return None
    return max(self._clock.seconds(self._clock.last), newest)

  def _features(self, history, known):
    """Returns the raw values of each event, by name."""
    if known:
      return [event.features for event in history]
    features = [event if isinstance(event, dict) else {} for event in history]
    names = {*EVENT, *(key.partition('.')[2] for key in self.keys)}
    for number, event in enumerate(features):
      if not names.issuperset(event):
        with _placed(number):
          self._key(next(name for name in event if name not in names))
    return features

  def _key(self, name):
    """Returns the key of an event feature."""
    key = f'event.{name}'
    if key not in self.keys:
      names = ', '.join(key.partition('.')[2] for key in self.keys) or 'none'
      raise RequestError(f'event feature {name!r} is unknown; event features of the model: {names}')
    return key

  def _column(self, key, raw, known):
    """Returns the values of a feature of all events."""
    try:
      return self._raw.column(key, raw)
    except RequestError:
      if not known:
        for number, value in enumerate(raw):
          with _placed(number):
            self._raw.read(key, value)
    # It was stored for an export that read the feature in another way.
    return self._raw.column(key, [value if self._is_read(key, value) else None for value in raw])

  def _is_read(self, key, raw):
    try:
      self._raw.read(key, raw)
    except RequestError:
      return False
    return True

  def _times(self, history, known):
    """Returns the seconds of events, int32."""
    if known:
      times = [x.time for x in history]
      return np.array([UNTIMED if x is None else self._seconds(x) for x in times], np.int32)
    raw = [x.get('time') if isinstance(x, dict) else None for x in history]
    seconds, latest = [], -MOST
    for n, time in enumerate(raw):
      seconds.append(UNTIMED if time is None else self._parsed(f'history.{n}.time', time))
      if UNTIMED < seconds[-1] < latest:
        raise RequestError(
          f'history.{n}.time={shown(time)} is before that of an earlier event; give the oldest '
          'first'
        )
      latest = max(latest, seconds[-1])
    return np.array(seconds, np.int32)

  def _parsed(self, name, raw):
    try:
      return self._seconds(self._clock.parse(raw))
    except ValueError as error:
      raise RequestError(f'{name}={shown(raw)}: {error}') from None

  def _seconds(self, time):
    """Returns an integer of the log in seconds since the earliest time of the log."""
    seconds = self._clock.seconds(time)
    if abs(seconds) > MOST:
      raise RequestError(
        f'a time is {seconds:,} s from the earliest one of the log; the model counts up to {MOST:,}'
      )
    return seconds


@contextlib.contextmanager
def _placed(number):
  """Names the event of a history in a RequestError."""
  try:
    yield
  except RequestError as error:
    raise RequestError(f'history.{number}: {error}') from None


def _item(number, event):
  if isinstance(event, KnownEvent):
    return event.item
  if not isinstance(event, dict):
    return event
  if 'item' not in event:
    raise RequestError(f"history.{number} has no 'item'; give the raw id of its item")
  return event['item']
