"""The users of an export: embedding rows, profiles and events."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmn_jax.export.runtime.ids import Ids
from lmn_jax.export.runtime.manifest import load

log = logging.getLogger(__name__)


class Users:
  """All users of the log, memory-mapped.

  A record is a user's place in the arrays, in the order of `ids`; -1 is a user that is not in the
  log.
  """

  def __init__(self, folder: Path, manifest: dict[str, Any], ids: Ids):
    self._ids, self._timed = ids, manifest['timed']
    self.profile_keys, self.event_keys = (
      [key for key, feature in manifest['features'].items() if feature['kind'] == kind]
      for kind in ('user', 'event')
    )
    names = ['row', 'offset', 'history', *self.profile_keys, *self.event_keys]
    if (folder / 'users/met.npy').exists():
      names += ['event_time', 'met', 'met_offset']
    else:
      names += ['time']  # of the newest event of each user
      log.warning(
        '%s: an export of an earlier version, which holds only the newest %d events of a user, so '
        'that items met before may be recommended; export again', folder, manifest['length'],
      )  # fmt: skip
    self._arrays = {name: load(folder / f'users/{name}.npy') for name in names}

  def find(self, user: str) -> tuple[int, int]:
    """Returns a user's record and embedding row, 0 for a user that training did not see."""
    (record,) = self._ids.find([user]).tolist()
    return record, 0 if record < 0 else int(self._arrays['row'][record])

  def profile(self, record: int) -> dict[str, np.ndarray]:
    """Returns a user's features by key: codes () or [M], or a number ()."""
    return {key: np.asarray(self._arrays[key][record]) for key in self.profile_keys}

  def offsets(self) -> np.ndarray:
    """Returns where the events of each user begin, int64 [U + 1]."""
    return self._arrays['offset']

  def history(self, record: int) -> np.ndarray:
    """Returns the item rows of a user's events, int32 [E], oldest first; empty for record -1."""
    begin, end = self._events(record)
    return self._arrays['history'][begin:end]

  def event_features(self, record: int) -> dict[str, np.ndarray]:
    """Returns the features of these events by key: codes [E] or [E, M], or numbers [E]."""
    begin, end = self._events(record)
    return {key: self._arrays[key][begin:end] for key in self.event_keys}

  def times(self, record: int) -> list[int | None]:
    """Returns the times of these events; None where they are not known.

    A log may have no times; exports of earlier versions hold the time of the newest event only.
    """
    begin, end = self._events(record)
    if not self._timed:
      return [None] * (end - begin)
    if 'event_time' in self._arrays:
      return self._arrays['event_time'][begin:end].tolist()
    return [None] * (end - begin - 1) + [int(self._arrays['time'][record])] * (end > begin)

  def _events(self, record) -> Sequence[int]:
    return (0, 0) if record < 0 else self._arrays['offset'][record : record + 2].tolist()

  def time_span(self) -> tuple[int, int]:
    """Returns the first and the last time; (0, 0) if there are none."""
    if 'event_time' in self._arrays:
      times = self._arrays['event_time']
    else:
      times = self._arrays['time'][np.diff(self.offsets()) > 0]
    return (int(times.min()), int(times.max())) if len(times) else (0, 0)

  def met(self, record: int) -> np.ndarray:
    """Returns the rows of the items that a user met in the log, int32 [M], unordered."""
    items = [self.history(record)]
    if record >= 0 and 'met' in self._arrays:
      begin, end = self._arrays['met_offset'][record : record + 2]
      items.append(self._arrays['met'][begin:end])
    return np.concatenate(items)
