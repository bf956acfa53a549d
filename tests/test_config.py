"""Every config file loads and documents its command; misspelt fields are refused."""

import ast
import importlib.util
from pathlib import Path

import ml_collections
import pytest

from lmn_jax import config as configs
from lmn_jax.data import sources
from lmn_jax.errors import UserError
from lmn_jax.models import registry
from lmn_jax.training import setup as setups
from tests.runs import tiny_config

FILES = sorted((Path(__file__).parent.parent / 'configs').glob('*.py'))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_config_file(path):
  config = load(path)
  assert './launch.sh --config=configs/' in ast.get_docstring(ast.parse(path.read_text()))
  assert isinstance(config, ml_collections.ConfigDict) and config.is_locked
  assert set(config) == set(configs.base(config.model.name, config.task))
  assert set(config.data) == set(configs.data())
  # The batches of all files must be divisible by 8 devices.
  setups.check(config)


def test_config_files_exist():
  assert 'lmn_douyin' in [path.stem for path in FILES]


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: configs.data(nmae='a'), "data field='nmae' is unknown; did you mean 'name'?"),
    (
      lambda: configs.base('lmn', stpes=3),
      "config field='stpes' is unknown; did you mean 'steps'?",
    ),
    (
      lambda: configs.data(split=dict(protocol='global_time', valid=0.2, tset=0.3)),
      "data.split field='tset' is unknown; did you mean 'test'?",
    ),
    (
      lambda: configs.data(split='user_ratio'),
      "data.split='user_ratio' must be a dict with fields",
    ),
    (
      lambda: configs.base('lmn', data=dict(split=dict(vaild=0.2))),
      "config.data.split field='vaild' is unknown; did you mean 'valid'?",
    ),
    (
      lambda: configs.base('lmn', optimizer=dict(dense=dict(rat=1.0))),
      "config.optimizer.dense field='rat' is unknown; did you mean 'rate'?",
    ),
    (
      lambda: configs.base('lmn', loss=dict(memory_wieght=3)),
      "config.loss field='memory_wieght' is unknown; did you mean 'memory_weight'?",
    ),
    (lambda: configs.base('lnm'), "config.model.name='lnm' is unknown; did you mean 'lmn'?"),
  ],
)
def test_unknown_fields_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_new_fields_cannot_be_assigned():
  config = tiny_config()
  with pytest.raises(AttributeError, match='Did you mean "steps" instead of "stepz"'):
    config.stepz = 3
  with pytest.raises(AttributeError, match='slots_per_axis'):
    config.model.slots_per_axis = 3  # of another model
  with pytest.raises(AttributeError, match='sorce'):
    config.data.sorce = 'log.csv'


@pytest.mark.parametrize('model', registry.CLICK)
def test_no_field_has_the_name_of_a_method_of_config_dict(model):
  # config.values would be the method, so an override of the field would have no effect.
  def names(section):
    for name, value in section.items():
      yield name
      if isinstance(value, ml_collections.ConfigDict):
        yield from names(value)

  assert not set(names(configs.base(model))) & set(dir(ml_collections.ConfigDict))


def test_douyin_takes_arguments_of_the_generator():
  data = configs.douyin_data(users=7)
  assert (data.synthetic.users, data.synthetic.days) == (7, 90)
  assert sources.signature(data) != sources.signature(configs.douyin_data())


def test_a_config_without_a_field_is_refused():
  config = tiny_config()
  with config.unlocked():
    del config.patience
  with pytest.raises(UserError, match="the config has no field 'patience'; begin with lmn_jax"):
    configs.check(config)


def sections(config, path=()):
  """Yields (path, section) of the sections whose fields config.py lists."""
  yield path, config
  for name, value in config.items():
    # Building a model checks its fields, `optimizers.make` the arguments of an optimizer.
    free = (
      'multi', 'numeric', 'user_vectors', 'item_vectors', 'synthetic', 'model', 'arguments',
      'histories', 'history_lengths',
    )  # fmt: skip
    if isinstance(value, ml_collections.ConfigDict) and name not in free:
      yield from sections(value, (*path, name))


PATHS = [path for path, _ in sections(tiny_config())]


@pytest.mark.parametrize('path', PATHS, ids=['.'.join(('config', *path)) for path in PATHS])
def test_fields_of_an_assigned_section_are_checked(path):
  """Assigning a dict replaces a section, even of a locked config."""
  config = tiny_config().unlock()
  section = dict(sections(config))[path]
  configs.check_names(config)
  section['invented'] = 1
  where = '.'.join(('config', *path))
  with pytest.raises(UserError, match=f"^{where} field='invented' is unknown;"):
    configs.check_names(config)
  del section['invented']
  if path:
    last = list(section)[-1]
    value = section[last]
    del section[last]
    config.lock()
    configs.check_names(config)
    assert section[last] == value or path == ('data',)


def test_a_section_cannot_be_replaced_by_a_value():
  config = tiny_config().unlock()
  with config.ignore_type():
    config.data.split = 'user_ratio'
  with pytest.raises(UserError, match="config.data.split='user_ratio' must be a section with"):
    configs.check_names(config)


def test_names_of_features_are_free_and_those_of_generators_checked():
  config = tiny_config()
  config.data = configs.data(multi={'tags': '|'}, numeric={'age': 'log'})
  configs.check_names(config)
  config.data = configs.douyin_data(usres=7)
  with pytest.raises(UserError, match="config.data.synthetic field='usres' .* mean 'users'"):
    configs.check_names(config)
