"""The config files of the package, which a command line may select by name.

They are in `configs/` of the repository, and in `lmn_jax/configs` of an installed wheel.
"""

import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from lmn_jax import cli_errors
from lmn_jax.errors import UserError, one_of


def folder() -> Path:
  """Returns the folder of the config files, in the installed package or in the repository."""
  package = Path(__file__).parent
  installed = package / 'configs'
  return installed if installed.is_dir() else package.parent / 'configs'


def names() -> list[str]:
  """Returns the names of the config files, such as 'lmn_douyin', in alphabetical order."""
  return sorted(path.stem for path in folder().glob('*.py'))


def path_of(text: str) -> str:
  """Returns the path of a config: 'douyin:din' -> 'FOLDER/douyin.py:din'. A path is unchanged.

  Args:
    text: NAME, NAME:ARGUMENT, or a path, which contains a dot or a separator.

  Raises:
    UserError: no config file has this name.
  """
  name, colon, argument = text.partition(':')
  if not re.fullmatch(r'\w+', name):
    return text
  if name not in names() and Path(f'{name}.py').is_file():
    raise UserError(f'--config={name!r} is not a config of the package; use --config={name}.py')
  return f'{folder() / one_of("--config", name, names())}.py{colon}{argument}'


def load(text: str) -> ml_collections.ConfigDict:
  """The config of a file: what its get_config() returns.

  Args:
    text: name or path of a config file, with ':ARGUMENT' for get_config(ARGUMENT).

  Raises:
    UserError: no such file, one that raises an exception, or one that returns no ConfigDict.
  """
  text = path_of(text)
  path, colon, argument = text.partition(':')
  if not Path(path).is_file():
    raise UserError(f'{path!r} is not a file; the configs of the package are {", ".join(names())}')
  try:
    module = runpy.run_path(path, run_name='config')
    if 'get_config' not in module:
      raise UserError(f'{path} defines no function get_config()')
    config = module['get_config'](*([argument] if colon else []))
  except Exception as error:  # a config file is code of the user, which may raise anything
    line = cli_errors.explain(error, ['', f'--config={text}'])
    raise UserError(' '.join(line.split())) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'{path}: get_config() must return a ConfigDict and returned {config!r}')
  return config


def run_name(text: str) -> str:
  """The name of a config's runs: 'configs/douyin.py:din' -> 'douyin-din'."""
  path, _, argument = text.partition(':')
  return '-'.join([Path(path).stem, *re.findall(r'\w+', argument)])


def resolved(argv: Sequence[str]) -> list[str]:
  """Returns a command line with the name in --config replaced by its path.

  Raises:
    UserError: no config file has this name.
  """
  argv = list(argv)
  for k, argument in enumerate(argv[1:], 1):
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      if equals:
        argv[k] = f'{flag}={path_of(value)}'
      elif k + 1 < len(argv):
        argv[k + 1] = path_of(argv[k + 1])
  return argv
