"""The sweep over lengths: measurements, arithmetic, picture, gaps and resuming."""

import argparse
import json
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.data.batches import BatchSource
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from tests.runs import load_experiment, mesh_of, tiny_config

sweep = load_experiment('length_sweep')
compare, step_cost = load_experiment('compare'), load_experiment('step_cost')

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
def file(tmp_path):
  """Returns a tiny config file."""
  path = tmp_path / 'tiny.py'
  path.write_text(CONFIG)
  return path


@pytest.fixture
def call(file, tmp_path):
  """Runs the script on the tiny config in a new folder."""

  def run(*arguments):
    folders = [f'--workdir={tmp_path / "runs"}', f'--log={tmp_path / "LOG.md"}']
    return sweep.main([f'--config={file}', *folders, *arguments])

  return run


def test_histories_are_full(tiny_store):
  batch = BatchSource(tiny_store.path, 'train', 6, 50, shuffle=True)[0]
  filled = sweep.fill(batch, tiny_store, np.random.default_rng(0))
  assert {name: (x.shape, x.dtype) for name, x in filled.items()} == {
    name: (x.shape, x.dtype) for name, x in batch.items()
  }
  assert batch['length'].max() < 50 and set(filled['length']) == set(filled['total']) == {50}
  V = tiny_store.vocabulary['item']
  assert filled['history'].max() < V and len(np.unique(filled['history'])) > V / 2
  codes = tiny_store.items['item.category']
  np.testing.assert_array_equal(filled['history.category'], codes[filled['history']])
  np.testing.assert_array_equal(filled['item'], batch['item'])


@pytest.mark.slow
def test_a_process_measures_the_step_at_its_length(call, monkeypatch, capsys):
  mesh = mesh_of(1)
  monkeypatch.setattr(meshes, 'make_mesh', lambda *_: mesh)
  for L in (3, 30):
    models = f'--models=pooling[model.width=5,history_length={L}]'
    call('--one=cost', models, '--seeds=7', '--steps=6')
  short, long = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert short['temporaries_mib'] <= long['temporaries_mib'] and short['peak_rss_mib'] > 0
  assert 0 < long['ms_best'] <= long['ms'] and long['steps'] == 6
  config = long['config']
  assert (config['history_length'], config['model']['width'], config['seed']) == (30, 5, 7)
  assert long['fingerprint'] and long['protocol'] and long['counts']


def test_fit():
  L = [50, 100, 500, 1000]
  fit = sweep.fit(L, [2 + 0.03 * n for n in L])
  np.testing.assert_allclose([fit[k] for k in ('slope', 'fixed', 'r2')], [0.03, 2, 1])
  assert 0.5 < fit['exponent'] < fit['exponent_at_end'] < 1
  square = sweep.fit(L, [1e-4 * n**2 for n in L])
  np.testing.assert_allclose([square['exponent'], square['exponent_at_end']], 2)
  # By the definition: 1 minus the share of the residual variance.
  t = np.array([1.0, 4.0, 3.0, 9.0])
  noisy = sweep.fit(L, list(t))
  residual = t - (noisy['fixed'] + noisy['slope'] * np.array(L))
  np.testing.assert_allclose(noisy['r2'], 1 - residual.var() / t.var())
  assert noisy['r2'] < 0.95


def invented():
  """Returns rows of invented results: `a` is linear, `b` has no memory at 40 and no AUC at 20."""
  points = [
    sweep.Point(model, L, '', compare.Entry(f'{model}{L}', tiny_config()))
    for L in (10, 20, 40)
    for model in ('a', 'b')
  ]

  def cost(ms, device=None):
    peaks = dict(peak_rss_mib=8 * ms, peak_device_mib=device, temporaries_mib=ms / 2)
    return {'ms': ms, 'ms_best': ms - 0.5} | peaks

  def report(auc):
    return {'test': {'overall': {'auc': auc, 'gauc': auc - 0.1}}}

  costs = {f'a{L}': [cost(L + 1.0), cost(L + 3.0), cost(L + 2.0)] for L in (10, 20, 40)}
  costs |= {f'b{L}': [cost(5.0 * L, 3.0)] for L in (10, 20)}
  reports = {f'a{L}': [report(0.6), report(0.6 + L / 1000)] for L in (10, 20, 40)}
  reports['b10'] = [report(0.7)]
  cost_gaps = {'b40': 'out of memory: killed'}
  train_gaps = cost_gaps | {'b20': 'diverged: the loss', 'b10': 'diverged: too'}
  return sweep.lines_of(points, costs, reports, (cost_gaps, train_gaps))


