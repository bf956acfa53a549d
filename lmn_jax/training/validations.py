"""The scores of the validations of a run, stored in validations.json beside the checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lmn_jax.errors import UserError
from lmn_jax.files import write_json

FILE = 'validations.json'
Scores = list[tuple[int, float]]


class Standing(NamedTuple):
  """A summary of validations.

  best, best_step: the highest score and the first step that has it; None without validations.
  waited: number of validations since then.
  """

  best: float | None = None
  best_step: int | None = None
  waited: int = 0


def standing(scores: Iterable[tuple[int, float]]) -> Standing:
  """Returns the summary of validations, (step, score) in the order of the steps."""
  result = Standing()
  for step, score in scores:
    if result.best is None or score > result.best:
      result = Standing(score, step)
    else:
      result = result._replace(waited=result.waited + 1)
  return result


def out_of_patience(patience: int, scores: Scores) -> bool:
  """Whether the last `patience` validations did not improve the score; never if it is 0."""
  return 0 < patience <= standing(scores).waited


def read(folder: Path) -> Scores:
  """Returns the (step, score) pairs in a folder of checkpoints; [] without a file.

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
      f'{path} is damaged ({error}); delete it: the scores of earlier validations are then lost, '
      'and the newest step is validated again'
    ) from None


def write(folder: Path, scores: Scores) -> None:
  """Writes validations.json in a folder of checkpoints, on process 0."""
  write_json(folder / FILE, scores)
