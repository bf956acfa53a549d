"""A request in rows and codes, its scores, and the sizes that requests are padded to."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lmn_jax.export.runtime.raw_values import RequestError, shown
from lmn_jax.inference.segment_states import UserStates


class Request(NamedTuple):
  """A request in rows and codes, for one user.

  user: embedding row. item: int32 [C], indices of the candidates (item_index.py), none if all items
  are candidates; next-item models: V for an unknown one. history: of click models, the events that
  are read, oldest first: arrays by name, `item` and, if the model reads them, `event.<f>` and
  `time_gap`, float32 seconds. features: codes () or [M], or numbers (), by name, of context and
  profile. state: of next-item models. time: of the request, in seconds as those of the state's
  events; None if the model reads no times. user_known: whether training saw the user. unknown:
  candidates that it did not see and that are no cold items; cold: those that are. events: number of
  known events. met: if all items are candidates, indices of those that the user has met, in the log
  and in the history. unknown_features: features of the request with a value that training did not
  see: names, or keys of those of events. missing: keys of the fields that have no value.
  """

  user: int
  item: np.ndarray
  history: dict[str, np.ndarray]
  features: dict[str, np.ndarray]
  state: UserStates | None
  time: int | None
  user_known: bool
  unknown: list[str]
  events: int
  met: np.ndarray
  unknown_features: list[str]
  missing: list[str]
  cold: list[str]


class Scores(NamedTuple):
  """Scores of the candidates of a request.

  values: float32 [C], of the main label. degraded: whether some rows were not available (see
  `Values`). labels: of several labels, the scores of each by name, float32 [C].
  """

  values: np.ndarray
  degraded: bool
  labels: Mapping[str, np.ndarray] = {}


class Sizes(NamedTuple):
  """Sizes of the compiled programs, ascending.

  batch: users. candidates: of each user. pads: whether batches are padded, see `padding.pieces`.
  """

  batch: list[int]
  candidates: list[int]
  pads: bool


def best(rows: np.ndarray, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k best rows and their values, best first; lower rows first of equals, NaN last.

  Raises:
    RequestError: k is not a whole number of at least 1.
  """
  if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
    raise RequestError(f'k={shown(k)} must be a whole number of at least 1')
  cost = np.where(np.isnan(values), np.inf, -values)
  if len(cost) > k:
    low = cost <= np.partition(cost, k - 1)[k - 1]
    rows, values, cost = rows[low], values[low], cost[low]
  order = np.lexsort((rows, cost))[:k]
  return rows[order], values[order]
