"""The comparison of models: its runs, table and errors."""

import json

import numpy as np
import pytest

from lmn_jax.errors import DivergedError, Preempted, UserError
from lmn_jax.training import loop
from tests.runs import load_experiment

compare = load_experiment('compare')

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

CONFIG = """
from tests.runs import tiny_config

def get_config(model='pooling'):
  config = tiny_config(model)
  config.steps = config.eval_every = config.save_every = 4
  return config
"""


@pytest.fixture
def call(tmp_path):
  """Runs the script on a tiny config in a new folder."""
  file = tmp_path / 'tiny.py'
  file.write_text(CONFIG)

  def run(*arguments):
    fixed = [f'--config={file}', f'--workdir={tmp_path / "runs"}', f'--log={tmp_path / "LOG.md"}']
    return compare.main([*fixed, *arguments])

  return run


@pytest.mark.slow
def test_the_table_has_the_numbers_of_the_reports(call, tmp_path, monkeypatch):
  expected = ['--models=pooling,pooling[optimizer.dense.rate=0.1]', '--seeds=3,5']
  call(*expected, '--note=a note')
  result = json.loads((tmp_path / 'runs' / 'compare.json').read_text())
  labels = ['pooling', 'pooling[optimizer.dense.rate=0.1]']
  folders = ['pooling', 'pooling-optimizer.dense.rate=0.1']
  auc = {}
  for label, folder, rate in zip(labels, folders, (1e-3, 0.1), strict=True):
    reports = [
      json.loads((tmp_path / 'runs' / f'{folder}-seed{seed}' / 'report.json').read_text())
      for seed in (3, 5)
    ]
    assert [r['config']['seed'] for r in reports] == [3, 5]
    assert [r['config']['optimizer']['dense']['rate'] for r in reports] == [rate, rate]
    auc[label] = np.array([r['test']['overall']['auc'] for r in reports])
    for metric in ('auc', 'gauc', 'log_loss'):
      values = [r['test']['overall'][metric] for r in reports]
      line = result['lines'][label][metric]
      np.testing.assert_allclose(line, [np.mean(values), np.std(values, ddof=1)], rtol=1e-9)
  assert auc[labels[0]].std() > 0 and not np.allclose(auc[labels[0]], auc[labels[1]])
  difference = auc[labels[0]] - auc[labels[1]]
  for label, sign in zip(labels, (1, -1), strict=True):
    line = result['lines'][label]
    assert line['rival'] != label
    np.testing.assert_allclose(
      line['over_rival'], [sign * difference.mean(), difference.std(ddof=1)], rtol=1e-9
    )
  baseline = reports[0]['baselines']['test']['item_user_mean']['overall']['auc']
  assert result['lines']['item_user_mean']['auc'] == [baseline, None]

  log = (tmp_path / 'LOG.md').read_text()
  assert f'| {auc[labels[1]].mean():.4f} ± {auc[labels[1]].std(ddof=1):.4f} ' in log
  for entry in (
    '--models=', '--config=PATH/tiny.py', 'seeds 3, 5', 'a note', reports[0]['protocol'],
    reports[0]['fingerprint'], str(reports[0]['commit']),
  ):  # fmt: skip
    assert entry in log, entry
  assert str(tmp_path) not in log

  # Again: the finished runs are reused, and a second entry has the same numbers.
  monkeypatch.setattr(loop, 'train', None)
  assert call(*expected, '--note=a note')['lines'] == result['lines']
  assert (tmp_path / 'LOG.md').read_text() == log + log
  with pytest.raises(TypeError):  # another config is another run
    call(*expected, '--config.steps=3')


def test_a_failed_run_is_an_error(call, tmp_path, monkeypatch):
  def diverge(config, workdir, store):
    raise DivergedError('the loss is nan')

  monkeypatch.setattr(loop, 'train', diverge)
  with pytest.raises(DivergedError, match='pooling, seed 7: the loss is nan'):
    call('--models=pooling,din', '--seeds=7')
  assert not (tmp_path / 'runs' / 'compare.json').exists()
  assert not (tmp_path / 'LOG.md').exists()


def test_entries():
  assert compare.split_entries('lmn, lmn[model.base=none,model.hidden=(8,4)],a/x.py:din') == [
    ('lmn', []), ('lmn', ['model.base=none', 'model.hidden=(8,4)']), ('a/x.py:din', []),
  ]  # fmt: skip
  assert compare.split_entries('din[a={"b": 1, "c": 2}]') == [('din', ['a={"b": 1, "c": 2}'])]
  assert compare.label_of('a/din_x.py', ['b=1', 'c=2']) == 'din_x[b=1,c=2]'
  assert compare.label_of('a/x.py:din', ['b=1']) == 'x:din[b=1]'
  assert compare.label_of('b.c:Din', []) == 'b.c:Din'  # a model outside of the package


