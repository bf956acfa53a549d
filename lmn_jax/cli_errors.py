"""What is wrong with a command line, in the words of its user.

absl and ml_collections raise what their code met (a KeyError of two lines, a traceback as text);
here it becomes the flag, or the line of the config file, that has to be changed.
"""

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lmn_jax.errors import UserError, one_of

EXAMPLE = '--config=lmn_douyin'
# What Python says of a text that is no number, and what it means.
KINDS = {
  'invalid literal for int': 'must be a whole number',
  'could not convert string to float': 'must be a number',
  'Non-boolean argument': 'must be true or false',
}


def config_path(argv: Sequence[str]) -> Path | None:
  """The config file that a command line names, found without parsing its flags."""
  for k, argument in enumerate(argv[1:], 1):
    name, _, value = argument.partition('=')
    if name in ('--config', '-config'):
      value = value or ''.join(argv[k + 1 : k + 2])
      # Behind a colon stands what is handed to get_config().
      return Path(value.split(':', 1)[0]) if value else None
  return None


def check_config(argv: Sequence[str]) -> None:
  """Refuses overrides without a config file, and a config file that is not there.

  Raises:
    UserError: with the nearest file of that folder.
  """
  path = config_path(argv)
  if not path and any(re.match(r'--?config\.', x) for x in argv):
    raise UserError(f'--config is missing, whose fields are to be changed; for example {EXAMPLE}')
  if path and not path.is_file():
    known = sorted(str(x) for x in path.parent.glob('*.py'))
    if known:
      one_of('--config', str(path), known)
    raise UserError(f'--config={str(path)!r} is not a file; for example {EXAMPLE}')


def explain(error: Exception, argv: Sequence[str]) -> str:
  """What a user needs to know of an error that came up while flags were parsed.

  Args:
    error: out of absl, ml_collections or the config file. argv: the command line.
  """
  path, chain = config_path(argv), [error]
  while inner := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(inner)
  for cause in reversed(chain):
    if path and isinstance(cause, SyntaxError) and cause.filename:
      return f'{cause.filename} line {cause.lineno}: {type(cause).__name__}: {cause.msg}'
    # The innermost line of the config file on the way to the error.
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if path and os.path.abspath(frame.filename) == os.path.abspath(path):
        kind = '' if isinstance(cause, UserError) else f'{type(cause).__name__}: '
        return f'{path} line {frame.lineno}: {kind}{_said(cause)}'
  if any(isinstance(x, AttributeError) and "attribute 'get_config'" in str(x) for x in chain):
    return f'{path} defines no function get_config()'
  # No line of the config file is on the way to this one: the call itself does not fit.
  if any(isinstance(x, TypeError) and str(x).startswith('get_config() takes') for x in chain):
    return f'{path}: get_config() takes no argument; give --config={path} without one'
  if any(isinstance(x, TypeError) and str(x).startswith('get_config() missing') for x in chain):
    return f'{path}: get_config() takes an argument; give it as --config={path}:ARGUMENT'
  if isinstance(error, KeyError | AttributeError):
    return _no_field(_said(error), argv)
  if isinstance(error, flags.IllegalFlagValueError):
    for said, meaning in KINDS.items():
      if said in str(error):
        return f'{str(error).split(": ")[0]}: {meaning}'
  return str(error)


def _said(error):
  """The message, without the list of all fields that ml_collections puts into its own."""
  # A KeyError shows its message as a literal, and some are made from another one's text.
  said = (str(error.args[0]) if error.args else '').replace('\\n', '\n').replace("\\'", "'")
  near = re.search(r'Did you mean "(\w+)"', said)
  said = re.split(r' Other fields present|\nDid you mean', said)[0]
  if near or 'config is locked' in said:
    said = said.lstrip('\'"')
  return f'{said} Did you mean {near[1]!r}?' if near else said


def _no_field(said, argv):
  """Of ml_collections' answer to a --config.FIELD that is not there."""
  name = re.match(r'\W*(\w+)', said)
  near = re.search(r"Did you mean '(\w+)'", said)
  given = [x for x in argv if name and re.match(rf'--?(config|serve)\.[^=]*\b{name[1]}\b', x)]
  if not given:
    return said
  field, whose, file = given[0].partition('=')[0], 'config', 'config.py'
  if field.lstrip('-').startswith('serve.'):
    whose, file = 'service', 'serving/settings.py'
  hint = f'did you mean {near[1]!r}?' if near else f'the fields are listed in lmn_jax/{file}'
  return f'{field}: the {whose} has no field {name[1]!r}; {hint}'
