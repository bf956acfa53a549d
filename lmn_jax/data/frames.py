"""Converts tables of pandas, polars, Arrow or any library with the Arrow interface to files."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmn_jax.errors import UserError


def is_path(value: Any) -> bool:
  """Whether a value is the path of a file rather than a table."""
  return isinstance(value, str | os.PathLike)


def to_arrow(table: Any, name: str) -> pa.Table:
  """Returns a table as an Arrow table, without the index of a pandas DataFrame.

  Args:
    table: a pandas or polars DataFrame, an Arrow table or record batch, or any object with
      `__arrow_c_stream__`. name: name of the argument, for messages.

  Raises:
    UserError: the object is not a table, or a column has no Arrow type.
  """
  pandas = _library(table) == 'pandas'
  try:
    if pandas and table.ndim == 2 and not table.columns.is_unique:
      raise UserError(f'{name} has several columns of one name; rename them')
    if pandas and table.ndim == 2 and not len(table.columns):
      raise UserError(f'{name} has no columns; at least one is expected')
    if pandas and table.ndim == 2:
      return pa.Table.from_pandas(table, preserve_index=False)
    if not pandas and (hasattr(table, '__arrow_c_stream__') or isinstance(table, pa.RecordBatch)):
      return _without_views(pa.table(table))
  except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
    message = ' '.join(map(str, error.args))
    raise UserError(f'{name}: {message}; give each column one type') from None
  raise UserError(
    f'{name} is a {type(table).__name__}; give a path, a pandas or polars DataFrame, or an Arrow '
    'table'
  )


def _without_views(table):
  """Returns the table with string views and categories of them, as in polars, as strings."""
  for k, field in enumerate(table.schema):
    column, text = table.column(k), pa.large_string()
    if pa.types.is_string_view(field.type):
      table = table.set_column(k, field.name, column.cast(text))
    elif pa.types.is_dictionary(field.type) and pa.types.is_string_view(field.type.value_type):
      # Arrow cannot cast these categories.
      chunks = [chunk.dictionary.cast(text).take(chunk.indices) for chunk in column.chunks]
      table = table.set_column(k, field.name, pa.chunked_array(chunks, text))
  return table


def like(table: pa.Table, example: Any) -> Any:
  """Returns an Arrow table as a DataFrame of the library of `example`, or unchanged."""
  library = _library(example)
  if library == 'pandas':
    return table.to_pandas()
  if library == 'polars':
    import polars

    return polars.from_arrow(table)
  return table


def write(table: pa.Table, path: Path) -> bool:
  """Writes a Parquet file atomically; does not replace a file with the same content.

  Returns:
    Whether a file with other content was replaced.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as scratch:
    new = Path(scratch) / path.name
    pq.write_table(table, new)
    existed = path.exists()
    if existed and path.read_bytes() == new.read_bytes():
      return False
    os.replace(new, path)
    return existed


@contextlib.contextmanager
def as_file(table: Any, name: str) -> Iterator[str]:
  """Yields the path of a table; a table in memory is written to a temporary file.

  Args:
    table: a path, or a table for `to_arrow`. name: name of the argument, for messages.
  """
  if is_path(table):
    yield str(table)
    return
  with tempfile.TemporaryDirectory(prefix='lmn_jax-') as scratch:
    path = Path(scratch) / f'{name}.parquet'
    pq.write_table(to_arrow(table, name), path)
    try:
      yield str(path)
    except UserError as error:  # the user knows the table by the name of the argument
      message = str(error).replace(f'--input={path}', name).replace(str(path), name)
      raise UserError(message) from error


def _library(table):
  """Returns the name of the library of the class of a table."""
  return type(table).__module__.partition('.')[0]
