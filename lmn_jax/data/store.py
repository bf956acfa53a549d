"""The history store: every history once per user, in memory-mapped Arrow files.

    manifest.json                       what it holds; seals the other files by size and sha256
    vocabulary/<name>.arrow             raw ids, row r is embedding row r; row 0 (null) the unknown
    items.arrow                         item features by embedding row, row V is the padding
    part-00000/users.arrow              user_id, row, offset, count, user.<feature>...
              /history.arrow            item, time; by (user record, time, original row)
              /examples.arrow           user, item, label, time, end, place, split, context.<f>...

An example's history is events `[offset, offset + end)` of its user; `place` is its own among the
user's events, -1 if it is none (stores made before have no such column). A column is one contiguous
piece of its file, so that it is read as a numpy view of the map, without a copy. A user's record
(its position over all parts) is not its embedding row: records exist for users that training
never saw, whose row is 0.
"""

import json
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmn_jax import files
from lmn_jax.data import times
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError

SCHEMA = 1  # raise when the layout or the meaning of a column changes


class Part(NamedTuple):
  """One part's columns, memory-mapped. U users, N events, E examples."""

  first: int  # record of its first user
  users: dict[str, np.ndarray]  # row i32, offset i64, count i64, user.<f> i32 [U] or [U, M]
  history: dict[str, np.ndarray]  # item i32, time i64 [N]
  examples: dict[str, np.ndarray]  # user i32 (within the part), item i32, label f32, time i64,
  # end i64, place i64, split i8, context.<f> i32; the examples of a split lie together
  bounds: dict[str, tuple[int, int]]  # split -> its examples, from and to


