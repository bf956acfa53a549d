"""The raw ids of a vocabulary by row, and the rows by raw id."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmn_jax.export.runtime.manifest import mapped

CACHED = 2**17  # entries of each cache of a vocabulary


class Ids:
  """Raw ids by row and rows by raw id, memory-mapped.

  text.bin holds the ids in UTF-8, concatenated; offsets.npy, int64 [V + 1], where each begins;
  hashes.npy, uint64 [V], their `hash_of`, ascending; order.npy, int32 [V], the rows of the hashes.
  """

  def __init__(self, folder: Path):
    self._text = mapped(folder / 'text.bin')
    self._offsets = np.load(folder / 'offsets.npy', mmap_mode='r')
    self._hashes = np.load(folder / 'hashes.npy', mmap_mode='r')
    self._order = np.load(folder / 'order.npy', mmap_mode='r')
    # Caches of the first ids looked up, so that a history takes microseconds.
    self._row_of: dict[str, int] = {}
    self._raw_of: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def raw(self, row: int) -> str:
    """Returns the raw id of a row."""
    text = self._raw_of.get(row)
    if text is None:
      text = self._bytes(row).decode('utf-8')
      if len(self._raw_of) < CACHED:
        self._raw_of[row] = text
    return text

  def _bytes(self, row):
    begin, end = self._offsets[row : row + 2]
    return self._text[begin:end].tobytes()

  def find(self, raw: Sequence[str]) -> np.ndarray:
    """Returns the rows of raw ids: int32 [N], -1 for an id that is not in the vocabulary."""
    rows = [self._row_of.get(text) for text in raw]
    if None in rows:
      rows = [self._find(text) if row is None else row for text, row in zip(raw, rows, strict=True)]
    return np.array(rows, np.int32)

  def _find(self, raw):
    text = raw.encode('utf-8', 'surrogatepass')
    key = np.uint64(hash_of(text))
    at = int(np.searchsorted(self._hashes, key))
    while at < len(self._hashes) and self._hashes[at] == key:  # ids may share a hash
      row = int(self._order[at])
      if self._bytes(row) == text:
        if len(self._row_of) < CACHED:
          self._row_of[raw] = row
        return row
      at += 1
    return -1


def hash_of(text: bytes) -> int:
  """Returns the first 8 bytes of BLAKE2b as an integer."""
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little')
