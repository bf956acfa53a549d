"""Parquet files: their columns have types."""

from pathlib import Path

import duckdb

from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import Reader, Source
from lmn_jax.data.readers.table import Table, typed


class Parquet(Reader):
  """Parquet: columns with types, and lists."""

  name, endings = 'parquet', ('.parquet', '.pq')

  def table(self, source, path, db, scratch):
    return parquet_table(source, path, db)


def parquet_table(source: Source, path: Path, db: duckdb.DuckDBPyConnection) -> Table:
  """Returns the Table of a Parquet file."""
  relation = f'read_parquet({literal(path)})'
  return typed(str(path), relation, db, source.multi, source.settings)
