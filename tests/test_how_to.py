"""The code of the how-to pages runs from an empty folder."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pytest

from lmn_jax.data.readers import registry
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.training import setup as setups
from tests.runs import lines, mesh_of, steps_kept, tiny_config
from tests.test_main import call

CODE = Path(__file__).parents[1] / 'docs/how_to/code'
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
  monkeypatch.setattr(meshes, 'make_mesh', lambda *_: mesh_of(1))
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


def test_a_reader(empty, tmp_path, monkeypatch, capsys):
  """A format outside of the package is read as CSV is; its files are known by their content."""
  empty('my_reader.py', 'my_reader_config.py')
  log = pa.table({
    'user': [f'u{k % 4}' for k in range(40)],
    'item': [f'i{k % 6}' for k in range(40)],
    'time': range(1_700_000_000, 1_700_000_040),
    'label': [k % 3 == 0 for k in range(40)],
  })  # fmt: skip
  for k in (0, 1):
    pyarrow.feather.write_feather(log.slice(20 * k, 20), f'log-{k}.feather')
  pyarrow.csv.write_csv(log, 'log.csv')
  stores, run = tmp_path / 'runs/stores', ['--config=my_reader_config.py', '--mode=prepare']
  plain = ['source=log.csv', 'format=csv', 'name=plain']
  for more in ([], [f'--config.data.{field}' for field in plain]):
    code, _, err = call(monkeypatch, capsys, *run, *more)
    assert code == 0, err
  opened = [Store(next(stores.glob(f'{name}*'))) for name in ('feather', 'plain')]
  assert opened[0].examples == opened[1].examples
  for name in ('user', 'item', 'end', 'label'):
    found, wanted = (
      np.concatenate([part.examples[name] for part in store.parts]) for store in opened
    )
    np.testing.assert_array_equal(found, wanted)
  signature = opened[0].manifest['signature']
  names = [file['name'] for file in signature['files']]
  assert names == ['source/log-0.feather', 'source/log-1.feather']
  assert signature['config.data']['format'] == 'my_reader:Feather'
  before = set(stores.glob('feather*'))
  pyarrow.feather.write_feather(log.slice(20, 19), 'log-1.feather')
  code, _, err = call(monkeypatch, capsys, *run)
  assert code == 0 and len(set(stores.glob('feather*')) - before) == 1, err


@pytest.mark.parametrize(
  'name, message',
  [
    ('my_reader:Fether', "is unknown; did you mean 'Feather'?"),
    ('my_reader:typed', 'not a reader; make it a subclass of lmn_jax.data.readers.reader.Reader'),
    ('their_reader:Feather', "there is no module 'their_reader' in"),
    ('feather', "config.data.format='feather' is unknown; .*available: csv, .*MODULE:CLASS"),
  ],
)
def test_a_name_that_means_no_reader(name, message, empty):
  empty('my_reader.py')
  with pytest.raises(UserError, match=message):
    registry.reader_of('log.feather', name, 'config.data.source')


def test_a_metric_and_a_criterion(empty, tmp_path, monkeypatch, capsys):
  """They are reported, and what the criterion gives for each validation chooses."""
  empty('my_metric.py', 'my_metric_config.py')
  run = ['--config=my_metric_config.py', *SMALL, *SMALL_LOG, '--config.steps=4']
  code, out, err = call(monkeypatch, capsys, *run)
  assert code == 0, err
  assert 'precision_of_the_top_tenth' in out
  workdir = tmp_path / 'runs/my_metric_config'
  report = json.loads((workdir / 'report.json').read_text())
  assert report['columns'][-1] == 'precision_of_the_top_tenth'
  assert 0 <= report['test']['overall']['precision_of_the_top_tenth'] <= 1
  assert report['baselines']['test']['popularity']['overall']['precision_of_the_top_tenth'] is None
  validations = [line for line in lines(workdir) if line.get('group') == 'valid']
  wanted = [[line['step'], line['auc'] - abs(line['calibration'] - 1)] for line in validations]
  assert len(wanted) == 2
  scores = json.loads((workdir / 'checkpoints/validations.json').read_text())
  np.testing.assert_allclose(scores, wanted, rtol=1e-6)
  assert report['step'] == max(wanted, key=lambda pair: pair[1])[0]


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(criterion='auk'), "config.criterion='auk' is unknown; did you mean 'auc'?"),
    (dict(criterion='-log_los'), "config.criterion='log_los' is unknown; did you mean 'log_loss'?"),
    (dict(criterion='my_metric:np'), 'config.criterion=.* not a function'),
    (dict(criterion='nowhere:best'), "there is no module 'nowhere'"),
    (dict(metrics=('my_metric:np',)), 'config.metrics=.* not a function'),
    (dict(metrics=('my_metric:median_rank',) * 2), "a metric 'median_rank' exists; rename"),
    (dict(metrics=('auc',)), "config.metrics='auc' must be MODULE:NAME"),
  ],
)
def test_a_name_that_means_no_metric_or_criterion(fields, message, empty):
  empty('my_metric.py')
  config = tiny_config('pooling')
  config.update(fields)
  with pytest.raises(UserError, match=message):
    setups.check(config)


@pytest.mark.parametrize('kind, small', [('click', SMALL_LOG), ('next_item', SMALL_INTERESTS)])
def test_a_loss(kind, small, empty, tmp_path, monkeypatch, capsys):
  """It is what is minimised; next items are chosen by the median of their ranks."""
  empty('my_loss.py', 'my_metric.py', 'my_loss_config.py')
  run = [f'--config=my_loss_config.py:{kind}', *SMALL, *small, '--config.steps=4']
  code, _, err = call(monkeypatch, capsys, *run, '--config.log_every=1')
  assert code == 0, err
  workdir = tmp_path / f'runs/my_loss_config-{kind}'
  losses = [line['loss'] for line in lines(workdir) if line['group'] == 'train']
  assert len(losses) == 4
  # At the start every score is about 0: log 2 each, of the focal loss times (1 - 1 / 2)^2.
  np.testing.assert_allclose(losses[0], np.log(2) * (0.25 if kind == 'click' else 1), rtol=0.02)
  if kind == 'next_item':
    ranks = [line['median_rank'] for line in lines(workdir) if line['group'] == 'valid']
    scores = json.loads((workdir / 'checkpoints/validations.json').read_text())
    assert [score for _, score in scores] == [-rank for rank in ranks]
  code, _, err = call(monkeypatch, capsys, *run, '--config.model.loss=my_loss:focal_los')
  assert code == 2 and "did you mean 'focal_loss'?" in err
  code, _, err = call(monkeypatch, capsys, *run, '--config.model.loss=bcee')
  assert code == 2 and "config.model.loss='bcee' is unknown; did you mean 'bce'?" in err
