"""Imports the code of users that a config names, such as 'my_package.my_module:MyModel'."""

import contextlib
import functools
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lmn_jax.errors import UserError, one_of

# Folders of the code of this package and of Python.
NOT_OF_USER = (os.path.dirname(os.path.abspath(__file__)), sysconfig.get_path('stdlib'))
LIBRARIES = frozenset(('site-packages', 'dist-packages'))  # folders of libraries
LONGEST = 300  # characters of the message of an error of the user's code


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
  except (Exception, SystemExit) as error:  # code of the user, which may raise anything
    raise UserError(f'{setting}: {_reason(error, module_name)}') from None
  public = [key for key in vars(module) if not key.startswith('_')]
  one_of(
    f'{setting}: name in {module_name}', attribute, [*public, *vars(module).keys() & {attribute}]
  )
  return getattr(module, attribute)


def load_function(field: str, name: str) -> Callable:
  """Returns the function that a config names; its errors are those of `guarded`.

  Raises:
    UserError: the module cannot be imported, or has no such function.
  """
  function = load(field, name)
  if not callable(function):
    raise UserError(f'{field}={name!r} is {function!r:.80}, not a function; name a function')
  return guarded(f'{field}={name!r}', function)


def guarded(setting: str, function: Callable) -> Callable:
  """Returns a function of the user whose exceptions are UserErrors.

  Args:
    setting: the field of the config and its value, for messages. function: of the user.
  """

  @functools.wraps(function)
  def call(*arguments, **named):
    with explained(setting):
      return function(*arguments, **named)

  return call


@contextlib.contextmanager
def explained(setting: str) -> Iterator[None]:
  """Turns an exception of the user's code into a UserError that names its line.

  The exception stays the cause of the error, so a program in Python shows its traceback.

  Args:
    setting: the field of the config and its value, for messages.

  Raises:
    UserError: the `with` block raised an exception.
  """
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise UserError(f'{setting} failed{_place(error)}: {_text(error)}; correct it') from error


def _place(error):
  """Returns the innermost line of the user's code, in words; '' if the call itself failed."""
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    others = frame.filename.startswith(('<', *(f'{folder}{os.sep}' for folder in NOT_OF_USER)))
    if not others and not LIBRARIES & {*frame.filename.split(os.sep)}:
      return f' in {frame.filename} line {frame.lineno}'
  return ''


def _text(error):
  """Returns the class and the message of an error, as one line of bounded length."""
  message = ' '.join(str(error).split())
  if len(message) > LONGEST:
    message = f'{message[:LONGEST]}...'
  return f'{type(error).__name__}: {message}' if message else type(error).__name__


def _reason(error, module_name):
  """Returns why an import failed, and the remedy."""
  if isinstance(error, ModuleNotFoundError) and f'{module_name}.'.startswith(f'{error.name}.'):
    return (
      f'there is no module {error.name!r} in {os.getcwd()} or on the Python path; start the '
      'command in the folder that holds it, or add that folder to PYTHONPATH'
    )
  if isinstance(error, SyntaxError):
    place = f' in {error.filename} line {error.lineno}'
    text = f'{type(error).__name__}: {error.msg}'
  else:
    place, text = _place(error), _text(error)
  return f'importing {module_name} failed{place}: {text}; correct that file'
