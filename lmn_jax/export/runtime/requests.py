"""A request in rows, and the sizes that requests are padded to."""

from typing import NamedTuple

import numpy as np

from lmn_jax.inference.segment_states import UserStates


class Asked(NamedTuple):
  """A request in rows. C candidates, none where all items are asked; E events known.

  user: embedding row. item int32 [C], of next-item models V where the candidate is unknown.
  history: item rows, oldest first. features: codes by name of context and profile, () or (M,).
  state: of a next-item model. user_known: whether training saw the user. unknown: candidates
  that it did not see. events: E. met: where all items are asked, rows of those that the user has
  met: of the log and of the history. unknown_features: those given with a value that training did
  not see.
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
  """values: float32 [C]. degraded: whether some rows were out of reach (see Bundle)."""

  values: np.ndarray
  degraded: bool


class Sizes(NamedTuple):
  """Of the compiled programs, ascending. batch: users. candidates: of each user."""

  batch: list[int]
  candidates: list[int]
