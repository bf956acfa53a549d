"""The kill harness: a short form of it, and that it sees what differs."""

import random
import signal

import numpy as np
import pytest

from tests.runs import load_experiment

kill_test = load_experiment('kill_test')


@pytest.mark.slow
def test_a_run_that_was_killed_and_terminated_leaves_what_another_leaves(capsys):
  with pytest.raises(SystemExit) as ended:
    kill_test.main(['--kills=1', '--terms=2', '--steps=60', '--model=pooling'])
  said = capsys.readouterr().out
  assert ended.value.code == 0 and 'all alike, to the bit' in said, said
  assert 'interrupted 3 times' in said and 'too late' not in said


def test_what_differs_is_seen():
  def left(**changes):
    rows = np.array([[1.0, np.nan], [-0.0, 3.0]], np.float32)
    return {
      'state of step 4': {'tables': {'item': [rows, None]}, 'step': np.int32(4)},
      'TensorBoard': {'train/loss': [(1, 0.5), (2, float('nan'))]},
      'steps': [4],
    } | changes

  assert kill_test.differences(left(), left()) == []
  rows = left()['state of step 4']['tables']['item'][0]
  for changed in (
    np.abs(rows),
    rows.astype(np.float64),
    rows[:1],
    rows + np.float32([[0, 0], [0, 1e-6]]),
  ):
    other = left()
    other['state of step 4']['tables']['item'][0] = changed
    assert kill_test.differences(other, left()) == ['state of step 4']
  assert kill_test.differences(left(steps=[4, 5]), left()) == ['steps']
  assert kill_test.differences(left(more=1), left()) == ['more']
  twice = {'train/loss': [(1, 0.5), (1, 0.5), (2, float('nan'))]}
  assert kill_test.differences(left(TensorBoard=twice), left()) == ['TensorBoard']


def test_the_plan_has_every_phase_and_signal():
  planned = kill_test.plan(25, 5, random.Random(0))
  assert {phase for phase, _ in planned} == {'prepare', *kill_test.PHASES}
  assert [number for _, number in planned].count(signal.SIGKILL) == 25
  assert planned[0][0] == 'prepare' and planned != kill_test.plan(25, 5, random.Random(1))
