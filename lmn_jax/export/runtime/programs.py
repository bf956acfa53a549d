"""The functions of an export, compiled on demand, with the arrays that they read."""

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
    dense: dense parameters and statistics, by path. tables: by name the parts 'rows' [V, D] and
      'scale' [V]; where JAX runs on CPU they are the memory map itself.
    compiled: how many programs were compiled.
  """

  def __init__(
    self, folder: Path, manifest: dict[str, Any], names: Iterable[str], absent: str | None
  ):
    """Reads them.

    Args:
      folder: of the export. manifest: of it. names: of the functions. absent: the table that is
        held elsewhere, None for none.
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
    """The function; jit traces it once for each program that it compiles."""
    exported = jax.export.deserialize(bytearray(serialized))

    def call(*arguments):
      self.compiled += 1
      return exported.call(*arguments)

    return call

  def run(self, name: str, *arguments: Any) -> Any:
    """Calls a function; its results are on the host."""
    return jax.tree.map(np.asarray, self._functions[name](*arguments))
