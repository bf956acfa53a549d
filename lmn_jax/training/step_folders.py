"""The folders of the checkpoints of a run: `checkpoints/step_N` for each step."""

from pathlib import Path

PREFIX = 'step_'
HALF = f'{PREFIX}*.orbax-checkpoint-tmp*'  # Orbax writes a step here, then renames it


def steps_of(folder: Path) -> list[int]:
  """Returns the steps that have a folder, ascending.

  Args:
    folder: of the checkpoints; it need not exist.
  """
  names = (path.name.removeprefix(PREFIX) for path in folder.glob(f'{PREFIX}*'))
  return sorted(int(name) for name in names if name.isdecimal())


def step_folder(folder: Path, step: int) -> Path:
  """Returns the folder of a step."""
  return folder / f'{PREFIX}{step}'


def last_good(folder: Path) -> str:
  """Returns a phrase that names the newest checkpoint, for the error of a run that ends."""
  steps = steps_of(folder)
  return f'the last good checkpoint is step {steps[-1]}' if steps else 'there is no checkpoint'
