"""The deployment files: their command lines are valid, and their numbers agree."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from absl import flags
from ml_collections import config_flags
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lmn_jax.serving import settings

ROOT = Path(__file__).parents[1]
FILES = list(yaml.safe_load_all((ROOT / 'deploy/kubernetes.yaml').read_text()))


def pods():
  """Returns name of the workload -> (replicas, its only container, volumes)."""
  workloads = {}
  for file in FILES:
    if file['kind'] in ('Deployment', 'StatefulSet'):
      spec = file['spec']['template']['spec']
      (container,) = spec['containers']
      name, replicas = file['metadata']['name'], file['spec']['replicas']
      workloads[name] = replicas, container, spec.get('volumes', [])
  return workloads


def settings_of(arguments):
  """Returns the settings of a command line, and the value of --export."""
  values = flags.FlagValues()
  for name in ('export', 'compilation_cache'):
    flags.DEFINE_string(name, '', '', flag_values=values)
  result = settings.settings()
  command = ['program', *arguments]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', command)
    config_flags.DEFINE_config_dict('serve', result, flag_values=values)
  assert values(command) == ['program']
  settings.check(result)
  return result, values.export


def test_the_command_lines_are_valid_and_agree():
  replicas, ranker, _ = pods()['ranker']
  ranker_settings, export = settings_of(ranker['args'])
  assert (
    ranker_settings.role == 'ranker'
    and ranker_settings.host == '0.0.0.0'
    and export.startswith('/models/')
  )
  assert ranker_settings.users.startswith('redis://users:')
  shards, shard, _ = pods()['shard']
  name, port = 'shard', shard['ports'][0]['containerPort']
  assert list(ranker_settings.shards) == [f'{name}-{k}.{name}:{port}' for k in range(shards)]
  for number in range(shards):
    arguments = [x.replace('$(NUMBER)', str(number)) for x in shard['args']]
    shard_settings, shard_export = settings_of(arguments)
    assert shard_settings.role == 'shard' and shard_settings.port == port
    assert shard_export == export
    assert settings.part_of(shard_settings) == (number, shards)
    assert shard_settings.token_file == ranker_settings.token_file


def test_probes_volumes_and_grace_period_agree():
  names = {file['metadata']['name'] for file in FILES if file['kind'] == 'Service'}
  assert names == {'ranker', 'shard', 'users'}
  for name, (_, container, volumes) in pods().items():
    if name == 'users':
      continue
    assert container['readinessProbe']['httpGet']['path'] == '/readyz'
    assert container['livenessProbe']['httpGet']['path'] == '/healthz'
    mounted = {mount['name'] for mount in container['volumeMounts']}
    assert mounted == {volume['name'] for volume in volumes}
  ranker = next(file for file in FILES if file['metadata']['name'] == 'ranker')
  ranker_settings, _ = settings_of(pods()['ranker'][1]['args'])
  grace = ranker['spec']['template']['spec']['terminationGracePeriodSeconds']
  assert grace > ranker_settings.drain_s + ranker_settings.stop_s


def test_the_image_copies_existing_files_and_installs_existing_extras():
  lines = (ROOT / 'deploy/Dockerfile').read_text().replace('\\\n', ' ').splitlines()
  (copied,) = (x for x in lines if x.startswith('COPY pyproject'))
  assert all((ROOT / name).exists() for name in shlex.split(copied)[1:-1])
  (installed,) = (x for x in lines if x.startswith('RUN pip install'))
  extras = re.search(r"'\.\[(.*?)\]'", installed)[1].split(',')
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert set(extras) <= set(project['optional-dependencies'])
  assert 'ENTRYPOINT ["python", "-m", "lmn_jax", "--mode=serve"]' in lines


def test_constraints_pin_every_dependency_within_its_bounds():
  """Also the dependencies of every extra."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  required = [*project['dependencies'], *sum(project['optional-dependencies'].values(), [])]
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith('#')]
  pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
  assert all(str(pin.specifier).startswith('==') for pin in pins)
  versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
  assert len(versions) == len(pins)
  for requirement in map(Requirement, required):
    if requirement.name != project['name']:
      assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement
