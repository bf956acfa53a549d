"""Logs of TensorFlow Datasets by name, streamed to Parquet without TensorFlow."""

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
SPLIT = 'tfds_split'  # the column that says from which split of the data set a row is


class Tfds(Reader):
  """A set by its name."""

  name, rows, splits, by_name = 'tfds', False, False, True

  def matches(self, source):
    return source.startswith('tfds:')

  def signature(self, source, field):
    return {}

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    return Opened(data, [table(source, data.tfds_data_dir, scratch)])


def table(source: Source, data_dir: str, scratch: Path) -> Table:
  """Opens `tfds:NAME[/CONFIG]`, all its splits one after the other, and prepares it if need be.

  Nested features are called `outer/inner`. The records are read with `tfds.data_source`, that is
  from ArrayRecord files with random access and without TensorFlow.

  Args:
    source: `pattern` is 'tfds:NAME'.
    data_dir: where the data sets lie; '' for TFDS's own default.
    scratch: folder for the Parquet copy of the columns that are asked for.

  Raises:
    UserError: if tensorflow-datasets is missing, or the name is unknown, or the data set cannot
      be prepared or lies there in another file format.
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
  kinds = {path: _arrow_type(f) for path, f in _flat(builder.info.features)} | {SPLIT: pa.string()}

  def relation(names: list[str]) -> str:
    path = scratch / 'tfds.parquet'
    schema = pa.schema([(n, kinds[n]) for n in dict.fromkeys(names)])
    scratch.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
      for split in sorted(splits):
        records = _records(splits[split], split)
        while chunk := list(itertools.islice(records, CHUNK)):
          rows = [{n: _plain(r[n]) for n in schema.names} for r in chunk]
          writer.write_table(pa.Table.from_pylist(rows, schema))
    return f'read_parquet({cells.literal(path)})'

  columns = {}
  for n, k in kinds.items():
    kind = 'VARCHAR[]' if pa.types.is_list(k) else str(k).upper()
    columns[n] = cells.as_text(n, cells.identifier(n), kind, source.multi)
  return Table(source.pattern, columns, relation)


def _records(split: Any, name: str) -> Iterator[dict[str, Any]]:
  for k in range(len(split)):
    yield {**dict(_flat(split[k])), SPLIT: name}


def _flat(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Flattens a record, or the features of one: TFDS's own kind of dict is no Mapping."""
  for name, value in tree.items():
    if hasattr(value, 'items'):
      yield from _flat(value, f'{prefix}{name}/')
    else:
      yield prefix + name, value


def _arrow_type(feature: Any) -> pa.DataType:
  """Arrow's type of a feature of TFDS; bytes are text, anything with axes is a list."""
  kind = np.dtype(feature.np_dtype)
  scalar = pa.from_numpy_dtype(kind) if kind.kind in 'iufb' else pa.string()
  return pa.list_(scalar) if feature.shape else scalar


def _plain(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  return [_plain(v) for v in value] if isinstance(value, list) else value
