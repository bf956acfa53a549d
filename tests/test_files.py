"""Locks exclude other processes and end with their process; writes are atomic; hashes are right."""

import hashlib
import os
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


def test_a_held_lock_is_refused_and_the_error_names_the_holder(holder, tmp_path):
  message = rf'in use by process {holder.pid} on .*; wait until'
  with pytest.raises(UserError, match=message) as error:
    with files.locked(tmp_path / '.lock'):
      pytest.fail('two processes hold the lock')
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
  holder.kill()
  holder.wait()
  for _ in range(2):  # the end of the block releases the lock, too
    with files.locked(tmp_path / '.lock'):
      pass


def test_a_waiting_process_gets_the_lock_when_the_holder_is_killed(holder, tmp_path):
  start = time.monotonic()
  waiter = subprocess.Popen(
    [sys.executable, '-c', HOLDER.replace('1])', '1]), wait=True'), str(tmp_path / '.lock')],
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    time.sleep(0.5)
    assert waiter.poll() is None
    holder.kill()
    assert waiter.stdout.readline() == 'held\n' and time.monotonic() - start < 30
  finally:
    waiter.kill()
    waiter.communicate()


def test_only_process_0_of_a_run_takes_the_lock_of_its_folder(holder, tmp_path, monkeypatch):
  assert trained_run.LOCK == '.lock'
  monkeypatch.setattr(processes, 'index', lambda: 1)
  with trained_run.only_command(tmp_path):
    assert holder.poll() is None  # it runs beside the holder
  monkeypatch.undo()
  with pytest.raises(UserError, match='in use by process'), trained_run.only_command(tmp_path):
    pytest.fail('two processes hold the lock')


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'file.txt'
  files.write_text(path, 'old')
  with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
    temporary.write_text('half')
    assert path.read_text() == 'old' and temporary.parent == tmp_path
    raise KeyboardInterrupt
  assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
  files.write_text(path, 'new')
  assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_others_may_read_a_written_file_where_the_umask_allows_it(tmp_path):
  before = os.umask(0o022)
  try:
    files.write_json(tmp_path / 'folder' / 'file.json', {'a': 1})
  finally:
    os.umask(before)
  assert (tmp_path / 'folder' / 'file.json').stat().st_mode & 0o777 == 0o644


def test_sha256_is_of_the_content_and_of_several_files_in_their_order(tmp_path):
  paths = [tmp_path / name for name in 'ab']
  for path, content in zip(paths, (b'x' * 300_000, b'y'), strict=True):
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()
  digests = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
  assert files.sha256_of_files(paths) == hashlib.sha256(b''.join(digests)).hexdigest()
  assert files.sha256_of_files(paths) != files.sha256_of_files(paths[::-1])


def test_flatten_names_values_by_their_paths():
  tree = {'a': {'b': 1, 'c': {}}, 'd': [2], 'e': {'f': {'g': 3}}}

  def children(value, path):
    return value if isinstance(value, dict) and path != 'e.f' else None

  assert files.flatten(tree, children) == {'a.b': 1, 'a.c': {}, 'd': [2], 'e.f': {'g': 3}}
