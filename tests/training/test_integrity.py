"""Damaged checkpoints are detected and moved aside."""

import errno
import os
import re
import shutil

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training import integrity
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.step_folders import steps_of
from tests.examples import make_config, make_trainer
from tests.runs import mesh_of, saved


def damage(folder, how):
  """Damages a step as disks, copies or people may; returns the damaged file."""
  file = max((folder / 'state').rglob('*'), key=lambda x: x.stat().st_size * x.is_file())
  data = bytearray(file.read_bytes())
  if how == 'flipped':
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  elif how == 'truncated':
    file.write_bytes(data[:-1])
  elif how == 'missing':
    file.unlink()
  elif how == 'no item':
    shutil.rmtree(folder / 'loop')
  elif how == 'no seal':
    (folder / 'seal.json').unlink()
  else:
    (folder / 'seal.json').write_text(how)
  return str(file.relative_to(folder))


WAYS = [
  ('flipped', 'has another CRC-32 than when it was written'),
  ('truncated', r'has \d+ bytes, \d+ expected'),
  ('missing', 'is missing'),
  ('no item', 'loop/.* is missing'),
  ('no seal', 'it has no seal.json'),
  ('{"state":', 'seal.json is damaged'),
  ('[1, 2]', 'seal.json is damaged'),
  ('{"state": 3}', 'seal.json is damaged'),
]


@pytest.mark.parametrize('how, message', WAYS, ids=[how for how, _ in WAYS])
def test_a_damaged_step_is_moved_aside_and_logged(tmp_path, caplog, how, message):
  """The step before is then the newest; a damaged one is never read."""
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  folder = tmp_path / 'checkpoints'
  saved(folder, trainer.init(0), {2: 0.6, 4: 0.5})
  damage(folder / 'step_4', how)
  line = f'step_4 is damaged: .*{message}'
  with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match=line):
    checkpoints.restore(4, trainer.abstract)
  integrity.set_aside(folder)
  assert re.search(f'{line}.*; moved to .*spoilt/step_4', caplog.text)
  assert steps_of(folder) == [2] and (tmp_path / 'spoilt' / 'step_4').is_dir()
  with Checkpoints(folder) as checkpoints:
    assert (checkpoints.latest(), checkpoints.best()) == (2, 2)
    checkpoints.restore(2, trainer.abstract)


def test_no_run_starts_again_if_all_steps_are_damaged(tmp_path):
  _, trainer = make_trainer(make_config('pooling'), mesh_of(1))
  saved(tmp_path, trainer.init(0), {2: 0.6, 4: 0.5})
  for step in (2, 4):
    damage(tmp_path / f'step_{step}', 'flipped')
  with pytest.raises(UserError, match='step_4 is damaged: .* no other checkpoint is sound, so'):
    integrity.set_aside(tmp_path)
  assert steps_of(tmp_path) == [2, 4]
  integrity.set_aside(tmp_path / 'none')


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError('x: No space left on device'),
  ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
  """From the number of the error, or from the text of a C++ library."""
  (tmp_path / 'step_3').mkdir()
  message = f'{tmp_path}: No space left on device; the last good checkpoint is step 3. Free space'
  with pytest.raises(UserError, match=message), integrity.disk_errors(tmp_path):
    raise error


def test_other_errors_are_raised_unchanged(tmp_path):
  with pytest.raises(ValueError, match='shapes'), integrity.disk_errors(tmp_path):
    raise ValueError('shapes differ')
