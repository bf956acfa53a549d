"""One process at a time: what the second hears, and that a killed one holds nothing."""

import subprocess
import sys
import time

import pytest

from lmn_jax import files
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.training import trained_run

HOLDER = """
import pathlib, sys, time
from lmn_jax import files
with files.locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds tmp_path/.lock."""
  command = [sys.executable, '-c', HOLDER, str(tmp_path / '.lock')]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()


def test_the_second_is_told_who_holds_it(holder, tmp_path):
  with pytest.raises(UserError, match=rf'in use by process {holder.pid} on .*; wait until') as told:
    with files.locked(tmp_path / '.lock'):
      pytest.fail('two hold it')
  assert str(tmp_path) in str(told.value) and '\n' not in str(told.value)
  holder.kill()
  holder.wait()
  for _ in range(2):  # and it is given back
    with files.locked(tmp_path / '.lock'):
      pass


def test_who_waits_gets_it(holder, tmp_path):
  began = time.monotonic()
  waiter = subprocess.Popen(
    [sys.executable, '-c', HOLDER.replace('1])', '1]), wait=True'), str(tmp_path / '.lock')],
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    time.sleep(0.5)
    assert waiter.poll() is None
    holder.kill()
    assert waiter.stdout.readline() == 'held\n' and time.monotonic() - began < 30
  finally:
    waiter.kill()
    waiter.communicate()


def test_the_other_hosts_of_a_run_share_it(holder, tmp_path, monkeypatch):
  assert trained_run.LOCK == '.lock'
  monkeypatch.setattr(processes, 'index', lambda: 1)
  with trained_run.only_command(tmp_path):
    assert holder.poll() is None  # beside it
  monkeypatch.undo()
  with pytest.raises(UserError, match='in use by process'), trained_run.only_command(tmp_path):
    pytest.fail('two hold it')
