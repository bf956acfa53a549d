"""launch.sh with a fake Python: nothing is installed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / 'launch.sh'

# A fake Python: creates a folder for `-m venv`, logs `-m pip`, prints the calls of other modules.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
  '-m venv') echo venv >>"$FAKE_LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') echo "pip ${{@: -1}}" >>"$FAKE_LOG"
    sleep "${{FAKE_SLEEP:-0}}"; exit "${{FAKE_PIP:-0}}" ;;
  '-m '*) [[ ! -f $FAKE_HOST ]] || exec bash "$FAKE_HOST" "$@"
    printf '%s\\n' "$PWD" "${{@:2}}" ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""


KEEP_FREED = [
  'export', 'MALLOC_MMAP_MAX_=0', 'MALLOC_TRIM_THRESHOLD_=34359738368', 'MALLOC_TOP_PAD_=268435456',
  'MALLOC_ARENA_MAX=1',
]  # fmt: skip


@pytest.fixture
def launch(tmp_path):
  """Runs a copy of launch.sh in a folder with a blank in its name, with few commands on PATH."""
  root = tmp_path / 'a checkout'
  root.mkdir()
  shutil.copy(LAUNCH, root)
  text = (root / 'launch.sh').read_text()
  assert 'GRACE=80' in text
  (root / 'launch.sh').write_text(text.replace('GRACE=80', 'GRACE=10'))
  (root / 'pyproject.toml').write_text('[project]\n')
  (root / 'constraints.txt').write_text('jax==0.10.2\n')
  bin_folder = tmp_path / 'bin'
  bin_folder.mkdir()
  for name in ('bash', 'dirname', 'cat', 'cksum', 'sed', 'mkdir', 'ls', 'rm', 'find', 'mv', 'cp',
               'sleep', 'env', 'mktemp', 'tar'):  # fmt: skip
    (bin_folder / name).symlink_to(shutil.which(name))
  fake(bin_folder, 'python3', PYTHON)

  class Launch:
    folder, bin, log = root, bin_folder, tmp_path / 'log'
    host = tmp_path / 'host'  # if it exists: the script that a process of lmn_jax runs

    def start(self, *arguments, cwd=tmp_path, **environment):
      environment = {
        'PATH': str(bin_folder), 'FAKE_LOG': str(self.log), 'FAKE_HOST': str(self.host),
        'TMPDIR': str(tmp_path), **environment,
      }  # fmt: skip
      return subprocess.Popen(
        [root / 'launch.sh', *arguments], env=environment, cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )  # fmt: skip

    def __call__(self, *arguments, **environment):
      process = self.start(*arguments, **environment)
      out, err = process.communicate(timeout=60)
      return process.returncode, out, err

    def calls(self):
      """The logged calls since the last call of this function."""
      calls = self.log.read_text().splitlines() if self.log.exists() else []
      self.log.unlink(missing_ok=True)
      return [line.replace(str(root), 'ROOT') for line in calls]

  return Launch()


def fake(folder, name, text):
  path = folder / name
  path.write_text(text)
  path.chmod(0o755)


def test_arguments_are_passed_unchanged(launch, tmp_path):
  odd = ['--config=a b.py', '--x=$HOME', '', '*', 'say "hi"']
  code, out, _ = launch(*odd, LMN_EXTRA='cpu')
  assert code == 0
  assert out.split('\n') == [str(tmp_path), 'lmn_jax', *odd, '']


def test_only_the_first_use_creates_the_environment(launch):
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == []


def test_the_environment_runs_without_the_interpreter_that_created_it(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.bin / 'python3').unlink()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0


def test_the_tools_of_tests_are_installed_once(launch):
  launch('--x', LMN_EXTRA='cpu')
  launch.calls()
  code, out, _ = launch('--test', '-k', 'a and b', LMN_EXTRA='cpu')
  pytest_of = ['pytest', '-n', 'auto', '--maxprocesses=4', '--dist=loadfile']
  assert (code, out.split('\n')) == (0, [str(launch.folder), *pytest_of, '-k', 'a and b', ''])
  assert launch.calls() == ['pip ROOT[cpu,dev]']
  _, out, _ = launch('-x', '--test-slow', LMN_EXTRA='cpu')
  assert out.split('\n')[1:] == [*pytest_of, '-m', 'slow', '-x', '']
  _, out, _ = launch('--docs', '-v', LMN_EXTRA='cpu')
  build = ['sphinx', '-E', '-W', '--keep-going', '-q', '-b', 'html', 'docs', 'build/docs', '-v']
  assert out.split('\n') == [str(launch.folder), *build, '']
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == []


def test_a_changed_pyproject_updates_the_environment_and_keeps_the_tools(launch):
  launch('--test', LMN_EXTRA='cpu')
  launch.calls()
  (launch.folder / 'pyproject.toml').write_text('[project]\nname = "x"\n')
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == ['pip ROOT[cpu,dev]']


def test_changed_versions_are_installed(launch):
  launch('--x', LMN_EXTRA='cpu')
  launch.calls()
  (launch.folder / 'constraints.txt').write_text('jax==0.10.3\n')
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == ['pip ROOT[cpu]']


def test_another_extra_creates_the_environment_again(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.folder / '.venv' / 'old').touch()
  launch.calls()
  launch('--x', LMN_EXTRA='tpu')
  assert launch.calls() == ['venv', 'pip ROOT[tpu]']
  assert not (launch.folder / '.venv' / 'old').exists()


def test_a_failed_set_up_is_repeated(launch):
  code, out, err = launch('--x', LMN_EXTRA='cpu', FAKE_PIP='1')
  assert (code, out) == (1, '')
  assert 'the next call repeats it' in err
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_failed_update_is_not_taken_for_the_old_environment(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.folder / 'pyproject.toml').write_text('[broken]\n')
  assert launch('--x', LMN_EXTRA='cpu', FAKE_PIP='1')[0] == 1
  (launch.folder / 'pyproject.toml').write_text('[project]\n')
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_calls_at_the_same_time_create_one_environment(launch):
  processes = [launch.start('--x', LMN_EXTRA='cpu', FAKE_SLEEP='0.5') for _ in range(3)]
  for process in processes:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert 'lmn_jax' in out
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_killed_set_up_releases_its_lock(launch):
  process = launch.start('--x', LMN_EXTRA='cpu', FAKE_SLEEP='2')
  while not launch.log.exists() or 'pip' not in launch.log.read_text():
    time.sleep(0.01)
  process.kill()
  process.communicate(timeout=60)
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_folder_of_the_user_is_not_changed(launch, tmp_path):
  mine = tmp_path / 'mine'
  mine.mkdir()
  (mine / 'thesis.txt').touch()
  code, _, err = launch('--x', LMN_EXTRA='cpu', LMN_VENV=str(mine))
  assert code == 2
  assert 'was not created by launch.sh; remove it, or set LMN_VENV' in err
  assert [child.name for child in mine.iterdir()] == ['thesis.txt']


def test_the_environment_may_be_in_another_folder(launch, tmp_path):
  """An empty folder, as from mktemp -d, and a path relative to the current folder."""
  (tmp_path / 'empty').mkdir()
  assert launch('--x', LMN_EXTRA='cpu', LMN_VENV='empty')[0] == 0
  assert (tmp_path / 'empty' / 'bin' / 'python').exists()
  assert not (launch.folder / '.venv').exists()


def test_dry_run_prints_the_commands(launch):
  code, out, _ = launch('--dry-run', '--config=a b.py', LMN_EXTRA='cuda')
  commands = [shlex.split(line) for line in out.splitlines()]
  venv, tested = f'{launch.folder}/.venv', ['--constraint', f'{launch.folder}/constraints.txt']
  assert code == 0
  assert commands == [
    [str(launch.bin / 'python3'), '-m', 'venv', venv],
    [f'{venv}/bin/python', '-m', 'pip', 'install', *tested, '--editable', f'{launch.folder}[cuda]'],
    KEEP_FREED,
    [f'{venv}/bin/python', '-m', 'lmn_jax', '--config=a b.py'],
  ]
  assert not Path(venv).exists() and launch.calls() == []


def test_training_keeps_freed_memory(launch):
  """Unless one of the variables is set; tests run with the defaults."""
  host = '[[ ! -v MALLOC_TOP_PAD_ ]] || echo "$MALLOC_MMAP_MAX_ $MALLOC_TOP_PAD_"\n'
  launch.host.write_text(host)
  assert launch('--x', LMN_EXTRA='cpu')[1] == '0 268435456\n'
  assert launch('--x', LMN_EXTRA='cpu', MALLOC_TOP_PAD_='7')[1] == ' 7\n'
  assert launch('--x', LMN_EXTRA='cpu', MALLOC_TRIM_THRESHOLD_='7')[1] == ''
  assert launch('--x', LMN_EXTRA='cpu', MALLOC_ARENA_MAX='7')[1] == ''
  assert launch('--test', LMN_EXTRA='cpu')[1] == ''
  assert 'export' not in launch('--dry-run', '--x', LMN_EXTRA='cpu', MALLOC_MMAP_MAX_='7')[1]


def commands_of(out):
  return [shlex.split(line) for line in out.splitlines()]


def test_dry_run_of_a_rehearsal(launch):
  launch('--x', LMN_EXTRA='cpu')
  code, out, _ = launch(
    '--dry-run', '--config=a b.py', '--hosts=2', '--mode=train', LMN_EXTRA='cpu', LMN_DEVICES='4',
    LMN_PORT='1234',
  )  # fmt: skip
  python = f'{launch.folder}/.venv/bin/python'
  assert code == 0
  assert commands_of(out) == [KEEP_FREED] + [
    ['env', 'JAX_PLATFORMS=cpu', 'JAX_NUM_CPU_DEVICES=4', python, '-m', 'lmn_jax',
     '--config=a b.py', '--mode=train', '--coordinator=127.0.0.1:1234', '--processes=2',
     f'--process={k}']
    for k in range(2)
  ]  # fmt: skip


def test_dry_run_of_a_slice(launch):
  """The command is quoted for two shells: the one here and the one of each worker."""
  code, out, _ = launch(
    '--tpu=pod', '--config=a b.py', '--zone', 'us-x', '--project=p', '--dry-run', '--x=$HOME'
  )
  pack, copy, run = commands_of(out)
  archive, tpu = f'{launch.folder}/.lmn_jax.tgz', ['gcloud', 'compute', 'tpus', 'tpu-vm']
  where = ['--worker=all', '--zone=us-x', '--project=p']
  assert code == 0
  assert pack[:5] == ['tar', '-czf', archive, '-C', str(launch.folder)]
  assert pack[5:] == ['--exclude=__pycache__', 'constraints.txt', 'launch.sh', 'pyproject.toml']
  assert copy == [*tpu, 'scp', archive, 'pod:lmn_jax.tgz', *where]
  assert run[:-1] == [*tpu, 'ssh', 'pod', *where]
  remote = shlex.split(run[-1].removeprefix('--command='))
  call = shlex.split(remote[remote.index('-c') + 1])
  assert call[3:8] == [
    'LMN_EXTRA=tpu', 'LMN_COORDINATOR=auto', './launch.sh', '--config=a b.py', '--x=$HOME;',
  ]  # fmt: skip
  assert launch.calls() == []  # no environment is created on this host


@pytest.fixture
def worker(launch, tmp_path):
  """The home folder of the only worker of a slice, for a fake gcloud."""
  home = tmp_path / 'home'
  home.mkdir()
  for name in ('gzip', 'setsid', 'nohup', 'tail'):
    (launch.bin / name).symlink_to(shutil.which(name))
  gcloud = f"""#!/bin/bash
