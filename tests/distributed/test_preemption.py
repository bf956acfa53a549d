"""SIGTERM saves and ends a training, which continues exactly; a second SIGTERM ends at once."""

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
from tests.training.test_loop import assert_same, results_of


def send_sigterm():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_store):
  workdir = tmp_path_factory.mktemp('whole')
  loop.train(tiny_config(), workdir, tiny_store)
  return results_of(tiny_config(), workdir, tiny_store)


def send_sigterm_at(monkeypatch, step):
  """Sends SIGTERM when the batch of a step is placed."""
  place, placed = meshes.place, []

  def place_and_send(mesh, batch):
    if len(batch.get('label', ())) == 32:
      placed.append(batch)
      if len(placed) == step:
        send_sigterm()
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', place_and_send)


@pytest.mark.parametrize('step', [5, 8])
def test_training_stops_after_the_step_and_continues_exactly(
  whole, tiny_store, tmp_path, monkeypatch, capsys, step
):
  """Between two lines of metrics, and at a step that is saved and validated in any case."""
  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    send_sigterm_at(patch, step)
    with pytest.raises(Preempted, match=rf'by SIGTERM: step {step} is saved \(.*checkpoints\); '):
      loop.train(tiny_config(), tmp_path, tiny_store)
  assert signal.getsignal(signal.SIGTERM) is before
  assert steps_kept(tmp_path)[-1] == step and not (tmp_path / 'report.json').exists()
  assert 'SIGTERM: stops and saves; a second one ends at once' in capsys.readouterr().err
  loop.train(tiny_config(), tmp_path, tiny_store)
  assert_same(results_of(tiny_config(), tmp_path, tiny_store), whole)


@pytest.mark.parametrize('validation, saved', [(1, 4), (5, 16)])
def test_sigterm_ends_a_validation_or_a_report_which_is_then_repeated(
  whole, tiny_store, tmp_path, monkeypatch, validation, saved
):
  score, scored = click_evaluation.score, []

  def score_and_send(*arguments):
    scored.append(arguments)
    if len(scored) == validation:
      send_sigterm()
    scores = score(*arguments)
    assert len(scored) != validation, 'SIGTERM did not end it'
    return scores

  with monkeypatch.context() as patch:
    patch.setattr(click_evaluation, 'score', score_and_send)
    with pytest.raises(Preempted, match=rf'ended by SIGTERM: step {saved} is saved'):
      loop.train(tiny_config(), tmp_path, tiny_store)
  loop.train(tiny_config(), tmp_path, tiny_store)
  assert_same(results_of(tiny_config(), tmp_path, tiny_store), whole)


def test_sigterm_before_the_first_step(tiny_store, tmp_path, monkeypatch):
  set_up = setups.set_up
  monkeypatch.setattr(setups, 'set_up', lambda *a: send_sigterm() or set_up(*a))
  with pytest.raises(Preempted, match='ended by SIGTERM: nothing is saved yet; the same'):
    loop.train(tiny_config(), tmp_path, tiny_store)
  assert not (tmp_path / 'checkpoints').exists()


WAITS = """
import time
from lmn_jax.distributed import preemption
with preemption.listening() as notice, notice.deferred():
  print('ready', flush=True)
  time.sleep(60)
  print('slept')
  time.sleep(60)
"""


def test_a_second_sigterm_ends_the_process_at_once():
  with subprocess.Popen(
    [sys.executable, '-c', WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    process.terminate()
    assert process.stderr.readline().startswith('SIGTERM: stops and saves')
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert process.stderr.read() == 'error: ended by a second SIGTERM\n'


def test_sigterm_explains_a_failure_after_it(monkeypatch):
  monkeypatch.setattr(preemption.time, 'sleep', lambda seconds: None)
  with preemption.listening() as notice, notice.deferred():
    assert not notice.explains_failure()
    send_sigterm()
    assert notice.due(3) and notice.explains_failure()
    with pytest.raises(Preempted), notice.deferred(False):
      raise AssertionError('SIGTERM did not end it')


@pytest.mark.slow
def test_hosts_that_all_receive_sigterm_stop_together(tmp_path):
  """For SIGTERM to one host see test_processes.py."""
  both = start(tmp_path, '--config.steps=1000000', '--config.eval_every=1000000')
  try:
    wait_for_lines(both, tmp_path)
    for process in both.processes:
      process.terminate()
  finally:
    ended = both.wait()
  assert [status for status, _, _ in ended] == [0, 0], ended
  step = steps_kept(tmp_path / 'run')[-1]
  assert step > 0 and re.search(rf'ended by SIGTERM: step {step} is saved', ended[0][2])


@pytest.mark.slow
def test_sigterm_to_the_readers_of_batches_too(tmp_path):
  """Slurm sends SIGTERM to every process of a step."""
  config = tmp_path / 'tiny.py'
  make = tiny_config.__name__
  config.write_text(f'from tests import runs\n\ndef get_config():\n  return runs.{make}()\n')
  command = [
    sys.executable, '-m', 'lmn_jax', f'--config={config}', f'--workdir={tmp_path}/run',
    '--config.loader_workers=2', '--config.steps=1000000', '--config.eval_every=1000000',
  ]  # fmt: skip
  output = tmp_path / 'output'
  with output.open('w') as file:
    process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
  # A long limit: on a busy machine the first step has taken more than 100 s.
  written, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 400
  try:
    while not written.exists() or written.read_text().count('\n') < 3:
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(200) == 0, output.read_text()
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  # Python may print a warning on the readers' shared memory, which it removes.
  text = output.read_text()
  assert f'\nended by SIGTERM: step {steps_kept(tmp_path / "run")[-1]} is saved' in text, text
  assert 'Traceback' not in text, text
