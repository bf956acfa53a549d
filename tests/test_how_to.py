"""The code of the how-to pages runs from an empty folder."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.training import loop
from tests.runs import mesh_of, steps_kept
from tests.test_main import call

CODE = Path(__file__).parents[1] / 'docs/how-to/code'
# What makes the data and the training of a how-to small.
SMALL = [
  '--config.batch_size=16', '--config.eval_batch_size=16', '--config.history_length=4',
  '--config.eval_every=2', '--config.save_every=2', '--config.model.width=4',
]  # fmt: skip
SMALL_LOG = ['--config.data.synthetic.users=40', '--config.data.synthetic.impressions=30']
SMALL_INTERESTS = [
  f'--config.data.synthetic.{name}={value}'
  for name, value in dict(users=40, goods=20, favourites=3, chatter=5, length=40, recent=5).items()
]


@pytest.fixture
def empty(tmp_path, monkeypatch):
  """An empty folder, the current one, and a function that copies the code of a how-to into it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(loop.mesh, 'make_mesh', lambda *_: mesh_of(1))
  names = []

  def copy(*files):
    names.extend(Path(file).stem for file in files)
    for file in files:
      shutil.copy(CODE / file, tmp_path)

  yield copy
  for name in names:
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
  'kind, name, small, pairs',
  [
    ('click', 'Forgetting', SMALL_LOG, 'user,item,query\n1,2,3\n'),
    ('next_item', 'MovingAverage', SMALL_INTERESTS, 'user,item\n1,2\n'),
  ],
  ids=['click', 'next_item'],
)
def test_a_model(kind, name, small, pairs, empty, tmp_path, monkeypatch, capsys):
  """A model outside of the package trains, goes on, predicts and is exported."""
  empty(f'my_{kind}_model.py', f'my_{kind}_config.py')
  (tmp_path / 'pairs.csv').write_text(pairs)
  run = [f'--config=my_{kind}_config.py', *SMALL, *small]

  def lmn_jax(*arguments):
    code, out, err = call(monkeypatch, capsys, *run, *arguments)
    assert code == 0, err
    return out + err

  workdir = tmp_path / f'runs/my_{kind}_config'
  lmn_jax('--config.steps=2')
  assert steps_kept(workdir) == [2]
  assert 'resumed from step 2' in lmn_jax('--config.steps=4')
  lmn_jax('--config.steps=4', '--mode=predict', '--input=pairs.csv', '--output=scores.csv')
  head, row = (tmp_path / 'scores.csv').read_text().split()
  score = dict(zip(head.replace('"', '').split(','), row.split(','), strict=True))['score']
  lmn_jax('--config.steps=4', '--mode=export')
  bundle = Bundle(workdir / 'export', (1,), (8,))
  assert bundle.model == f'my_{kind}_model:{name}'
  context = {'query': '3'} if kind == 'click' else {}
  asked = bundle.ask('1', ['2'], bundle.known_history('1'), context)
  (scores,) = bundle.score([asked])
  np.testing.assert_allclose(scores.values, [float(score)], rtol=1e-4, atol=1e-5)
  assert json.loads((workdir / 'report.json').read_text())['model'] == bundle.model
  code, _, err = call(monkeypatch, capsys, *run, '--config.model.depth=3')
  assert code == 2 and "--config.model.depth: the config has no field 'depth'" in err
