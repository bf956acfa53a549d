"""The history store: the history of each user, stored once, in memory-mapped Arrow files.

    manifest.json                       the contents; size and sha256 of the other files
    vocabulary/<name>.arrow             raw ids by embedding row; row 0 (null) is the unknown id
    items.arrow                         item features by index, see item_index.py
    cold_items.arrow                    raw ids of cold items, if there are any
    vectors/<key>.npy                   vectors by embedding row or item index, see vectors.py
    part-00000/users.arrow              user_id, row, offset, count, user.<feature>...
              /history.arrow            item, time, event.<f>...; by (user record, time, row)
              /examples.arrow           user, item, label, time, end, place, split, context.<f>...
              /history.<name>.arrow     the same columns of the events of a named history

The history of an example is the events `[offset, offset + end)` of its user. `place` is the place
of the example among the user's events, -1 if it is no event; stores of earlier versions do not have
this column. Items are indices (item_index.py). Features are int32 codes of a vocabulary, or float32
numbers as in the log, NaN where one is missing; the manifest's `numeric` has their shift and scale.
With sample weights, examples.arrow has `weight`, too; with several labels `label` is the main one,
and `label.<name>` each other one, NaN where it is missing. A named history has in users.arrow
`offset.<name>` and `count.<name>`, and in examples.arrow `end.<name>`, see named_histories.py. A
column is one contiguous piece of its file, so it is read as a numpy view of the map, without a
copy. A user's record (the position over all parts) is not the user's embedding row: users that
training never saw have a record, too, and their row is 0.
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
from lmn_jax.data.arrow_files import read_arrow
from lmn_jax.data.named_histories import column_of
from lmn_jax.data.times import Clock
from lmn_jax.errors import UserError

SCHEMA = 1  # raise when the layout or the meaning of a column changes


class Part(NamedTuple):
  """One part's columns, memory-mapped. U users, N events, E examples."""

  first: int  # the record of the part's first user
  users: dict[str, np.ndarray]  # row i32, offset i64, count i64, user.<f> i32 [U] or [U, M], f32
  history: dict[str, np.ndarray]  # item i32, time i64 [N], event.<f> i32 [N] or [N, M], f32 [N]
  examples: dict[str, np.ndarray]  # user i32 (within the part), item i32, label f32, time i64,
  # end i64, place i64, split i8, context.<f> i32 or f32, and if the log has them label.<name> f32
  # and weight f32; the examples of a split are contiguous
  bounds: dict[str, tuple[int, int]]  # split -> begin and end of its examples
  named: dict[str, dict[str, np.ndarray]]  # named history -> its events, as `history`

  def events(self, history: str) -> dict[str, np.ndarray]:
    """The events of a named history, or of the main one (named_histories.MAIN)."""
    return self.named[history] if history else self.history


