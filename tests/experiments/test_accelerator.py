"""The table of accelerators: a row for every model, and records whose figures are of one run."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from tests.runs import load_experiment, mesh_of

accelerator = load_experiment('accelerator')
rows = load_experiment('accelerator_rows')
steps = load_experiment('accelerator_steps')
step_cost = load_experiment('step_cost')

STEP = {
  'row', 'task', 'model', 'device_ms', 'loop_ms', 'ratio', 'per_s', 'unit', 'bound', 'share', 'gb',
  'gflop', 'cold_s', 'second_s', 'step_mib', 'peak_mib', 'prepare_s', 'row_s', 'store', 'steps',
}  # fmt: skip
LOOP = {'loop_ms', 'prepare_s', 'store', 'steps'}
MACHINE = {
  'card', 'devices', 'platform', 'commit', 'jax', 'jaxlib', 'python', 'date', 'copy_gb_per_s',
  'tflop_per_s',
}  # fmt: skip
SCHEMAS = {
  'click': step_cost.SCHEMA,
  'export': step_cost.SCHEMA,
  'next_item': Schema((('user', 7), ('item', 9))),
}


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model=1, devices=None: mesh_of(1))


@contextlib.contextmanager
def cache_hits():
  """A list that gets an entry for every program that is read from the compilation cache."""
  hits = []

  def listen(event, **_):
    if event == '/jax/compilation_cache/cache_hits':
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield hits
  finally:
    jax.monitoring.unregister_event_listener(listen)


def test_every_model_has_a_row():
  names = {task: {row.model for row in rows.ROWS if row.task == task} for task in rows.TASKS}
  assert names['click'] == set(registry.CLICK)
  assert names['next_item'] == set(registry.NEXT_ITEM)
  assert names['export'] == {'lmn', 'sam'} and names['memory'] == {''}
  assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)


@pytest.mark.parametrize('small', [False, True])
def test_every_row_is_a_valid_experiment(small):
  for row in rows.ROWS:
    row = rows.quick(row) if small else row
    if row.task == 'memory':
      continue
    config = rows.config_of(row, small)
    model = registry.build(config.model.to_dict(), SCHEMAS[row.task], config.task)
    assert config.history_length == row.L and model.bf16 == row.fields.get('bf16', False)
    if not small:
      assert all(config.model[name] == value for name, value in row.fields.items())
    elif 'width' in row.fields:
      assert config.model.width == row.fields['width'] // 16


def test_rows_are_chosen_by_patterns():
  assert rows.chosen('') == list(rows.ROWS)
  chosen = [row.name for row in rows.chosen('next_item/dman/*,memory/*')]
  assert chosen == [
    'next_item/dman/20x1024',
    'memory/memory-2^24/32x16384',
    'next_item/dman/20x128',
  ]
  with pytest.raises(UserError, match=r"--only='click/lmm\*' matches none of the \d+ rows; a row"):
    rows.chosen('click/din/*,click/lmm*')


def test_goals_are_compared_with_their_rows():
  some = rows.chosen('click/lmn-2^16/50x512,click/din/50x512')
  records = {
    some[0].name: {'ratio': 1.2, 'per_s': 900e3, 'cold_s': 9.0, 'second_s': 2.0},
    some[1].name: {'ratio': 1.1, 'per_s': 1, 'cold_s': 16.0, 'second_s': 1.0},
  }
  verdicts = {goal.text: (goal.found, goal.verdict()) for goal in rows.goals(records, some)}
  assert verdicts == {
    'click/lmn-2^16/50x512 ratio': (1.2, 'NOT MET'),
    'click/lmn-2^16/50x512 per_s': (900e3, 'met'),
    'click/din/50x512 ratio': (1.1, 'met'),
    'slowest cold_s': (16.0, 'NOT MET'),
    'slowest second_s': (2.0, 'met'),
  }
  assert {goal.verdict() for goal in rows.goals({}, some)} == {'not measured'}


def test_the_share_is_of_the_bound_that_takes_longer():
  rates = steps.Rates(copy=100.0, matmul={'float32': 1000.0, 'bfloat16': 4000.0})
  cost = 50.0, 1000.0, 2000.0, rates
  assert steps.share_of_bound(*cost, 'float32').items() >= {'bound': 'flops', 'share': 0.5}.items()
  assert (
    steps.share_of_bound(*cost, 'bfloat16').items() >= {'bound': 'bytes', 'share': 0.25}.items()
  )


def test_a_time_is_the_median_of_groups(monkeypatch):
  """Calls take 10 ms of a fake clock, but one group of two calls takes 40 ms a call."""
  now, calls = [0.0], []
  monkeypatch.setattr(steps.time, 'perf_counter', lambda: now[0])

  def call():
    calls.append(len(calls))
    now[0] += 0.04 if calls[-1] in (4, 5) else 0.01
    return jnp.zeros(())

  assert steps.median_ms(call, 0.1) == pytest.approx(10)
  assert len(calls) == 2 + steps.GROUPS * 2
  # Longer calls than a group: two after the first one, and no more once the time is over twice.
  calls.clear()
  assert steps.median_ms(call, 0.006) == pytest.approx(10)
  assert len(calls) == 3


def test_digits():
  assert [steps.digits(x) for x in (0.0123456, 12345.6, 0.0)] == [0.01235, 12350, 0.0]


def test_targets_are_counted():
  V = 5
  batch = {'target': np.array([[1, 2, 0], [4, V, V]])}
  setup = type('Setup', (), {'sources': {'train': [batch] * 4}})
  setup.model = type('Model', (), {'items': V})
  (row,) = rows.chosen('next_item/dman/20x128')
  assert steps.counted(row, setup) == 3
  (row,) = rows.chosen('click/din/50x512')
  assert steps.counted(row, setup) == 512


# The row of DIN has a goal of the ratio, so it is measured with every feed.
RUNS = {
  'click/pooling/*': ['click/pooling/50x4096'],
  'click/din/50x512': ['click/din/50x512'],
  'next_item/gru4rec/*,memory/*': ['memory/memory-2^24/32x16384', 'next_item/gru4rec/50x256'],
}


@pytest.mark.slow
@pytest.mark.parametrize('only', list(RUNS))
def test_a_run(only, tmp_path, one_device, monkeypatch, capsys):
  """Every figure is of the run, and the file has the lines that are printed."""
  monkeypatch.setitem(steps.FEEDS, 'loop_ms', dict(store_on='auto', steps_per_dispatch=4))
  path, names = tmp_path / 'lines.jsonl', RUNS[only]
  cache = jax.config.jax_compilation_cache_dir
  with cache_hits() as hits:
    accelerator.main(['--quick', f'--only={only}', f'--json={path}'])
  assert len(hits) >= len(names)  # each update is compiled again from the cache
  assert jax.config.jax_compilation_cache_dir == cache
  printed = capsys.readouterr().out.splitlines()
  lines = path.read_text().splitlines()
  assert printed[: len(lines)] == lines
  machine, *records, last = map(json.loads, lines)
  assert machine.keys() == MACHINE and machine['card'] == 'cpu' and last.keys() == {'seconds'}
  assert [x['row'] for x in records] == names
  for x in records:
    check_record(x, machine)
  table = [line for line in printed[len(lines) :] if line.startswith('| ')]
  assert len(table) == 2 + len(names) and 'device_ms' in table[0]  # and no goals


def check_record(x, machine):
  """Checks the fields of a step's record, and that its ratios are of its own times and rates."""
  loop = x['task'] != 'memory'
  assert x.keys() >= (STEP if loop else STEP - LOOP)
  assert min(x['device_ms'], x['cold_s'], x['second_s'], x['step_mib'], x['per_s']) > 0
  assert x['unit'] == {'click': 'examples', 'next_item': 'targets', 'memory': 'rows'}[x['task']]
  if loop:
    assert (x['store'], x['steps']) == ('host', 4)
    assert ('host_ms' in x) == ('resident_ms' in x) == (x['row'] == 'click/din/50x512')
    assert x['ratio'] == pytest.approx(x['loop_ms'] / x['device_ms'], rel=2e-3)
  else:
    assert x['ratio'] is None
  rate = machine['copy_gb_per_s'] * 1e9, x['gb'] * 1e9
  if x['bound'] == 'flops':
    rate = machine['tflop_per_s']['float32'] * 1e12, x['gflop'] * 1e9
  assert x['share'] == pytest.approx(rate[1] / rate[0] / x['device_ms'] * 1e3, rel=5e-3)


