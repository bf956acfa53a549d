"""The service as a process: how it starts, what it refuses, and how it stops."""

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
from tests.fake_service import running, settings, wait_for, write_export
from tests.test_main import call

ONE = {'user': 'u', 'candidates': ['i1', 'i8']}


class Process:
  """A service of fake exports; `lines` is what it printed."""

  def __init__(self, export, *arguments):
    command = [sys.executable, '-m', 'tests.fake_service', '--mode=serve', f'--export={export}']
    self._process = subprocess.Popen(
      [*command, '--serve.port=0', *arguments],
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.lines = []
    self._reader = threading.Thread(
      target=lambda: self.lines.extend(iter(self._process.stderr.readline, ''))
    )
    self._reader.start()

  def said(self, pattern):
    return next((found for x in self.lines if (found := re.search(pattern, x))), None)

  def url(self):
    wait_for(lambda: self.said('http://') or self._process.poll() is not None, 30)
    return self.said(r'(http://\S+) answers from')[1]

  def client(self):
    """When it is ready."""
    url = self.url()
    wait_for(lambda: httpx.get(f'{url}/readyz', timeout=30).status_code == 200, 30)
    return httpx.Client(base_url=url, timeout=20)

  def stop(self, number=signal.SIGTERM):
    self._process.send_signal(number)

  def end(self):
    """Its exit status."""
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


def test_a_stop_lets_who_began_end(tmp_path):
  """Within drain_s others are answered as well, and the load balancer is told at once."""
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
    found = {}

    def ask(name, another):
      found[name] = another.post('/v1/score', json=ONE)

    begun = threading.Thread(target=ask, args=('begun', first))
    threads = [begun, threading.Thread(target=ask, args=('later', second))]
    threads[0].start()
    time.sleep(0.1)
    process.stop()
    wait_for(lambda: client.get('/readyz').status_code == 503)
    threads[1].start()
    for thread in threads:
      thread.join()
    assert [found[name].json()['events'] for name in ('begun', 'later')] == [1, 1]
    assert process.end() == 0
    with pytest.raises(httpx.ConnectError):
      ask('too late', client)
    assert [line.split(' ', 2)[0] for line in process.lines] == [
      process.url(), f'{export}:', 'stops', 'stopped\n',
    ], process.lines  # fmt: skip


def test_a_first_export_that_is_spoilt(tmp_path):
  export = write_export(tmp_path, task=None)
  (tmp_path / 'manifest.json').write_text('{"format": 1}')
  with started(export) as process:
    assert process.end() == 1 and process.said("KeyError: 'task'")


@pytest.mark.slow
def test_several_processes(tmp_path):
  """One port; one killed is replaced; each tells the meters of all; SIGINT stops them."""
  export = write_export(tmp_path / 'export')
  with started(export, '--serve.workers=2') as process:
    with process.client() as client:
      assert client
      wait_for(lambda: sum(': answers from' in line for line in process.lines) == 2, 30)
    for _ in range(20):
      with httpx.Client(
        base_url=process.url(), timeout=20
      ) as client:  # whoever takes the connection
        assert client.post('/v1/score', json=ONE).status_code == 200
    with httpx.Client(base_url=process.url(), timeout=20) as client:
      text = client.get('/metrics').text
    assert 'lmn_jax_requests_total{path="/v1/score",status="200"} 20.0' in text
    assert 'lmn_jax_export{export="one",model="fake"} 2.0' in text
    process.stop(signal.SIGINT)
    assert process.end() == 0 and process.lines[-1] == 'stopped\n'


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
  """`kill -9`: the port is free, and the same command starts again."""
  export = write_export(tmp_path / 'export')
  with started(export, '--serve.workers=2') as process:
    with process.client():
      wait_for(lambda: sum(': answers from' in line for line in process.lines) == 2, 30)
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
def test_several_processes_that_cannot_start(tmp_path):
  export = write_export(tmp_path)
  (tmp_path / 'manifest.json').write_text('{"format": 1}')
  with started(export, '--serve.workers=2') as process:
    assert process.end() == 2
    assert process.lines[-1] == 'error: no worker could start; the lines above say why\n'


# What is refused before anything is started.


@pytest.mark.parametrize(
  'fields, wanted',
  [
    (dict(port=70_000), 'serve.port=70000 must be 1 to 65535, or 0 for any that is free'),
    (dict(port=-1), 'serve.port=-1 must be'),
    (dict(host=''), "serve.host='' is no address"),
    (dict(host='no such host'), "serve.host='no such host', serve.port=8000: "),
    (dict(host='192.0.2.1'), "serve.host='192.0.2.1', serve.port=8000: "),
    (dict(workers=0), 'serve.workers=0 must be at least 1'),
    (dict(wait_ms=-1.0), 'serve.wait_ms=-1.0 must be at least 0'),
    (dict(wait_ms=float('nan')), 'serve.wait_ms=nan must be at least 0'),
    (dict(timeout_s=0.0), 'serve.timeout_s=0.0 must be larger than 0'),
    (dict(batch_sizes=()), r'serve.batch_sizes=\(\) must be whole numbers from 1 on'),
    (dict(candidate_sizes=(64, 0)), 'serve.candidate_sizes='),
    (dict(role='rank'), "serve.role='rank' is unknown; did you mean 'ranker'?"),
    (dict(users='users.db'), "serve.users='users.db' is no store of users"),
    (dict(token_file='/nowhere/token'), r'/nowhere/token.* cannot be read \(No such file'),
  ],
)  # fmt: skip
def test_settings(tmp_path, fields, wanted):
  given = settings()
  given.update(fields)
  with pytest.raises(UserError, match=wanted):
    server.serve(given, str(write_export(tmp_path)))


def test_a_port_in_use(tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=f'serve.port={port}: Address already in use; choose an'):
      server.serve(settings(port=port), str(write_export(tmp_path)))


def test_no_export(tmp_path):
  with pytest.raises(UserError, match=r'--export=.*/nowhere: .*no export'):
    server.serve(settings(), str(tmp_path / 'nowhere'))


def test_tokens(tmp_path, caplog):
  path = tmp_path / 'tokens'
  path.write_bytes(b'\n one \r\ntwo\n')
  path.chmod(0o600)
  assert server.read_tokens(str(path)) == [b'one', b'two'] and server.read_tokens('') == []
  assert not caplog.records
  path.chmod(0o644)
  server.read_tokens(str(path))
  assert 'can be read by every user of this machine' in caplog.text
  for content, wanted in [
    (b' \n\n', 'has no token'),
    (b'a b', 'without spaces'),
    (b'\xe9', 'ASCII'),
  ]:
    path.write_bytes(content)
    with pytest.raises(UserError, match=wanted):
      server.read_tokens(str(path))


@pytest.mark.parametrize(
  'arguments, wanted',
  [
    (['--mode=serve'], '--export is missing; for example --export=runs/lmn_douyin/export'),
    (['--mode=serve', '--export=/nowhere'], '--export=/nowhere: '),
    (['--mode=serve', '--serve.prt=1'], "the service has no field 'prt'; did you mean 'port'?"),
    (['--mode=serve', '--export=x', '--serve.port=abc'], 'flag --serve.port=abc: must be a whole'),
    (['--serve.port=1'], '--serve.port=1 is for --mode=serve, and this is --mode=train'),
    (['--mode=serve', '--export=x', '--serve.workers=0'], 'serve.workers=0 must be at least 1'),
  ],
)  # fmt: skip
def test_command_line(monkeypatch, capsys, arguments, wanted):
  code, out, err = call(monkeypatch, capsys, *arguments)
  assert code == 2 and out == '' and wanted in err and err.count('\n') == 1, err


def test_no_path_of_a_request_is_a_file(tmp_path):
  """Whatever is asked, nothing is opened but the export."""
  with running(write_export(tmp_path)) as client:
    client.ready()
    for path in ('/../manifest.json', '/manifest.json', '/v1/score/../../etc/passwd', '//etc'):
      assert client.get(path).status_code == 404
