"""Explains the errors of a command line in one line each.

absl and ml_collections raise errors of their code (a KeyError of two lines, a traceback as text);
here they become the flag, or the line of the config file, that the user must change.
"""

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lmn_jax.errors import UserError, one_of

EXAMPLE = '--config=lmn_douyin'
# Messages of Python for a text of the wrong kind -> the kind that is expected.
KINDS = {
  'invalid literal for int': 'must be a whole number',
  'could not convert string to float': 'must be a number',
  'Non-boolean argument': 'must be true or false',
  'as a ConfigDict': "must be a dict, in quotes for the shell, such as {'name': 1}",
}


def config_path(argv: Sequence[str]) -> Path | None:
  """Returns the config file that a command line names, without parsing its flags."""
  for k, argument in enumerate(argv[1:], 1):
    name, _, value = argument.partition('=')
    if name in ('--config', '-config'):
      value = value or ''.join(argv[k + 1 : k + 2])
      # After a colon follows the argument of get_config().
      path = value.split(':', 1)[0]
      return Path(path) if path else None
  return None


def check_config(argv: Sequence[str]) -> None:
  """Checks that the config file of a command line exists.

  Raises:
    UserError: overrides without a config file, or the file does not exist; then it proposes the
      nearest file of that folder.
  """
  path = config_path(argv)
  if not path and any(re.match(r'--?config\.', x) for x in argv):
    raise UserError(
      f'--config is missing, so --config.FIELD=VALUE has no config to change; for example {EXAMPLE}'
    )
  if not path and any(re.match(r'--?config=', x) for x in argv):
    raise UserError(f'--config names no file; for example {EXAMPLE}')
  if path and not path.is_file():
    files = sorted(str(x) for x in path.parent.glob('*.py'))
    if files:
      one_of('--config', str(path), files)
    raise UserError(f'--config={str(path)!r} is not a file; for example {EXAMPLE}')


def explain(error: Exception, argv: Sequence[str]) -> str:
  """Returns one line for the user on an error that was raised while flags were parsed.

  Args:
    error: from absl, ml_collections or the config file. argv: the command line.
  """
  path, chain = config_path(argv), [error]
  while inner := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(inner)
  if path and (line := _line_of_config(path, chain)):
    return line
  if any(isinstance(x, AttributeError) and "attribute 'get_config'" in str(x) for x in chain):
    return f'{path} defines no function get_config()'
  # No line of the config file is in the traceback of a TypeError of the call itself.
  if any(isinstance(x, TypeError) and str(x).startswith('get_config() takes') for x in chain):
    return f'{path}: get_config() takes no argument; give --config={path} without one'
  if any(isinstance(x, TypeError) and str(x).startswith('get_config() missing') for x in chain):
    return f'{path}: get_config() takes an argument; give it as --config={path}:ARGUMENT'
  if isinstance(error, KeyError | AttributeError):
    return _unknown_field(_message(error), argv)
  if isinstance(error, flags.IllegalFlagValueError):
    for text, expected in KINDS.items():
      if text in str(error):
        return f'{str(error).split(": ")[0]}: {expected}'
  return str(error)


def _line_of_config(path, chain):
  """Returns the message with the line of the config file that caused it; None without one."""
  for cause in reversed(chain):
    # A value of a flag that is not closed is a SyntaxError of the file '<unknown>'.
    if isinstance(cause, SyntaxError) and cause.filename and not cause.filename.startswith('<'):
      return f'{cause.filename} line {cause.lineno}: {type(cause).__name__}: {cause.msg}'
    # The innermost frame in the config file.
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if os.path.abspath(frame.filename) == os.path.abspath(path):
        kind = '' if isinstance(cause, UserError) else f'{type(cause).__name__}: '
        return f'{path} line {frame.lineno}: {kind}{_message(cause)}'
  return None


def _message(error):
  """Returns the message of an error without the list of all fields that ml_collections appends."""
  # A KeyError shows its message as a literal, and some messages contain that of another error.
  message = str(error.args[0]) if error.args else ''
  message = message.replace('\\n', '\n').replace("\\'", "'")
  near = re.search(r'Did you mean "(\w+)"', message)
  message = re.split(r' Other fields present|\nDid you mean', message)[0]
  if near or 'config is locked' in message:
    message = message.lstrip('\'"')
  return f'{message} Did you mean {near[1]!r}?' if near else message


def _unknown_field(message, argv):
  """Returns one line for ml_collections' message on an override of a field that does not exist."""
  name = re.match(r'\W*(\w+)', message)
  near = re.search(r"Did you mean '(\w+)'", message)
  overrides = [x for x in argv if name and re.match(rf'--?(config|serve)\.[^=]*\b{name[1]}\b', x)]
  if not overrides:
    return message
  field, section, file = overrides[0].partition('=')[0], 'config', 'config.py'
  if field.lstrip('-').startswith('serve.'):
    section, file = 'service', 'serving/settings.py'
  hint = f'did you mean {near[1]!r}?' if near else f'the fields are listed in lmn_jax/{file}'
  return f'{field}: the {section} has no field {name[1]!r}; {hint}'
