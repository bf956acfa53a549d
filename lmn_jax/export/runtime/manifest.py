"""The manifest of an exported folder: read, and the folder compared with its seal."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # raised when the folder's layout or the meaning of a file changes


class FolderError(ValueError):
  """The folder is no export, or a file of it was changed; the message is one line."""


def read_manifest(folder: Path, check: bool = False) -> dict[str, Any]:
  """The manifest of a folder that has all its files.

  Args:
    folder: of the export. check: whether to compare the CRC-32 of every file too; sizes always are.

  Raises:
    FolderError: no export, an export of another format, a file that is missing or was changed.
  """
  try:
    manifest = json.loads((folder / 'manifest.json').read_text())
    sealed = json.loads((folder / 'seal.json').read_text())
    format_number = manifest['format']
  except FileNotFoundError as error:
    raise FolderError(f'{folder}: no export ({error.filename} is missing)') from None
  except (ValueError, KeyError, TypeError) as error:
    raise FolderError(f'{folder}: manifest.json or seal.json is damaged ({error})') from None
  if format_number != FORMAT:
    raise FolderError(f'{folder}: export of format {format_number}, this program reads {FORMAT}')
  for name, (size, crc) in sealed.items():
    path = folder / name
    size_now = path.stat().st_size if path.is_file() else None
    if size_now != size:
      state = 'is missing' if size_now is None else f'has {size_now} bytes and had {size}'
      raise FolderError(f'{path} {state}; export again')
    if check and zlib.crc32(mapped(path)) != crc:
      raise FolderError(f'{path} is not what was written (CRC-32); export again')
  return manifest


def mapped(path: Path) -> np.ndarray:
  """The bytes of a file, uint8 [size], memory-mapped; an empty file cannot be mapped."""
  return np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)


def load(path: Path) -> np.ndarray:
  """The array of a .npy file, memory-mapped; an empty one cannot be mapped."""
  array = np.load(path, mmap_mode='r')
  return array if array.size else np.array(array)
