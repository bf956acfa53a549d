"""The benchmark of the kernels: every case runs, and a contestant that disagrees is reported."""

import json

import pytest

from tests.runs import load_experiment

kernels = load_experiment('kernels')
FEW = ['--steps=2', '--passes=1']


def run(tmp_path, *flags):
  """The lines that a run appends to --json."""
  path = tmp_path / 'lines.jsonl'
  kernels.main([*FEW, *flags, f'--json={path}'])
  return [json.loads(line) for line in path.read_text().splitlines()]


def complete(lines, tasks):
  """Whether the lines have a device, agreeing checks, and timed contestants of some tasks."""
  first, *rest, last = lines
  assert first['interpreted'] and first['copy_gb_per_s'] > 0 and last['seconds'] > 0
  checks, timed = ([line for line in rest if key in line] for key in ('check', 'task'))
  assert {line['check'] for line in checks} == {line['task'] for line in timed} == set(tasks)
  assert all(line['agrees'] for line in checks)
  for line in timed:
    assert 0 < line['ms_low'] <= line['ms'] <= line['ms_high'], line
    assert line['compile_s'] > 0 and line['share'] >= 0, line
  for task in tasks:
    names = [line['who'] for line in timed if line['task'] == task]
    assert names[0] == 'library' and any('kernel' in name for name in names), names


def test_a_run(tmp_path, capsys):
  complete(run(tmp_path, '--only=weights', '--seconds=1000'), ['weights'])
  assert 'no measure' in capsys.readouterr().err


@pytest.mark.slow
def test_all_tasks_and_sizes_of_blocks(tmp_path):
  complete(run(tmp_path, '--sweep', '--seconds=10000'), kernels.TASKS)


def test_cases_after_the_time_are_reported(tmp_path):
  lines = run(tmp_path, '--only=weights', '--seconds=0')
  assert [line['skipped'] for line in lines if 'task' in line] == ['after 0.0 s']


def test_a_contestant_that_disagrees(tmp_path, monkeypatch):
  monkeypatch.setitem(kernels.TOLERANCE, 'weights', -1.0)
  with pytest.raises(SystemExit, match='disagrees'):
    run(tmp_path, '--only=weights', '--seconds=0')


def test_a_contestant_that_does_not_compile(tmp_path, monkeypatch):
  def refused(rows_RD, reads):
    raise ValueError('no such instruction')

  monkeypatch.setattr(kernels.kernel_cases, 'weight_grads_whole', refused)
  with pytest.raises(SystemExit, match='did not compile'):
    run(tmp_path, '--only=weights', '--seconds=1000')
  lines = [json.loads(line) for line in (tmp_path / 'lines.jsonl').read_text().splitlines()]
  failed = [line for line in lines if 'error' in line]
  # A check for each dtype, and one measurement; the others are measured.
  assert [line['who'] for line in failed] == ['xla whole'] * 3
  assert all('no such instruction' in line['error'] for line in failed)
  assert len([line for line in lines if 'ms' in line]) == 2


@pytest.mark.parametrize('flag', ['--only=writes', '--read-blocks=1,2,3,4', '--sam-blocks=-1'])
def test_wrong_flags(flag):
  with pytest.raises(SystemExit):
    kernels.parse([flag])


def test_cases_of_a_gpu():
  """The sizes of the goals, with more forms and sizes of blocks for the first."""
  args = kernels.parse(['--sweep', '--only=read,rows,sam'])
  args.interpret, args.options = False, args.options._replace(interpret=False)
  cases = kernels.cases(args)
  reads = [case for case in cases if case.task == 'read']
  assert [case.sizes for case in reads] == kernels.READINGS
  swept = len(kernels.kernel_cases.SWEEP['read'])
  assert len(reads[0].contestants) - swept == len(reads[1].contestants) > len(reads[2].contestants)
  # Gradients of rows are float32.
  assert {case.sizes.dtype for case in cases if case.task == 'rows'} == {'float32'}
