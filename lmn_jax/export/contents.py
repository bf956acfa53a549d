"""The arrays and vocabularies of an export's folder (layout: runtime/manifest.py)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data import texts, vocabulary
from lmn_jax.data.store import Store
from lmn_jax.export.runtime import ids


def write_tables(
  folder: Path, tables: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, str]]:
  """Writes stored tables, and returns the files: table -> part -> path in the export."""
  folder.mkdir()
  files: dict[str, dict[str, str]] = {}
  for name, table in tables.items():
    files[name] = {}
    for part, x in table.items():
      file = f'{name}.npy' if part == 'rows' else f'{name}.{part}.npy'
      np.save(folder / file, x, allow_pickle=False)
      files[name][part] = f'tables/{file}'
  return files


def write_ids(folder: Path, columns: Iterable[pa.ChunkedArray | pa.Array]) -> None:
  """Writes raw ids in the format of `ids.Ids`; null, the unknown id, is an empty text.

  Ids of stores of earlier versions are normalised as texts.py does it.

  Args:
    folder: to create. columns: the ids by row, in pieces.
  """
  folder.mkdir(parents=True)
  sizes, hashes = [0], []
  with (folder / 'text.bin').open('wb') as file:
    for column in columns:
      for raw in column.to_pylist():
        text = texts.value(raw, frozenset()).encode('utf-8')
        file.write(text)
        sizes.append(len(text))
        hashes.append(ids.hash_of(text))
  hash_V = np.array(hashes, np.uint64)
  order_V = np.argsort(hash_V, kind='stable').astype(np.int32)
  np.save(folder / 'offsets.npy', np.cumsum(np.array(sizes, np.int64)))
  np.save(folder / 'hashes.npy', hash_V[order_V])
  np.save(folder / 'order.npy', order_V)


def write_features(
  folder: Path, data: ml_collections.ConfigDict, store: Store
) -> dict[str, dict[str, Any]]:
  """Writes the features' vocabularies, and the items' codes and numbers by index.

  Returns:
    The description of each feature for the manifest, by key.
  """
  features = {}
  for feature in vocabulary.features_of(data):
    key = feature.key
    number = {}
    if feature.coded:
      write_ids(folder / 'vocabulary' / key, [store.raw_ids(key)])
    else:
      number = {'number': store.manifest['numeric'][key]}
    features[key] = dict(
      kind=feature.kind,
      name=feature.name,
      separator=feature.separator,
      width=store.widths.get(key, 0),
      edges=store.manifest['bins'].get(key),
      **number,
    )
  (folder / 'items').mkdir()
  for key, codes in store.items.items():
    np.save(folder / f'items/{key}.npy', codes)
  return features


def write_users(folder: Path, store: Store, keep: int) -> None:
  """Writes all users of the log.

  Args:
    folder: of the export. store: the data. keep: newest events to write of each user, 0 for all. Of
      the events before, each item is written once, since the user has met it.
  """
  write_ids(folder / 'vocabulary/user', [store.user_ids(k) for k in range(len(store.parts))])
  columns: dict[str, list[np.ndarray]] = {}
  for part in store.parts:
    offset, count = part.users['offset'], part.users['count']
    size = np.minimum(count, keep) if keep else count
    newest = _spans(offset + count - size, size)
    met, met_count = _distinct(part.history['item'], offset, count - size)
    user_columns = dict(
      row=part.users['row'], history=part.history['item'][newest],
      event_time=part.history['time'][newest], count=size, met=met, met_count=met_count,
      **{key: part.users[key] for key in store.fields('user')},
      **{key: part.history[key][newest] for key in store.fields('event')},
    )  # fmt: skip
    for name, column in user_columns.items():
      columns.setdefault(name, []).append(column)
  whole = {name: np.concatenate(pieces) for name, pieces in columns.items()}
  for count, offset in (('count', 'offset'), ('met_count', 'met_offset')):
    whole[offset] = np.concatenate([[0], np.cumsum(whole.pop(count))])
  (folder / 'users').mkdir()
  for name, x in whole.items():
    np.save(folder / f'users/{name}.npy', x)


def _spans(first, size):
  """Returns the indices of spans, concatenated."""
  return np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())


def _distinct(item, first, size):
  """Returns the distinct known items of each user's span, concatenated, and their numbers."""
  user = np.repeat(np.arange(len(size), dtype=np.int64), size)
  rows = item[_spans(first, size)].astype(np.int64)
  pairs = np.unique((user << 32 | rows)[rows > 0])
  return (pairs & 0xFFFFFFFF).astype(np.int32), np.bincount(pairs >> 32, minlength=len(size))
