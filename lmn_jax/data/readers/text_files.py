"""Text files as DuckDB reads them: UTF-8, line ends alike throughout, and the names of a header."""

import bz2
import csv
import gzip
import io
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from lmn_jax.errors import UserError

PACKED = ('.gz', '.bz2', '.zst')  # endings of packed files
CHUNK = 2**20  # bytes or characters read at once
BOM = b'\xef\xbb\xbf'
UTF8 = ('utf-8', 'utf8', 'utf-8-sig', 'ascii', 'us-ascii')


def header(local: Path, path: Path, delimiter: str, quote: str, encoding: str) -> list[str]:
  """The names of the columns, in order.

  Args:
    local: the file as it is read. path: as the user named it.
    delimiter: between names. quote: about names; '' for none.
    encoding: the field that says the encoding, for messages.

  Raises:
    UserError: if it is not UTF-8, or empty.
  """
  # As bytes: reading as text decodes far past the line, and would fail at what lies there.
  with open(local, 'rb') as file:
    first = file.readline().rstrip(b'\r\n')
  try:
    line = first.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: the header is not utf-8: {error}; set {encoding}') from None
  if not line:
    raise UserError(f'{path}: the file is empty; a header with the names of columns is expected')
  if len(delimiter) > 1 or not quote:
    names = line.split(delimiter)
  else:
    names = next(csv.reader([line], delimiter=delimiter, quotechar=quote))
  return [name.strip() for name in names]


def is_blank(local: Path) -> bool:
  """Whether the file holds nothing but white space and a byte order mark."""
  with open(local, 'rb') as file:
    while chunk := file.read(CHUNK):
      if chunk.removeprefix(BOM).strip():
        return False
  return True


def lines(local: Path) -> int:
  """How many lines the file has, blank ones too."""
  count, last = 0, b'\n'
  with open(local, 'rb') as file:
    while chunk := file.read(CHUNK):
      count, last = count + chunk.count(b'\n'), chunk[-1:]
  return count + (last != b'\n')


def distinct(names: Sequence[str]) -> list[str]:
  """Names the nameless by position and numbers repetitions: ['a', '', 'a'] -> a, column1, a.1."""
  seen: dict[str, int] = {}
  result = []
  for k, name in enumerate(names):
    name = name or f'column{k}'
    times = seen[name] = seen.get(name, -1) + 1
    result.append(f'{name}.{times}' if times else name)
  return result


def plain(
  path: Path,
  encoding: str,
  field: str,
  scratch: Path,
  delimiter: str = ',',
  quote: str = '',
  skip: bool = False,
) -> Path:
  """Returns the file itself if DuckDB reads it as it is, otherwise a copy that it can read.

  Other encodings, packed files, and line ends that are not alike throughout are rewritten as a
  stream; line ends within quotes are part of a value and stay.

  Args:
    path: the file. encoding: of it. field: the field that says the encoding, for messages.
    scratch: folder for the copy. delimiter: between values. quote: around values; '' where quotes
      are plain characters. skip: bytes that are not of the encoding stay as they are, so that
      their lines are left out as they are read.

  Raises:
    UserError: if the encoding is unknown, or the file is not of that encoding.
  """
  try:
    known = ''.encode(encoding) is not None and encoding.lower().replace('_', '-') in UTF8
  except LookupError:
    raise UserError(
      f'{path}: {field}={encoding!r} is unknown; give a codec of Python, such as gbk'
    ) from None
  packed = path.suffix.lower() in PACKED
  if known and not packed and _even_line_ends(path):
    return path
  scratch.mkdir(parents=True, exist_ok=True)
  handle, copy = tempfile.mkstemp(suffix=f'-{path.stem if packed else path.name}', dir=scratch)
  bad = 'surrogateescape' if skip else 'strict'
  packed_file = io.BufferedReader(_Unpacked(path), CHUNK)
  with (
    io.TextIOWrapper(packed_file, encoding=encoding, errors=bad, newline='') as old,
    open(handle, 'w', encoding='utf-8', errors=bad, newline='') as new,
  ):
    characters = 0
    try:
      for line in _ends_alike(old, delimiter, quote):
        new.write(line)
        characters += len(line)
    except (UnicodeError, Damaged) as error:
      raise UserError(
        f'{path}: cannot be read as {encoding} after {characters} characters: {error}; set {field}'
      ) from None
  return Path(copy)


class Damaged(Exception):
  """A packed file that cannot be unpacked to its end."""


class _Unpacked(io.RawIOBase):
  """Bytes of a packed file."""

  def __init__(self, path: Path):
    ending = path.suffix.lower()
    if ending == '.zst':
      self._file: BinaryIO = pa.input_stream(str(path), compression='zstd')
    else:
      self._file = {'.gz': gzip.open, '.bz2': bz2.open}.get(ending, open)(path, 'rb')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    try:
      found = self._file.read(len(buffer))
    except (EOFError, OSError, zlib.error) as error:
      if isinstance(error, OSError) and error.errno is not None:  # of the disk
        raise
      raise Damaged(error) from error
    buffer[: len(found)] = found
    return len(found)

  def close(self) -> None:
    self._file.close()
    super().close()


def _even_line_ends(path: Path) -> bool:
  """Whether all lines end in \\n, or all in \\r\\n, and not in a bare \\r or a mixture."""
  bare = pairs = newlines = 0
  with open(path, 'rb') as file:
    while chunk := file.read(CHUNK):
      if chunk.endswith(b'\r'):
        chunk += file.read(1)
      newlines += chunk.count(b'\n')
      if b'\r' in chunk:
        pairs += chunk.count(b'\r\n')
        bare += chunk.count(b'\r')
      if bare > pairs or (pairs and newlines > pairs):
        return False
  return True


def _ends_alike(lines: Iterable[str], delimiter: str, quote: str) -> Iterator[str]:
  """Lines with their ends, whatever these are, made to end in \\n; but not within quotes."""
  # A quoted value begins where a value does, and a doubled quote in it is one quote of the value.
  quoted, inside = None, False
  if quote:
    q, begin = re.escape(quote), f'(?:^|(?<={re.escape(delimiter)}))'
    quoted = re.compile(f'{begin}{q}[^{q}]*(?:{q}{q}[^{q}]*)*({q}|\\Z)')
  for line in lines:
    if quoted and quote in line:
      # What goes on within quotes reads as a value that begins.
      values = quoted.finditer(quote + line if inside else line)
      inside = any(not value[1] for value in values)
    yield line if inside else line.rstrip('\r\n') + '\n'
