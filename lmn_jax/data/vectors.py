"""Vectors of items and users, such as those of an image or a text: one for each id of a vocabulary.

    config.data.item_vectors = {'image': 'images.parquet:vector', 'text': 'text.npy:ids.txt'}

A Parquet file has the ids in a column with the name of config.data.item or config.data.user, and
the vectors in a column of lists, which is named after the colon. A `.npy` file has a matrix [N, W]
of floats; the file after the colon has the id of each row: one on each line, or a `.npy` of texts
or numbers. Ids are read by the rule of the log (texts.py). Ids that the vocabulary does not have
are counted and left out, unless they are cold items; an id without a vector reads as zeros, and is
counted. In the layout of LongCTR, `{'image': 'image_emb_dim64'}` is that column of its
item_info.parquet.

    vectors/<key>.npy       [V + 1, W], float32, or float16 if the file has these; row 0 (the
                            unknown id) and row V (the padding) are zeros. Of items with cold ones
                            [V + C + 2, W] by index (item_index.py); the last row is zeros, too
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmn_jax.data import texts
from lmn_jax.data.arrow_files import manifest_entry
from lmn_jax.data.readers import paths, registry
from lmn_jax.errors import UserError, one_of

log = logging.getLogger(__name__)
ROWS = 2**16  # vectors in memory at a time
PARQUET, NUMPY = ('.parquet', '.pq'), '.npy'


class Source(NamedTuple):
  """Where vectors are read from.

  key: such as 'item.image'. field: of the config, for messages. path: of the vectors. part: the
  column of a Parquet file, or the path of the ids of a `.npy` file. column: of the ids in a Parquet
  file.
  """

  key: str
  field: str
  path: Path
  part: str
  column: str

  @property
  def kind(self) -> str:
    """'item' or 'user', the vocabulary."""
    return self.key.partition('.')[0]

  @property
  def is_numpy(self) -> bool:
    """Whether the vectors are in a `.npy` file."""
    return self.path.suffix.lower() == NUMPY

  def files(self) -> dict[str, Path]:
    """The files by name; UserError if one is missing."""
    files = paths.files_by_name(str(self.path), self.field)
    return files | (paths.files_by_name(self.part, self.field) if self.is_numpy else {})


def sources_of(data: ml_collections.ConfigDict) -> list[Source]:
  """The sources of config.data.user_vectors and item_vectors.

  Raises:
    UserError: a value is not `FILE:COLUMN` or `FILE.npy:IDS`, or a name is that of a feature.
  """
  if not data.user_vectors and not data.item_vectors:
    return []
  sources = []
  if data.source:  # `build` also takes tables that were read from no log
    data = registry.reader_of(data.source, data.format, 'config.data.source').layout(data)
  for kind in ('user', 'item'):
    for name, value in data[f'{kind}_vectors'].items():
      field = f'config.data.{kind}_vectors.{name}'
      path, colon, part = str(value).rpartition(':')
      if not (colon and path and part and Path(path).suffix.lower() in (*PARQUET, NUMPY)):
        raise UserError(
          f'{field}={value!r} must be FILE.parquet:COLUMN, or FILE.npy:IDS with the file of the ids'
        )
      if '*' in path or '?' in path or '[' in path:
        raise UserError(f'{field}={value!r} must be one file; join the files, or name one')
      if name in data[f'{kind}_features']:
        raise UserError(f'{field} has the name of a feature of the {kind}; choose another name')
      sources.append(Source(f'{kind}.{name}', field, Path(path), part, data[kind]))
  return sources


def write(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  vocabulary: dict[str, int],
  cold: int,
  folder: Path,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict]]:
  """Writes the vectors of the ids of the vocabularies, and of cold items.

  Args:
    data: config.data. db: has `index_item` and `vocabulary_user`. vocabulary: name -> V. cold: C.
    folder: of the store.

  Returns:
    Key -> file, width, missing (ids without a vector) and unused (vectors of other ids), for the
    manifest; file -> its entry in the manifest.

  Raises:
    UserError: a file or a column is missing, no id has a vector, an id has two, or a vector has
      another width or a number that is not finite.
  """
  manifest, entries = {}, {}
  for source in sources_of(data):
    (folder / 'vectors').mkdir(exist_ok=True)
    file = f'vectors/{quote(source.key, safe="")}.npy'
    V, C = vocabulary[source.kind], cold if source.kind == 'item' else 0
    with _readable(source):
      row_N = _rows_of_ids(source, data.missing, db)
      counts = _write_one(source, db, row_N, V, C, folder / file)
    manifest[source.key] = {'file': file} | counts
    entries[file] = manifest_entry(folder / file)
  return manifest, entries


def _write_one(
  source: Source, db: duckdb.DuckDBPyConnection, row_N: np.ndarray, V: int, C: int, path: Path
) -> dict[str, Any]:
  """Writes the vectors of one source; returns its counts.

  Args:
    row_N: of the table, for each id of the file, see `_rows_of_ids`. V, C: ids of the vocabulary,
      and cold ones.
  """
  matrix, first = None, 0
  lacks = np.ones(V + 1 + C if C else V, bool)  # by row of the table
  for vectors, present in _vectors(source, len(row_N)):
    if matrix is None and len(vectors):
      shape = (len(lacks) + 1, vectors.shape[1])
      matrix = np.lib.format.open_memmap(path, 'w+', vectors.dtype, shape)  # of zeros
    rows = row_N[first : first + len(present)][present]
    _check_finite(source, vectors, first + np.flatnonzero(present))
    if matrix is not None:
      matrix[rows[rows > 0]] = vectors[rows > 0]
    lacks[rows] = False
    first += len(present)
  lacks[0], lacks[V:][:1] = True, False  # the unknown id and the padding have none
  if matrix is None or lacks[:V].all():
    raise UserError(
      f'{source.field}: no {source.kind} of the vocabulary has a vector in {source.path} '
      f'({len(row_N):,} ids); check that its ids are those of config.data.{source.kind}'
    )
  matrix.flush()
  lacking = int(lacks[1:].sum())
  if lacking:
    ((raw,),) = db.execute(
      f'SELECT id FROM {_indices(source)} WHERE code = ?', [int(np.argmax(lacks[1:])) + 1]
    ).fetchall()
    log.warning(
      '%s: %d of %d %ss have no vector, the first %r; they are read as zeros',
      source.field, lacking, V - 1 + C, source.kind, raw,
    )  # fmt: skip
  unused = int((row_N == 0).sum())
  return dict(width=int(matrix.shape[1]), missing=lacking, unused=unused)


def _check_finite(source, vectors, numbers):
  """Refuses a vector with NaN or an infinite number. numbers: of the rows of the file."""
  bad = ~np.isfinite(vectors).all(axis=1)
  if bad.any():
    row = int(numbers[np.argmax(bad)])
    raise UserError(
      f'{source.path}: row {row + 1}: a vector of {source.field} has a number that is not finite; '
      'correct or remove the row'
    )


def _rows_of_ids(
  source: Source, missing: tuple[str, ...], db: duckdb.DuckDBPyConnection
) -> np.ndarray:
  """The row of the table of each id of the file, int32 [N], 0 for ids that have none.

  Raises:
    UserError: an id with a row is there twice.
  """
  ids = ids_of(source)
  place = pa.array(np.arange(len(ids)))
  db.register('vector_ids', pa.table({'place': place, 'raw': ids}))
  try:
    table = db.sql(
      f"""SELECT coalesce(code, 0)::INTEGER AS code FROM (
        SELECT place, {texts.value_sql('raw', missing)} AS id FROM vector_ids
      ) LEFT JOIN {_indices(source)} USING (id) ORDER BY place"""
    ).to_arrow_table()
  finally:
    db.unregister('vector_ids')
  row_N = table.column('code').to_numpy()
  order = np.argsort(row_N, kind='stable')
  same = (row_N[order][1:] == row_N[order][:-1]) & (row_N[order][1:] > 0)
  if same.any():
    first, second = (int(order[np.argmax(same) + k]) for k in (0, 1))
    raise UserError(
      f'{source.path}: rows {first + 1} and {second + 1} have the same id {ids[first].as_py()!r}; '
      'keep one vector for each id'
    )
  return row_N


def ids_of(source: Source) -> pa.ChunkedArray:
  """The ids of a source as texts, in the order of its vectors.

  Raises:
    UserError: a file or a column is missing, or cannot be read.
  """
  with _readable(source):
    return _numpy_ids(source) if source.is_numpy else _parquet_ids(source)


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
  """Explains errors of reading a file."""
  try:
    yield
  except (pa.ArrowException, UnicodeDecodeError) as error:
    reason = ' '.join(str(error).split())[:160]
    raise UserError(f'{source.field}: {source.path} cannot be read: {reason}') from None


def _indices(source: Source) -> str:
  """The DuckDB relation (id, code) of the rows of the table."""
  return 'index_item' if source.kind == 'item' else 'vocabulary_user'


def _parquet_ids(source: Source) -> pa.ChunkedArray:
  """The ids of a Parquet file as texts."""
  names = pq.read_schema(source.path).names
  one_of(f'{source.path}: column of {source.field}', source.part, names)
  one_of(f'{source.path}: column config.data.{source.kind}', source.column, names)
  return pq.read_table(source.path, columns=[source.column]).column(0).cast(pa.string())


def _numpy_ids(source: Source) -> pa.ChunkedArray:
  """The ids beside a `.npy` file as texts."""
  path = Path(source.part)
  if path.suffix.lower() == NUMPY:
    ids = _loaded(source, path)
    if ids.ndim != 1 or ids.dtype.kind not in 'iuU':
      raise UserError(
        f'{source.field}: {path} has shape {ids.shape} of {ids.dtype}; one row of texts or whole '
        'numbers is expected'
      )
    texts_N = ids.tolist() if ids.dtype.kind == 'U' else [str(x) for x in ids.tolist()]
  else:
    texts_N = path.read_text(encoding='utf-8').splitlines()
  return pa.chunked_array([pa.array(texts_N, pa.string())])


def _loaded(source: Source, path: Path) -> np.ndarray:
  """The array of a `.npy` file, memory-mapped; no file of it can run code."""
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise UserError(f'{source.field}: {path} is not a .npy file of numbers ({error})') from None


def _vectors(source: Source, N: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (vectors [P, W], which of the next n rows have one [n]), in the order of the file."""
  if not source.is_numpy:
    yield from _parquet_vectors(source)
    return
  matrix = _loaded(source, source.path)
  if matrix.ndim != 2 or matrix.dtype not in (np.float16, np.float32, np.float64):
    raise UserError(
      f'{source.field}: {source.path} has shape {matrix.shape} of {matrix.dtype}; a matrix [N, W] '
      'of floats is expected'
    )
  if len(matrix) != N:
    raise UserError(
      f'{source.field}: {source.path} has {len(matrix):,} rows, and {source.part} {N:,} ids; each '
      'row needs its id'
    )
  kind = np.float16 if matrix.dtype == np.float16 else np.float32
  for begin in range(0, N, ROWS):
    rows = np.asarray(matrix[begin : begin + ROWS], kind)
    yield rows, np.ones(len(rows), bool)


