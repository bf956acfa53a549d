"""Names of user code: the objects that they load, and the errors of wrong names."""

import sys

import pytest

from lmn_jax import config as configs
from lmn_jax import plugins
from lmn_jax.errors import UserError
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry

MODELS = '''
import dataclasses
from lmn_jax.models.base import Model
from lmn_jax.models.ctr.base import CTRModel, Encoded
from lmn_jax.models.next_item.base import NextItemModel


class Mine(CTRModel):
  """Has an auxiliary loss."""

  depth: int = 2
  sizes: list = dataclasses.field(default_factory=lambda: [1, 2])
  positive_fields = ('depth',)
  loss_weights = {'mine': 0.25}

  def encode(self, x, batch, read, train):
    return Encoded(x.i_BQI)


class Next(NextItemModel):
  def encode(self, events, carry, train):
    raise NotImplementedError


class Without(CTRModel):
  pass


class Neither(Model):
  pass


class Callables(Mine):
  activation: object = max


class Values(Mine):
  values: int = 3


def function():
  pass
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
  """A package of models in the current folder, which is not on the Python path."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [x for x in sys.path if x])
  folder = tmp_path / 'my_package'
  folder.mkdir()
  (folder / '__init__.py').write_text('')
  (folder / 'models.py').write_text(MODELS)
  (folder / 'broken.py').write_text('import os\nx = 1 / 0\n')
  (folder / 'typo.py').write_text('x = = 1\n')
  (folder / 'needs.py').write_text('import not_installed_here\n')
  yield
  for name in [name for name in sys.modules if name.split('.')[0] == 'my_package']:
    del sys.modules[name]


def test_a_model_by_its_module_and_class():
  config = configs.base('my_package.models:Mine')
  assert config.model.name == 'my_package.models:Mine' and config.model.depth == 2
  assert list(config.model.sizes) == [1, 2]
  # Every config has the weights of the built-in losses; that of the model's loss is added.
  built_in = configs.base('pooling').loss.to_dict()
  assert config.loss.to_dict() == built_in | {'mine_weight': 0.25}
  config.model.depth = 3
  configs.check(config)
  model = registry.build(config.model.to_dict(), Schema(()))
  assert type(model).__name__ == 'Mine' and model.depth == 3 and model.sizes == (1, 2)
  assert configs.base('my_package.models:Next', 'next_item').model.loss == 'softmax'


def test_fields_of_a_model_are_checked_like_those_of_built_in_models():
  section = configs.base('my_package.models:Mine').model.to_dict()
  with pytest.raises(
    UserError, match='config.model.heads: unknown fields of model .*; its fields are .*depth'
  ):
    registry.build(section | {'heads': 1}, Schema(()))
  with pytest.raises(UserError, match='config.model.depth=0 must be at least 1'):
    registry.build(section | {'depth': 0}, Schema(()))
  config = configs.base('my_package.models:Mine')
  config.loss.mine_weight = -1.0
  with pytest.raises(UserError, match='config.loss.mine_weight=-1.0 must be at least 0'):
    configs.check(config)


@pytest.mark.parametrize(
  'name, message',
  [
    ('nowhere:Mine', "there is no module 'nowhere' in .*start the command in the fold"),
    ('my_package.model:Mine', "there is no module 'my_package.model' in"),
    ('my_package.needs:Mine', "needs.py line 1: ModuleNotFoundError: .*'not_installed_here'"),
    ('my_package.broken:Mine', 'broken.py line 2: ZeroDivisionError: .*; correct that file'),
    ('my_package.typo:Mine', 'typo.py line 1: SyntaxError'),
    ('my_package.models:Mien', "in my_package.models='Mien' is unknown; did you mean 'M"),
    ('my_package.models:', 'must be MODULE:NAME, such as'),
    (':Mine', 'must be MODULE:NAME, such as'),
    ('../models.py:Mine', 'must be MODULE:NAME, such as'),
    ('my_package.models:function', 'not a model; make it a subclass of lmn_jax.models.ctr.base.'),
    ('my_package.models:Neither', 'not a model; make it a subclass of lmn_jax.models.ctr.base.CT'),
    ('my_package.models:Without', r'has no encode\(\); define it as described in lmn_jax.models.'),
    ('my_package.models:Next', "is a model of the task 'next_item', but config.task='click'; "),
    ('my_package.models:Callables', "field 'activation' has the default <built-in function max>"),
    ('my_package.models:Values', "field 'values' has the name of a method of ConfigDict"),
    ('my_package.models.Mine', "is unknown; .*available: pooling, .*lmn, MODULE:CLASS"),
  ],
)  # fmt: skip
def test_a_wrong_name_is_refused(name, message):
  with pytest.raises(UserError, match=message) as error:
    configs.base(name)
  assert '\n' not in str(error.value) and f'config.model.name={name!r}' in str(error.value)


def test_a_file_of_the_current_folder_does_not_replace_a_library(tmp_path):
  (tmp_path / 'numpy.py').write_text('raise ImportError')
  plugins.load('config.model.name', 'my_package.models:Mine')
  assert sys.path[-1] == str(tmp_path)
