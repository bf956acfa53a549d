"""Builds a store from staged tables.

`plan` codes and stages the rows, `parts.write_part` writes each part, and `seal` writes the
manifest. `build` does all three in one process. With several writers, one calls `plan`, each calls
`write_part` for its parts, and one calls `seal`.
"""

import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import quote

import duckdb
import ml_collections
import numpy as np
import pyarrow as pa

from lmn_jax.data import (
  cold_items,
  label_counts,
  labels,
  named_histories,
  numeric,
  parts,
  vectors,
)
from lmn_jax.data import vocabulary as vocabularies
from lmn_jax.data.arrow_files import codes_of, manifest_entry, numbers_of, write_arrow
from lmn_jax.data.readers.cells import identifier, literal
from lmn_jax.data.splits import SPLITS, person, place, scalar
from lmn_jax.data.store import SCHEMA, sealed_files
from lmn_jax.errors import UserError


def build(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  notes: dict,
  folder: str | Path,
  signature: dict | None = None,
) -> Path:
  """Builds a store from the tables `interactions`, `users` and `items` of `db`.

  Args:
    data: the data config.
    db: as `interactions.stage` leaves it; gets the tables of `splits` and `vocabulary`.
    notes: JSON-able counts of the reading, stored in the manifest.
    folder: the store to create; must not exist.
    signature: of the log and config, stored in the manifest.

  Returns:
    `folder`.
  """
  folder = Path(folder)
  scratch = folder.with_name(folder.name + '.staged')
  scratch.mkdir(parents=True)
  try:
    planned = plan(data, db, folder, scratch, notes)
    written = [parts.write_part(scratch, folder, part) for part in range(len(planned['parts']))]
    seal(folder, planned, written, notes, signature or {})
  finally:
    shutil.rmtree(scratch)
  return folder


def plan(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  folder: Path,
  scratch: Path,
  notes: dict | None = None,
) -> dict:
  """Codes the rows, writes vocabularies and items, and stages rows and users by part as Parquet.

  Args:
    data: the data config. db: has `interactions`, `users` and `items`.
    folder: the store to create. scratch: an empty folder that every writer of parts can read.
    notes: of the reading; `time` is the log's clock, by which times of the config are read.

  Returns:
    What the writers and the manifest need, also written as `scratch/plan.json`.
  """
  if data.negatives < 0:
    raise UserError(f'config.data.negatives={data.negatives} must be 0 (none) or more')
  features = vocabularies.features_of(data)
  # Every result is ordered explicitly; not keeping the order of insertion saves memory.
  db.execute('SET preserve_insertion_order = false')
  protocol = place(data, db, notes or {})
  histories = named_histories.behaviours_of(data)
  _check_rows(data, db, histories)
  ranges = vocabularies.number_users(data, db)
  vocabulary = {kind: vocabularies.make_vocabulary(data, db, kind) for kind in ('user', 'item')}
  cold = cold_items.create(data, db, vocabulary['item'])
  coded = [feature for feature in features if feature.coded]
  codes = {feature.key: vocabularies.encode(data, db, feature) for feature in coded}
  vocabulary |= {key: code['vocabulary'] for key, code in codes.items()}
  widths = {key: code['width'] for key, code in codes.items()}
  names, files = _write_vocabularies(db, coded, folder)
  files['items.arrow'] = _write_items(db, features, vocabulary, cold, widths, folder)
  files |= cold_items.write(db, folder) if cold else {}
  vectors_of, vector_files = vectors.write(data, db, vocabulary, cold, folder)
  _stage(data, db, features, vocabulary, widths, scratch)
  planned = dict(
    parts=ranges,
    items=vocabulary['item'],
    cold_items=cold,
    negatives=data.negatives,
    seed=data.seed,
    memory_limit=data.memory_limit,
    events_before_cut=scalar(db, 'SELECT count(*) FROM interactions WHERE history'),
    protocol=protocol,
    vocabulary=vocabulary,
    vocabulary_files=names,
    widths=widths,
    **_of_features(db, features, codes),
    vectors=vectors_of,
    histories=histories,
    labels=list(labels.names(data)),
    label_kind=data.label_kind,
    weighted=bool(data.weight),
    files=files | vector_files,
  )
  (scratch / 'plan.json').write_text(json.dumps(planned))
  return planned


def _of_features(
  db: duckdb.DuckDBPyConnection, features: list[vocabularies.Feature], codes: dict[str, dict]
) -> dict:
  """What the manifest has of features: keys of the coded ones by kind, edges of bins, numbers."""
  coded = [feature for feature in features if feature.coded]
  kinds = ['user', 'item', 'context', *(['event'] if any(f.kind == 'event' for f in coded) else [])]
  return dict(
    features={kind: [f.key for f in coded if f.kind == kind] for kind in kinds},
    bins={f.key: codes[f.key]['edges'] for f in features if f.bins},
    numeric={f.key: vocabularies.fit_number(db, f) for f in features if not f.coded},
  )


