"""The validations of a run: (step, score) pairs, in validations.json beside the checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lmn_jax.errors import UserError
from lmn_jax.files import write_json

FILE = 'validations.json'
Scores = list[tuple[int, float]]


class Standing(NamedTuple):
  """What validations have come to.

  best, best_step: the highest score and its step, of equals the earliest; None without validation.
  waited: validations since then.
  """

  best: float | None = None
  best_step: int | None = None
  waited: int = 0


def standing(scores: Iterable[tuple[int, float]]) -> Standing:
  """Where a run stands after validations, (step, score) in the order of the steps."""
  result = Standing()
  for step, score in scores:
    if result.best is None or score > result.best:
      result = Standing(score, step)
    else:
      result = result._replace(waited=result.waited + 1)
  return result


def out_of_patience(patience: int, scores: Scores) -> bool:
  """Whether validation has not improved for `patience` times; never if that is 0."""
  return 0 < patience <= standing(scores).waited


def read(folder: Path) -> Scores:
  """The validations of the checkpoints in a folder, in the order of the steps; [] without a file.

  Raises:
    UserError: the file is damaged.
  """
  path = folder / FILE
  try:
    return [(int(step), float(score)) for step, score in json.loads(path.read_text())]
  except FileNotFoundError:
    return []
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{path} is damaged ({error}); delete it: what earlier validations found is then forgotten, '
      'and the newest step is validated again'
    ) from None


def write(folder: Path, scores: Scores) -> None:
  """Writes them, on process 0."""
  write_json(folder / FILE, scores)
