"""The functions of an export, compiled at their first call, and the arrays that they read."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from lmn_jax.export.runtime.manifest import load


class Programs:
  """The exported functions.

  Attributes:
    dense: dense parameters and statistics, by path. tables: name -> 'rows' [V, D] and, of int8
      rows, 'scale' [V]; on CPU these arrays are the memory map itself.
    compiled: number of compiled programs.
  """

  def __init__(
    self, folder: Path, manifest: dict[str, Any], names: Iterable[str], absent: str | None
  ):
    """Reads the functions and arrays.

    Args:
      folder: of the export. manifest: its manifest. names: of the functions. absent: the table that
        other processes hold, None for none.
    """
    with np.load(folder / 'dense.npz') as dense:
      self.dense = jax.device_put(dict(dense))
    self.tables = {
      name: {part: jax.device_put(load(folder / file)) for part, file in table['files'].items()}
      for name, table in manifest['tables'].items()
      if name != absent
    }
    self.compiled = 0
    self._functions = {
      name: jax.jit(self._counted((folder / f'functions/{name}.jax').read_bytes()))
      for name in names
    }

  def _counted(self, serialized: bytes) -> Callable:
    """Returns the function with a counter: jit traces it once for each program it compiles."""
    exported = jax.export.deserialize(bytearray(serialized))

    def call(*arguments):
      self.compiled += 1
      return exported.call(*arguments)

    return call

  def run(self, name: str, *arguments: Any) -> Any:
    """Calls a function and returns its results on the host."""
    return jax.tree.map(np.asarray, self._functions[name](*arguments))
