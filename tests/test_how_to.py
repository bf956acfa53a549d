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
from tests.runs import but_slow, lines, mesh_of, steps_kept, tiny_config
from tests.test_main import call

CODE = Path(__file__).parents[1] / 'docs/how_to/code'
# Flags for small data and a short training.
SMALL = [
  '--config.batch_size=16', '--config.eval_batch_size=16', '--config.history_length=4',
  '--config.eval_every=2', '--config.save_every=2', '--config.model.width=4',
]  # fmt: skip
SMALL_LOG = [
  f'--config.data.synthetic.{name}={value}'
  for name, value in dict(users=40, items=60, categories=20, impressions=30).items()
]
SMALL_INTERESTS = [
  f'--config.data.synthetic.{name}={value}'
  for name, value in dict(users=40, goods=20, favourites=3, chatter=5, length=40, recent=5).items()
]
SMALL_DATA = {'click': SMALL_LOG, 'next_item': SMALL_INTERESTS}


@pytest.fixture
def copy_code(tmp_path, monkeypatch):
  """A function that copies files of the how-to code into an empty folder, the current one."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(meshes, 'make_mesh', lambda *_: mesh_of(1))
  modules = []

  def copy(*names):
    modules.extend(Path(name).stem for name in names)
    for name in names:
      shutil.copy(CODE / name, tmp_path)

  yield copy
  for name in modules:
    sys.modules.pop(name, None)


@pytest.fixture
def lmn_jax(monkeypatch, capsys):
  """A function that runs a command without errors and returns its output."""

  def run(*arguments):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    return out + err

  return run


@pytest.fixture
def refused(monkeypatch, capsys):
  """A function that runs a command with an error of the user and returns the message."""

  def run(*arguments):
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2, err
    return err

  return run


def write_feather_log():
  """Writes log-0.feather and log-1.feather; returns their rows as one table."""
  log = pa.table({
    'user': [f'u{k % 4}' for k in range(40)],
    'item': [f'i{k % 6}' for k in range(40)],
    'time': range(1_700_000_000, 1_700_000_040),
    'label': [k % 3 == 0 for k in range(40)],
  })  # fmt: skip
  for k in (0, 1):
    pyarrow.feather.write_feather(log.slice(20 * k, 20), f'log-{k}.feather')
  return log


@pytest.mark.parametrize(
  'task, name, pairs',
  [
    ('click', 'Forgetting', 'user,item,query\n1,2,3\n'),
    ('next_item', 'MovingAverage', 'user,item\n1,2\n'),
  ],
  ids=['click', 'next_item'],
)
def test_a_model_trains_resumes_predicts_and_is_exported(
  task, name, pairs, copy_code, lmn_jax, refused, tmp_path
):
  copy_code(f'my_{task}_model.py', f'my_{task}_config.py')
  (tmp_path / 'pairs.csv').write_text(pairs)
  run = [f'--config=my_{task}_config.py', *SMALL, *SMALL_DATA[task]]
  workdir = tmp_path / f'runs/my_{task}_config'
  lmn_jax(*run, '--config.steps=2')
  assert steps_kept(workdir) == [2]
  assert 'resumed from step 2' in lmn_jax(*run, '--config.steps=4')
  lmn_jax(*run, '--config.steps=4', '--mode=predict', '--input=pairs.csv', '--output=scores.csv')
  head, row = (tmp_path / 'scores.csv').read_text().split()
  score = dict(zip(head.replace('"', '').split(','), row.split(','), strict=True))['score']
  lmn_jax(*run, '--config.steps=4', '--mode=export')
  bundle = Bundle(workdir / 'export', (1,), (8,))
  assert bundle.model == f'my_{task}_model:{name}'
  context = {'query': '3'} if task == 'click' else {}
  request = bundle.ask('1', ['2'], bundle.known_history('1'), context)
  (scores,) = bundle.score([request])
  np.testing.assert_allclose(scores.values, [float(score)], rtol=1e-4, atol=1e-5)
  assert json.loads((workdir / 'report.json').read_text())['model'] == bundle.model
  message = refused(*run, '--config.model.depth=3')
  assert "--config.model.depth: the config has no field 'depth'" in message


def test_a_model_trains_with_a_config_of_the_package(copy_code, lmn_jax, tmp_path):
  copy_code('my_click_model.py')
  config = '--config=douyin:my_click_model:Forgetting'
  lmn_jax(config, *SMALL, *SMALL_LOG, '--config.steps=2')
  report = json.loads((tmp_path / 'runs/douyin-my_click_model-Forgetting/report.json').read_text())
  assert report['model'] == 'my_click_model:Forgetting' and report['step'] == 2


def test_a_reader_gives_the_store_of_the_same_rows_in_csv(copy_code, lmn_jax, tmp_path):
  copy_code('my_reader.py', 'my_reader_config.py')
  log = write_feather_log()
  pyarrow.csv.write_csv(log, 'log.csv')
  folder, run = tmp_path / 'runs/stores', ['--config=my_reader_config.py', '--mode=prepare']
  lmn_jax(*run)
  csv = 'source=log.csv', 'format=csv', 'name=plain'
  lmn_jax(*run, *(f'--config.data.{field}' for field in csv))
  stores = [Store(next(folder.glob(f'{name}*'))) for name in ('feather', 'plain')]
  assert stores[0].examples == stores[1].examples
  for name in ('user', 'item', 'end', 'label'):
    columns = [np.concatenate([part.examples[name] for part in store.parts]) for store in stores]
    np.testing.assert_array_equal(*columns)
  signature = stores[0].manifest['signature']
  names = [file['name'] for file in signature['files']]
  assert names == ['source/log-0.feather', 'source/log-1.feather']
  assert signature['config.data']['format'] == 'my_reader:Feather'
  # A changed file makes another store.
  before = set(folder.glob('feather*'))
  pyarrow.feather.write_feather(log.slice(20, 19), 'log-1.feather')
  lmn_jax(*run)
  assert len(set(folder.glob('feather*')) - before) == 1


@pytest.mark.parametrize(
  'name, message',
  [
    ('my_reader:Fether', "is unknown; did you mean 'Feather'?"),
    ('my_reader:typed', 'not a reader; make it a subclass of lmn_jax.data.readers.reader.Reader'),
    ('their_reader:Feather', "there is no module 'their_reader' in"),
    ('feather', "config.data.format='feather' is unknown; .*available: csv, .*MODULE:CLASS"),
  ],
)
def test_a_name_of_no_reader_is_refused(name, message, copy_code):
  copy_code('my_reader.py')
  with pytest.raises(UserError, match=message):
    registry.reader_of('log.feather', name, 'config.data.source')


def test_a_click_metric_is_reported(copy_code, lmn_jax, tmp_path):
  copy_code('my_metric.py', 'my_metric_config.py')
  out = lmn_jax('--config=my_metric_config.py:click', *SMALL, *SMALL_LOG, '--config.steps=4')
  assert 'precision_of_the_top_tenth' in out
  report = json.loads((tmp_path / 'runs/my_metric_config-click/report.json').read_text())
  assert report['columns'][-1] == 'precision_of_the_top_tenth'
  assert 0 <= report['test']['overall']['precision_of_the_top_tenth'] <= 1
  assert report['baselines']['test']['popularity']['overall']['precision_of_the_top_tenth'] is None


LABELS = {
  'my_labels_config': ('user,item,time,click,order,importance', 'order/auc', 'click/rows'),
  'my_dwell_config': ('user,item,time,dwell', 'rmse', 'rows'),
}


def write_log_of_labels(name):
  """Writes log.csv, with random labels, for a config of LABELS."""
  header, rng = LABELS[name][0], np.random.default_rng(0)
  with Path('log.csv').open('w') as file:
    file.write(f'{header}\n')
    for k in range(300):
      numbers = ','.join(str(x) for x in rng.integers(2, size=header.count(',') - 2))
      file.write(f'u{rng.integers(9)},i{rng.integers(9)},{k},{numbers}\n')


@pytest.mark.parametrize('name', but_slow(list(LABELS), {0}))
def test_labels_are_learnt(name, copy_code, lmn_jax, tmp_path):
  _, metric, rows = LABELS[name]
  copy_code(f'{name}.py')
  write_log_of_labels(name)
  out = lmn_jax(f'--config={name}.py', *SMALL, '--config.steps=4')
  report = json.loads((tmp_path / f'runs/{name}/report.json').read_text())
  assert report['test']['overall'][metric] > 0 and report['test']['overall'][rows] == 30
  assert metric.rpartition('/')[2] in out


def test_the_lowest_value_of_a_next_item_metric_chooses_the_checkpoint(
  copy_code, lmn_jax, tmp_path
):
  copy_code('my_metric.py', 'my_metric_config.py')
  run = ['--config=my_metric_config.py:next_item', *SMALL, *SMALL_INTERESTS]
  lmn_jax(*run, '--config.steps=4')
  workdir = tmp_path / 'runs/my_metric_config-next_item'
  ranks = [line['median_rank'] for line in lines(workdir) if line.get('group') == 'valid']
  scores = json.loads((workdir / 'checkpoints/validations.json').read_text())
  assert [score for _, score in scores] == [-rank for rank in ranks] and len(ranks) == 2


def test_the_highest_value_of_a_criterion_chooses_the_checkpoint(copy_code, lmn_jax, tmp_path):
  copy_code('my_criterion.py', 'my_criterion_config.py')
  lmn_jax('--config=my_criterion_config.py', *SMALL, *SMALL_LOG, '--config.steps=4')
  workdir = tmp_path / 'runs/my_criterion_config'
  validations = [line for line in lines(workdir) if line.get('group') == 'valid']
  values = [[line['step'], line['auc'] - abs(line['calibration'] - 1)] for line in validations]
  assert len(values) == 2
  scores = json.loads((workdir / 'checkpoints/validations.json').read_text())
  np.testing.assert_allclose(scores, values, rtol=1e-6)
  report = json.loads((workdir / 'report.json').read_text())
  assert report['step'] == max(values, key=lambda pair: pair[1])[0]


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
def test_a_name_of_no_metric_or_criterion_is_refused(fields, message, copy_code):
  copy_code('my_metric.py')
  config = tiny_config('pooling')
  config.update(fields)
  with pytest.raises(UserError, match=message):
    setups.check(config)


@pytest.mark.parametrize('task', SMALL_DATA)
def test_a_loss_is_minimised(task, copy_code, lmn_jax, refused, tmp_path):
  copy_code('my_loss.py', 'my_loss_config.py')
  run = [f'--config=my_loss_config.py:{task}', *SMALL, *SMALL_DATA[task], '--config.steps=4']
  lmn_jax(*run, '--config.log_every=1')
  workdir = tmp_path / f'runs/my_loss_config-{task}'
  losses = [line['loss'] for line in lines(workdir) if line['group'] == 'train']
  assert len(losses) == 4
  # At the start every score is about 0: log 2 each, of the focal loss times (1 - 1 / 2)^2.
  np.testing.assert_allclose(losses[0], np.log(2) * (0.25 if task == 'click' else 1), rtol=0.02)
  message = refused(*run, '--config.model.loss=my_loss:focal_los')
  assert "did you mean 'focal_loss'?" in message
  message = refused(*run, '--config.model.loss=bcee')
  assert "config.model.loss='bcee' is unknown; did you mean 'bce'?" in message


@pytest.mark.slow
def test_an_optimizer_of_optax_trains_and_resumes(copy_code, lmn_jax, refused, tmp_path):
  copy_code('my_optimizer_config.py')
  run = ['--config=my_optimizer_config.py', *SMALL, *SMALL_LOG]
  lmn_jax(*run, '--config.steps=2')
  assert 'resumed from step 2' in lmn_jax(*run, '--config.steps=4')
  report = json.loads((tmp_path / 'runs/my_optimizer_config/report.json').read_text())
  dense = report['config']['optimizer']['dense']
  assert report['step'] in (2, 4) and dense['name'] == 'lion' and dense['arguments']['b2'] == 0.98
  message = refused(*run, '--config.optimizer.dense.name=lionn')
  assert "config.optimizer.dense.name='lionn' is unknown; did you mean 'lion'?" in message
  message = refused(*run, "--config.optimizer.dense.arguments={'b3': 0.5}")
  assert "config.optimizer.dense.arguments of lion: field='b3' is unknown" in message
