"""The service as a process: how it starts, which settings it refuses, and how it stops."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from lmn_jax.errors import UserError
from lmn_jax.serving import server
from lmn_jax.serving import settings as serving_settings
from tests.fake_service import running, settings, wait_for, write_export
from tests.test_main import call

ONE = {'user': 'u', 'candidates': ['i1', 'i8']}


class Process:
  """A service of fake exports; `lines` are what it prints."""

  def __init__(self, export, *arguments):
    command = [sys.executable, '-m', 'tests.fake_service', '--mode=serve', f'--export={export}']
    self._process = subprocess.Popen(
      [*command, '--serve.port=0', '--compilation_cache=off', *arguments],
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.lines = []
    self._reader = threading.Thread(
      target=lambda: self.lines.extend(iter(self._process.stderr.readline, ''))
    )
    self._reader.start()

  def search(self, pattern):
    """Returns the first match in the printed lines, or None."""
    return next((match for x in self.lines if (match := re.search(pattern, x))), None)

  def url(self):
    wait_for(lambda: self.search('http://') or self._process.poll() is not None, 30)
    return self.search(r'(http://\S+) serves')[1]

  def client(self):
    """Returns a client once the service is ready."""
    url = self.url()
    wait_for(lambda: httpx.get(f'{url}/readyz', timeout=30).status_code == 200, 30)
    return httpx.Client(base_url=url, timeout=20)

  def stop(self, number=signal.SIGTERM):
    self._process.send_signal(number)

  def end(self):
    """Waits for the end, and returns the exit status."""
    status = self._process.wait(90)  # workers import JAX before they can fail
    self._reader.join()
    return status

  def kill(self):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)  # its workers as well
    self.end()
    self._process.stderr.close()


@contextlib.contextmanager
def started(*arguments):
  process = Process(*arguments)
  try:
    yield process
  finally:
    process.kill()


@pytest.mark.slow
def test_requests_in_progress_finish_when_the_service_stops(tmp_path):
  """Within drain_s new requests are answered too, and /readyz answers 503 at once."""
  export = write_export(tmp_path / 'export', score_s=0.5)
  users = f'--serve.users={tmp_path / "users.sqlite"}'
  with (
    started(export, users, '--serve.drain_s=1') as process,
    process.client() as client,
    process.client() as first,
    process.client() as second,
  ):
    event = {'user': 'u', 'events': [{'item': 'i1'}]}
    assert client.post('/v1/update', json=event).json()['events_taken'] == 1
    answers = {}

    def ask(name, another):
      answers[name] = another.post('/v1/score', json=ONE)

    early = threading.Thread(target=ask, args=('first', first))
    threads = [early, threading.Thread(target=ask, args=('later', second))]
    threads[0].start()
    time.sleep(0.1)
    process.stop()
    wait_for(lambda: client.get('/readyz').status_code == 503)
    threads[1].start()
    for thread in threads:
      thread.join()
    assert [answers[name].json()['events'] for name in ('first', 'later')] == [1, 1]
    assert process.end() == 0
    with pytest.raises(httpx.ConnectError):
      ask('too late', client)
    assert [line.split(' ', 2)[0] for line in process.lines] == [
      process.url(), f'{export}:', f'{export}:', 'stops', 'stopped\n',
    ], process.lines  # fmt: skip


@pytest.mark.slow
def test_a_damaged_first_export_ends_the_process(tmp_path):
  export = write_export(tmp_path, task=None)
  (tmp_path / 'manifest.json').write_text('{"format": 1}')
  with started(export) as process:
    assert process.end() == 1 and process.search("KeyError: 'task'")


@pytest.mark.slow
def test_several_processes_share_a_port_and_their_metrics(tmp_path):
  """SIGINT stops them."""
  export = write_export(tmp_path / 'export')
  with started(export, '--serve.workers=2') as process:
    with process.client() as client:
      assert client
      wait_for(lambda: sum(': serves ' in line for line in process.lines) == 2, 30)
    for _ in range(20):
      with httpx.Client(base_url=process.url(), timeout=20) as client:  # any of the processes
        assert client.post('/v1/score', json=ONE).status_code == 200
    with httpx.Client(base_url=process.url(), timeout=20) as client:
      text = client.get('/metrics').text
    assert 'lmn_jax_requests_total{path="/v1/score",status="200"} 20.0' in text
    assert 'lmn_jax_export{export="one",model="fake"} 2.0' in text
    process.stop(signal.SIGINT)
    assert process.end() == 0 and process.lines[-1] == 'stopped\n'


@pytest.mark.slow
def test_workers_end_with_their_parent_process(tmp_path):
  """After `kill -9` the port is free, and the same command starts again."""
  export = write_export(tmp_path / 'export')
  with started(export, '--serve.workers=2') as process:
    with process.client():
      wait_for(lambda: sum(': serves ' in line for line in process.lines) == 2, 30)
    url = process.url()
    process.stop(signal.SIGKILL)

    def gone():
      with contextlib.suppress(httpx.TransportError):
        httpx.get(f'{url}/healthz', timeout=5)
        return False
      return True

    wait_for(gone, 10)
    port = url.rpartition(':')[2]
    with started(export, '--serve.workers=2', f'--serve.port={port}') as again:
      with again.client() as client:
        assert client.post('/v1/score', json=ONE).status_code == 200


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_command(tmp_path):
  export = write_export(tmp_path)
  (tmp_path / 'manifest.json').write_text('{"format": 1}')
  with started(export, '--serve.workers=2') as process:
    assert process.end() == 2
    assert process.lines[-1] == 'error: no worker could start; see the errors in the lines above\n'


# Errors before anything is started.


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(port=70_000), 'serve.port=70000 must be 1 to 65535, or 0 for any free port'),
    (dict(port=-1), 'serve.port=-1 must be'),
    (dict(host=''), "serve.host='' is empty; give an address"),
    (dict(host='no such host'), "serve.host='no such host', serve.port=8000: "),
    (dict(host='192.0.2.1'), "serve.host='192.0.2.1', serve.port=8000: "),
    (dict(workers=0), 'serve.workers=0 must be at least 1'),
    (dict(wait_ms=-1.0), 'serve.wait_ms=-1.0 must be at least 0'),
    (dict(wait_ms=float('nan')), 'serve.wait_ms=nan must be at least 0'),
    (dict(timeout_s=0.0), 'serve.timeout_s=0.0 must be larger than 0'),
    (dict(batch_sizes=()), r'serve.batch_sizes=\(\) must be integers from 1 up'),
    (dict(candidate_sizes=(64, 0)), 'serve.candidate_sizes='),
    (dict(role='rank'), "serve.role='rank' is unknown; did you mean 'ranker'?"),
    (dict(platform='cudas'), "serve.platform='cudas' is unknown; did you mean 'cuda'?"),
    (dict(platform='cuda', port=0), "serve.platform='cuda': JAX sees no device .*, but cpu; use"),
    (dict(users='users.db'), "serve.users='users.db' is not a store of users"),
    (dict(token_file='/nowhere/token'), r'/nowhere/token.* cannot be read \(No such file'),
  ],
)  # fmt: skip
def test_wrong_settings_are_refused(tmp_path, fields, message):
  wrong = settings()
  wrong.update(fields)
  with pytest.raises(UserError, match=message):
    server.serve(wrong, str(write_export(tmp_path)), None)


def test_numbers_are_those_of_the_platform_unless_they_are_set():
  given = serving_settings.settings()
  given.batch_sizes = (1, 2)
  on_cpu, on_gpu = (serving_settings.for_platform(given, name) for name in ('cpu', 'cuda'))
  assert on_cpu.candidate_sizes == (64, 256, 1024) and on_gpu.candidate_sizes == (256, 1024)
  assert on_cpu.batch_sizes == on_gpu.batch_sizes == (1, 2) and on_gpu.max_batch == 2
  assert serving_settings.for_platform(serving_settings.settings(), 'cpu').max_batch == 8
  assert given.candidate_sizes is given.max_batch is None


def test_a_port_in_use_is_refused(tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=f'serve.port={port}: Address already in use; choose an'):
      server.serve(settings(port=port), str(write_export(tmp_path)), None)


def test_a_folder_that_is_not_an_export_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'--export=.*/nowhere is not an export'):
    server.serve(settings(), str(tmp_path / 'nowhere'), None)


def test_tokens_are_read_from_a_file(tmp_path, caplog):
  path = tmp_path / 'tokens'
  path.write_bytes(b'\n one \r\ntwo\n')
  path.chmod(0o600)
  assert server.read_tokens(str(path)) == [b'one', b'two'] and server.read_tokens('') == []
  assert not caplog.records
  path.chmod(0o644)
  server.read_tokens(str(path))
  assert 'can be read by every user of this machine' in caplog.text
  for content, message in [
    (b' \n\n', 'has no token'),
    (b'a b', 'without spaces'),
    (b'\xe9', 'ASCII'),
  ]:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
      server.read_tokens(str(path))


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--mode=serve'], '--export is missing; for example --export=runs/lmn_douyin/export'),
    (['--mode=serve', '--export=/nowhere'], '--export=/nowhere: '),
    (['--mode=serve', '--serve.prt=1'], "the service has no field 'prt'; did you mean 'port'?"),
    (['--mode=serve', '--export=x', '--serve.port=abc'], 'flag --serve.port=abc: must be a whole'),
    (['--serve.port=1'], '--serve.port=1 is for --mode=serve, and this is --mode=train'),
    (['--mode=serve', '--export=x', '--serve.workers=0'], 'serve.workers=0 must be at least 1'),
  ],
)  # fmt: skip
def test_a_wrong_command_line_is_an_error_of_one_line(monkeypatch, capsys, arguments, message):
  code, out, err = call(monkeypatch, capsys, *arguments)
  assert code == 2 and out == '' and message in err and err.count('\n') == 1, err


def test_no_path_of_a_request_is_a_file(tmp_path):
  """No path opens a file."""
  with running(write_export(tmp_path)) as client:
    client.ready()
    for path in ('/../manifest.json', '/manifest.json', '/v1/score/../../etc/passwd', '//etc'):
      assert client.get(path).status_code == 404
