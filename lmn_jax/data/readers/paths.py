"""The files that a path or a glob names."""

import re
from collections.abc import Sequence
from pathlib import Path

from lmn_jax.data.readers import text_files
from lmn_jax.errors import UserError


def ending(pattern: str) -> str:
  """What the name of a path or glob ends in, small, without what says that it is packed."""
  path = Path(pattern)
  return (path.with_suffix('') if path.suffix.lower() in text_files.PACKED else path).suffix.lower()


def files(pattern: str, field: str) -> list[Path]:
  """Returns the files of a path or a glob, in natural order: day_2 comes before day_10.

  What tools leave beside their parts, `_SUCCESS` or `.part-0.crc`, matches only a pattern that
  names it: names that begin with `_` or `.` are left out otherwise.

  Raises:
    UserError: if there is none.
  """
  path = Path(pattern)
  if path.is_file():
    return [path]
  if any(c in pattern for c in '*?['):
    root, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.anchor else ('', path)
    found = [
      p for p in Path(root).glob(str(rest)) if p.is_file() and not _hidden(p.parts, path.parts)
    ]
    if found:
      return sorted(found, key=_natural)
    raise UserError(f'{field}={pattern!r} matches no file; correct the pattern or the folder')
  what = 'is a folder, not a file or a glob' if path.is_dir() else 'does not exist'
  raise UserError(f'{field}={pattern!r} {what}; correct the path (relative to {Path.cwd()})')


def _hidden(parts: Sequence[str], pattern: Sequence[str]) -> bool:
  """Whether a name of the path begins with `_` or `.` and none of the pattern's names does so."""
  wild = [asked for asked in pattern if any(c in asked for c in '*?[')]
  return any(
    name.startswith(mark) and not any(asked.startswith(mark) for asked in wild)
    for name in parts
    if name not in pattern
    for mark in '_.'
  )


def _natural(path: Path) -> list[tuple]:
  """A key to sort paths by, folder by folder, with whole numbers as numbers: day, day2, day10."""
  return [
    (tuple(int(x) if k % 2 else x for k, x in enumerate(re.split('([0-9]+)', stem))), name)
    for name, stem in ((name, Path(name).stem) for name in path.parts)
  ]


def named(pattern: str, field: str) -> dict[str, Path]:
  """The files of a path or a glob, each by its path below the fixed part of the pattern.

  Raises:
    UserError: if there is none.
  """
  root = _fixed(pattern)
  return {str(path.relative_to(root)): path for path in files(pattern, field)}


def _fixed(pattern: str) -> Path:
  """The folder that all files of a pattern lie in, whatever stands for its signs."""
  path = Path(pattern)
  if path.is_file():
    return path.parent
  parts = path.parts
  first = next((k for k, part in enumerate(parts) if any(c in part for c in '*?[')), len(parts))
  return Path(*parts[:first])
