"""Names of user code: the objects that they load, and the errors of wrong names."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax import plugins
from lmn_jax.data import prepare
from lmn_jax.errors import UserError
from lmn_jax.evaluation import criterion, custom_metrics
from lmn_jax.layers import losses
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.training import setup as setups
from tests.runs import tiny_config, tiny_next

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
    ('my_package.models.Mine', "is unknown; .*available: pooling, .*lmn, .*MODULE:CLASS"),
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


CALLED = """
import jax.numpy as jnp
import numpy as np
from lmn_jax.data.readers.reader import Reader
from lmn_jax.models.ctr.base import CTRModel, Encoded
from lmn_jax.models.next_item.base import NextItemModel, Vectors


def raises(*arguments):
  raise KeyError('auk')


def exits(*arguments):
  raise SystemExit(3)


def of_one(x):
  return 1.0


def long(*arguments):
  raise ValueError('a\\n' * 1000)


def in_a_library(*arguments):
  return np.zeros(3).reshape(2, 2)


def per_row(logit, label, weight):
  return logit


def whole(logit, label, weight):
  return jnp.int32(1)


def constant(logit, label, weight):
  return 1.0


def to_numpy(logit, label, weight):
  return np.mean(np.asarray(logit))


class Table(Reader):
  def table(self, *arguments):
    raise RuntimeError('no table')


class NoTable(Reader):
  def table(self, *arguments):
    return None


class Opens(Reader):
  def open(self, *arguments):
    raise RuntimeError('not opened')


class Takes(Reader):
  def __init__(self, x):
    pass


class Checked(CTRModel):
  def check(self):
    raise ValueError('no check')

  def encode(self, x, batch, read, train):
    return Encoded(x.i_BQI)


class Raises(CTRModel):
  def encode(self, x, batch, read, train):
    return Encoded(jnp.zeros(3) @ jnp.zeros(4))


class OfOne(CTRModel):
  def encode(self, x):
    return Encoded(x.i_BQI)


class Array(CTRModel):
  def encode(self, x, batch, read, train):
    return x.i_BQI


class Shape(CTRModel):
  def encode(self, x, batch, read, train):
    return Encoded(x.s_BLI)


class NextShape(NextItemModel):
  def encode(self, events, carry, train):
    return Vectors(events.x_BTD[:, 0])
