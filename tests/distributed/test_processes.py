"""Training on several hosts: real processes that communicate over Gloo, four devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.training import loop, trained_run
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from tests import runs
from tests.runs import lines

TESTS = Path(__file__).parents[1]
CONFIG = """from tests import runs


def get_config():
  config = runs.{make}({model!r})
  config.steps = 8
  return config
"""
ENVIRONMENT = {
  **os.environ,
  'PYTHONPATH': str(TESTS.parent),
  'JAX_PLATFORMS': 'cpu',
  # The settings of conftest.py.
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  **{x.upper(): str(y) for x, y in runs.compiled_in(os.environ['LMN_TEST_COMPILED']).items()},
}


class Both:
  """Two processes of one program, with further arguments for each."""

  def __init__(self, folder, module, *arguments, more=((), ()), cwd=(TESTS.parent,) * 2, devices=4):
    self.outputs = [folder / f'{k}.{name}' for k in range(2) for name in ('out', 'err')]
    files = [path.open('w') for path in self.outputs]
    environment = ENVIRONMENT | {'JAX_NUM_CPU_DEVICES': str(devices)}
    self.processes = [
      subprocess.Popen(
        [sys.executable, '-m', module, *map(str, (*arguments, *more[k]))],
        cwd=cwd[k], env=environment, stdout=files[2 * k], stderr=files[2 * k + 1],
      )
      for k in range(2)
    ]  # fmt: skip
    for file in files:
      file.close()

  def wait(self, seconds=120):
    """Returns [(status, stdout, stderr)] of both; kills a process that does not end in time."""
    deadline = time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
      self.kill()
    texts = [path.read_text() for path in self.outputs]
    return [(p.returncode, *texts[2 * k : 2 * k + 2]) for k, p in enumerate(self.processes)]

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


def address():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def start(tmp_path, *arguments, more=((), ()), make='tiny_config', model='pooling', **places):
  """Starts two hosts that train in `tmp_path`."""
  config = tmp_path / 'tiny.py'
  config.write_text(CONFIG.format(make=make, model=model))
  more = [(f'--process={k}', *more[k]) for k in range(2)]
  return Both(
    tmp_path, 'lmn_jax', f'--config={config}', f'--workdir={tmp_path}/run',
    f'--stores={tmp_path}/stores', f'--coordinator={address()}', '--processes=2', *arguments,
    more=more, **places,
  )  # fmt: skip


def assert_close(result, expected):
  """Asserts the same structure, with numbers that differ only by the rounding of sums."""

  def close(x, y):
    assert x == (pytest.approx(y, rel=1e-5, abs=1e-6) if isinstance(y, int | float) else y)

  jax.tree.map(close, result, expected)


def state_of(workdir, setup):
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(checkpoints.latest(), setup.trainer.abstract)


ON_DEVICES = ('--config.store_on=device', '--config.steps_per_dispatch=50')


@pytest.mark.parametrize(
  'make, model, flags',
  [
    ('tiny_next', 'dman', ()),
    ('tiny_config', 'lmn', ON_DEVICES),
  ],
  ids=['dman', 'lmn on devices'],
)
@pytest.mark.slow
def test_two_hosts_train_like_one_process(tmp_path, capsys, make, model, flags):
  """Two hosts of four devices against one process of eight: lines of metrics, report, checkpoint,
  and the continuation on one host; also with the store on the devices of the two hosts."""
  first, second = start(tmp_path, *flags, make=make, model=model).wait()
  assert first[0] == second[0] == 0, first[2] + second[2]
  assert second[1:] == ('', '')  # only host 0 prints
  config = getattr(runs, make)(model)
  assert f'store {tmp_path}/stores/{config.data.name}-' in first[2] and ' is built: ' in first[2]
  assert '8 devices (cpu) on 2 hosts' in first[2] and 'report.json' in first[1]
  workdir, alone = tmp_path / 'run', tmp_path / 'alone'
  config.steps = 8
  store = prepare.prepare(config.data, tmp_path / 'stores')
  expected = loop.train(config, alone, store)

  assert_close(lines(workdir), lines(alone))
  assert {x['step'] for x in lines(alone)} == {2, 3, 4, 6, 8}
  report = json.loads((workdir / 'report.json').read_text())
  for split in ('valid', 'test'):
    assert_close(report[split], expected[split])
  assert report['devices'] == expected['devices'] and report['step'] == expected['step']

  setup = setups.set_up(config, store)
  two_hosts, one_host = state_of(workdir, setup), state_of(alone, setup)
  scores = [json.loads((x / 'checkpoints/validations.json').read_text()) for x in (workdir, alone)]
  assert_close(*scores)
  assert [step for step, _ in scores[0]] == [4, 8]
  # Adagrad's first steps enlarge rounding errors of sums; attention and routing have many sums.
  atol = 1e-4 if model == 'dman' else 1e-6
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol),
    jax.device_get(two_hosts.state), jax.device_get(one_host.state),
  )  # fmt: skip
  assert model == 'dman' or two_hosts.state.tables['memory'].ever_R.any()

  config.steps = 10
  loop.train(config, alone, store)
  capsys.readouterr()
  loop.train(config, workdir, store)
  assert 'resumed from step 8' in capsys.readouterr().err
  assert lines(workdir)[-1]['step'] == 10
  assert_close(lines(workdir), lines(alone))


@pytest.mark.slow
def test_a_batch_is_the_same_on_any_mesh(tmp_path, tiny_store):
  coordinator = address()
  both = Both(
    tmp_path, 'tests.two_hosts', tiny_store.path, coordinator, more=(('0',), ('1',))
  ).wait()
  for status, out, err in both:
    assert status == 0, err
    assert out.splitlines() == [
      'in order: 16 of 32', 'woven: 16 of 32', 'a model axis within hosts: 16 of 32',
      'a model axis over hosts: 32 of 32', 'both: 32 of 32',
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('make, model', [('tiny_config', 'lmn'), ('tiny_next', 'dman')])
def test_other_numbers_of_devices_evaluate_a_run_of_eight(tmp_path, monkeypatch, make, model):
  """4 devices, 1, and two processes with 2 each give the report of 8 devices, up to rounding."""
  config = getattr(runs, make)(model)
  config.steps = 8
  store = prepare.prepare(config.data, tmp_path / 'stores')
  expected = loop.train(config, tmp_path / 'run', store)
  for devices in (4, 1):
    with monkeypatch.context() as patch:
      patch.setattr(meshes, 'make_mesh', lambda *_, n=devices: runs.mesh_of(n))
      report = trained_run.evaluate_best(config, tmp_path / 'run', store)
    for split in ('valid', 'test'):
      assert_close(report[split], expected[split])
  both = start(tmp_path, '--mode=evaluate', make=make, model=model, devices=2).wait()
  assert [status for status, _, _ in both] == [0, 0], both
  report = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert report['devices'].startswith('4 ')
  for split in ('valid', 'test'):
    assert_close(report[split], json.loads(json.dumps(expected[split])))


def wait_for_lines(both, tmp_path, more=3):
  """Waits until `more` lines of metrics are written."""
  written, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 100

  def count():
    return written.read_text().count('\n') if written.exists() else 0

  before = count()
  while count() < before + more:
    running = time.monotonic() < deadline and both.processes[0].poll() is None
    assert running, both.wait()
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [1, 0])
def test_a_killed_host_ends_the_other_and_sigterm_stops_both(tmp_path, victim):
  """The run then continues from its checkpoint. SIGTERM to one host stops both after the same step,
  which they save; both end with status 0."""
  both = start(tmp_path, '--config.steps=1000000', '--config.eval_every=1000000')
  deadline = time.monotonic() + 100
  try:
    while not runs.steps_kept(tmp_path / 'run'):
      assert time.monotonic() < deadline and both.processes[victim].poll() is None
      time.sleep(0.05)
    both.processes[victim].kill()
    began = time.monotonic()
    both.processes[1 - victim].wait(60)
    print(f'host {victim} killed: the other ended after {time.monotonic() - began:.1f} s')
  finally:
    ended = both.wait()
  status, _, err = ended[1 - victim]
  assert ended[victim][0] == -signal.SIGKILL and status not in (0, -signal.SIGKILL)
  # XLA may end the process before `failure.watch` does: host 0 is gone, or Gloo receives a part of
  # what the killed host was sending.
  messages = f'error: host {1 - victim}: ', 'another task died', 'gloo::EnforceNotMet'
  assert any(x in err for x in messages), err
  saved = runs.steps_kept(tmp_path / 'run')[-1]
  both = start(tmp_path, '--config.steps=1000000', '--config.eval_every=1000000')
  try:
    wait_for_lines(both, tmp_path)
    both.processes[victim].terminate()
  finally:
    again = both.wait()
  assert [status for status, _, _ in again] == [0, 0], again
  assert f'resumed from step {saved}' in again[0][2]
  step = runs.steps_kept(tmp_path / 'run')[-1]
  assert step > saved and f'ended by SIGTERM: step {step} is saved' in again[0][2]


def test_different_configs_end_both_hosts(tmp_path):
  both = start(tmp_path, more=((), ('--config.seed=1',))).wait()
  line = (
    'error: host 1: the config differs from that of host 0: config.seed 0 -> 1; start all '
    'hosts with the same flags and config file\n'
  )
  assert [(status, err) for status, _, err in both] == [(2, line)] * 2
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'stores').exists()


@pytest.mark.slow
def test_different_logs_of_one_name_end_both_hosts(tmp_path):
  """Each host has a different log."""
  folders = [tmp_path / str(k) for k in range(2)]
  for k, folder in enumerate(folders):
    folder.mkdir()
    rows = [f'u{i % 3},i{(i + k) % 5},{i},{i % 2}' for i in range(60)]
    (folder / 'log.csv').write_text('\n'.join(['user,item,time,label', *rows]) + '\n')
  both = start(
    tmp_path, '--mode=prepare', '--config.data.source=log.csv', '--config.data.name=log',
    '--config.data.user_features=()', '--config.data.item_features=()',
    '--config.data.context_features=()', '--stores=stores', cwd=folders,
  ).wait()  # fmt: skip
  for status, _, err in both:
    assert status == 2, err
    last = err.splitlines()[-1]
    assert last.startswith('error: host 1: the store differs from that of host 0: fingerprint '), (
      err
    )
    assert last.endswith('give every host the same log, or --stores on a disk they share')


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_ends_both_hosts(tmp_path):
  both = start(tmp_path, more=((), (f'--workdir={tmp_path}/another',))).wait()
  for status, _, err in both:
    assert status == 2, err
    assert err.splitlines()[-1] == (
      f'error: host 1: --workdir={tmp_path}/another is not the same folder as on host 0, and '
      'checkpoints are written by all hosts; use a folder on a disk they share'
    )


@pytest.mark.parametrize('process', [0, 1])
def test_a_process_that_waits_too_long_for_the_others_ends(process):
  program = (
    'from lmn_jax.distributed import discovery, joining; joining.START_SECONDS = 1; '
    f'joining.start(discovery.Place({address()!r}, 2, {process}))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=TESTS.parent, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2
  assert re.fullmatch(
    rf'error: process {process} of 2 waited 1 s for all processes to join at 127.0.0.1:\d+; '
    'start all of them, with an address that each host can reach, and read the messages of the '
    'others\n',
    done.stderr,
  )


def test_a_single_process_neither_joins_nor_waits_nor_imports_jax():
  program = (
    'import sys; from lmn_jax.distributed import discovery, joining, processes; '
    'joining.start(discovery.find(None, None, None, {})); processes.wait("x"); '
    'processes.check_shared(None); processes.agree("x", {}, None, ""); joining.stop(); '
    'assert processes.first_then_others(lambda: 3) == 3 and processes.count() == 1; '
    'assert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', program], cwd=TESTS.parent, check=True, timeout=60)


def test_one_host_of_a_larger_slice_is_refused():
  processes.check_alone(1)
  with pytest.raises(UserError, match='one of 4 hosts of a TPU slice, started alone; use ./launch'):
    processes.check_alone(4)
