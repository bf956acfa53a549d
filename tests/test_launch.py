"""What launch.sh decides, with a stand-in for Python: nothing is installed."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / 'launch.sh'

# Answers as Python would: makes a folder for `-m venv`, notes `-m pip`, shows other modules' calls.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
  '-m venv') echo venv >>"$FAKE_LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') echo "pip ${{@: -1}}" >>"$FAKE_LOG"
    sleep "${{FAKE_SLEEP:-0}}"; exit "${{FAKE_PIP:-0}}" ;;
  '-m '*) printf '%s\\n' "$PWD" "${{@:2}}" ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
  """Runs a copy of launch.sh in a folder with a blank, with few commands on the path."""
  root = tmp_path / 'a checkout'
  root.mkdir()
  shutil.copy(LAUNCH, root)
  (root / 'pyproject.toml').write_text('[project]\n')
  bin_folder = tmp_path / 'bin'
  bin_folder.mkdir()
  for name in ('bash', 'dirname', 'cat', 'cksum', 'sed', 'mkdir', 'ls', 'rm', 'find', 'mv', 'cp',
               'sleep'):  # fmt: skip
    (bin_folder / name).symlink_to(shutil.which(name))
  fake(bin_folder, 'python3', PYTHON)

  class Launch:
    folder, bin, log = root, bin_folder, tmp_path / 'log'

    def start(self, *arguments, cwd=tmp_path, **environment):
      environment = {'PATH': str(bin_folder), 'FAKE_LOG': str(self.log), **environment}
      return subprocess.Popen(
        [root / 'launch.sh', *arguments], env=environment, cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )  # fmt: skip

    def __call__(self, *arguments, **environment):
      process = self.start(*arguments, **environment)
      out, err = process.communicate(timeout=60)
      return process.returncode, out, err

    def calls(self):
      """What was made and installed since the last look."""
      found = self.log.read_text().splitlines() if self.log.exists() else []
      self.log.unlink(missing_ok=True)
      return [line.replace(str(root), 'ROOT') for line in found]

  return Launch()


def fake(folder, name, text):
  path = folder / name
  path.write_text(text)
  path.chmod(0o755)


def test_arguments_arrive_unharmed(launch, tmp_path):
  odd = ['--config=a b.py', '--x=$HOME', '', '*', 'say "hi"']
  code, out, _ = launch(*odd, LMN_EXTRA='cpu')
  assert code == 0
  assert out.split('\n') == [str(tmp_path), 'lmn_jax.main', *odd, '']


def test_first_use_makes_and_later_uses_do_not(launch):
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == []


def test_what_is_made_runs_without_the_interpreter_that_made_it(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.bin / 'python3').unlink()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0


def test_tests_add_the_tools_once(launch):
  launch('--x', LMN_EXTRA='cpu')
  launch.calls()
  code, out, _ = launch('--test', '-k', 'a and b', LMN_EXTRA='cpu')
  assert (code, out.split('\n')) == (
    0,
    [str(launch.folder), 'pytest', '-n', 'auto', '--maxprocesses=4', '-k', 'a and b', ''],
  )
  assert launch.calls() == ['pip ROOT[cpu,dev]']
  launch('--test', LMN_EXTRA='cpu')
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == []


def test_a_changed_pyproject_updates_in_place_and_keeps_the_tools(launch):
  launch('--test', LMN_EXTRA='cpu')
  launch.calls()
  (launch.folder / 'pyproject.toml').write_text('[project]\nname = "x"\n')
  launch('--x', LMN_EXTRA='cpu')
  assert launch.calls() == ['pip ROOT[cpu,dev]']


def test_another_extra_begins_anew(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.folder / '.venv' / 'old').touch()
  launch.calls()
  launch('--x', LMN_EXTRA='tpu')
  assert launch.calls() == ['venv', 'pip ROOT[tpu]']
  assert not (launch.folder / '.venv' / 'old').exists()


def test_a_failed_set_up_is_not_taken_for_made(launch):
  code, out, err = launch('--x', LMN_EXTRA='cpu', FAKE_PIP='1')
  assert (code, out) == (1, '')
  assert 'the next call begins it again' in err
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_failed_update_is_not_taken_for_what_was_before(launch):
  launch('--x', LMN_EXTRA='cpu')
  (launch.folder / 'pyproject.toml').write_text('[broken]\n')
  assert launch('--x', LMN_EXTRA='cpu', FAKE_PIP='1')[0] == 1
  (launch.folder / 'pyproject.toml').write_text('[project]\n')
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_two_at_once_make_one_environment(launch):
  processes = [launch.start('--x', LMN_EXTRA='cpu', FAKE_SLEEP='0.5') for _ in range(3)]
  for process in processes:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert 'lmn_jax.main' in out
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_killed_set_up_holds_no_lock(launch):
  process = launch.start('--x', LMN_EXTRA='cpu', FAKE_SLEEP='2')
  while not launch.log.exists() or 'pip' not in launch.log.read_text():
    time.sleep(0.01)
  process.kill()
  process.communicate(timeout=60)
  launch.calls()
  assert launch('--x', LMN_EXTRA='cpu')[0] == 0
  assert launch.calls() == ['venv', 'pip ROOT[cpu]']


def test_a_folder_of_the_user_is_left_alone(launch, tmp_path):
  mine = tmp_path / 'mine'
  mine.mkdir()
  (mine / 'thesis.txt').touch()
  code, _, err = launch('--x', LMN_EXTRA='cpu', LMN_VENV=str(mine))
  assert code == 2
  assert 'was not made by launch.sh; remove it, or set LMN_VENV' in err
  assert [child.name for child in mine.iterdir()] == ['thesis.txt']


def test_the_environment_may_lie_elsewhere(launch, tmp_path):
  """An empty folder, as mktemp -d makes it, and a path relative to the caller."""
  (tmp_path / 'empty').mkdir()
  assert launch('--x', LMN_EXTRA='cpu', LMN_VENV='empty')[0] == 0
  assert (tmp_path / 'empty' / 'bin' / 'python').exists()
  assert not (launch.folder / '.venv').exists()


def test_dry_run_prints_what_would_run(launch):
  code, out, _ = launch('--dry-run', '--config=a b.py', LMN_EXTRA='cuda')
  commands = [shlex.split(line) for line in out.splitlines()]
  venv = str(launch.folder / '.venv')
  assert code == 0
  assert commands == [
    [str(launch.bin / 'python3'), '-m', 'venv', venv],
    [f'{venv}/bin/python', '-m', 'pip', 'install', '--editable', f'{launch.folder}[cuda]'],
    [f'{venv}/bin/python', '-m', 'lmn_jax.main', '--config=a b.py'],
  ]
  assert not Path(venv).exists() and launch.calls() == []


def test_unknown_extra(launch):
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


def test_the_interpreter_may_be_named(launch, tmp_path):
  code, _, err = launch('--x', LMN_EXTRA='cpu', LMN_PYTHON='/nowhere')
  assert code == 2 and 'no Python >= 3.11 among: /nowhere;' in err
  fake(tmp_path, 'my python', PYTHON)
  _, out, _ = launch('--dry-run', '--x', LMN_EXTRA='cpu', LMN_PYTHON=str(tmp_path / 'my python'))
  assert shlex.split(out)[0] == str(tmp_path / 'my python')


def test_a_shim_that_does_not_run_is_passed_over(launch):
  fake(launch.bin, 'python3.13', '#!/bin/bash\nexit 127\n')
  fake(launch.bin, 'python3.12', '#!/bin/bash\n[[ $2 != *ensurepip* ]]\n')
  _, out, _ = launch('--dry-run', '--x', LMN_EXTRA='cpu')
  assert shlex.split(out)[0] == str(launch.bin / 'python3')
  (launch.bin / 'python3').unlink()
  code, _, err = launch('--dry-run', '--x', LMN_EXTRA='cpu')
  assert code == 2 and 'apt install python3.12-venv' in err


def extra(launch, fs=''):
  """Calls find_extra alone, with `fs` before /dev and /sys."""
  done = subprocess.run(
    ['bash', '-c', 'source "$1"; find_extra "$2"', '-', launch.folder / 'launch.sh', fs],
    env={'PATH': str(launch.bin)}, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return done.stdout.strip()


@pytest.mark.parametrize('driver, want', [('580.65.06', 'cuda'), ('535.161.08', 'cuda12')])
def test_cuda_by_driver(launch, tmp_path, driver, want):
  fake(
    launch.bin,
    'nvidia-smi',
    f'#!/bin/bash\n[[ $1 == -L ]] && echo "GPU 0: H100 (UUID: GPU-0)" || echo "{driver}"\n',
  )
  assert extra(launch, tmp_path) == want


def test_a_driver_without_a_gpu_is_no_gpu(launch, tmp_path):
  fake(launch.bin, 'nvidia-smi', '#!/bin/bash\necho "No devices were found"\nexit 6\n')
  assert extra(launch, tmp_path) == 'cpu'


def test_cuda_in_a_container_without_nvidia_smi(launch, tmp_path):
  (tmp_path / 'dev').mkdir()
  (tmp_path / 'dev' / 'nvidia0').touch()
  assert extra(launch, tmp_path) == 'cuda'


@pytest.mark.parametrize(
  'vendor, device, want',
  [('0x1ae0', '0x0063', 'tpu'), ('0x1ae0', '0x0042', 'cpu'), ('0x8086', '0x0063', 'cpu')],
  ids=['tpu', 'network card of the same maker', 'another maker'],
)
def test_tpu_by_pci(launch, tmp_path, vendor, device, want):
  folder = tmp_path / 'sys' / 'bus' / 'pci' / 'devices' / '0000:00:04.0'
  folder.mkdir(parents=True)
  (folder / 'vendor').write_text(vendor + '\n')
  (folder / 'device').write_text(device + '\n')
  assert extra(launch, tmp_path) == want


def test_launch_is_executable_and_passes_shellcheck():
  assert os.access(LAUNCH, os.X_OK)
  shellcheck = Path(sys.executable).with_name('shellcheck')
  if not shellcheck.exists():
    pytest.skip('shellcheck is not installed beside this Python')
  done = subprocess.run([shellcheck, LAUNCH], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
