"""Data sets of TensorFlow Datasets by name, converted to Parquet without TensorFlow."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmn_jax.data.readers import cells
from lmn_jax.data.readers.reader import Opened, Reader, Source
from lmn_jax.data.readers.table import Table
from lmn_jax.errors import UserError

CHUNK = 2**16  # records converted at once
SPLIT = 'tfds_split'  # the column with the name of the data set's split


class Tfds(Reader):
  """A data set of TensorFlow Datasets, by name."""

  name, rows, splits, by_name = 'tfds', False, False, True

  def matches(self, source):
    return source.startswith('tfds:')

  def signature(self, source, field):
    return {}

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    return Opened(data, [table(source, data.tfds_data_dir, scratch)])


def table(source: Source, data_dir: str, scratch: Path) -> Table:
  """Prepares `tfds:NAME[/CONFIG]` if necessary, and opens all its splits one after the other.

  Nested features are called `outer/inner`. The records are read with `tfds.data_source`, that is
  from ArrayRecord files with random access and without TensorFlow.

  Args:
    source: `pattern` is 'tfds:NAME'.
    data_dir: the folder of the data sets; '' for the default of TFDS.
    scratch: folder for a Parquet copy of the columns that are read.

  Raises:
    UserError: if tensorflow-datasets is missing, the name is unknown, or the data set cannot be
      prepared or was prepared in another file format.
  """
  name = source.pattern.removeprefix('tfds:')
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise UserError(
      f"{source.field}={source.pattern!r}: {error}; pip install 'lmn_jax[tfds]'"
    ) from None
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format='array_record')
    builder.download_and_prepare()
    splits = builder.as_data_source()
  except (tfds.core.DatasetNotFoundError, ValueError, NotImplementedError, OSError) as error:
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'{source.field}={source.pattern!r}: {reason} (TFDS data_dir={data_dir or "default"!r})'
    ) from error
  types = {path: _arrow_type(f) for path, f in _flatten(builder.info.features)}
  types[SPLIT] = pa.string()

  def relation(names: list[str]) -> str:
    path = scratch / 'tfds.parquet'
    schema = pa.schema([(n, types[n]) for n in dict.fromkeys(names)])
    scratch.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
      for split in sorted(splits):
        records = _records(splits[split], split)
        while chunk := list(itertools.islice(records, CHUNK)):
          rows = [{n: _to_python(r[n]) for n in schema.names} for r in chunk]
          writer.write_table(pa.Table.from_pylist(rows, schema))
    return f'read_parquet({cells.literal(path)})'

  columns = {}
  for n, t in types.items():
    kind = 'VARCHAR[]' if pa.types.is_list(t) else str(t).upper()
    columns[n] = cells.typed_text(n, cells.identifier(n), kind, source.multi)
  return Table(source.pattern, columns, relation)


def _records(split: Any, name: str) -> Iterator[dict[str, Any]]:
  for k in range(len(split)):
    yield {**dict(_flatten(split[k])), SPLIT: name}


def _flatten(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the paths and leaves of a record or of its features; TFDS's dicts are not Mappings."""
  for name, value in tree.items():
    if hasattr(value, 'items'):
      yield from _flatten(value, f'{prefix}{name}/')
    else:
      yield prefix + name, value


def _arrow_type(feature: Any) -> pa.DataType:
  """Returns the Arrow type of a TFDS feature; bytes are text, and a feature with axes is a list."""
  kind = np.dtype(feature.np_dtype)
  scalar = pa.from_numpy_dtype(kind) if kind.kind in 'iufb' else pa.string()
  return pa.list_(scalar) if feature.shape else scalar


def _to_python(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, 'tolist'):
    return _to_python(value.tolist())
  return [_to_python(v) for v in value] if isinstance(value, list) else value