def _parquet_vectors(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """`_vectors` of a Parquet file; a null in place of a list is a missing vector."""
  width, first = 0, 0
  with pq.ParquetFile(source.path) as file:
    for batch in file.iter_batches(ROWS, columns=[source.part]):
      column = batch.column(0)
      values = getattr(column.type, 'value_type', None)
      if values is None or not (pa.types.is_floating(values) or pa.types.is_integer(values)):
        raise UserError(
          f'{source.path}: column {source.part!r} has the type {column.type}; {source.field} needs '
          'lists of numbers'
        )
      present = column.is_valid().to_numpy(zero_copy_only=False)
      sizes = pc.list_value_length(column.drop_null()).to_numpy(zero_copy_only=False)
      width = width or int(sizes[0]) if len(sizes) else width
      if (sizes != width).any() or (len(sizes) and not width):
        row = first + int(np.flatnonzero(present)[np.argmax(sizes != width)])
        raise UserError(
          f'{source.path}: row {row + 1}: the vector {source.part!r} has '
          f'{sizes[np.argmax(sizes != width)]} numbers, and the first has {width}; all need the '
          'same, at least one'
        )
      kind = np.float16 if pa.types.is_float16(values) else np.float32
      numbers = column.drop_null().flatten()
      flat = numbers.to_numpy(zero_copy_only=False).astype(kind)  # a null in a list is NaN
      yield flat.reshape(len(sizes), width), present
      first += len(batch)