"""


@pytest.fixture
def called():
  Path('my_package/called.py').write_text(CALLED)


@pytest.mark.parametrize(
  'name, message',
  [
    ('raises', "failed in .*called.py line 10: KeyError: 'auk'; correct it"),
    ('exits', 'failed in .*called.py line 14: SystemExit: 3; correct it'),
    ('of_one', r'failed: TypeError: of_one\(\) takes 1 positional argument but 3 were given'),
    ('long', r'line 22: ValueError: a a .*[a ]\.\.\.; correct it'),
    ('in_a_library', 'line 26: ValueError: cannot reshape'),
  ],
)
def test_an_exception_of_a_function_is_one_line(called, name, message):
  name = f'my_package.called:{name}'
  rows = [np.zeros(3, np.float32)] * 3
  metrics = custom_metrics.load([name], ())
  loss = functools.partial(losses.custom_loss, name)
  arrays = [jnp.zeros(3)] * 3
  for field, call in (
    ('metrics', lambda: custom_metrics.measure(metrics, *rows)),
    ('model.loss', lambda: loss(*arrays)),
  ):
    with pytest.raises(UserError, match=message) as error:
      call()
    assert str(error.value).startswith(f'config.{field}={name!r} failed')
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
    assert error.value.__cause__ is not None


def test_an_exception_of_a_criterion_is_one_line(called):
  config = configs.base('pooling', criterion='my_package.called:raises')
  with pytest.raises(UserError, match="config.criterion=.* failed in .*: KeyError: 'auk'"):
    criterion.criterion_of(config, ['auc']).score({'auc': 0.5})


@pytest.mark.parametrize(
  'value', [None, {}, [1.0], 'x', object(), 1j, np.ones(2), np.datetime64('now')]
)
def test_what_is_no_number_is_refused(value):
  assert not custom_metrics.is_number(value)
  if value is not None:
    with pytest.raises(UserError, match=r'mine\(\) returned .*; it must return one number'):
      custom_metrics.measure({'mine': lambda rows: value}, np.zeros(3))


@pytest.mark.parametrize('value', [1, True, 0.5, np.float32(1), np.ones(()), jnp.ones(())])
def test_what_is_a_number_is_taken(value):
  assert custom_metrics.measure({'mine': lambda rows: value}, np.zeros(3)) == {'mine': float(value)}


@pytest.mark.parametrize(
  'name, message',
  [
    ('per_row', r'an array of float32 with the shape \(3,\)'),
    ('whole', r'an array of int32 with the shape \(\)'),
    ('constant', '1.0 of the type float'),
    ('to_numpy', 'TracerArrayConversionError'),
  ],
)
def test_a_loss_must_be_a_float32_scalar(called, name, message):
  name = f'my_package.called:{name}'
  with pytest.raises(UserError, match=message) as error:
    jax.jit(functools.partial(losses.custom_loss, name))(*[jnp.zeros(3)] * 3)
  assert str(error.value).startswith(f'config.model.loss={name!r}')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, message',
  [
    ('Table', r'table\(\) failed in .*called.py line \d+: RuntimeError: no table; correct it'),
    ('NoTable', r'table\(\) returned None; it must return a Table'),
    ('Opens', r'open\(\) failed in .*called.py line \d+: RuntimeError: not opened'),
    ('Takes', 'failed: TypeError: .*__init__'),
  ],
)
def test_an_exception_of_a_reader_is_one_line(called, tmp_path, name, message):
  Path('log.csv').write_text('user,item,time,label\nu,i,1,1\n')
  data = configs.data(name='log', source='log.csv', format=f'my_package.called:{name}')
  with pytest.raises(UserError, match=message) as error:
    prepare.prepare(data, tmp_path / 'stores')
  assert str(error.value).startswith(f"config.data.format='my_package.called:{name}'")
  assert [x.name for x in (tmp_path / 'stores').iterdir()] == ['.log.lock']


@pytest.mark.parametrize(
  'name, message',
  [
    ('Checked', r'failed in .*called.py line \d+: ValueError: no check'),
    ('Raises', r'encode\(\) failed in .*called.py line \d+: TypeError: '),
    ('OfOne', r'encode\(\) failed: TypeError: '),
    ('Array', r'encode\(\) returned .*; it must return lmn_jax.models.ctr.base.Encoded'),
    ('Shape', r'Encoded.x_BQE of the shape .*; it must be \[B, Q, E\] = \[32, 1, any\]'),
    ('NextShape', r'Vectors.v_BTD of the shape .*; it must be \[B, T, D\] = \[16, 4, 4\]'),
  ],
)
def test_an_exception_of_a_model_is_one_line(called, tiny_store, tmp_path, name, message):
  name = f'my_package.called:{name}'
  if name.endswith('NextShape'):
    config = tiny_next(name)
    store = prepare.prepare(config.data, tmp_path / 'stores')
  else:
    config, store = tiny_config(name), tiny_store
  with pytest.raises(UserError, match=message) as error:
    setups.set_up(config, store, jax.devices()[:1])
  assert 'my_package.called:' in str(error.value) and '\n' not in str(error.value)


def test_an_import_that_fails_in_a_library_names_the_line_of_the_user():
  Path('my_package/fails.py').write_text('import json\n\nx = json.loads("{")\n')
  Path('my_package/exits.py').write_text('import sys\nsys.exit(3)\n')
  with pytest.raises(UserError, match=r'failed in .*fails.py line 3: JSONDecodeError: '):
    plugins.load('config.criterion', 'my_package.fails:x')
  with pytest.raises(UserError, match=r'failed in .*exits.py line 2: SystemExit: 3; correct that'):
    plugins.load('config.criterion', 'my_package.exits:x')