def _check_rows(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  histories: dict[str, tuple[str, ...]],
) -> None:
  """Refuses weights that are 0 for all examples of training, and a named history without events."""
  training = 'FROM placed WHERE example AND split = 0'
  if data.weight and scalar(db, f'SELECT max({identifier(labels.WEIGHT)}) {training}') == 0:
    rows = scalar(db, f'SELECT count(*) {training}')
    raise UserError(
      f'config.data.weight={data.weight!r} is 0 in all {rows} training examples; name another '
      'column, or correct the weights'
    )
  for name, behaviours in histories.items():
    column = identifier(named_histories.staged_column(name))
    if not scalar(db, f'SELECT count(*) FROM placed WHERE history AND {column}'):
      raise UserError(
        f'config.data.histories.{name}={behaviours!r} has no event: with '
        f'config.data.history={data.history!r} and config.data.max_history={data.max_history} no '
        "row with these behaviours is a history event; set config.data.history='all', or remove it"
      )


def seal(folder: str | Path, planned: dict, written: list[dict], notes: dict, signature: dict):
  """Writes manifest.json, which makes a folder of parts a store.

  `fingerprint` is the sha256 of the manifest, which has the hashes of all files, without what
  depends on the place of the log: its signature, and the notes that list files. `content` is the
  sha256 of the files alone, which earlier versions used as the fingerprint.

  Args:
    folder: the store.
    planned: the result of `plan`.
    written: the entries of all parts, in any order.
    notes: stored as they are.
    signature: stored as it is.
  """
  written = sorted(written, key=lambda part: part['folder'])
  manifest = dict(
    schema=SCHEMA,
    protocol=planned['protocol'],
    counts=_counts(written, planned['events_before_cut']),
    **{
      name: planned[name]
      for name in ('vocabulary', 'vocabulary_files', 'features', 'widths', 'bins', 'files')
    },
    # A store without any of these has the manifest of earlier versions.
    **{
      name: planned[name]
      for name in ('numeric', 'vectors', 'histories', 'cold_items')
      if planned[name]
    },
    parts=written,
    notes=notes,
    signature=signature,
  )
  if len(planned['labels']) > 1:
    manifest['labels'] = planned['labels']
  if planned['label_kind'] != 'click':
    manifest['label_kind'] = planned['label_kind']
  checksums = ''.join(f'{name} {file["sha256"]}\n' for name, file in sealed_files(manifest))
  manifest['content'] = hashlib.sha256(checksums.encode()).hexdigest()
  counts = {name: note for name, note in notes.items() if not isinstance(note, list)}
  text = json.dumps(manifest | {'notes': counts, 'signature': None}, sort_keys=True)
  manifest['fingerprint'] = hashlib.sha256(text.encode()).hexdigest()
  (Path(folder) / 'manifest.json').write_text(json.dumps(manifest, indent=1))


def _counts(written: list[dict], events_before_cut: int) -> dict:
  """The counts of the whole store. written: the entries of its parts."""

  def total(name: str) -> int:
    return sum(part[name] for part in written)

  def by_split(name: str) -> dict[str, int]:
    return {split: sum(part[name][split] for part in written) for split in SPLITS}

  examples, logged = by_split('examples'), by_split('logged')
  unknown = {
    kind: {split: n / max(1, logged[split]) for split, n in by_split(f'unknown_{kind}s').items()}
    for kind in ('user', 'item')
  }
  counts = dict(
    users=total('users'),
    users_without_history=total('users_without_history'),
    events=total('events'),
    cut_events=events_before_cut - total('events'),
    examples=examples,
    **({'clicks': by_split('clicks')} if 'clicks' in written[0] else {}),
    negatives=sum(examples.values()) - sum(logged.values()),
    # Rows without another item of their kind to sample, see negatives.with_negatives.
    examples_left_out=total('left_out'),
    # Share of the logged examples whose user or item has no index but 0.
    out_of_vocabulary=unknown,
  )
  if 'cold_items' in written[0]:  # shares of the logged examples
    cold = by_split('cold_items')
    counts['cold_items'] = {split: n / max(1, logged[split]) for split, n in cold.items()}
  if 'labels' in written[0]:
    counts['labels'] = label_counts.total([part['labels'] for part in written])
  return counts


