"""The device that answers, the functions of an export compiled for it, and their arrays on it."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from lmn_jax.export.runtime.manifest import FolderError, load
from lmn_jax.export.runtime.platforms import PLATFORMS


class PlatformError(ValueError):
  """JAX has no device of a platform that exports are for; the message is one line."""


def device_of(platform: str = '') -> jax.Device:
  """Returns the first device of a platform.

  Args:
    platform: of PLATFORMS; '' is the one that JAX prefers.

  Raises:
    PlatformError: there is none, or JAX prefers another platform.
  """
  try:
    device = jax.devices(platform or None)[0]
  except RuntimeError:
    present = ', '.join(sorted({platform_of(device) for device in jax.devices()}))
    raise PlatformError(
      f'JAX sees no device of the platform {platform!r}, but {present}; use one of these, or '
      f'install JAX for {platform!r}'
    ) from None
  if platform_of(device) not in PLATFORMS:
    raise PlatformError(
      f'JAX computes on {platform_of(device)!r}, and exports on {", ".join(PLATFORMS)}; use the '
      "platform 'cpu'"
    )
  return device


def platform_of(device: jax.Device) -> str:
  """Returns the platform of a device by its name in `jax.export`."""
  if device.platform != 'gpu':
    return device.platform
  return 'rocm' if 'rocm' in device.client.platform_version.lower() else 'cuda'


class Programs:
  """The exported functions.

  Attributes:
    device: that computes. dense: dense parameters and statistics, by path. tables: name -> 'rows'
      [V, D] and, of int8 rows, 'scale' [V]. Both are on the device; on CPU the tables are the
      memory map itself.
    compiled: number of compiled programs.
  """

  def __init__(
    self,
    folder: Path,
    manifest: dict[str, Any],
    names: Iterable[str],
    absent: str | None,
    device: jax.Device,
  ):
    """Reads the functions and arrays, and moves the arrays to the device.

    Args:
      folder: of the export. manifest: its manifest. names: of the functions. absent: the table that
        other processes hold, None for none. device: that computes.

    Raises:
      FolderError: the functions were exported for other platforms.
    """
    self.device, self.compiled, self._lock = device, 0, threading.Lock()
    self._functions = {name: self._function(folder / f'functions/{name}.jax') for name in names}
    with np.load(folder / 'dense.npz') as dense:
      self.dense = self.place(dict(dense))
    self.tables = {
      name: {part: self.place(load(folder / file)) for part, file in table['files'].items()}
      for name, table in manifest['tables'].items()
      if name != absent
    }

  def _function(self, path: Path) -> Callable:
    """Returns a function that counts its programs: jit traces it once for each of them."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    if platform_of(self.device) not in exported.platforms:
      raise FolderError(
        f'{path} is for {", ".join(exported.platforms)}, and the device is of the platform '
        f'{platform_of(self.device)!r}; use another platform, or export again'
      )

    def call(*arguments):
      with self._lock:
        self.compiled += 1
      return exported.call(*arguments)

    return jax.jit(call)

  def place(self, arrays: Any) -> Any:
    """Returns arrays on the device."""
    return jax.device_put(arrays, self.device)

  def call(self, name: str, *arguments: Any) -> Any:
    """Calls a function; its results are on the device, perhaps not yet computed."""
    return self._functions[name](*arguments)

  def run(self, name: str, *arguments: Any) -> Any:
    """Calls a function and returns its results on the host."""
    results = self.call(name, *arguments)
    if self.device.platform != 'cpu':  # there nothing is copied
      for result in jax.tree.leaves(results):
        result.copy_to_host_async()  # all at once, rather than one after the other
    return jax.tree.map(np.asarray, results)
