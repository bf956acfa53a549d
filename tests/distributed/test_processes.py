"""Several hosts: real processes over Gloo, with four devices each."""

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
from lmn_jax.distributed.processes import Place, find
from lmn_jax.errors import UserError
from lmn_jax.training import loop, trained_run
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from tests import runs
from tests.runs import lines

HERE = Path(__file__).parents[1]
CONFIG = """from tests import runs


def get_config():
  config = runs.{make}({model!r})
  config.steps = 8
  return config
"""
ENVIRONMENT = {
  **os.environ,
  'PYTHONPATH': str(HERE.parent),
  'JAX_PLATFORMS': 'cpu',
  # As conftest.py does.
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  **{x.upper(): str(y) for x, y in runs.compiled_in(os.environ['LMN_TEST_COMPILED']).items()},
}


class Both:
  """Two processes of one program, each with its own end of the arguments."""

  def __init__(self, folder, module, *arguments, own=((), ()), cwd=(HERE.parent,) * 2, devices=4):
    self.said = [folder / f'{k}.{name}' for k in range(2) for name in ('out', 'err')]
    files = [path.open('w') for path in self.said]
    environment = ENVIRONMENT | {'JAX_NUM_CPU_DEVICES': str(devices)}
    self.processes = [
      subprocess.Popen(
        [sys.executable, '-m', module, *map(str, (*arguments, *own[k]))],
        cwd=cwd[k], env=environment, stdout=files[2 * k], stderr=files[2 * k + 1],
      )
      for k in range(2)
    ]  # fmt: skip
    for file in files:
      file.close()

  def wait(self, seconds=120):
    """[(status, stdout, stderr)] of both; those who do not end in time are killed."""
    deadline = time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
      self.kill()
    said = [path.read_text() for path in self.said]
    return [(p.returncode, *said[2 * k : 2 * k + 2]) for k, p in enumerate(self.processes)]

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


def address():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def start(tmp_path, *arguments, own=((), ()), make='tiny_config', model='pooling', **places):
  """Two hosts of a training in `tmp_path`."""
  config = tmp_path / 'tiny.py'
  config.write_text(CONFIG.format(make=make, model=model))
  own = [(f'--process={k}', *own[k]) for k in range(2)]
  return Both(
    tmp_path, 'lmn_jax', f'--config={config}', f'--workdir={tmp_path}/run',
    f'--stores={tmp_path}/stores', f'--coordinator={address()}', '--processes=2', *arguments,
    own=own, **places,
  )  # fmt: skip


def assert_close(found, wanted):
  """Of the same structure, with numbers that differ by no more than the order of sums does."""

  def close(x, y):
    assert x == (pytest.approx(y, rel=1e-5, abs=1e-6) if isinstance(y, int | float) else y)

  jax.tree.map(close, found, wanted)


def state_of(workdir, setup):
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(checkpoints.latest(), setup.trainer.abstract)


@pytest.mark.parametrize(
  'make, model',
  [('tiny_config', 'lmn'), pytest.param('tiny_next', 'dman', marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path, capsys, make, model):
  """Two times four devices against eight of one process: lines, report, checkpoint, and going on
  with half the hosts."""
  (one, two) = start(tmp_path, make=make, model=model).wait()
  assert one[0] == two[0] == 0, one[2] + two[2]
  assert two[1:] == ('', '')  # host 0 speaks
  config = getattr(runs, make)(model)
  assert f'store {tmp_path}/stores/{config.data.name}-' in one[2] and ' is built: ' in one[2]
  assert '8 devices (cpu) on 2 hosts' in one[2] and 'report.json' in one[1]
  workdir, alone = tmp_path / 'run', tmp_path / 'alone'
  config.steps = 8
  store = prepare.prepare(config.data, tmp_path / 'stores')
  wanted = loop.train(config, alone, store)

  assert_close(lines(workdir), lines(alone))
  assert {x['step'] for x in lines(alone)} == {2, 3, 4, 6, 8}
  report = json.loads((workdir / 'report.json').read_text())
  for split in ('valid', 'test'):
    assert_close(report[split], wanted[split])
  assert report['devices'] == wanted['devices'] and report['step'] == wanted['step']

  setup = setups.set_up(config, store)
  ours, theirs = state_of(workdir, setup), state_of(alone, setup)
  scores = [json.loads((x / 'checkpoints/validations.json').read_text()) for x in (workdir, alone)]
  assert_close(*scores)
  assert [step for step, _ in scores[0]] == [4, 8]
  # Adagrad's first steps blow up what sums are rounded by: attention and routing have many.
  atol = 1e-4 if model == 'dman' else 1e-6
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol),
    jax.device_get(ours.state), jax.device_get(theirs.state),
  )  # fmt: skip
  assert model == 'dman' or ours.state.tables['memory'].ever_R.any()

  config.steps = 10
  loop.train(config, alone, store)
  capsys.readouterr()
  loop.train(config, workdir, store)
  assert 'resumed from step 8' in capsys.readouterr().err
  assert lines(workdir)[-1]['step'] == 10
  assert_close(lines(workdir), lines(alone))