def _stage(
  data: ml_collections.ConfigDict,
  db: duckdb.DuckDBPyConnection,
  features: list[vocabularies.Feature],
  vocabulary: dict[str, int],
  widths: dict[str, int],
  scratch: Path,
) -> None:
  """Writes the coded users and rows as Parquet, in a folder for each part."""

  def copy(name: str, query: str) -> None:
    folder = literal(scratch / name)
    db.execute(f'COPY ({query}) TO {folder} (FORMAT parquet, PARTITION_BY (part))')

  def joins_of(kinds: tuple[str, ...], table: str) -> tuple[str, str]:
    return _joins([f for f in features if f.kind in kinds], table, vocabulary, widths)

  joins, columns = joins_of(('user',), 'users')
  copy(
    'users',
    f"""SELECT records.part, records.position, records.user,
      coalesce(vocabulary_user.code, 0) AS row {columns}
    FROM records LEFT JOIN vocabulary_user ON vocabulary_user.id = {person(data, 'records.user')}
    LEFT JOIN users ON users.user = {person(data, 'records.user')} {joins}""",
  )
  joins, columns = joins_of(('context', 'event'), 'placed')
  more = [labels.column_of(name) for name in labels.names(data)[1:]]
  more += [labels.WEIGHT] if data.weight else []
  more += map(named_histories.staged_column, data.histories)
  more = ''.join(f', placed.{identifier(name)}' for name in more)
  copy(
    'rows',
    f"""SELECT records.part, records.position AS user, coalesce(index_item.code, 0) AS item,
      placed.time, placed.row, placed.label, placed.history, placed.example, placed.split
      {more} {columns}
    FROM placed JOIN records ON records.user = placed.user
    LEFT JOIN index_item ON index_item.id = placed.item {joins}""",
  )


def _joins(
  features: list[vocabularies.Feature],
  table: str,
  vocabulary: dict[str, int],
  widths: dict[str, int],
) -> tuple[str, str]:
  """Returns SQL that joins each feature's codes to `table`: the joins, and ', column...'.

  The column of a number is FLOAT, NULL where it is missing.
  """
  joins = columns = ''
  for feature in features:
    k, key, raw = feature.table, feature.key, f'{table}.{identifier(feature.column)}'
    if not feature.coded:
      columns += f', {numeric.value_sql(raw)} AS {identifier(key)}'
      continue
    unknown = '0::INTEGER'
    if widths[key]:
      unknown = f'list_resize([0::INTEGER], {widths[key]}, {vocabulary[key]}::INTEGER)'
    joins += f' LEFT JOIN codes_{k} ON codes_{k}.raw = {raw}'
    columns += f', coalesce(codes_{k}.code, {unknown}) AS {identifier(key)}'
  return joins, columns


def _write_vocabularies(
  db: duckdb.DuckDBPyConnection, features: list[vocabularies.Feature], folder: Path
) -> tuple[dict[str, str], dict[str, dict]]:
  """Writes the raw ids of each vocabulary by embedding row; row 0 is null.

  Returns:
    Vocabulary -> its file, relative to `folder`; file -> its entry in the manifest.
  """
  (folder / 'vocabulary').mkdir(parents=True)
  tables = {'user': 'user', 'item': 'item'} | {f.key: str(f.table) for f in features}
  names = {key: f'vocabulary/{quote(key, safe="")}.arrow' for key in tables}
  schema, entries = pa.schema([pa.field('id', pa.large_string())]), {}
  for key, table in tables.items():
    query = f"""SELECT id FROM (SELECT NULL AS id, 0 AS code UNION ALL
      SELECT id, code FROM vocabulary_{table}) ORDER BY code"""
    path = folder / names[key]
    with pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_file(sink, schema) as writer:
      for batch in db.sql(query).to_arrow_reader():
        writer.write_batch(batch.cast(schema))
    entries[names[key]] = manifest_entry(path)
  return names, entries


def _write_items(
  db: duckdb.DuckDBPyConnection,
  features: list[vocabularies.Feature],
  vocabulary: dict[str, int],
  cold: int,
  widths: dict[str, int],
  folder: Path,
) -> dict:
  """Writes the item features by index, [V + 1 + C] each: row 0 is unknown, row V padding.

  Both are NaN in a column of numbers.
  """
  features = [feature for feature in features if feature.kind == 'item']
  joins, columns = _joins(features, 'items', vocabulary, widths)
  table = db.sql(
    f"""SELECT index_item.code AS index {columns} FROM index_item
    LEFT JOIN items ON items.item = index_item.id {joins} ORDER BY index_item.code"""
  ).to_arrow_table()
  index, arrays, size = codes_of(table, 'index'), {}, vocabulary['item'] + 1 + cold
  for feature in features:
    if not feature.coded:
      numbers = np.full(size, np.nan, np.float32)
      numbers[index] = numbers_of(table, feature.key)
      arrays[feature.key] = numbers
      continue
    padding, width = vocabulary[feature.key], widths[feature.key]
    codes = np.full((size, max(1, width)), padding, np.int32)
    codes[0, 0] = 0  # an unknown list is one unknown token
    codes[index] = codes_of(table, feature.key, width).reshape(-1, max(1, width))
    arrays[feature.key] = codes if width else codes[:, 0]
  return write_arrow(folder / 'items.arrow', arrays)
