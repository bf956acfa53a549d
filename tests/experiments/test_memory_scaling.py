"""The scaling of the memory: its runs, arithmetic, picture and errors."""

import argparse
import json
import struct
import sys

import numpy as np
import pytest

from lmn_jax.errors import UserError
from tests.runs import load_experiment

scaling = load_experiment('memory_scaling')
compare, step_cost = load_experiment('compare'), load_experiment('step_cost')

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

CONFIG = """
from tests.runs import tiny_config

def get_config(model='lmn'):
  config = tiny_config(model)
  config.steps = config.eval_every = config.save_every = 4
  return config
"""

# Test AUC by seed, trained and control, and seconds of the trained runs.
AUC = {4: ([0.60, 0.64, 0.65], [0.55, 0.56, 0.60]), 8: ([0.70, 0.66, 0.71], [0.51, 0.53, 0.55])}
SECONDS = {4: [10.0, 20.0, 60.0], 8: [30.0, 40.0, 50.0]}
USAGE = {
  4: [dict(ever=e, dead=0.1, kl=0.5) for e in (0.9, 0.8, 1.0)],
  8: [dict(ever=0.5, dead=d, kl=k) for d, k in ((0.4, 1.0), (0.5, 1.5), (0.9, 2.0))],
}
TIMES = {
  'table': [dict(log2=4, ms=3.0, ms_low=2.0, ms_high=5.0, others=0.25)],
  'missing': ['lmn_jax, default failed at 2^6: status 1'] * 2,
  'passes': 2,
  'cores': 2,
}


def invented(axes=(4, 8), seeds=3, times=TIMES):
  """Rows from invented reports."""

  def reports(auc, seconds):
    return [
      {'test': {'overall': {'auc': a}}, 'train_seconds': s}
      for a, s in zip(auc[:seeds], seconds, strict=False)
    ]

  sizes = {n: tuple(reports(auc, SECONDS[n]) for auc in AUC[n]) for n in axes}
  return scaling.lines_of(sizes, {n: USAGE[n][:seeds] for n in axes}, times)


@pytest.fixture
def file(tmp_path):
  """A tiny config file."""
  path = tmp_path / 'tiny.py'
  path.write_text(CONFIG)
  return path


@pytest.fixture
def call(file, tmp_path):
  """Runs the script on the tiny config in a new folder."""

  def run(*arguments):
    folders = [f'--workdir={tmp_path / "runs"}', f'--log={tmp_path / "LOG.md"}']
    return scaling.main([f'--config={file}', *folders, *arguments])

  return run


def test_differences_are_computed_seed_by_seed():
  small, large = invented()
  for line, n in ((small, 4), (large, 8)):
    trained, frozen = map(np.array, AUC[n])
    for name, values in (('auc', trained), ('frozen', frozen), ('over_frozen', trained - frozen)):
      np.testing.assert_allclose(line[name], [values.mean(), values.std(ddof=1)], rtol=1e-9)
    assert line['slots'] == n * n and line['seconds'] == np.mean(SECONDS[n])
    for name in ('ever', 'dead', 'kl'):
      np.testing.assert_allclose(line[name], np.mean([u[name] for u in USAGE[n]]))
  step = np.array(AUC[8][0]) - AUC[4][0]
  np.testing.assert_allclose(large['over_before'], [step.mean(), step.std(ddof=1)], rtol=1e-9)
  assert small['over_before'] is None
  # A size that was not timed has no time.
  assert small['ms'] == [3.0, 2.0, 5.0] and large['ms'] is None
  assert invented(times=None)[0]['ms'] is None


def test_table():
  rows = [
    [cell.strip() for cell in row.strip('|').split('|')]
    for row in scaling.table_of(invented()).split('\n')
  ]
  assert [len(row) for row in rows] == [10] * 4
  assert rows[2] == [
    '16', '0.6300 ± 0.0265', '0.5700 ± 0.0265', '+0.0600 ± 0.0173', '-', '90.0 %', '10.0 %', '0.50',
    '3.0 (2.0-5.0)', '30',
  ]  # fmt: skip
  assert rows[3] == [
    '64', '0.6900 ± 0.0265', '0.5300 ± 0.0200', '+0.1600 ± 0.0300', '+0.0600 ± 0.0400', '50.0 %',
    '60.0 %', '1.50', '-', '40',
  ]  # fmt: skip
  assert scaling.table_of(invented(seeds=1)).split('\n')[2].startswith('| 16      | 0.6000   |')


