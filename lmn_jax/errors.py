"""What `main` prints as one line: mistakes of the user's with their remedy, divergence, notice."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake the user can mend. The message is one line: what, where, the bound, the remedy."""


class DivergedError(Exception):
  """Training cannot go on: loss, scores or weights are no finite numbers. `main` exits with 1."""


class Preempted(Exception):
  """Training was asked to end by SIGTERM, and what it had is saved. `main` exits with 0."""


def one_of(what: str, value: str, known: Iterable[str]) -> str:
  """Returns `value` if it is among `known`, otherwise raises with a 'did you mean'.

  Args:
    what: the noun and place for the message, such as `config.model.name`.
    value: what the user gave.
    known: what is allowed.

  Raises:
    UserError: if `value` is not allowed.
  """
  known = list(known)
  if value in known:
    return value
  near = difflib.get_close_matches(str(value), known, n=1)
  hint = f' did you mean {near[0]!r}?' if near else ''
  raise UserError(f'{what}={value!r} is unknown;{hint} available: {", ".join(known)}')
