"""A large output made of parts: a command that was killed goes on after the last one it finished.

A part is written under another name, and renamed when it is whole; so is the output.
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
  """Refuses an output that cannot be written.

  Raises:
    UserError: no name, an ending that is none of `endings`, a file that exists, or no folder.
  """
  if not output.name:
    raise UserError(f'--output is missing: a file of the ending {" or ".join(endings)}')
  if output.suffix not in endings:
    raise UserError(f'--output={str(output)!r} must end in {" or ".join(endings)}')
  if output.exists():
    raise UserError(f'--output={output} exists; give another, or delete it')
  if not output.parent.is_dir():
    raise UserError(f'--output={output}: {output.parent} is no folder; make it first')


class Parts:
  """The finished parts of an output, in a folder beside it.

  Attributes:
    done: how many there are.
  """

  def __init__(self, output: Path, made_of: dict[str, Any] | None = None):
    """Finds the parts that are there.

    Args:
      output: the file to be. made_of: all that what is in a part depends on; None begins anew.

    Raises:
      UserError: the parts are of something else.
    """
    self.folder = output.with_name(output.name + '.parts')
    self._output, made_of = output, json.loads(json.dumps(jsonable(made_of)))
    said = self.folder / 'made_of.json'
    if made_of and said.exists():
      changes = differences(json.loads(said.read_text()), made_of)
      if changes:
        raise UserError(
          f'{self.folder} holds parts of another prediction: {"; ".join(changes[:3])}; delete it, '
          'or give another --output'
        )
    else:
      shutil.rmtree(self.folder, ignore_errors=True)  # killed before it said what it is of
      self.folder.mkdir()
      self._write(said, lambda path: path.write_text(json.dumps(made_of)))
    self.done = next(n for n in itertools.count() if not self._path(n).exists())

  def _path(self, number):
    return self.folder / f'part-{number:05}.parquet'

  def _write(self, path, write):
    """Writes a file as a whole or not at all."""
    with replacing(path) as temporary:
      write(temporary)

  def add(self, table: pa.Table, counts: dict[str, int]) -> None:
    """Keeps the next part, with its counts."""
    table = table.replace_schema_metadata({'counts': json.dumps(counts)})
    self._write(self._path(self.done), lambda path: pq.write_table(table, path))
    self.done += 1

  def counts(self) -> dict[str, int]:
    """The sums of the counts of all parts, one at least."""
    each = (pq.read_schema(self._path(n)).metadata for n in range(self.done))
    found = [json.loads(metadata[b'counts']) for metadata in each]
    return {name: sum(one[name] for one in found) for name in found[0]}

  def join(self, user: str, memory_limit: str) -> int:
    """Writes the output, a part after the other, and removes the parts.

    Args:
      user: the column of users. memory_limit: of DuckDB.

    Returns:
      How many different users there are in the output.
    """
    paths = ', '.join(literal(self._path(n)) for n in range(self.done))
    parts = f'read_parquet([{paths}])'
    form = 'csv, HEADER' if self._output.suffix == '.csv' else 'parquet'
    with interactions.connect(Path(':memory:'), memory_limit, self.folder / 'spill') as db:
      db.execute('SET threads = 1')  # so that the bytes are the same each time
      users = scalar(db, f'SELECT count(DISTINCT {identifier(user)}) FROM {parts}')

      def write(path):
        db.execute(f'COPY (SELECT * FROM {parts}) TO {literal(path)} (FORMAT {form})')

      try:
        self._write(self.folder / 'joined', write)
      except duckdb.IOException as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
          f'{self._output}: cannot be written ({reason}); make room, the same command goes on'
        ) from error
    os.replace(self.folder / 'joined', self._output)
    shutil.rmtree(self.folder)
    return users