def test_entries_and_folders_are_those_of_compare(tmp_path):
  config = 'configs/lmn_douyin.py'
  typed = (
    f'{config}[model.slots_per_axis=64],{config}[model.slots_per_axis=64,model.freeze_values=True]'
  )
  expected = [compare.read_entry('', *entry, []) for entry in compare.split_entries(typed)]
  entries = scaling.entries_of(config, [64], [])
  assert [entry.label for entry in entries] == [entry.label for entry in expected]
  assert [entry.config.to_dict() for entry in entries] == [x.config.to_dict() for x in expected]
  assert tuple(entry.label for entry in entries) == scaling.labels_of(config, 64)
  assert [compare.folder_of(tmp_path, entry.label, 2).name for entry in entries] == [
    'lmn_douyin-model.slots_per_axis=64-seed2',
    'lmn_douyin-model.slots_per_axis=64-model.freeze_values=True-seed2',
  ]
  sizes = [entry.config.model for entry in scaling.entries_of(config, [8, 16], [])]
  assert [(m.slots_per_axis, m.freeze_values) for m in sizes] == [
    (8, False), (8, True), (16, False), (16, True),
  ]  # fmt: skip


def test_usage_is_that_of_the_checkpoint(tmp_path):
  memory = {'memory/ever': 0.5, 'memory/dead': 0.25, 'memory/kl': 1.5}
  lines = [
    {'step': 4, 'group': 'valid'} | dict.fromkeys(memory, 0.0),
    {'step': 8, 'group': 'train'} | dict.fromkeys(memory, 0.0),
    {'step': 8, 'group': 'valid'} | memory,
    {'step': 12, 'group': 'valid'} | dict.fromkeys(memory, 0.0),
    {'step': 16, 'group': 'valid', 'auc': 0.5},
  ]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert scaling.usage_of(tmp_path, 8) == {'ever': 0.5, 'dead': 0.25, 'kl': 1.5}
  with pytest.raises(UserError, match='no memory/ever at step 16; --config must be of an LMN'):
    scaling.usage_of(tmp_path, 16)


def test_times_are_those_of_step_cost(monkeypatch):
  seen = []

  def ran(who, log2, setting, args):
    seen.append((args.task, who, setting, log2))
    blank = dict.fromkeys(
      ('state_mib', 'temporaries_mib', 'start_rss_mib', 'peak_rss_mib', 'compile_s', 'gb_per_s')
    )
    # The passes of 2^12 take 12, 13 and 14 ms.
    ms = log2 + (len(seen) - 1) // 3
    output = json.dumps(blank | dict(ms=ms, ms_best=1, ms_worst=99, device='cpu', version='x'))
    return argparse.Namespace(returncode=0, stdout=output, stderr=''), 0.5

  monkeypatch.setattr(step_cost, 'run_one', ran)
  times = scaling.times_of([64, 128, 1024], 3)
  assert seen == [('model', 'lmn_jax', 'kept', log2) for log2 in (12, 14, 20)] * 3
  table = [[row[k] for k in ('log2', 'ms', 'ms_low', 'ms_high')] for row in times['table']]
  assert table == [[12, 13, 12, 14], [14, 15, 14, 16], [20, 21, 20, 22]]
  assert scaling.note_on(times).startswith('ms a step: step_cost.py --task=model')
  assert 'passes: 3' in scaling.note_on(times) and 'up to 0.5 cores' in scaling.note_on(times)
  assert scaling.note_on(TIMES).count('failed at 2^6') == 1 and not scaling.note_on(None)


def test_picture_shows_every_point():
  figure = scaling.figure_of(invented(), 3, din=0.62)
  scores, cost = figure.axes
  trained, frozen = scores.containers
  for drawn, key in ((trained, 'auc'), (frozen, 'frozen')):
    line, _, (bars,) = drawn
    mean, deviation = np.array([line[key] for line in invented()]).T
    np.testing.assert_allclose(line.get_xydata(), np.stack([[16, 64], mean], 1))
    ends = np.array(bars.get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, np.stack([mean - deviation, mean + deviation], 1))
  (din,) = [line for line in scores.lines if line.get_label() == 'DIN']
  assert din.get_linestyle() == '--' and set(din.get_ydata()) == {0.62}
  labels = [text.get_text() for text in scores.get_legend().get_texts()]
  assert labels == ['LMN', 'values frozen at random', 'DIN']
  assert scores.get_ylabel() == 'test AUC, mean ± deviation of 3 seeds'
  for axes in figure.axes:
    assert axes.get_xscale() == 'log' and axes.get_xlabel() == 'slots of the memory'
    assert [text.get_text() for text in axes.get_xticklabels()] == ['16', '64']
  # The second size was not timed.
  ((line, _, (bars,)),) = cost.containers
  np.testing.assert_allclose(line.get_xydata(), [[16, 3]])
  np.testing.assert_allclose(bars.get_segments(), [[[16, 2], [16, 5]]])
  assert cost.get_ylabel() == 'ms of a training step' and cost.get_ylim()[0] == 0


def test_picture_of_one_seed_without_times():
  (scores,) = scaling.figure_of(invented(seeds=1, times=None), 1).axes
  assert scores.get_ylabel() == 'test AUC'
  assert not any(drawn.has_yerr for drawn in scores.containers)


