"""The wheel, installed outside the repository: configs, command, a training, how-to code."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import lmn_jax
from lmn_jax import config_files
from tests.test_how_to import (
  CODE,
  LABELS,
  SMALL,
  SMALL_DATA,
  write_feather_log,
  write_log_of_labels,
)

ROOT = Path(__file__).resolve().parents[1]


def call(folder, *command):
  """Runs a command in a folder, without variables that the tests set; returns its output."""
  clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  done = subprocess.run(
    [*map(str, command)], cwd=folder, env=clean, capture_output=True, text=True,
    timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """Returns the folder of commands of a virtual environment with the wheel.

  A .pth file adds the dependencies in the environment of the tests. Python ignores .pth files in
  folders added like this, so an editable installation of the repository is not found. Nothing is
  downloaded.
  """
  pytest.importorskip('hatchling', reason='the wheel is built by hatchling, which is not installed')
  folder = tmp_path_factory.mktemp('wheel')
  call(ROOT, sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', folder)
  (wheel,) = folder.glob('lmn_jax-*.whl')
  venv.create(folder / 'venv')
  python = folder / 'venv' / 'bin' / 'python'
  code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
  site = Path(call(folder, python, '-I', '-c', code).strip())
  paths = [path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))]
  (site / 'dependencies.pth').write_text('\n'.join(paths))
  options = ('--no-deps', '--no-index', '--quiet', '--disable-pip-version-check')
  call(folder, sys.executable, '-m', 'pip', '--python', python, 'install', *options, wheel)
  module = call(folder, python, '-c', 'import lmn_jax; print(lmn_jax.__file__)')
  assert Path(module.strip()).is_relative_to(folder)
  return python.parent


@pytest.mark.slow
def test_the_wheel_has_the_configs_and_the_command(installed, tmp_path):
  """In an empty folder: every config is found by name, and a training writes a report."""
  assert call(tmp_path, installed / 'lmn-jax', '--version').startswith(
    f'lmn_jax {lmn_jax.__version__} (jax '
  )
  module = installed / 'python', '-m', 'lmn_jax'
  assert call(tmp_path, *module, '--version') == call(tmp_path, installed / 'lmn-jax', '--version')
  code = (
    'import sys; from lmn_jax import config_files as c;'
    'print(*c.names()); print(c.path_of("douyin:din"))'
  )
  names, path = call(tmp_path, installed / 'python', '-c', code).splitlines()
  assert names.split() == config_files.names()
  path, _, model = path.partition(':')
  assert Path(path).is_relative_to(installed.parent) and model == 'din'
  assert Path(path).read_bytes() == (ROOT / 'configs' / 'douyin.py').read_bytes()
  small = ['--config.data.synthetic.users=40', '--config.data.synthetic.impressions=30']
  prepared = call(tmp_path, *module, '--config=lmn_douyin', '--mode=prepare', *small)
  assert prepared.startswith('rows read ') and f'store: {Path("runs/stores/douyin")}' in prepared
  steps = ['--config.steps=2', '--config.batch_size=32', '--config.model.slots_per_axis=16']
  call(tmp_path, installed / 'lmn-jax', '--config=lmn_douyin', *small, *steps)
  report = json.loads((tmp_path / 'runs' / 'lmn_douyin' / 'report.json').read_text())
  assert report['step'] == 2 and report['config']['model']['name'] == 'lmn'
  assert report['commit'] is None


@pytest.mark.slow
def test_the_code_of_the_how_to_pages_runs_with_the_wheel(installed, tmp_path, monkeypatch):
  """Every config of docs/how_to/code trains, in a folder that contains only that code."""
  shutil.copytree(CODE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
  monkeypatch.chdir(tmp_path)
  write_feather_log()
  runs = {
    'my_click_config.py': 'click',
    'my_next_item_config.py': 'next_item',
    'my_loss_config.py:click': 'click',
    'my_loss_config.py:next_item': 'next_item',
    'my_metric_config.py:click': 'click',
    'my_metric_config.py:next_item': 'next_item',
    'my_criterion_config.py': 'click',
    'my_optimizer_config.py': 'click',
    'my_reader_config.py': '',
    'my_labels_config.py': '',
    'my_dwell_config.py': '',
  }
  files = {config.partition(':')[0] for config in runs}
  assert files == {path.name for path in CODE.glob('*_config.py')}
  for config, task in runs.items():
    flags = [*SMALL, *SMALL_DATA.get(task, ()), '--config.steps=2', '--workdir=runs/run']
    shutil.rmtree(tmp_path / 'runs/run', ignore_errors=True)
    if config.removesuffix('.py') in LABELS:
      write_log_of_labels(config.removesuffix('.py'))
    call(tmp_path, installed / 'lmn-jax', f'--config={config}', *flags)
    report = json.loads((tmp_path / 'runs/run/report.json').read_text())
    assert report['step'] == 2, config
