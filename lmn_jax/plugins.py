"""Imports the code of users that a config names, such as 'my_package.my_module:MyModel'."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from lmn_jax.errors import UserError, one_of


def is_plugin(name: str) -> bool:
  """Whether a name is of code outside lmn_jax: MODULE:OBJECT."""
  return ':' in name


def load(field: str, name: str) -> Any:
  """Returns the object that a config names, from the Python path or else the current folder.

  Args:
    field: of the config, for messages, such as 'config.model.name'. name: MODULE:OBJECT.

  Raises:
    UserError: the module cannot be imported, or has no such object.
  """
  module_name, _, attribute = name.partition(':')
  setting = f'{field}={name!r}'
  if not all(part.isidentifier() for part in (*module_name.split('.'), attribute)):
    raise UserError(f"{setting} must be MODULE:NAME, such as 'my_package.my_module:MyModel'")
  if os.getcwd() not in sys.path:  # the command lmn-jax does not add it, python -m does
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # code of the user, which may raise anything
    raise UserError(f'{setting}: {_reason(error, module_name)}') from None
  public = [key for key in vars(module) if not key.startswith('_')]
  one_of(
    f'{setting}: name in {module_name}', attribute, [*public, *vars(module).keys() & {attribute}]
  )
  return getattr(module, attribute)


def load_function(field: str, name: str) -> Callable:
  """Returns the function that a config names.

  Raises:
    UserError: the module cannot be imported, or has no such function.
  """
  function = load(field, name)
  if not callable(function):
    raise UserError(f'{field}={name!r} is {function!r:.80}, not a function; name a function')
  return function


def _reason(error, module_name):
  """Returns why an import failed, and the remedy."""
  if isinstance(error, ModuleNotFoundError) and f'{module_name}.'.startswith(f'{error.name}.'):
    return (
      f'there is no module {error.name!r} in {os.getcwd()} or on the Python path; start the '
      'command in the folder that holds it, or add that folder to PYTHONPATH'
    )
  if isinstance(error, SyntaxError):
    file, line, message = error.filename, error.lineno, error.msg
  else:
    last = traceback.extract_tb(error.__traceback__)[-1]
    file, line, message = last.filename, last.lineno, error
  return (
    f'importing {module_name} failed in {file} line {line}: {type(error).__name__}: {message}; '
    'correct that file'
  )