def test_lines():
  lines = invented()
  assert [(line['model'], line['length']) for line in lines] == [
    (model, L) for model in 'ab' for L in (10, 20, 40)
  ]
  second, fourth, last = lines[1], lines[3], lines[-1]
  assert [second[name] for name in sweep.COSTS] == [[22, 21, 23], 20.5, 32e3 / 22, 184, 11.5]
  np.testing.assert_allclose(second['auc'], [0.61, 0.02 / 2**0.5])
  assert fourth['peak_mib'] == 3.0 and fourth['auc'] == [0.7, None]
  assert {last[name] for name in (*sweep.COSTS, 'auc', 'gauc')} == {None}


def test_tables_name_the_reasons_of_gaps():
  table = sweep.table_of(invented(), 2).split('\n')
  rows = [[cell.strip() for cell in row.strip('|').split('|')] for row in table]
  assert {len(row) for row in rows} == {9}
  score = '0.6100 ± 0.0141', '0.5100 ± 0.0141'
  assert rows[3] == ['a', '20', *score, '22.0 (21.0-23.0)', '20.5', '1,455', '184', '11.5']
  assert rows[5][2:4] == ['0.7000 (1 of 2 seeds)', '0.6000 (1 of 2 seeds)']
  assert rows[6][2:5] == ['diverged', 'diverged', '100.0 (100.0-100.0)']
  assert rows[7] == ['b', '40', *3 * ['out of memory'], *4 * ['-']]
  assert 'AUC' not in sweep.table_of(invented(), 0)

  fits = sweep.fits_of(invented())  # b was measured at two lengths
  assert fits.keys() == {'a'} and fits['a']['lengths'] == [10, 20, 40]
  row = [cell.strip() for cell in sweep.fits_table(fits).split('\n')[2].strip('|').split('|')]
  assert row == ['a', '10 to 40', '1,000.0', '0.5', '1.0000', '0.97', '0.98']


def test_picture_shows_every_point():
  figure = sweep.figure_of(invented(), 2)
  assert [axes.get_ylabel() for axes in figure.axes] == [
    'test AUC, mean ± deviation of 2 seeds', 'ms of a training step', 'peak of memory, MiB',
    'temporaries of the step, MiB',
  ]  # fmt: skip
  drawn = [[c.lines[0].get_xydata().tolist() for c in axes.containers] for axes in figure.axes]
  assert drawn[1] == [[[10, 12], [20, 22], [40, 42]], [[10, 50], [20, 100]]]
  assert drawn[2][1] == [[10, 3], [20, 3]] and drawn[3][0][0] == [10, 6.5]
  np.testing.assert_allclose(drawn[0][0], [[10, 0.605], [20, 0.61], [40, 0.62]])
  (bars,) = figure.axes[1].containers[0].lines[2]
  np.testing.assert_allclose(bars.get_segments()[1], [[20, 21], [20, 23]])
  (legend,) = figure.legends
  assert {text.get_text() for text in legend.get_texts()} == {'a', 'b', 'linear in L'}
  for axes in figure.axes:
    assert axes.get_xscale() == 'log'
    assert [text.get_text() for text in axes.get_xticklabels()] == ['10', '20', '40']
  # Round ticks around all points, and no panel that was not requested.
  assert figure.axes[1].get_ylim() == (10, 100)
  costs_only = [line | {'auc': None} for line in invented()]
  assert len(sweep.figure_of(costs_only, 0).axes) == 3


def test_ticks():
  assert sweep.ticks_of(532, 795) == [500, 1000]
  assert sweep.ticks_of(3, 45) == [2, 5, 10, 20, 50]
  assert sweep.ticks_of(2, 30_000) == [1, 10, 100, 1000, 10_000, 100_000]
  assert sweep.ticks_of(5, 5) == [5, 10]


def ended(status, *output):
  return argparse.Namespace(returncode=status, stdout='', stderr='\n'.join(output))


