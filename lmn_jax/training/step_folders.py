"""The folders of a run's checkpoints, one a step: `checkpoints/step_N`."""

from pathlib import Path

PREFIX = 'step_'
HALF = f'{PREFIX}*.orbax-checkpoint-tmp*'  # Orbax writes a step here and renames it


def steps_of(folder: Path) -> list[int]:
  """The steps that have a folder, ascending.

  Args:
    folder: of the checkpoints; it need not exist.
  """
  names = (path.name.removeprefix(PREFIX) for path in folder.glob(f'{PREFIX}*'))
  return sorted(int(name) for name in names if name.isdecimal())


def step_folder(folder: Path, step: int) -> Path:
  """The folder of a step."""
  return folder / f'{PREFIX}{step}'


def last_kept(folder: Path) -> str:
  """In words, for a run that ends: which checkpoint it has."""
  steps = steps_of(folder)
  return f'the last good checkpoint is step {steps[-1]}' if steps else 'no checkpoint was kept'