def test_a_batch_is_the_same_on_any_mesh(tmp_path, tiny_store):
  meet = address()
  both = Both(tmp_path, 'tests.two_hosts', tiny_store.path, meet, own=(('0',), ('1',))).wait()
  for status, out, err in both:
    assert status == 0, err
    assert out.splitlines() == [
      'in order: 16 of 32', 'woven: 16 of 32', 'a model axis within hosts: 16 of 32',
      'a model axis over hosts: 32 of 32', 'both: 32 of 32',
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('make, model', [('tiny_config', 'lmn'), ('tiny_next', 'dman')])
def test_what_eight_devices_trained_others_evaluate(tmp_path, monkeypatch, make, model):
  """On 4, on 1, and on two processes with 2 each: the report of the 8, but for rounding."""
  config = getattr(runs, make)(model)
  config.steps = 8
  store = prepare.prepare(config.data, tmp_path / 'stores')
  wanted = loop.train(config, tmp_path / 'run', store)
  for devices in (4, 1):
    with monkeypatch.context() as patch:
      patch.setattr(meshes, 'make_mesh', lambda *_, n=devices: runs.mesh_of(n))
      found = trained_run.evaluate_best(config, tmp_path / 'run', store)
    for split in ('valid', 'test'):
      assert_close(found[split], wanted[split])
  both = start(tmp_path, '--mode=evaluate', make=make, model=model, devices=2).wait()
  assert [status for status, _, _ in both] == [0, 0], both
  found = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert found['devices'].startswith('4 ')
  for split in ('valid', 'test'):
    assert_close(found[split], json.loads(json.dumps(wanted[split])))


def wait_for_lines(both, tmp_path, more=3):
  """Until `more` lines are written."""
  written, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 100

  def count():
    return written.read_text().count('\n') if written.exists() else 0

  begun = count()
  while count() < begun + more:
    assert time.monotonic() < deadline and both.processes[0].poll() is None
    time.sleep(0.05)


@pytest.mark.parametrize('victim', [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_host_that_is_killed_ends_the_other(tmp_path, victim):
  """They go on from what was saved, until notice to one of them, which is notice to both: they
  stop at one step, save it, and end well."""
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
    found = both.wait()
  status, _, err = found[1 - victim]
  assert found[victim][0] == -signal.SIGKILL and status not in (0, -signal.SIGKILL)
  # XLA may be faster than we are where host 0 is gone.
  said = f'error: host {1 - victim}: ', 'another task died'
  assert any(x in err for x in said), err
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


def test_disagreeing_configs_end_both(tmp_path):
  both = start(tmp_path, own=((), ('--config.seed=1',))).wait()
  line = (
    'error: host 1: another config than on host 0: config.seed 0 -> 1; start all hosts with the '
    'same flags and config file\n'
  )
  assert [(status, err) for status, _, err in both] == [(2, line)] * 2
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'stores').exists()


@pytest.mark.slow
def test_disagreeing_data_end_both(tmp_path):
  """One name, two contents: the log lies on a disk of each host."""
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
    assert last.startswith('error: host 1: another store than on host 0: fingerprint '), err
    assert last.endswith('give every host the same log, or --stores on a disk they share')


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_ends_both(tmp_path):
  both = start(tmp_path, own=((), (f'--workdir={tmp_path}/another',))).wait()
  for status, _, err in both:
    assert status == 2, err
    assert err.splitlines()[-1] == (
      f'error: host 1: --workdir={tmp_path}/another is not the same folder as on host 0, and '
      'checkpoints are written by all hosts; use a folder on a disk they share'
    )


@pytest.mark.parametrize('process', [0, 1])
def test_who_waits_in_vain_says_so(process):
  program = (
    'from lmn_jax.distributed import processes; processes.START_SECONDS = 1; '
    f'processes.start(processes.Place({address()!r}, 2, {process}))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=HERE.parent, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2
  assert re.fullmatch(
    rf'error: process {process} of 2 waited 1 s for all to meet at 127.0.0.1:\d+; start all of '
    'them, with an address that each can reach, and see what the others say\n',
    done.stderr,
  )


SLURM = {
  'SLURM_JOB_ID': '4097', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NUM_NODES': '2',
  'SLURM_STEP_NODELIST': 'n1,n2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
}  # fmt: skip
MEET = {'LMN_COORDINATOR': 'a:1', 'LMN_PROCESSES': '3', 'LMN_PROCESS': '2'}


@pytest.mark.parametrize(
  'given, environ, wanted',
  [
    ((None, None, None), {}, None),
    (('a:1', 2, 0), {}, Place('a:1', 2, 0)),
    (('a:1', 1, 0), {}, None),
    ((None, None, None), MEET, Place('a:1', 3, 2)),
    (('b:2', None, 0), MEET, Place('b:2', 3, 0)),
    (('auto', None, None), {}, Place(None, None, None)),
    ((None, None, None), {'LMN_COORDINATOR': 'auto'}, Place(None, None, None)),
    ((None, None, None), SLURM, Place('n1:61441', 2, 1)),
    ((None, None, None), SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),
    # The batch script itself is no step.
    ((None, None, None), {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, None),
    (
      (None, None, None),
      SLURM | {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_LOCALID': '1'},
      Place('n1:61441', 4, 1, device=1),
    ),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a,b'}, Place(None, None, None)),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a'}, None),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, None),
  ],
)
def test_finding_the_place(given, environ, wanted):
  assert find(*given, environ) == wanted


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('node01', 'node01'),
    ('node01,node02', 'node01'),
    ('node[001-016,020],x1', 'node001'),
    ('node[001,007-015]', 'node001'),
    ('rack[1-2]n[01-04]', 'rack1n01'),
    ('gpu-a[3-4]-ib,gpu-b1', 'gpu-a3-ib'),
  ],
)
def test_the_first_node_of_slurm_s_lists(nodes, first):
  found = find(None, None, None, SLURM | {'SLURM_STEP_NODELIST': nodes})
  assert found.coordinator == f'{first}:61441'


