"""Text files in the form that DuckDB reads: UTF-8 with uniform line ends; and names in headers.

DuckDB 2.0 reads UTF-8 with or without a byte order mark, and lines that all end in \\n or all in
\\r\\n. Everything else is decoded here first, because DuckDB reads it wrongly or not at all:

  gzip       checksums are ignored: of 100 files with one wrong bit, 21 gave wrong rows silently
  zstd       a truncated file is read up to an arbitrary row, without an error
  bz2        not supported
  latin-1    the bytes 0x80 to 0x9f, which text from Windows has, are refused
  UTF-16     big-endian text gives no rows and no error, as does text in another encoding
  others     encodings need an extension that DuckDB downloads
  line ends  a mixture is refused; strict_mode=false reads it, but also drops values silently where
             a row has too many
"""

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

COMPRESSED = ('.gz', '.bz2', '.zst')  # endings of compressed files
CHUNK = 2**20  # bytes or characters read at once
BOM = b'\xef\xbb\xbf'
UTF8 = ('utf-8', 'utf8', 'utf-8-sig', 'ascii', 'us-ascii')


def header(local: Path, path: Path, delimiter: str, quote: str, encoding: str) -> list[str]:
  """Returns the names of the columns, in order.

  Args:
    local: the file to read, UTF-8. path: the file that the user named, for messages.
    delimiter: between names. quote: around names; '' for none.
    encoding: the config field that sets the encoding, for messages.

  Raises:
    UserError: if the header is not UTF-8, or empty.
  """
  # As bytes, because reading as text would decode far past the line and fail on errors there.
  with open(local, 'rb') as file:
    first = file.readline().rstrip(b'\r\n')
  try:
    line = first.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: the header is not utf-8: {error}; set {encoding}') from None
  if not line:
    raise UserError(f'{path}: the first line is empty; write a header with the names of columns')
  if len(delimiter) > 1 or not quote:
    names = line.split(delimiter)
  else:
    names = next(csv.reader([line], delimiter=delimiter, quotechar=quote))
  return [name.strip() for name in names]


def is_blank(local: Path) -> bool:
  """Whether the file has only white space and a byte order mark."""
  with open(local, 'rb') as file:
    while chunk := file.read(CHUNK):
      if chunk.removeprefix(BOM).strip():
        return False
  return True


def count_lines(local: Path) -> int:
  """Returns the number of lines, including blank ones."""
  count, last = 0, b'\n'
  with open(local, 'rb') as file:
    while chunk := file.read(CHUNK):
      count, last = count + chunk.count(b'\n'), chunk[-1:]
  return count + (last != b'\n')


def unique_names(names: Sequence[str]) -> list[str]:
  """Names empty names by position and numbers repeated ones: ['a', '', 'a'] -> a, column1, a.1."""
  counts: dict[str, int] = {}
  result = []
  for k, name in enumerate(names):
    name = name or f'column{k}'
    count = counts[name] = counts.get(name, -1) + 1
    result.append(f'{name}.{count}' if count else name)
  return result


def as_utf8(
  path: Path,
  encoding: str,
  field: str,
  scratch: Path,
  delimiter: str = ',',
  quote: str = '',
  skip: bool = False,
) -> Path:
  """Returns the file itself if DuckDB can read it, otherwise the path of a readable copy.

  The copy is written as a stream. Line ends within quotes are part of a value and are kept.

  Args:
    path: the file. encoding: its encoding. field: the config field of the encoding, for messages.
    scratch: folder for the copy. delimiter: between values.
    quote: around values; '' where quotes are plain characters.
    skip: copy bytes that are invalid in the encoding, so that their lines are skipped in reading.

  Raises:
    UserError: if the encoding is unknown, or the file cannot be decompressed and decoded.
  """
  compressed = path.suffix.lower() in COMPRESSED
  if _is_utf8(path, encoding, field) and not compressed and _has_uniform_line_ends(path):
    return path
  scratch.mkdir(parents=True, exist_ok=True)
  handle, copy = tempfile.mkstemp(suffix=f'-{path.stem if compressed else path.name}', dir=scratch)
  data = io.BufferedReader(_Decompressed(path), CHUNK)
  errors = 'surrogateescape' if skip else 'strict'
  with (
    io.TextIOWrapper(data, encoding=encoding, errors=errors, newline='') as source,
    open(handle, 'w', encoding='utf-8', errors=errors, newline='') as target,
  ):
    characters = 0
    try:
      for line in _with_uniform_line_ends(source, delimiter, quote):
        target.write(line)
        characters += len(line)
    except (UnicodeError, CorruptFileError) as error:
      raise UserError(
        f'{path}: cannot be read as {encoding} after {characters} characters: {error}; set {field}'
      ) from None
  return Path(copy)


def _is_utf8(path: Path, encoding: str, field: str) -> bool:
  """Whether an encoding is UTF-8 or a part of it; refuses an encoding that does not exist."""
  try:
    ''.encode(encoding)
  except LookupError:
    raise UserError(
      f'{path}: {field}={encoding!r} is unknown; set a codec of Python, such as gbk'
    ) from None
  return encoding.lower().replace('_', '-') in UTF8


class CorruptFileError(Exception):
  """A compressed file that cannot be decompressed to its end."""


class _Decompressed(io.RawIOBase):
  """The decompressed bytes of a file, whether it is compressed or not."""

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
      data = self._file.read(len(buffer))
    except (EOFError, OSError, zlib.error) as error:
      if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
        raise
      raise CorruptFileError(error) from error
    buffer[: len(data)] = data
    return len(data)

  def close(self) -> None:
    self._file.close()
    super().close()


def _has_uniform_line_ends(path: Path) -> bool:
  """Whether all lines end in \\n, or all in \\r\\n."""
  returns = pairs = newlines = 0
  with open(path, 'rb') as file:
    while chunk := file.read(CHUNK):
      if chunk.endswith(b'\r'):
        chunk += file.read(1)
      newlines += chunk.count(b'\n')
      if b'\r' in chunk:
        pairs += chunk.count(b'\r\n')
        returns += chunk.count(b'\r')
      if returns > pairs or (pairs and newlines > pairs):
        return False
  return True


def _with_uniform_line_ends(lines: Iterable[str], delimiter: str, quote: str) -> Iterator[str]:
  """Yields lines with the end \\n in place of any other, except within quotes."""
  # A quoted value begins where a value begins, and a doubled quote within it is a quote character.
  quoted, inside = None, False
  if quote:
    q, begin = re.escape(quote), f'(?:^|(?<={re.escape(delimiter)}))'
    quoted = re.compile(f'{begin}{q}[^{q}]*(?:{q}{q}[^{q}]*)*({q}|\\Z)')
  for line in lines:
    if quoted and quote in line:
      # A quoted value that continues from the line before is matched like one that begins here.
      values = quoted.finditer(quote + line if inside else line)
      inside = any(not value[1] for value in values)
    yield line if inside else line.rstrip('\r\n') + '\n'
