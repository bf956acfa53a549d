"""The exceptions that `main` prints as one line, with an exit status."""

import difflib
import errno
from collections.abc import Iterable

# OS errors that a user can fix; others are errors of the program.
DISK = frozenset(
  (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR,
   errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
)  # fmt: skip


class UserError(Exception):
  """A mistake that the user can correct. Its message is one line: value, place, bound, remedy."""


class DivergedError(Exception):
  """Training diverged: a loss, score or weight is NaN or infinite. `main` exits with 1."""


class Preempted(Exception):
  """SIGTERM stopped training, and its state is saved. `main` exits with 0."""


def one_of(what: str, value: str, allowed: Iterable[str]) -> str:
  """Returns `value` if it is among `allowed`.

  Args:
    what: the name of the value for the message, such as `config.model.name`.
    value: from the user. allowed: all that it may be.

  Raises:
    UserError: `value` is not allowed; it proposes the nearest one that is.
  """
  allowed = list(allowed)
  if value in allowed:
    return value
  near = difflib.get_close_matches(str(value), allowed, n=1)
  hint = f' did you mean {near[0]!r}?' if near else ''
  raise UserError(f'{what}={value!r} is unknown;{hint} available: {", ".join(allowed)}')


def of_disk(error: BaseException) -> str | None:
  """Returns one line for an error of a disk or folder that the user can correct; None otherwise."""
  if not (isinstance(error, OSError) and error.errno in DISK):
    return None
  where = f'{error.filename}: ' if error.filename else ''
  return f'{where}{error.strerror}; choose another --workdir or --stores, or correct that folder'
