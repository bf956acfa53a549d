"""Code of users that a config names: 'my_package.my_module:MyModel'."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from lmn_jax.errors import UserError, one_of


def is_plugin(name: str) -> bool:
  """Whether a name means code outside of lmn_jax."""
  return ':' in name


def load(field: str, name: str) -> Any:
  """Imports the object that a config names.

  Modules are looked for where Python looks, and last in the current folder.

  Args:
    field: of the config, for errors, such as 'config.model.name'. name: MODULE:OBJECT.

  Raises:
    UserError: the module cannot be imported, or has no such object.
  """
  module_name, _, attribute = name.partition(':')
  given = f'{field}={name!r}'
  if not all(part.isidentifier() for part in (*module_name.split('.'), attribute)):
    raise UserError(f"{given} must be MODULE:NAME, such as 'my_package.my_module:MyModel'")
  if os.getcwd() not in sys.path:  # the command lmn-jax does not add it, python -m does
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # code of the user: any error may come of it
    raise UserError(f'{given}: {_reason(error, module_name)}') from None
  public = [key for key in vars(module) if not key.startswith('_')]
  one_of(
    f'{given}: name in {module_name}', attribute, [*public, *vars(module).keys() & {attribute}]
  )
  return getattr(module, attribute)


def load_function(field: str, name: str) -> Callable:
  """Imports the function that a config names.

  Raises:
    UserError: the module cannot be imported, or has no such function.
  """
  function = load(field, name)
  if not callable(function):
    raise UserError(f'{field}={name!r} is {function!r:.80}, no function')
  return function


def _reason(error, module_name):
  """Why the import failed, and what to do."""
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
