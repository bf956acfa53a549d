"""A large output in parts: a command that was killed continues after the last finished part.

A part is written to a temporary file and renamed when it is complete, and so is the output.
"""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lmn_jax.data import interactions
from lmn_jax.data.prepare import differences
from lmn_jax.data.readers.cells import identifier, literal
from lmn_jax.data.splits import scalar
from lmn_jax.errors import UserError
from lmn_jax.files import jsonable, replacing

ENDINGS = ('.parquet', '.csv')


def check_output(output: Path, endings: tuple[str, ...] = ENDINGS) -> None:
  """Checks that an output can be written.

  Raises:
    UserError: it has no name or an ending not in `endings`, it exists, or its folder does not.
  """
  if not output.name:
    raise UserError(f'--output is missing; it must be a file ending in {" or ".join(endings)}')
  if output.suffix not in endings:
    raise UserError(f'--output={str(output)!r} must end in {" or ".join(endings)}')
  if output.exists():
    raise UserError(f'--output={output} exists; use another path, or delete it')
  if not output.parent.is_dir():
    raise UserError(f'--output={output}: there is no folder {output.parent}; create it first')


class Parts:
  """The finished parts of an output, in a folder beside it.

  Attributes:
    done: number of finished parts.
  """

  def __init__(self, output: Path, made_of: dict[str, Any] | None = None):
    """Opens the folder of parts, and keeps parts of an earlier run with the same `made_of`.

    Args:
      output: the file to write. made_of: everything that the parts depend on; None deletes earlier
        parts.

    Raises:
      UserError: the folder has parts with another `made_of`.
    """
    self.folder = output.with_name(output.name + '.parts')
    self._output, made_of = output, json.loads(json.dumps(jsonable(made_of)))
    record = self.folder / 'made_of.json'
    if made_of and record.exists():
      changes = differences(json.loads(record.read_text()), made_of)
      if changes:
        raise UserError(
          f'{self.folder} has parts of another prediction: {"; ".join(changes[:3])}; delete it, or '
          'use another --output'
        )
    else:
      # A run that was killed before it wrote the record may have left a folder.
      shutil.rmtree(self.folder, ignore_errors=True)
      self.folder.mkdir()
      self._write(record, lambda path: path.write_text(json.dumps(made_of)))
    self.done = next(n for n in itertools.count() if not self._path(n).exists())

  def _path(self, number):
    return self.folder / f'part-{number:05}.parquet'

  def _write(self, path, write):
    """Writes a file atomically."""
    with replacing(path) as temporary:
      write(temporary)

  def add(self, table: pa.Table, counts: dict[str, int]) -> None:
    """Writes the next part, with its counts."""
    table = table.replace_schema_metadata({'counts': json.dumps(counts)})
    self._write(self._path(self.done), lambda path: pq.write_table(table, path))
    self.done += 1

  def counts(self) -> dict[str, int]:
    """Returns the sums of the counts of all parts; there must be at least one part."""
    metadata = (pq.read_schema(self._path(n)).metadata for n in range(self.done))
    parts = [json.loads(entries[b'counts']) for entries in metadata]
    return {name: sum(counts[name] for counts in parts) for name in parts[0]}

  def join(self, user: str, memory_limit: str) -> int:
    """Concatenates the parts to the output and removes them.

    Args:
      user: the column of users. memory_limit: of DuckDB.

    Returns:
      The number of distinct users in the output.
    """
    paths = ', '.join(literal(self._path(n)) for n in range(self.done))
    parts = f'read_parquet([{paths}])'
    form = 'csv, HEADER' if self._output.suffix == '.csv' else 'parquet'
    with interactions.connect(Path(':memory:'), memory_limit, self.folder / 'spill') as db:
      db.execute('SET threads = 1')  # so that the output has the same bytes every time
      users = scalar(db, f'SELECT count(DISTINCT {identifier(user)}) FROM {parts}')

      def write(path):
        db.execute(f'COPY (SELECT * FROM {parts}) TO {literal(path)} (FORMAT {form})')

      try:
        self._write(self.folder / 'joined', write)
      except duckdb.IOException as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
          f'{self._output}: cannot be written ({reason}); free space and run the same command again'
        ) from error
    os.replace(self.folder / 'joined', self._output)
    shutil.rmtree(self.folder)
    return users