def test_without_time_every_row_is_a_line(one_device, capsys):
  accelerator.main(['--quick', '--seconds=0'])
  *lines, last = capsys.readouterr().out.splitlines()
  records = [json.loads(x) for x in lines if x.startswith('{"row"')]
  assert [x['row'] for x in records] == [row.name for row in rows.ROWS]
  remedy = 'no time is left; raise --seconds, or choose rows by --only'
  assert {x['skipped'] for x in records} == {remedy}
  assert last == f'{rows.ROWS[-1].name}: skipped: {remedy}'


def test_a_row_that_fails_does_not_end_the_run(monkeypatch, capsys):
  def fail(row, timing, rates, stores):
    if row.model == 'din':
      raise MemoryError('none left\nof it')
    return {'device_ms': 1.0}

  monkeypatch.setattr(accelerator, 'measure', fail)
  with pytest.raises(SystemExit) as ended:
    accelerator.main(['--quick', '--only=click/din/50x512,click/pooling/*'])
  assert ended.value.code == 1
  output = capsys.readouterr()
  assert '"device_ms": 1.0' in output.out
  assert output.out.endswith('click/din/50x512: error: MemoryError: none left\n')
  assert 'Traceback' in output.err


@pytest.mark.slow
def test_an_export(one_device, capsys):
  accelerator.main(['--quick', '--only=export/export-lmn*'])
  _, line, *_ = capsys.readouterr().out.splitlines()
  x = json.loads(line)
  assert x['p50_ms'] <= x['p99_ms'] and x['opens_s'] + x['first_s'] <= x['ready_s'] + 0.02
  assert x['per_s'] == pytest.approx(1e3 / x['p50_ms'], rel=0.01)
