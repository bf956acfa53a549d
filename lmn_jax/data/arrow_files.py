"""Writes and reads the Arrow files of a store: one record batch each, read as views of the map."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmn_jax.files import sha256


def write_arrow(path: Path, columns: dict[str, Any]) -> dict:
  """Writes columns as an Arrow file of one record batch, so that each is contiguous in the file.

  Args:
    path: the file to write.
    columns: name -> numpy array [N] or [N, M] (a fixed-size list), or Arrow array [N].

  Returns:
    The file's entry in the manifest, see `manifest_entry`.
  """
  arrays = {
    name: pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])
    if isinstance(column, np.ndarray) and column.ndim == 2
    else pa.array(column)
    for name, column in columns.items()
  }
  batch = pa.RecordBatch.from_pydict(arrays)
  with pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_file(sink, batch.schema) as writer:
    writer.write_batch(batch)
  return manifest_entry(path)


def manifest_entry(path: Path) -> dict:
  """The entry of a file in the manifest: its size, `bytes`, and its `sha256`."""
  return dict(bytes=path.stat().st_size, sha256=sha256(path))


def read_arrow(path: Path) -> dict[str, np.ndarray]:
  """The number columns of an Arrow file of one record batch, as views [N] or [N, M] of its map."""
  with pa.memory_map(str(path)) as source:
    batch = pa.ipc.open_file(source).get_batch(0)
  columns = {}
  for name, array in zip(batch.schema.names, batch.columns, strict=True):
    if pa.types.is_fixed_size_list(array.type):
      values = array.flatten().to_numpy(zero_copy_only=True)
      columns[name] = values.reshape(len(array), array.type.list_size)
    elif pa.types.is_primitive(array.type):
      columns[name] = array.to_numpy(zero_copy_only=True)
  return columns


def numbers_of(table: pa.Table, name: str) -> np.ndarray:
  """A column of numbers of a table as float32 [N]: NaN, always of the same bits, where missing."""
  array = table.column(name).combine_chunks().to_numpy(zero_copy_only=False)
  numbers = array.astype(np.float32)  # a copy
  numbers[np.isnan(numbers)] = np.nan
  return numbers


def codes_of(table: pa.Table, name: str, width: int = 0) -> np.ndarray:
  """A column of codes of a table as int32: [N], or [N, M] for lists of width M > 0."""
  array = table.column(name).combine_chunks()
  if width:
    return array.flatten().to_numpy().astype(np.int32, copy=False).reshape(-1, width)
  return array.to_numpy().astype(np.int32, copy=False)