class Store:
  """An open store, read-only. `--mode=prune` of another process does not remove an open store.

  Attributes:
    path: the folder.
    manifest: the content of manifest.json.
    vocabulary: name -> V, for 'user', 'item' and every feature with codes ('item.category'); V is
      also the padding id.
    features: 'user' | 'item' | 'context' | 'event' -> keys of the features with codes, such as
      ('item.category',); without the kind 'event' if it has none.
    numbers: kind -> keys of the features that are numbers; without kinds that have none.
    widths: feature -> M, the number of ids of a multi-valued feature, 0 for a plain one.
    cold_items: C, the number of cold items; 0 without config.data.cold_items.
    items: item feature -> i32 [I] or [I, M], or f32 [I], by index (item_index.py), I = V + 1 + C.
    vectors: key, such as 'item.image' -> float32 or float16 [V + 1, W], of items with cold ones
      [I + 1, W]; the last row is the padding. {} if there are none.
    parts: list of Part.
    examples: split -> number of examples.
    protocol: how the log was split, printed beside every metric.
    fingerprint: sha256 of the manifest and, through it, of all files, see `build.seal`.
  """

  def __init__(self, path: str | Path):
    """Opens a store and checks the size of each file.

    Raises:
      UserError: there is no store, it has another schema, or a file is missing or truncated.
    """
    self.path = Path(path)
    self.manifest = read_manifest(self.path)
    if self.manifest['schema'] != SCHEMA:
      raise UserError(
        f'{self.path}: store of schema {self.manifest["schema"]}, this version reads {SCHEMA}; run '
        '--mode=prepare to build a new store'
      )
    for name, entry in sealed_files(self.manifest):
      _check_file(self.path, name, entry['bytes'])
    weakref.finalize(self, os.close, files.share_lock(self.path / 'manifest.json'))
    self._states = self._file_states()
    self.vocabulary: dict[str, int] = self.manifest['vocabulary']
    self.features: dict[str, tuple[str, ...]] = {
      kind: tuple(keys) for kind, keys in self.manifest['features'].items()
    }
    self.numbers: dict[str, tuple[str, ...]] = {}
    for key in self.manifest.get('numeric', {}):
      kind = key.partition('.')[0]
      self.numbers[kind] = (*self.numbers.get(kind, ()), key)
    self.widths: dict[str, int] = self.manifest['widths']
    self.examples: dict[str, int] = self.manifest['counts']['examples']
    self.protocol: str = self.manifest['protocol']
    self.fingerprint: str = self.manifest['fingerprint']
    self.cold_items: int = self.manifest.get('cold_items', 0)
    self.items = read_arrow(self.path / 'items.arrow')
    self.vectors: dict[str, np.ndarray] = {
      key: np.load(self.path / entry['file'], mmap_mode='r', allow_pickle=False)
      for key, entry in self.manifest.get('vectors', {}).items()
    }
    self.parts = [self._open(part) for part in self.manifest['parts']]

  def check_unchanged(self) -> None:
    """Checks that no file was replaced or written to since the store was opened.

    Raises:
      UserError: names the first such file.
    """
    for name, state in self._file_states().items():
      if state != self._states[name]:
        raise UserError(
          f'{self.path / name} was changed while it was in use; batches since the last checkpoint '
          'may be of either content; run the command again, and do not change the store meanwhile'
        )

  def _file_states(self) -> dict[str, tuple[int, int, int] | None]:
    """Inode, size and time of each file of the manifest; None for a missing file."""
    states: dict[str, tuple[int, int, int] | None] = {}
    for name, _ in sealed_files(self.manifest):
      try:
        stat = (self.path / name).stat()
        states[name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
      except FileNotFoundError:
        states[name] = None
    return states

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
      {name: read_arrow(folder / f'{column_of(name, "history")}.arrow') for name in self.histories},
    )

  @property
  def histories(self) -> dict[str, list[str]]:
    """The behaviours of each named history; {} if there are none."""
    return self.manifest.get('histories', {})

  def fields(self, kind: str) -> tuple[str, ...]:
    """The keys of all features of a kind: those with codes, then the numbers."""
    return *self.features.get(kind, ()), *self.numbers.get(kind, ())

  @property
  def has_item_vectors(self) -> bool:
    """Whether items have vectors."""
    return any(key.startswith('item.') for key in self.vectors)

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of the labels, the main one first; ('label',) if there is only one."""
    return tuple(self.manifest.get('labels', ('label',)))

  @property
  def label_kind(self) -> str:
    """'click' or 'number'."""
    return self.manifest.get('label_kind', 'click')

  @property
  def label_columns(self) -> tuple[str, ...]:
    """The columns of the examples with the labels, in the order of `labels`."""
    return 'label', *(f'label.{name}' for name in self.labels[1:])

  @property
  def weighted(self) -> bool:
    """Whether the examples have sample weights."""
    return 'weight' in self.parts[0].examples

  @property
  def clock(self) -> Clock:
    """The unit and the form of the log's times, and the earliest and the latest of them."""
    notes = self.manifest['notes']
    data = self.manifest['signature'].get('config.data', {})
    first, last = 0, 0
    if 'time' not in notes:  # a store of an earlier version: the columns have the range
      columns = [table['time'] for part in self.parts for table in (part.history, part.examples)]
      ranges = [(int(x.min()), int(x.max())) for x in columns if len(x)]
      first, last = min(least for least, _ in ranges), max(most for _, most in ranges)
    return times.clock_of(notes, data.get('time_format', ''), first, last)

  @property
  def spelt(self) -> bool:
    """Whether raw ids are spelt as in the log, as in stores of versions before data/texts.py."""
    return 'missing_words' not in self.manifest['notes']

  def raw_times(self, time: np.ndarray) -> pa.Array:
    """Converts times to the form of the log: its numbers, or timestamps in UTC for text.

    Args:
      time: int64 [N], as in the columns of the store.
    """
    clock = self.clock
    if clock.form in ('number', 'position'):
      return pa.array(time / clock.per_unit if clock.per_unit > 1 else time)
    return pa.array(time, pa.timestamp('us', 'UTC'))

  def raw_ids(self, name: str) -> pa.ChunkedArray:
    """The raw ids [V] of a vocabulary by embedding row; row 0, the unknown id, is null."""
    path = self.path / self.manifest['vocabulary_files'][name]
    with pa.memory_map(str(path)) as source:
      return pa.ipc.open_file(source).read_all().column('id')

  def raw_items(self) -> pa.ChunkedArray:
    """The raw ids of the items by index: [V], or [V + 1 + C] with a null for the padding."""
    known = self.raw_ids('item')
    if not self.cold_items:
      return known
    with pa.memory_map(str(self.path / 'cold_items.arrow')) as source:
      cold = pa.ipc.open_file(source).read_all().column('id')
    return pa.chunked_array([*known.chunks, pa.nulls(1, known.type), *cold.chunks])

  def user_ids(self, part: int) -> pa.Array:
    """The raw ids [U] of a part's user records."""
    path = self.path / self.manifest['parts'][part]['folder'] / 'users.arrow'
    with pa.memory_map(str(path)) as source:
      return pa.ipc.open_file(source).get_batch(0).column('user_id')

  def raw_users(self) -> pa.ChunkedArray:
    """The raw user id of each record, over all parts.

    Where each row has its own history (config.data.row_history), a user has several records. All
    but the newest have a null byte and a number behind the id in `user_ids`; they are removed here.
    """
    ids = pa.chunked_array([self.user_ids(number) for number in range(len(self.parts))])
    if 'row_histories' not in self.manifest['notes']:
      return ids
    return pc.list_element(pc.split_pattern(ids, '\0', max_splits=1), 0)

  def users(self) -> np.ndarray:
    """A number of the user of each record, int32 [records], below the number of records."""
    if 'row_histories' not in self.manifest['notes']:
      return np.arange(self.manifest['counts']['users'], dtype=np.int32)
    return self.raw_users().combine_chunks().dictionary_encode().indices.to_numpy()


