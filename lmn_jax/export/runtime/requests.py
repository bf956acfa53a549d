"""A request in rows and codes, its scores, and the sizes that requests are padded to."""

from typing import NamedTuple

import numpy as np

from lmn_jax.inference.segment_states import UserStates


class Request(NamedTuple):
  """A request in rows and codes, for one user.

  user: embedding row. item: int32 [C], rows of the candidates, none if all items are candidates;
  next-item models: V for an unknown one. history: item rows, oldest first. features: codes () or
  [M] by name, of context and profile. state: of next-item models. user_known: whether training saw
  the user. unknown: candidates that it did not see. events: number of known events. met: if all
  items are candidates, rows of those that the user has met, in the log and in the history.
  unknown_features: features of the request with a value that training did not see.
  """

  user: int
  item: np.ndarray
  history: np.ndarray
  features: dict[str, np.ndarray]
  state: UserStates | None
  user_known: bool
  unknown: list[str]
  events: int
  met: np.ndarray
  unknown_features: list[str]


class Scores(NamedTuple):
  """values: float32 [C]. degraded: whether some rows were not available (see `Values`)."""

  values: np.ndarray
  degraded: bool


class Sizes(NamedTuple):
  """Sizes of the compiled programs, ascending.

  batch: users. candidates: of each user. pads: whether batches are padded, see `padding.pieces`.
  """

  batch: list[int]
  candidates: list[int]
  pads: bool
