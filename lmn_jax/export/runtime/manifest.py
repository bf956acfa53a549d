"""Reading the manifest of an exported folder, and checking the folder against its seal."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # raise when the folder's layout or the meaning of a file changes


class FolderError(ValueError):
  """The folder is not an export, or one of its files was changed; the message is one line."""


def read_manifest(folder: Path, check: bool = False) -> dict[str, Any]:
  """Returns the manifest of a folder, after checking that all files have their size.

  Args:
    folder: of the export. check: whether to compare the CRC-32 of every file too.

  Raises:
    FolderError: not an export, another format, a file that is missing or was changed.
  """
  try:
    manifest = json.loads((folder / 'manifest.json').read_text())
    seal = json.loads((folder / 'seal.json').read_text())
    format_number = manifest['format']
  except FileNotFoundError as error:
    raise FolderError(
      f'{folder} is not an export ({error.filename} is missing); give the folder or link that '
      '--mode=export wrote'
    ) from None
  except (ValueError, KeyError, TypeError) as error:
    raise FolderError(
      f'{folder}: manifest.json or seal.json is damaged ({error}); export again'
    ) from None
  if format_number != FORMAT:
    raise FolderError(
      f'{folder}: an export of format {format_number}, and this program reads format {FORMAT}; '
      'export again'
    )
  for name, (size, crc) in seal.items():
    path = folder / name
    size_now = path.stat().st_size if path.is_file() else None
    if size_now != size:
      state = 'is missing' if size_now is None else f'has {size_now} bytes and had {size}'
      raise FolderError(f'{path} {state}; export again')
    if check and zlib.crc32(mapped(path)) != crc:
      raise FolderError(f'{path} was changed after it was written (CRC-32); export again')
  return manifest


def mapped(path: Path) -> np.ndarray:
  """Returns the bytes of a file, uint8 [size], memory-mapped unless it is empty."""
  return np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)


def load(path: Path) -> np.ndarray:
  """Returns the array of a .npy file, memory-mapped unless it is empty."""
  array = np.load(path, mmap_mode='r')
  return array if array.size else np.array(array)
