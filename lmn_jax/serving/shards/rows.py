"""The rows of a large memory that one shard holds, and their weighted sums (see client.py)."""

import threading
from pathlib import Path

import numpy as np

from lmn_jax.errors import UserError
from lmn_jax.export.runtime.manifest import FolderError, read_manifest
from lmn_jax.export.stored_rows import restored

EXPORTS = 2  # held at once: while rankers change to a new export, they need both


class ShardRows:
  """The rows of one shard, memory-mapped.

  Attributes:
    export: fingerprint. first, last: the rows are first to last - 1.
  """

  def __init__(self, folder: Path, number: int, count: int):
    """Opens the rows.

    Args:
      folder: of the export. number, count: shard i of N.

    Raises:
      UserError: an export of a model without an embedding bag. FolderError: not an export.
    """
    manifest = read_manifest(folder)
    if not manifest['pooled']:
      raise UserError(
        f'{folder}: the model {manifest["model"]} has no memory, so it needs no shards; give an '
        'export of a model with a memory, such as lmn'
      )
    table = manifest['tables'][manifest['pooled']]
    V = table['rows']
    self.export: str = manifest['fingerprint']
    self.first, self.last = number * V // count, (number + 1) * V // count
    self._parts = {
      part: np.load(folder / file, mmap_mode='r')[self.first : self.last]
      for part, file in table['files'].items()
    }

  def partial(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns s_i, float32 [T, D], and u_i, float32 [T], of this shard.

    Args:
      ids_TK: int32, rows of the table; rows of other shards, and ids out of bounds, add nothing.
      weights_TK: float32.
    """
    mine_TK = (ids_TK >= self.first) & (ids_TK < self.last)
    t_N, _ = np.nonzero(mine_TK)
    w_N = weights_TK[mine_TK]
    ids_N = ids_TK[mine_TK] - self.first
    rows_ND = restored({part: x[ids_N] for part, x in self._parts.items()})
    scaled_ND = rows_ND * w_N[:, None]
    sums_TD = np.zeros((len(ids_TK), self._parts['rows'].shape[1]), np.float32)
    if len(t_N):
      # The rows of one query are adjacent.
      begins = np.flatnonzero(np.r_[True, t_N[1:] != t_N[:-1]])
      sums_TD[t_N[begins]] = np.add.reduceat(scaled_ND, begins, axis=0)
    return sums_TD, np.where(mine_TK, weights_TK, 0).sum(axis=1, dtype=np.float32)


class Shard:
  """One shard of the export that a link points to, and of the export before it.

  Threads may share it.
  """

  def __init__(self, export: Path, number: int, count: int):
    """Opens the export; see ShardRows for the arguments and errors."""
    self._path, self._number, self._count = export, number, count
    self._lock = threading.Lock()
    self._rows: dict[str, ShardRows] = {}
    self._open()

  def _open(self):
    rows = ShardRows(self._path.resolve(), self._number, self._count)
    self._rows[rows.export] = rows
    while len(self._rows) > EXPORTS:
      del self._rows[next(iter(self._rows))]

  def newest(self) -> ShardRows:
    """Returns the rows of the export that was opened last."""
    with self._lock:
      return self._rows[next(reversed(self._rows))]

  def rows_of(self, export: str) -> ShardRows | None:
    """Returns the rows of an export by its fingerprint; None if the shard does not hold it.

    An unknown fingerprint makes the shard open the export that the link points to now.
    """
    with self._lock:
      if export not in self._rows:
        try:
          self._open()
        except (FolderError, UserError):
          return None
      return self._rows.get(export)
