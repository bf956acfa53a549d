"""The files to deploy by: what they start can be started, and their numbers fit each other."""

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
  """Name of the workload -> (its replicas, its only container, its volumes)."""
  found = {}
  for one in FILES:
    if one['kind'] in ('Deployment', 'StatefulSet'):
      spec = one['spec']['template']['spec']
      (container,) = spec['containers']
      found[one['metadata']['name']] = one['spec']['replicas'], container, spec.get('volumes', [])
  return found


def settings_of(arguments):
  """Settings of the service as its command line gives them, and the other flags."""
  values = flags.FlagValues()
  flags.DEFINE_string('export', '', '', flag_values=values)
  few = settings.settings()
  given = ['program', *arguments]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', given)
    config_flags.DEFINE_config_dict('serve', few, flag_values=values)
  assert values(given) == ['program']
  settings.check(few)
  return few, values.export


def test_every_process_can_be_started():
  replicas, ranker, _ = pods()['ranker']
  few, export = settings_of(ranker['args'])
  assert few.role == 'ranker' and few.host == '0.0.0.0' and export.startswith('/models/')
  assert few.users.startswith('redis://users:')
  shards, shard, _ = pods()['shard']
  name, port = 'shard', shard['ports'][0]['containerPort']
  assert list(few.shards) == [f'{name}-{k}.{name}:{port}' for k in range(shards)]
  for number in range(shards):
    arguments = [x.replace('$(NUMBER)', str(number)) for x in shard['args']]
    one, same = settings_of(arguments)
    assert one.role == 'shard' and same == export and one.port == port
    assert settings.part_of(one) == (number, shards)
    assert one.token_file == few.token_file


def test_probes_ports_and_services_fit():
  names = {one['metadata']['name'] for one in FILES if one['kind'] == 'Service'}
  assert names == {'ranker', 'shard', 'users'}
  for name, (_, container, volumes) in pods().items():
    if name == 'users':
      continue
    assert container['readinessProbe']['httpGet']['path'] == '/readyz'
    assert container['livenessProbe']['httpGet']['path'] == '/healthz'
    mounted = {mount['name'] for mount in container['volumeMounts']}
    assert mounted == {volume['name'] for volume in volumes}
  ranker = next(one for one in FILES if one['metadata']['name'] == 'ranker')
  few, _ = settings_of(pods()['ranker'][1]['args'])
  grace = ranker['spec']['template']['spec']['terminationGracePeriodSeconds']
  assert grace > few.drain_s + few.stop_s


def test_the_image_has_what_it_starts():
  lines = (ROOT / 'deploy/Dockerfile').read_text().replace('\\\n', ' ').splitlines()
  (copied,) = (x for x in lines if x.startswith('COPY pyproject'))
  assert all((ROOT / name).exists() for name in shlex.split(copied)[1:-1])
  (made,) = (x for x in lines if x.startswith('RUN pip install'))
  extras = re.search(r"'\.\[(.*?)\]'", made)[1].split(',')
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert set(extras) <= set(project['optional-dependencies'])
  assert 'ENTRYPOINT ["python", "-m", "lmn_jax", "--mode=serve"]' in lines


def test_tested_versions_are_those_that_the_package_asks_for():
  """One of each dependency, of every extra, within its bounds."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  asked = [*project['dependencies'], *sum(project['optional-dependencies'].values(), [])]
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith('#')]
  pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
  assert all(str(pin.specifier).startswith('==') for pin in pins)
  versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
  assert len(versions) == len(pins)
  for wanted in map(Requirement, asked):
    if wanted.name != project['name']:
      assert versions[canonicalize_name(wanted.name)] in wanted.specifier, wanted