def test_why():
  xla = 'jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.'
  assert sweep.why(ended(1, 'Traceback', xla, 'note')) == f'out of memory: {xla}'
  assert sweep.why(ended(-signal.SIGKILL)).startswith('out of memory: killed')
  assert sweep.why(ended(-signal.SIGABRT, 'what():  std::bad_alloc')).startswith('out of memory')
  assert sweep.why(ended(1, 'error: the loss is nan')) == 'diverged: the loss is nan'
  assert sweep.why(ended(1, 'Traceback', 'KeyError: 3')) == 'failed: status 1 KeyError: 3'
  with pytest.raises(UserError, match='^holds another$'):
    sweep.why(ended(2, 'x', 'error: holds another'))


@pytest.fixture
def faked(monkeypatch):
  """Fake processes, and the list of their calls. The model `din` is killed at length 200."""
  calls = []

  def ran(words, setting):
    flags = dict(word.removeprefix('--').split('=', 1) for word in words[2:])
    ((name, (*_, change)),) = compare.split_entries(flags['models'])
    L, seed = int(change.removeprefix('history_length=')), int(flags['seeds'])
    calls.append((flags['one'], name, L, seed))
    assert setting == 'kept' and words[1] == sweep.__file__
    if (name, L) == ('din', 200):
      return ended(-signal.SIGKILL), 0.1
    if (flags['one'], seed) == ('train', 9):
      return ended(1, f'error: the loss is nan ({flags["workdir"]}/x)'), 0.1
    config = compare.read_entry(flags['config'], name, [change], []).config
    data = prepare.prepare(config.data, f'{flags["workdir"]}/stores')
    result = sweep.report.origin(compare.with_seed(config, seed), data)
    if flags['one'] == 'cost':
      ms = L / 10 + seed
      result |= dict(ms=ms, ms_best=ms, peak_rss_mib=9.0, peak_device_mib=None, temporaries_mib=1.0)
    else:
      result['test'] = {'overall': dict(auc=0.5 + L / 1000 + seed / 100, gauc=0.5)}
    message = json.dumps(sweep.jsonable(result))
    return argparse.Namespace(returncode=0, stdout=f'a line\n{message}\n', stderr=''), 0.25

  monkeypatch.setattr(step_cost, 'run_process', ran)
  return calls


def test_from_processes_to_files(call, tmp_path, faked):
  arguments = [
    '--models=pooling,din',
    '--lengths=200,100,400',
    '--max-length=din:200',
    '--seeds=3,5',
  ]
  result = call(*arguments, '--passes=2', '--note=a note')
  # In turns; a failed point is not tried again, and one that does not fit is not trained.
  turn = [('pooling', 100), ('din', 100), ('pooling', 200), ('din', 200), ('pooling', 400)]
  fitting = [point for point in turn if point != ('din', 200)]
  assert faked == [
    *[('cost', *point, 0) for point in turn], *[('cost', *point, 1) for point in fitting],
    *[('train', *point, seed) for seed in (3, 5) for point in fitting],
  ]  # fmt: skip
  by_point = {(line['model'], line['length']): line for line in result['lines']}
  assert by_point['pooling', 400]['ms'] == [40.5, 40.0, 41.0]
  np.testing.assert_allclose(by_point['din', 100]['auc'], [0.64, 0.02 / 2**0.5])
  assert by_point['din', 200]['no_auc'].startswith('out of memory')
  assert by_point['din', 400]['no_cost'] == 'not tried: --max-length=din:200'
  np.testing.assert_allclose(result['fits']['pooling']['slope'], 0.1)

  runs = tmp_path / 'runs'
  assert json.loads((runs / 'length_sweep.json').read_text())['lines'] == result['lines']
  picture = (runs / 'length_sweep.png').read_bytes()
  assert picture[:8] == b'\x89PNG\r\n\x1a\n' and struct.unpack('>II', picture[16:24])[0] == 1560
  log = (tmp_path / 'LOG.md').read_text()
  for text in (
    'pooling, din with histories of 100 to 400', result['table'], 'a note', 'seeds 3, 5',
    'passes: 2', 'up to 0.25 cores', 'of 400', 'python experiments/length_sweep.py',
    'din at L = 400: not tried: --max-length=din:200', 'din at L = 200: out of memory: killed',
  ):  # fmt: skip
    assert text in log, text
  assert str(tmp_path) not in log

  # Again: only missing results, with a budget that finished runs do not need.
  del faked[:]
  again = call(*arguments[:-1], '--seeds=3,5,6', '--passes=2', '--minutes=0.001')
  assert faked == [('cost', 'din', 200, 0), ('train', 'pooling', 100, 6), ('train', 'din', 100, 6)]
  line = next(line for line in again['lines'] if line['length'] == 400)
  assert line['seeds'] == 2 and line['no_auc'] == 'not trained: 0.0 min, --minutes=0.001'
  # Results of another config are not reused.
  del faked[:]
  call('--models=pooling', '--lengths=100', '--cost-only', '--passes=1', '--config.batch_size=16')
  assert faked == [('cost', 'pooling', 100, 0)]


def test_a_diverged_training_is_reported_without_folders(call, tmp_path, faked):
  result = call('--models=pooling', '--lengths=100', '--passes=1', '--seeds=9')
  assert result['lines'][0]['ms'] and result['lines'][0]['auc'] is None
  log = (tmp_path / 'LOG.md').read_text()
  assert 'L = 100: diverged: the loss is nan (WORKDIR/x)' in log and str(tmp_path) not in log


def test_cost_only_needs_no_seeds(call, tmp_path, faked):
  result = call('--models=pooling', '--lengths=100,200', '--cost-only', '--passes=1')
  assert faked == [('cost', 'pooling', 100, 0), ('cost', 'pooling', 200, 0)]
  assert 'AUC' not in result['table'] and not result['reports']
  log = (tmp_path / 'LOG.md').read_text()
  assert 'nothing was trained' in log and 'seed' not in log


def test_nothing_measured_is_an_error(call, tmp_path, faked):
  with pytest.raises(UserError, match=r'nothing could be measured; din\[history_length=200\]: out'):
    call('--models=din', '--lengths=200')
  assert not (tmp_path / 'LOG.md').exists()


@pytest.mark.slow
def test_real_processes(call, tmp_path, monkeypatch):
  # The config of the processes imports tests/runs.py.
  monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[2]))
  arguments = ['--models=pooling', '--lengths=4', '--passes=1', '--seeds=0', '--steps=5']
  first = call(*arguments)
  assert all(line['ms'] and line['auc'] for line in first['lines'])
  # compare.py reuses the runs.
  folders = {path.parent.name for path in (tmp_path / 'runs').glob('*/report.json')}
  assert folders == {'pooling-history_length=4-seed0'}
  assert call(*arguments)['lines'] == first['lines']
  with pytest.raises(UserError, match='nothing could be measured; .*: out of memory'):
    call('--models=din', '--lengths=8000', '--cost-only', '--memory=1', '--config.batch_size=2048')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--lengths=50,x'], "--lengths='50,x' must be whole numbers, such as 50,100,200"),
    (['--lengths=0,50'], 'must be different numbers, 1 or more'),
    (['--models=poolin'], "'poolin' is unknown; did you mean 'pooling'"),
    (['--max-length=pooling'], "--max-length: 'pooling' is not MODEL:LENGTH"),
    (['--max-length=din:9'], "--max-length='din' is unknown; available: pooling"),
    (['--passes=0'], '--passes=0 must be 1 or more'),
    (['--memory=-1'], '--memory=-1.0 must be 0 or more'),
    (['--minutes=nan'], '--minutes=nan must be 0 or more'),
    (['--seeds=x'], '--seeds'),
    (['--config.model.widht=3'], 'widht'),
  ],
)
def test_invalid_arguments_are_refused(call, tmp_path, faked, arguments, message):
  with pytest.raises(UserError, match=message):
    call('--models=pooling', *arguments)
  assert not faked and not (tmp_path / 'runs').exists()


def test_without_matplotlib_nothing_is_measured(call, faked, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(UserError, match='length_sweep.png needs matplotlib'):
    call('--models=pooling')
  assert not faked


def test_next_items_are_refused(tmp_path):
  file = Path(sweep.__file__).parents[1] / 'configs' / 'dman_movielens.py'
  with pytest.raises(UserError, match="is of the task 'next_item'; this is of clicks"):
    sweep.main([f'--models={file}', '--lengths=20', f'--workdir={tmp_path}', '--log='])