def read_manifest(path: Path) -> dict:
  """Reads manifest.json of a store's folder.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    if not isinstance(manifest, dict) or 'schema' not in manifest:
      raise ValueError('no manifest of a store')
    return manifest
  except FileNotFoundError:
    raise UserError(f'{path} is not a store (no manifest.json); run --mode=prepare first') from None
  except ValueError as error:
    raise UserError(
      f'{path}/manifest.json is damaged ({error}); delete the folder and run --mode=prepare again'
    ) from None


def sealed_files(manifest: dict) -> list[tuple[str, dict]]:
  """Each file of a store, relative to its folder, with its manifest entry, in fixed order."""
  entries = sorted(manifest['files'].items())
  for part in manifest['parts']:
    folder = part['folder']
    entries += [(f'{folder}/{name}', entry) for name, entry in sorted(part['files'].items())]
  return entries


def _check_file(folder: Path, name: str, size: int):
  path = folder / name
  if not path.resolve().is_relative_to(folder.resolve()):
    raise UserError(
      f'{folder}/manifest.json: {name!r} is outside of the folder; delete the folder, and run '
      '--mode=prepare again'
    )
  actual = path.stat().st_size if path.is_file() else None
  if actual != size:
    state = 'is missing' if actual is None else f'has {actual} bytes'
    raise UserError(
      f'{path} {state}, {size} bytes expected; run --mode=prepare again or delete {folder}'
    )
