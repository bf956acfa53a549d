"""A process that holds a part of a large memory's values and sums them (shards.py says what)."""

import threading
from pathlib import Path

import numpy as np

from lmn_jax.bundle import FolderError, read_manifest
from lmn_jax.errors import UserError

KEPT = 2  # exports whose rows are held: while rankers change to a new one, both are asked for


class Held:
  """The rows of one shard, memory-mapped.

  Attributes:
    export: fingerprint. first, last: rows, the last one not among them.
  """

  def __init__(self, folder: Path, number: int, of: int):
    """Opens them.

    Args:
      folder: of the export. number, of: shard i of N.

    Raises:
      UserError: an export of a model that needs no shards. FolderError: no export.
    """
    manifest = read_manifest(folder)
    if not manifest['pooled']:
      raise UserError(
        f'{folder}: {manifest["model"]} has no table that is read with weights; only a memory such '
        "as LMN's can lie on shards"
      )
    table = manifest['tables'][manifest['pooled']]
    V = table['rows']
    self.export: str = manifest['fingerprint']
    self.first, self.last = number * V // of, (number + 1) * V // of
    self._parts = {
      part: np.load(folder / file, mmap_mode='r')[self.first : self.last]
      for part, file in table['files'].items()
    }

  def _rows(self, at):
    rows = self._parts['rows'][at]
    if rows.dtype == np.uint16:
      return (rows.astype(np.uint32) << 16).view(np.float32)
    if rows.dtype == np.int8:
      return rows * self._parts['scale'][at][:, None]
    return rows

  def partial(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s_i float32 [T, D] and u_i float32 [T] of this shard.

    Args:
      ids_TK: int32, rows of the table; those of other shards and beyond all add nothing.
      weights_TK: float32.
    """
    mine_TK = (ids_TK >= self.first) & (ids_TK < self.last)
    t_N, _ = np.nonzero(mine_TK)
    w_N = weights_TK[mine_TK]
    scaled_ND = self._rows(ids_TK[mine_TK] - self.first) * w_N[:, None]
    sums_TD = np.zeros((len(ids_TK), self._parts['rows'].shape[1]), np.float32)
    if len(t_N):
      # The reads of one query stand together.
      begins = np.flatnonzero(np.r_[True, t_N[1:] != t_N[:-1]])
      sums_TD[t_N[begins]] = np.add.reduceat(scaled_ND, begins, axis=0)
    return sums_TD, np.where(mine_TK, weights_TK, 0).sum(axis=1, dtype=np.float32)


class Shard:
  """One shard of the export that a link leads to, and of the one before. For many threads."""

  def __init__(self, export: Path, number: int, of: int):
    """Opens the export; see Held for the arguments and errors."""
    self._path, self._number, self._of = export, number, of
    self._lock = threading.Lock()
    self._held: dict[str, Held] = {}
    self._open()

  def _open(self):
    held = Held(self._path.resolve(), self._number, self._of)
    self._held[held.export] = held
    while len(self._held) > KEPT:
      del self._held[next(iter(self._held))]

  def of(self, export: str) -> Held | None:
    """The rows of an export; None if neither it nor what the link leads to now is that one."""
    with self._lock:
      if export not in self._held:
        try:
          self._open()
        except (FolderError, UserError):
          return None
      return self._held.get(export)