class Store:
  """An open store, read-only. While it is open, `--mode=prune` of another process leaves it alone.

  Attributes:
    path: its folder.
    manifest: all of manifest.json.
    vocabulary: name -> V, for 'user', 'item' and every feature ('item.category'); V is also the
      padding id.
    features: 'user' | 'item' | 'context' -> keys of the features, such as ('item.category',).
    widths: feature -> M, the ids of a multi-valued feature, 0 for a plain one.
    items: item feature -> i32 [V + 1] or [V + 1, M]; the last row is the padding.
    parts: list of Part.
    examples: split -> number of examples.
    protocol: how the log was split, to be printed beside every number.
    fingerprint: sha256 of all that it holds and says of it, see `build.seal`.
  """

  def __init__(self, path: str | Path):
    """Opens a store and checks each file's size.

    Raises:
      UserError: no store there, another schema, a file missing or truncated.
    """
    self.path = Path(path)
    self.manifest = read_manifest(self.path)
    if self.manifest['schema'] != SCHEMA:
      raise UserError(
        f'{self.path}: store of schema {self.manifest["schema"]}, this program reads {SCHEMA}; '
        'run --mode=prepare to build it again'
      )
    for name, sealed in sealed_files(self.manifest):
      _check(self.path, name, sealed['bytes'])
    weakref.finalize(self, os.close, files.share_lock(self.path / 'manifest.json'))
    self._files = self._look()
    self.vocabulary: dict[str, int] = self.manifest['vocabulary']
    self.features: dict[str, tuple[str, ...]] = {
      kind: tuple(keys) for kind, keys in self.manifest['features'].items()
    }
    self.widths: dict[str, int] = self.manifest['widths']
    self.examples: dict[str, int] = self.manifest['counts']['examples']
    self.protocol: str = self.manifest['protocol']
    self.fingerprint: str = self.manifest['fingerprint']
    self.items = read_arrow(self.path / 'items.arrow')
    self.parts = [self._open(part) for part in self.manifest['parts']]

  def check_unchanged(self) -> None:
    """Refuses to go on with a store whose files were replaced or written to since it was opened.

    Raises:
      UserError: naming the first such file.
    """
    for name, found in self._look().items():
      if found != self._files[name]:
        raise UserError(
          f'{self.path / name} was changed while it is read; what was read since the last '
          'checkpoint may be of either content: start again, and leave the store alone meanwhile'
        )

  def _look(self) -> dict[str, tuple[int, int, int] | None]:
    """Of every sealed file what changes when it does."""
    found: dict[str, tuple[int, int, int] | None] = {}
    for name, _ in sealed_files(self.manifest):
      try:
        file = (self.path / name).stat()
        found[name] = file.st_ino, file.st_size, file.st_mtime_ns
      except FileNotFoundError:
        found[name] = None
    return found

  def _open(self, entry: dict) -> Part:
    folder = self.path / entry['folder']
    bounds, start = {}, 0
    for split, count in entry['examples'].items():
      bounds[split] = (start, start + count)
      start += count
    return Part(
      entry['first'],
      read_arrow(folder / 'users.arrow'),
      read_arrow(folder / 'history.arrow'),
      read_arrow(folder / 'examples.arrow'),
      bounds,
    )

  @property
  def clock(self) -> Clock:
    """The unit and the form of the log's times, and the least and the greatest of them."""
    notes = self.manifest['notes']
    data = self.manifest['signature'].get('config.data', {})
    first, last = 0, 0
    if 'time' not in notes:  # of an older store: found in the columns
      columns = [table['time'] for part in self.parts for table in (part.history, part.examples)]
      ranges = [(int(x.min()), int(x.max())) for x in columns if len(x)]
      first, last = min(least for least, _ in ranges), max(most for _, most in ranges)
    return times.clock_of(notes, data.get('time_format', ''), first, last)

  @property
  def spelt(self) -> bool:
    """Whether raw ids are spelt as in the log: of a store from before texts.py."""
    return 'missing_words' not in self.manifest['notes']

  def raw_times(self, time: np.ndarray) -> pa.Array:
    """Times as a file has them: numbers as in the log, of texts timestamps in UTC.

    Args:
      time: int64 [N], as in the columns of the store.
    """
    clock = self.clock
    if clock.form in ('number', 'position'):
      return pa.array(time / clock.per_unit if clock.per_unit > 1 else time)
    return pa.array(time, pa.timestamp('us', 'UTC'))

  def raw_ids(self, name: str) -> pa.ChunkedArray:
    """The raw ids [V] of a vocabulary by embedding row; row 0, the unknown, is null."""
    path = self.path / self.manifest['vocabulary_files'][name]
    with pa.memory_map(str(path)) as source:
      return pa.ipc.open_file(source).read_all().column('id')

  def user_ids(self, part: int) -> pa.Array:
    """The raw ids [U] of a part's user records."""
    path = self.path / self.manifest['parts'][part]['folder'] / 'users.arrow'
    with pa.memory_map(str(path)) as source:
      return pa.ipc.open_file(source).get_batch(0).column('user_id')

  def raw_users(self) -> pa.ChunkedArray:
    """The raw id of each record's user, over all parts.

    Where rows bring their histories (config.data.row_history) a user has several records, and
    `user_ids` has a null byte and a number behind the id of all but the newest.
    """
    ids = pa.chunked_array([self.user_ids(number) for number in range(len(self.parts))])
    if 'row_histories' not in self.manifest['notes']:
      return ids
    return pc.list_element(pc.split_pattern(ids, '\0', max_splits=1), 0)

  def users(self) -> np.ndarray:
    """Which user each record is of, int32 [records]: a number below that of the records."""
    if 'row_histories' not in self.manifest['notes']:
      return np.arange(self.manifest['counts']['users'], dtype=np.int32)
    return self.raw_users().combine_chunks().dictionary_encode().indices.to_numpy()


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


def read_manifest(path: Path) -> dict:
  """Reads manifest.json.

  Raises:
    UserError: there is none, or it is damaged.
  """
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    if not isinstance(manifest, dict) or 'schema' not in manifest:
      raise ValueError('no manifest of a store')
    return manifest
  except FileNotFoundError:
    raise UserError(f'{path}: no store (no manifest.json); run --mode=prepare first') from None
  except ValueError as error:
    raise UserError(
      f'{path}/manifest.json: damaged ({error}); delete the folder and run --mode=prepare again'
    ) from None


def sealed_files(manifest: dict) -> list[tuple[str, dict]]:
  """Every file of a store, relative to its folder, with its bytes and sha256, in fixed order."""
  files = sorted(manifest['files'].items())
  for part in manifest['parts']:
    files += [(f'{part["folder"]}/{name}', seal) for name, seal in sorted(part['files'].items())]
  return files


def _check(folder: Path, name: str, size: int):
  path = folder / name
  if not path.resolve().is_relative_to(folder.resolve()):
    raise UserError(f'{folder}/manifest.json: {name!r} leads out of the store; delete the folder')
  found = path.stat().st_size if path.is_file() else None
  if found != size:
    state = 'missing' if found is None else f'{found} bytes found'
    raise UserError(
      f'{path}: {state}, {size} bytes expected; run --mode=prepare again or delete {folder}'
    )
