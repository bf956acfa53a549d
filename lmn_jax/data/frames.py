"""Tables in memory, of pandas, polars, Arrow or any library with the Arrow interface, as files."""

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
  """Returns a table as an Arrow table. The index of a pandas DataFrame is left out.

  Args:
    table: a pandas or polars DataFrame, an Arrow table or record batch, or any object with
      `__arrow_c_stream__`. name: of the argument, for messages.

  Raises:
    UserError: it is none of these, or a column has no Arrow type.
  """
  pandas = _library(table) == 'pandas'
  try:
    if pandas and table.ndim == 2 and not table.columns.is_unique:
      raise UserError(f'{name} has several columns of one name; rename them')
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
  """The table with views of text, and categories of these, as polars makes them, as text."""
  for k, field in enumerate(table.schema):
    column, text = table.column(k), pa.large_string()
    if pa.types.is_string_view(field.type):
      table = table.set_column(k, field.name, column.cast(text))
    elif pa.types.is_dictionary(field.type) and pa.types.is_string_view(field.type.value_type):
      # Arrow has no cast of such categories.
      chunks = [chunk.dictionary.cast(text).take(chunk.indices) for chunk in column.chunks]
      table = table.set_column(k, field.name, pa.chunked_array(chunks, text))
  return table


def like(table: pa.Table, example: Any) -> Any:
  """Returns an Arrow table as a DataFrame of the library that `example` is of, or as it is."""
  library = _library(example)
  if library == 'pandas':
    return table.to_pandas()
  if library == 'polars':
    import polars

    return polars.from_arrow(table)
  return table


def write(table: pa.Table, path: Path) -> None:
  """Writes a Parquet file as a whole or not at all; a file of the same content is left as it is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as scratch:
    new = Path(scratch) / path.name
    pq.write_table(table, new)
    if not (path.exists() and path.read_bytes() == new.read_bytes()):
      os.replace(new, path)


@contextlib.contextmanager
def as_file(table: Any, name: str) -> Iterator[str]:
  """Yields the path of a table: a path is yielded as it is, another table as a temporary file.

  Args:
    table: a path, or of `to_arrow`. name: of the argument, for messages.
  """
  if is_path(table):
    yield str(table)
    return
  with tempfile.TemporaryDirectory(prefix='lmn_jax-') as scratch:
    path = Path(scratch) / f'{name}.parquet'
    pq.write_table(to_arrow(table, name), path)
    yield str(path)


def _library(table):
  """The name of the library whose class the table is of."""
  return type(table).__module__.partition('.')[0]
