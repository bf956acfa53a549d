"""The kill test in a short form; it finds differences."""

import random
import signal

import numpy as np
import pytest

from tests.runs import load_experiment

kill_test = load_experiment('kill_test')


@pytest.mark.slow
def test_an_interrupted_run_has_the_results_of_an_uninterrupted_one(capsys):
  with pytest.raises(SystemExit) as ended:
    kill_test.main(['--kills=2', '--terms=1', '--ints=2', '--steps=60', '--model=pooling'])
  output = capsys.readouterr().out
  assert ended.value.code == 0 and 'all equal, to the bit' in output, output
  assert 'interrupted 5 times' in output
  assert all(f'{name} in prepare: step 0' in output for name in ('SIGTERM', 'SIGINT', 'SIGKILL')), (
    output
  )


def test_differences_are_found():
  def results(**changes):
    rows = np.array([[1.0, np.nan], [-0.0, 3.0]], np.float32)
    return {
      'state of step 4': {'tables': {'item': [rows, None]}, 'step': np.int32(4)},
      'TensorBoard': {'train/loss': [(1, 0.5), (2, float('nan'))]},
      'steps': [4],
    } | changes

  assert kill_test.differences(results(), results()) == []
  rows = results()['state of step 4']['tables']['item'][0]
  for changed in (
    np.abs(rows),
    rows.astype(np.float64),
    rows[:1],
    rows + np.float32([[0, 0], [0, 1e-6]]),
  ):
    other = results()
    other['state of step 4']['tables']['item'][0] = changed
    assert kill_test.differences(other, results()) == ['state of step 4']
  assert kill_test.differences(results(steps=[4, 5]), results()) == ['steps']
  assert kill_test.differences(results(more=1), results()) == ['more']
  twice = {'train/loss': [(1, 0.5), (1, 0.5), (2, float('nan'))]}
  assert kill_test.differences(results(TensorBoard=twice), results()) == ['TensorBoard']


def test_the_plan_has_every_phase_and_signal():
  planned = kill_test.plan(25, 5, 4, random.Random(0))
  assert {phase for phase, _ in planned} == {'prepare', *kill_test.PHASES}
  numbers = [number for _, number in planned]
  assert [numbers.count(x) for x in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)] == [25, 5, 4]
  assert {number for phase, number in planned if phase == 'prepare'} == set(numbers)
  assert planned != kill_test.plan(25, 5, 4, random.Random(1))


@pytest.mark.parametrize(
  'status, number, output, well',
  [
    (-9, signal.SIGKILL, 'step 7/60', True),
    (0, signal.SIGTERM, 'step 7/60\nended by SIGTERM: step 7 is saved', True),
    (143, signal.SIGTERM, 'error: ended by SIGTERM; the same command starts again', True),
    (130, signal.SIGINT, 'step 7/60\nerror: interrupted: step 7 is saved', True),
    (-11, signal.SIGINT, 'error: interrupted: step 7 is saved', False),
    (1, signal.SIGINT, 'Traceback ...\nRuntimeError: Query interrupted', False),
    (-2, signal.SIGINT, 'Traceback ...\nKeyboardInterrupt', False),
    (130, signal.SIGTERM, 'error: interrupted', False),
    (0, signal.SIGINT, 'the table', False),
  ],
)
def test_only_correct_ends_of_a_process_are_accepted(status, number, output, well):
  assert kill_test.ended_well(status, number, output) == well