@pytest.fixture
def faked(monkeypatch):
  """Fakes of the trainings and of the timing; their folders. The AUC identifies entry and seed."""
  folders = []

  def train(config, folder, store):
    folders.append(folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    model = config.model
    valid = {'memory/ever': 0.5, 'memory/dead': 0.25, 'memory/kl': float(model.slots_per_axis)}
    line = {'step': config.steps, 'group': 'valid'} | valid
    (folder / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    auc = 0.5 + 0.01 * model.slots_per_axis + 0.001 * config.seed - 0.1 * model.freeze_values
    return {
      'test': {'overall': dict(auc=auc, gauc=auc, log_loss=0.6)}, 'baselines': {'test': {}},
      'columns': ['auc', 'gauc', 'log_loss'],
      'step': config.steps, 'train_seconds': 9.0, 'protocol': store.protocol, 'commit': 'abc',
      'fingerprint': store.fingerprint, 'counts': store.manifest['counts'], 'devices': '1 cpu',
      'config': config.to_dict(),
    }  # fmt: skip

  monkeypatch.setattr(compare.loop, 'train', train)
  monkeypatch.setattr(scaling, 'times_of', lambda axes, passes: TIMES | {'passes': passes})
  return folders


def test_from_runs_to_files(call, file, tmp_path, faked):
  call('--axes=8,4', '--seeds=3,5', '--passes=5', '--din=0.6', '--note=a note')
  runs = tmp_path / 'runs'
  result = json.loads((runs / 'memory_scaling.json').read_text())
  assert [line['slots'] for line in result['lines']] == [16, 64]
  for line, axis in zip(result['lines'], (4, 8), strict=True):
    for key, less in (('auc', 0), ('frozen', 0.1)):
      np.testing.assert_allclose(line[key][0], 0.504 + 0.01 * axis - less)
    assert (line['ever'], line['dead'], line['kl']) == (0.5, 0.25, axis)
  assert result['lines'][0]['ms'] == [3.0, 2.0, 5.0] and result['din'] == 0.6
  assert {len(reports) for reports in result['reports'].values()} == {2}

  picture = (runs / 'memory_scaling.png').read_bytes()
  assert picture[:8] == b'\x89PNG\r\n\x1a\n' and len(picture) > 10_000
  assert struct.unpack('>II', picture[16:24]) == (1560, 660)

  log = (tmp_path / 'LOG.md').read_text()
  for text in (
    'douyin_standin: LMN from 16 to 64 slots', result['table'], 'a note', 'seeds 3, 5', 'passes: 5',
    'python experiments/memory_scaling.py --config=PATH/tiny.py --axes=8,4', result['protocol'],
    result['fingerprint'], 'commit abc',
  ):  # fmt: skip
    assert text in log, text
  assert str(tmp_path) not in log

  # compare.py uses the same folders.
  folders = faked[:4]
  entry = f'{file}[model.slots_per_axis=4]'
  models = f'{entry},{entry[:-1]},model.freeze_values=True]'
  compare.main([f'--models={models}', '--seeds=3,5', f'--workdir={runs}', '--log='])
  assert len(faked) == 12 and faked[8:] == folders


@pytest.mark.slow
def test_real_runs(call, file, tmp_path, monkeypatch):
  (line,) = call('--axes=4', '--seeds=3', '--no-times')['lines']
  assert 0 < line['ever'] <= 1 and 0 <= line['dead'] < 1 and line['kl'] > 0 and line['ms'] is None
  runs = tmp_path / 'runs'
  assert (runs / 'memory_scaling.png').exists()

  # compare.py reuses the runs.
  writer = compare.loop.Writer

  def resumed(folder, start):
    assert start == 4, f'{folder} starts again'
    return writer(folder, start)

  monkeypatch.setattr(compare.loop, 'Writer', resumed)
  again = compare.main(
    [f'--models={file}[model.slots_per_axis=4]', '--seeds=3', f'--workdir={runs}', '--log=']
  )
  assert again['lines']['tiny[model.slots_per_axis=4]']['auc'] == line['auc']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--axes=4,x'], "--axes='4,x' must be whole numbers, such as 64,128,256"),
    (['--axes=4,4'], 'must be different numbers, 1 or more'),
    (['--axes=0,4'], 'must be different numbers, 1 or more'),
    (['--axes=4,12'], 'which 12 is not; take 8 or 16, or add --no-times'),
    (['--axes=1', '--no-times'], 'slots_per_axis'),
    (['--seeds=x'], '--seeds'),
    (['--din=71.4'], '--din=71.4 must be between 0 and 1'),
    (['--passes=0'], '--passes=0 must be 1 or more, or add --no-times'),
    (['--steps=3'], "'--steps=3' is not a flag"),
    (['--config=lmn'], "--config='lmn' must be a config file"),
    (['--config.model.widht=3'], 'widht'),
  ],
)
def test_invalid_arguments_are_refused(call, tmp_path, faked, arguments, message):
  with pytest.raises(UserError, match=message):
    call(*arguments)
  assert not (tmp_path / 'runs').exists() and not (tmp_path / 'LOG.md').exists()


def test_without_matplotlib_nothing_is_trained(call, tmp_path, faked, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(UserError, match=r"not installed; in the clone, pip install '.\[plot\]'$"):
    call('--axes=4')
  assert not (tmp_path / 'runs').exists()
