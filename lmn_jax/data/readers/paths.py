"""The files that a path or a glob matches."""

import re
from collections.abc import Sequence
from pathlib import Path

from lmn_jax.data.readers import text_files
from lmn_jax.errors import UserError

WILDCARDS = '*?['


def ending(pattern: str) -> str:
  """Returns the ending of a path or glob in lower case, without that of a compressed file."""
  path = Path(pattern)
  if path.suffix.lower() in text_files.COMPRESSED:
    path = path.with_suffix('')
  return path.suffix.lower()


def files(pattern: str, field: str) -> list[Path]:
  """Returns the files of a path or a glob, in natural order: day_2 comes before day_10.

  Tools write files such as `_SUCCESS` or `.part-0.crc` next to their parts. A name that begins with
  `_` or `.` is therefore matched only by a pattern that begins with the same character.

  Raises:
    UserError: if there is no file.
  """
  path = Path(pattern)
  if path.is_file():
    return [path]
  if _has_wildcard(pattern):
    root, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.anchor else ('', path)
    matches = [
      p for p in Path(root).glob(str(rest)) if p.is_file() and not _is_hidden(p.parts, path.parts)
    ]
    if matches:
      return sorted(matches, key=_natural_key)
    raise UserError(f'{field}={pattern!r} matches no file; correct the pattern or the folder')
  problem = 'is a folder, not a file or a glob' if path.is_dir() else 'does not exist'
  raise UserError(f'{field}={pattern!r} {problem}; correct the path (relative to {Path.cwd()})')


def _has_wildcard(text: str) -> bool:
  return any(character in text for character in WILDCARDS)


def _is_hidden(parts: Sequence[str], pattern: Sequence[str]) -> bool:
  """Whether a part of the path begins with `_` or `.`, and no part of the pattern does."""
  wild = [part for part in pattern if _has_wildcard(part)]
  return any(
    name.startswith(mark) and not any(part.startswith(mark) for part in wild)
    for name in parts
    if name not in pattern
    for mark in '_.'
  )


def _natural_key(path: Path) -> list[tuple]:
  """Returns a sort key that compares numbers within names as numbers: day, day2, day10."""
  return [
    (tuple(int(x) if k % 2 else x for k, x in enumerate(re.split('([0-9]+)', stem))), name)
    for name, stem in ((name, Path(name).stem) for name in path.parts)
  ]


def files_by_name(pattern: str, field: str) -> dict[str, Path]:
  """Returns the files of a path or a glob, keyed by path relative to the pattern's fixed folder.

  Raises:
    UserError: if there is no file.
  """
  root = _fixed_folder(pattern)
  return {str(path.relative_to(root)): path for path in files(pattern, field)}


def _fixed_folder(pattern: str) -> Path:
  """Returns the deepest folder of the pattern without a wildcard."""
  path = Path(pattern)
  if path.is_file():
    return path.parent
  parts = path.parts
  first = next((k for k, part in enumerate(parts) if _has_wildcard(part)), len(parts))
  return Path(*parts[:first])
