"""SIGTERM: what was trained is saved, the run goes on from there, and a second one ends at once."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.distributed import preemption
from lmn_jax.errors import Preempted
from lmn_jax.evaluation import click_evaluation
from lmn_jax.training import loop
from lmn_jax.training import setup as setups
from tests.distributed.test_processes import start, wait_for_lines
from tests.runs import steps_kept, tiny_config
from tests.training.test_loop import assert_same, left_behind


def told(number):
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_store):
  workdir = tmp_path_factory.mktemp('whole')
  loop.train(tiny_config(), workdir, tiny_store)
  return left_behind(tiny_config(), workdir, tiny_store)


def told_at(monkeypatch, step):
  """SIGTERM comes when the batch of that step is placed."""
  place, placed = meshes.place, []

  def telling(mesh, batch):
    if len(batch.get('label', ())) == 32:
      placed.append(batch)
      if len(placed) == step:
        told(step)
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', telling)


@pytest.mark.parametrize('step', [5, 8])
def test_training_stops_after_the_step_saves_and_goes_on(
  whole, tiny_store, tmp_path, monkeypatch, capsys, step
):
  """Between two lines, and at a step that is saved and validated anyway."""
  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    told_at(patch, step)
    with pytest.raises(Preempted, match=rf'by SIGTERM: step {step} is saved \(.*checkpoints\); '):
      loop.train(tiny_config(), tmp_path, tiny_store)
  assert signal.getsignal(signal.SIGTERM) is before
  assert steps_kept(tmp_path)[-1] == step and not (tmp_path / 'report.json').exists()
  assert 'SIGTERM: stops and saves; a second one ends at once' in capsys.readouterr().err
  loop.train(tiny_config(), tmp_path, tiny_store)
  assert_same(left_behind(tiny_config(), tmp_path, tiny_store), whole)


@pytest.mark.parametrize('validation, kept', [(1, 4), (5, 16)])
def test_a_validation_or_a_report_is_cut_short_and_made_again(
  whole, tiny_store, tmp_path, monkeypatch, validation, kept
):
  score, scored = click_evaluation.score, []

  def telling(*arguments):
    scored.append(arguments)
    if len(scored) == validation:
      told(validation)
    found = score(*arguments)
    assert len(scored) != validation, 'it was not cut short'
    return found

  with monkeypatch.context() as patch:
    patch.setattr(click_evaluation, 'score', telling)
    with pytest.raises(Preempted, match=rf'ended by SIGTERM: step {kept} is saved'):
      loop.train(tiny_config(), tmp_path, tiny_store)
  loop.train(tiny_config(), tmp_path, tiny_store)
  assert_same(left_behind(tiny_config(), tmp_path, tiny_store), whole)


def test_notice_before_the_first_step(tiny_store, tmp_path, monkeypatch):
  set_up = setups.set_up
  monkeypatch.setattr(setups, 'set_up', lambda *a: told(0) or set_up(*a))
  with pytest.raises(Preempted, match='ended by SIGTERM: nothing is saved yet; the same'):
    loop.train(tiny_config(), tmp_path, tiny_store)
  assert not (tmp_path / 'checkpoints').exists()


WAITS = """
import time
from lmn_jax.distributed import preemption
with preemption.listening() as told, told.waits():
  print('here', flush=True)
  time.sleep(60)
  print('slept')
  time.sleep(60)
"""


def test_the_second_ends_the_process_at_once():
  with subprocess.Popen(
    [sys.executable, '-c', WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'here\n'
    process.terminate()
    assert process.stderr.readline().startswith('SIGTERM: stops and saves')
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert process.stderr.read() == 'error: ended by a second SIGTERM\n'


def test_what_fails_after_a_notice_is_explained_by_it(monkeypatch):
  monkeypatch.setattr(preemption.time, 'sleep', lambda seconds: None)
  with preemption.listening() as found, found.waits():
    assert not found.explains_failure()
    told(0)
    assert found.due(3) and found.explains_failure()
    with pytest.raises(Preempted), found.waits(False):
      raise AssertionError('it was not ended')


@pytest.mark.slow
def test_hosts_that_all_have_notice_stop_together(tmp_path):
  """Where only one has it: test_processes.py."""
  both = start(tmp_path, '--config.steps=1000000', '--config.eval_every=1000000')
  try:
    wait_for_lines(both, tmp_path)
    for process in both.processes:
      process.terminate()
  finally:
    found = both.wait()
  assert [status for status, _, _ in found] == [0, 0], found
  step = steps_kept(tmp_path / 'run')[-1]
  assert step > 0 and re.search(rf'ended by SIGTERM: step {step} is saved', found[0][2])


@pytest.mark.slow
def test_the_readers_of_batches_are_given_notice_as_well(tmp_path):
  """Slurm sends SIGTERM to every process of a step."""
  config = tmp_path / 'tiny.py'
  make = tiny_config.__name__
  config.write_text(f'from tests import runs\n\ndef get_config():\n  return runs.{make}()\n')
  command = [
    sys.executable, '-m', 'lmn_jax', f'--config={config}', f'--workdir={tmp_path}/run',
    '--config.loader_workers=2', '--config.steps=1000000', '--config.eval_every=1000000',
  ]  # fmt: skip
  with (tmp_path / 'said').open('w') as said:
    process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
  # Generous: on a busy machine the first step has taken more than 100 s.
  written, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 400
  try:
    while not written.exists() or written.read_text().count('\n') < 3:
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(200) == 0, (tmp_path / 'said').read_text()
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  # Python may add a word on the readers' shared memory, which it tidies up.
  told = (tmp_path / 'said').read_text()
  assert f'\nended by SIGTERM: step {steps_kept(tmp_path / "run")[-1]} is saved' in told, told
  assert 'Traceback' not in told, told