case $4 in
  scp) cp "$5" "{home}/${{6#*:}}" ;;
  ssh) cd "{home}" && exec bash -c "${{8#--command=}}" ;;
esac
"""
  fake(launch.bin, 'gcloud', gcloud)
  return home


POD = ('--tpu=pod', '--zone=z')


def test_a_slice_runs_a_copy_of_the_folder_and_returns_its_status(launch, worker):
  for folder in ('.venv', 'runs'):
    (launch.folder / folder).mkdir()
    (launch.folder / folder / 'large').touch()
  odd = ['--config=a b.py', '--x=$HOME', "--y=it's"]
  code, out, err = launch(*POD, *odd)
  assert code == 0, err
  assert out.split('\n')[-6:] == [str(worker / 'lmn_jax'), 'lmn_jax', *odd, '']
  assert not list((worker / 'lmn_jax').glob('*/large'))
  assert not (launch.folder / '.lmn_jax.tgz').exists()
  launch.host.write_text('exit 7')
  assert launch(*POD, '--x')[0] == 7
  assert launch(*POD, '--follow')[0] == 7
  code, _, err = launch(*POD, '--stop')
  assert code == 2 and 'no run is in progress' in err


def test_a_run_on_a_slice_continues_after_a_lost_connection(launch, worker):
  """A second run is refused; the first can be followed and stopped, with its status."""
  launch.host.write_text('trap "echo saved; exit 3" TERM; echo begun; while :; do sleep 0.05; done')
  connection = launch.start(*POD, '--x')
  while 'begun' not in (line := connection.stdout.readline()):
    assert line
  for pid in [*children_of(connection.pid), connection.pid]:
    os.kill(pid, signal.SIGKILL)
  connection.wait(60)
  code, _, err = launch(*POD, '--x')
  assert code == 2 and 'a run is in progress; --follow shows it, --stop ends it' in err
  following = launch.start(*POD, '--follow')
  code, out, _ = launch(*POD, '--stop')
  assert code == 3 and out.endswith('saved\n')
  out, _ = following.communicate(timeout=60)
  assert following.returncode == 3 and out.endswith('saved\n')
  assert launch(*POD, '--follow')[0] == 3
  connection.communicate(timeout=60)  # the worker's tail has ended with the run


def children_of(pid):
  """The child processes of a process."""
  children = []
  for stat in Path('/proc').glob('[0-9]*/stat'):
    try:
      parent = int(stat.read_text().rpartition(')')[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
      continue
    if parent == pid:
      children.append(int(stat.parent.name))
  return children


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--hosts=2', *POD], '--hosts and --tpu exclude each other'),
    (['--nodes=2', *POD], '--tpu and --nodes exclude each other'),
    (['--test', '--hosts=2'], '--hosts and --test exclude each other'),
    (['--zone=z'], '--zone is for --tpu=NAME'),
    (['--project', 'p'], '--project is for --tpu=NAME'),
    (['--stop'], '--stop is for --tpu=NAME'),
    ([*POD, '--follow', '--x'], '--follow takes no flags of the program; leave out --x'),
    (['--tpu', '--zone=z'], '--tpu needs a value'),
    (['--nodes=0'], '--nodes=0 must be a whole number from 1 on'),
  ],
)
def test_flags_that_exclude_each_other_are_refused(launch, arguments, message):
  """Nothing is run or installed."""
  fake(launch.bin, 'gcloud', '#!/bin/bash\necho called >>"$FAKE_LOG"\n')
  code, out, err = launch(*arguments, '--config=a.py')
  assert (code, out, launch.calls()) == (2, '', []) and message in err


@pytest.mark.parametrize('position', [1, 3])
@pytest.mark.parametrize(
  'arguments',
  [
    ['--tpu=x', '--zone=y', '--config=a.py'],
    ['--hosts', '2', '--config=a.py'],
    ['--nodes=2', '--config=a.py', '--x'],
    ['--test', '-k', 'name'],
    ['--test-slow', 'tests/test_x.py', '-x'],
    ['--config=a.py', '--steps=2', '--x'],
  ],
)
def test_a_dry_run_flag_works_at_any_position(launch, arguments, position):
  for name in ('gcloud', 'sbatch', 'srun'):
    fake(launch.bin, name, '#!/bin/bash\necho called >>"$FAKE_LOG"\n')
  k = 2 if arguments[0] == '--hosts' else position  # not between a flag and its value
  argv = [*arguments[:k], '--dry-run', *arguments[k:]]
  code, out, err = launch(*argv, LMN_EXTRA='cpu', LMN_PORT='1')
  assert (code, launch.calls()) == (0, []), err
  assert out == launch('--dry-run', *arguments, LMN_EXTRA='cpu', LMN_PORT='1')[1]
  assert '--dry-run' not in out


def test_a_slice_needs_its_zone(launch):
  code, out, err = launch('--tpu=pod', '--config=a.py')
  assert (code, out) == (2, '')
  assert err == 'launch.sh: --tpu=pod needs its zone: --zone=ZONE\n'
  code, _, err = launch('--tpu=pod', '--zone=z', '--config=a.py')
  assert code == 2 and 'needs gcloud' in err


def test_a_slurm_job_runs_one_process_on_each_node(launch, tmp_path):
  """sbatch runs a copy of the script; each node then runs the script itself."""
  spool = tmp_path / 'spool'
  spool.mkdir()
  shutil.copy(launch.folder / 'launch.sh', spool / 'slurm_script')
  job = dict(
    SLURM_JOB_ID='7', SLURM_JOB_NUM_NODES='4', SLURM_CPUS_ON_NODE='96', LMN_EXTRA='cpu',
    PATH=str(launch.bin),
  )  # fmt: skip

  def sbatch(*arguments, **more):
    return subprocess.run(
      [spool / 'slurm_script', *arguments], cwd=tmp_path, capture_output=True, text=True,
      env=job | dict(FAKE_LOG=str(launch.log), FAKE_HOST='', **more), timeout=60,
    )  # fmt: skip

  folder = str(launch.folder)
  done = sbatch('--dry-run', '--config=a b.py', SLURM_SUBMIT_DIR=folder)
  assert done.returncode == 0, done.stderr
  step = ['srun', '--nodes=4', '--ntasks=4', '--ntasks-per-node=1', '--cpus-per-task=96',
          '--kill-on-bad-exit=1', f'{folder}/launch.sh', '--config=a b.py']  # fmt: skip
  assert commands_of(done.stdout)[-1] == step
  fake(launch.bin, 'srun', '#!/bin/bash\nprintf "%s\\n" "$@"; exec "${@:6}"\n')
  done = sbatch('--config=a b.py', SLURM_SUBMIT_DIR=folder)
  assert done.stdout.split('\n') == [*step[1:], str(tmp_path), 'lmn_jax', step[-1], '']
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']
  done = sbatch('--config=a b.py', SLURM_SUBMIT_DIR=str(tmp_path))
  assert done.returncode == 2 and 'run sbatch there' in done.stderr


def test_a_slurm_job_is_submitted_and_shown_outside_a_job(launch):
  folder = str(launch.folder)
  code, out, _ = launch('--config=a b.py', '--nodes=4', '--dry-run')
  submission, step = commands_of(out)
  assert code == 0
  assert submission == [
    'sbatch', '--nodes=4', f'--chdir={folder}', f'{folder}/launch.sh', '--config=a b.py',
  ]  # fmt: skip
  assert step[:3] == ['srun', '--nodes=4', '--ntasks=4'] and step[-1] == '--config=a b.py'
  code, _, err = launch('--config=a.py', '--nodes=4')
  assert code == 2 and 'needs sbatch' in err
  fake(launch.bin, 'sbatch', '#!/bin/bash\nprintf "%s\\n" "$@"\n')
  assert launch('--config=a b.py', '--nodes=4')[1].splitlines() == submission[1:]


def test_a_rehearsal_shows_the_output_of_host_0_only(launch):
  launch.host.write_text('sleep 2; echo "${@: -2}"; echo "progress of ${@: -1}" >&2')
  code, out, err = launch('--x', '--hosts=3', LMN_EXTRA='cpu')
  assert (code, out) == (0, '--processes=3 --process=0\n')
  assert err.splitlines()[-1] == 'progress of --process=0' and '--process=1' not in err


def pids_of(folder):
  return [int(path.read_text()) for path in folder.glob('log.pid*')]


def gone(pids):
  return not any(Path(f'/proc/{pid}').exists() for pid in pids)


# Moved into place, because a file is empty for a moment while it is written.
WAITING = (
  'trap "exit 3" INT; echo $$ >"$FAKE_LOG.new${@: -1}"; '
  'mv "$FAKE_LOG.new${@: -1}" "$FAKE_LOG.pid${@: -1}"; while :; do sleep 0.05; done'
)


def test_a_host_that_fails_ends_the_rehearsal(launch, tmp_path):
  """The rehearsal has its message, once, and its status; no process remains."""
  launch('--x', LMN_EXTRA='cpu')
  message = 'error: host 1: config.steps=0 must be at least 1'
  for how in (
    f'[[ $* != *--process=1 ]] || {{ echo "{message}" >&2; exit 2; }}; {WAITING}',  # others wait
    f'echo "{message}" >&2; exit 2',  # all say it
  ):
    launch.host.write_text(how)
    code, out, err = launch('--x', '--hosts=3', LMN_EXTRA='cpu')
    assert (code, out, err) == (2, '', message + '\n')
  pids = pids_of(tmp_path)
  assert len(pids) == 2 and gone(pids)
  assert not list(tmp_path.glob('tmp.*'))


def test_a_traceback_of_another_host_is_shown(launch):
  launch.host.write_text(
    '[[ $* != *--process=1 ]] || printf "Traceback\\n  of host 1\\n" >&2\n'
    'echo "error: host 1: oh" >&2; exit 1\n'
  )
  code, _, err = launch('--x', '--hosts=2', LMN_EXTRA='cpu')
  assert code == 1
  assert err.splitlines()[-3:] == ['error: host 1: oh', 'Traceback', '  of host 1']


def test_a_host_that_is_killed_is_named(launch):
  launch('--x', LMN_EXTRA='cpu')
  launch.host.write_text(
    'if [[ $* == *--process=1 ]]; then kill -KILL $$; else sleep 1; echo lost >&2; exit 1; fi'
  )
  code, _, err = launch('--x', '--hosts=2', LMN_EXTRA='cpu')
  assert (code, err) == (137, 'lost\nlaunch.sh: host 1 was ended by signal 9\n')


@pytest.mark.usefixtures('hears_ctrl_c')
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_rehearsal_leaves_no_process(launch, tmp_path, number, status):
  launch('--x', LMN_EXTRA='cpu')
  launch.host.write_text(WAITING)
  process = launch.start('--x', '--hosts=2', LMN_EXTRA='cpu')
  deadline = time.monotonic() + 20
  while len(pids_of(tmp_path)) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode == status and gone(pids_of(tmp_path))


@pytest.mark.parametrize('value', ['0', 'two', '-1', ''])
def test_an_invalid_number_of_hosts_is_refused(launch, value):
  code, _, err = launch('--x', f'--hosts={value}', LMN_EXTRA='cpu')
  assert (code, err) == (2, f'launch.sh: --hosts={value} must be a whole number from 1 on\n')
  code, _, err = launch('--x', '--hosts=2', LMN_EXTRA='cpu', LMN_DEVICES='0')
  assert code == 2 and 'LMN_DEVICES=0 must be a whole number from 1 on' in err


def test_an_unknown_extra_is_refused(launch):
  code, out, err = launch('--x', LMN_EXTRA='gpu')
  assert (code, out) == (2, '')
  assert err == 'launch.sh: LMN_EXTRA=gpu is unknown; use cpu, cuda, cuda12 or tpu\n'


def test_help(launch):
  for arguments in ((), ('--help',), ('-h',)):
    code, out, _ = launch(*arguments)
    assert code == 0 and '--test' in out and 'LMN_EXTRA' in out
  assert launch.calls() == []


def test_old_python_is_refused(launch):
  fake(launch.bin, 'python3', '#!/bin/bash\nexit 1\n')
  code, _, err = launch('--x', LMN_EXTRA='cpu')
  assert code == 2
  assert 'no Python >= 3.11 among: python3.13 python3.12 python3.11 python3 python;' in err
  assert not (launch.folder / '.venv').exists()


def test_the_interpreter_can_be_set(launch, tmp_path):
  code, _, err = launch('--x', LMN_EXTRA='cpu', LMN_PYTHON='/nowhere')
  assert code == 2 and 'no Python >= 3.11 among: /nowhere;' in err
  fake(tmp_path, 'my python', PYTHON)
  _, out, _ = launch('--dry-run', '--x', LMN_EXTRA='cpu', LMN_PYTHON=str(tmp_path / 'my python'))
  assert shlex.split(out)[0] == str(tmp_path / 'my python')


def test_an_interpreter_that_does_not_run_is_skipped(launch):
  fake(launch.bin, 'python3.13', '#!/bin/bash\nexit 127\n')
  fake(launch.bin, 'python3.12', '#!/bin/bash\n[[ $2 != *ensurepip* ]]\n')
  _, out, _ = launch('--dry-run', '--x', LMN_EXTRA='cpu')
  assert shlex.split(out)[0] == str(launch.bin / 'python3')
  (launch.bin / 'python3').unlink()
  code, _, err = launch('--dry-run', '--x', LMN_EXTRA='cpu')
  assert code == 2 and 'apt install python3.12-venv' in err


def extra(launch, fs=''):
  """The output of find_extra, with `fs` as prefix of /dev and /sys."""
  done = subprocess.run(
    ['bash', '-c', 'source "$1"; find_extra "$2"', '-', launch.folder / 'launch.sh', fs],
    env={'PATH': str(launch.bin)}, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return done.stdout.strip()


@pytest.mark.parametrize('driver, expected', [('580.65.06', 'cuda'), ('535.161.08', 'cuda12')])
def test_cuda_by_driver(launch, tmp_path, driver, expected):
  fake(
    launch.bin,
    'nvidia-smi',
    f'#!/bin/bash\n[[ $1 == -L ]] && echo "GPU 0: H100 (UUID: GPU-0)" || echo "{driver}"\n',
  )
  assert extra(launch, tmp_path) == expected


def test_a_driver_without_a_gpu_gives_cpu(launch, tmp_path):
  fake(launch.bin, 'nvidia-smi', '#!/bin/bash\necho "No devices were found"\nexit 6\n')
  assert extra(launch, tmp_path) == 'cpu'


def test_cuda_in_a_container_without_nvidia_smi(launch, tmp_path):
  (tmp_path / 'dev').mkdir()
  (tmp_path / 'dev' / 'nvidia0').touch()
  assert extra(launch, tmp_path) == 'cuda'


@pytest.mark.parametrize(
  'vendor, device, expected',
  [('0x1ae0', '0x0063', 'tpu'), ('0x1ae0', '0x0042', 'cpu'), ('0x8086', '0x0063', 'cpu')],
  ids=['tpu', 'network card of the same maker', 'another maker'],
)
def test_tpu_by_pci(launch, tmp_path, vendor, device, expected):
  folder = tmp_path / 'sys' / 'bus' / 'pci' / 'devices' / '0000:00:04.0'
  folder.mkdir(parents=True)
  (folder / 'vendor').write_text(vendor + '\n')
  (folder / 'device').write_text(device + '\n')
  assert extra(launch, tmp_path) == expected


def test_launch_is_executable_and_passes_shellcheck():
  assert os.access(LAUNCH, os.X_OK)
  shellcheck = Path(sys.executable).with_name('shellcheck')
  if not shellcheck.exists():
    pytest.skip('shellcheck is not installed beside this Python')
  done = subprocess.run([shellcheck, LAUNCH], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
