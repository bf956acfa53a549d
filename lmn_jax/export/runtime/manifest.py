"""The folder of an export: its layout, its manifest, and the check against its seal.

    bundle/                  this loader
    manifest.json            description: task, model, sizes, functions, tables, features, metrics
    functions/<name>.jax     of jax.export, any number of users and candidates, for CPU, GPU and TPU
    dense.npz                dense parameters and statistics, by path
    tables/<name>.npy        rows [V, D]: float32, bfloat16 as its bits in uint16, or int8 with
    tables/<name>.scale.npy  the scale of each row, float32 [V]
    vocabulary/<name>/       raw ids by row, and rows by hash: see ids.py
    items/<feature>.npy      codes of the items by index (item_index.py), [V + 1 + C] or
                             [V + 1 + C, M], or numbers, float32 [V + 1 + C]
    users/                   all users of the log: raw ids, embedding rows, features, the events
                             that the model reads (history, event_time, event.<feature>), and the
                             distinct items of the events before (met); offset, met_offset: where
                             each begins
    seal.json                size and CRC-32 of every file

In the manifest, `features` describes each feature by its key: the kind, the name in the log, and
for a list the separator and the width, for bins the edges, for a number how it enters the model. A
missing value is the code 0, or NaN of a number. `reads_time` is there if the model reads times.
Of several labels `labels` has their names, the main one first; `label_kind` is there if labels are
numbers, which scores then predict. Such a folder has the format 2.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Programs that read format 1 alone take all scores for log-odds of one label, or for products.
# Raise it when the layout of the folder or the meaning of a file changes.
FORMATS = (1, 2)


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
  if format_number not in FORMATS:
    raise FolderError(
      f'{folder}: an export of format {format_number}, and this program reads the formats '
      f'{", ".join(map(str, FORMATS))}; export again'
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