@pytest.mark.parametrize(
  'given, environ, message',
  [
    (('a:1', None, None), {}, '--processes and --process missing: --coordinator=HOST:PORT, '),
    ((None, 2, 0), {}, '--coordinator missing: '),
    (('a', 2, 0), {}, "--coordinator='a' must be HOST:PORT"),
    (('a:1', 2, 2), {}, '--process=2 must be in 0..1 of --processes'),
    (('a:1', 2, -1), {}, '--process=-1 must be in 0..1 of --processes'),
    ((None, None, None), MEET | {'LMN_PROCESS': 'x'}, "LMN_PROCESS='x' must be a whole number"),
  ],
)
def test_what_does_not_belong_together(given, environ, message):
  with pytest.raises(UserError, match=message):
    find(*given, environ)


def test_one_host_pays_nothing():
  """Without others nothing is imported, joined or waited for."""
  program = (
    'import sys; from lmn_jax.distributed import processes; '
    'processes.start(processes.find(None, None, None, {})); processes.wait("x"); '
    'processes.check_shared(None); processes.agree("x", {}, None, ""); processes.stop(); '
    'assert processes.first_then_others(lambda: 3) == 3 and processes.count() == 1; '
    'assert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', program], cwd=HERE.parent, check=True, timeout=60)


def test_one_of_a_slice_is_not_taken_for_all_of_it():
  processes.check_alone(1)
  with pytest.raises(UserError, match='one of 4 hosts of a TPU slice, started alone; use ./launch'):
    processes.check_alone(4)