def test_an_entry_has_its_file_and_changes(tmp_path):
  file = tmp_path / 'tiny.py'
  file.write_text(CONFIG)
  overrides = ['--config.steps=9', '--config.model.width=7']
  entry = compare.read_entry(str(file), 'din', ['model.width=5', 'model.hidden=(3,2)'], overrides)
  model = entry.config.model
  assert (model.name, model.width, tuple(model.hidden), entry.config.steps) == ('din', 5, (3, 2), 9)
  assert compare.read_entry('', str(file), [], []).config.model.name == 'pooling'
  entry = compare.read_entry('', f'{file}:din', ['model.width=5'], [])
  assert (entry.label, entry.config.model.name) == ('tiny:din[model.width=5]', 'din')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--models=poolin'], "'poolin' is unknown; did you mean 'pooling'"),
    (['--models=pooling[model.widht=3]'], 'widht'),
    (['--models=pooling[model.width=x]'], 'must be a whole number'),
    (['--models=pooling[width]'], "'width' in 'pooling\\[width\\]' is not FIELD=VALUE"),
    (['--models=pooling[a=1'], 'are not balanced'),
    (['--models=pooling,pooling'], 'more than once'),
    (['--models=,'], 'has no entry'),
    (['--models=pooling', '--seeds=0,x'], 'must be whole numbers'),
    (['--models=pooling', '--seeds=1,1'], 'different numbers'),
    (['--models=pooling', '--steps=3'], "'--steps=3' is not a flag"),
    (
      ['--models=pooling,din[data.min_count=2]'],
      'data than pooling \\(config.data.min_count 1 -> 2\\)',
    ),
    (['--models=pooling', '--config.batch_size=31'], 'batch_size=31 is not divisible'),
  ],
)
def test_invalid_arguments_are_refused(call, tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    call(*arguments)
  assert not (tmp_path / 'runs').exists() and not (tmp_path / 'LOG.md').exists()


def test_a_file_without_an_argument_takes_no_model(tmp_path):
  file = tmp_path / 'fixed.py'
  file.write_text(CONFIG.replace("model='pooling'", '').replace('(model)', '("pooling")'))
  with pytest.raises(UserError, match='this file takes no model'):
    compare.read_entry(str(file), 'din', [], [])
  assert compare.read_entry('', str(file), [], []).label == 'fixed'


def test_folders_of_paths_are_not_logged():
  argv = [
    '--config=configs/x.py',
    '--config.data.source=/home/me/log.csv',
    '--models=lmn[a=1]',
    '--log=',
  ]
  assert compare.command_of(argv) == (
    'python experiments/compare.py --config=configs/x.py --config.data.source=PATH/log.csv '
    "'--models=lmn[a=1]'"
  )


def test_sigterm_ends_a_comparison(capsys):
  def preempted(argv):
    raise Preempted('ended by SIGTERM: step 4 is saved')

  with pytest.raises(SystemExit) as ended:
    compare.start(preempted)
  assert ended.value.code == 143
  assert capsys.readouterr().err == 'ended by SIGTERM: step 4 is saved\n'


def test_errors_are_better_if_they_are_lower():
  def report(rmse):
    overall = {'rmse': rmse, 'mae': rmse / 2}
    baselines = {'test': {'label_mean': {'overall': {'rmse': 9.0, 'mae': 5.0}}}}
    return [{'columns': ['rmse', 'mae'], 'test': {'overall': overall}, 'baselines': baselines,
             'step': 1}]  # fmt: skip

  lines = compare.summarise({'a': report(3.0), 'b': report(2.0), 'c': report(4.0)})
  assert lines['c']['rival'] == 'b' and lines['b']['rival'] == 'a'
  assert lines['c']['over_rival'] == [2.0, None] and lines['label_mean']['rmse'] == [9.0, None]


def test_each_label_has_its_metrics_in_the_table():
  columns = ['click/auc', 'click/calibration', 'order/auc', 'order/gauc']
  assert compare.metrics_of({'columns': columns}) == ('click/auc', 'order/auc', 'order/gauc')
  assert compare.metrics_of({'columns': ['ndcg@10', 'hr@10']}) == ('ndcg@10', 'hr@10')
