"""Cold items: those outside of the vocabulary with features or a vector (config.data.cold_items).

They get the indices V + 1 to V + C (item_index.py), in the order of the raw ids. An item is outside
of the vocabulary if it is not in training, or in fewer rows of it than `min_count`.
"""

from pathlib import Path

import duckdb
import ml_collections
import pyarrow as pa

from lmn_jax.data import texts, vectors
from lmn_jax.data.arrow_files import write_arrow
from lmn_jax.data.readers.cells import identifier
from lmn_jax.data.splits import scalar
from lmn_jax.data.vocabulary import check_rows
from lmn_jax.errors import UserError

FILE = 'cold_items.arrow'


def create(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection, V: int) -> int:
  """Creates `cold_item(id, code)`, and `index_item(id, code)` of all items with an index.

  Args:
    data: config.data. db: has `items` and `vocabulary_item`. V: of the items.

  Returns:
    C; 0 without config.data.cold_items.

  Raises:
    UserError: there are no features and no vectors of items, a file of vectors cannot be read, or
      there are more items than int32 can number.
  """
  db.execute('CREATE TABLE known_items (id VARCHAR)')
  if data.cold_items:
    _find(data, db)
  db.execute(
    f"""CREATE TABLE cold_item AS SELECT id, {V:d} + row_number() OVER (ORDER BY id) AS code
    FROM (SELECT DISTINCT id FROM known_items WHERE id IS NOT NULL)
    WHERE id NOT IN (SELECT id FROM vocabulary_item)"""
  )
  db.execute(
    """CREATE VIEW index_item AS
    SELECT id, code FROM vocabulary_item UNION ALL SELECT id, code FROM cold_item"""
  )
  count = scalar(db, 'SELECT count(*) FROM cold_item')
  check_rows('vocabulary item with cold items', V + 1 + count)
  return count


def _find(data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection) -> None:
  """Fills `known_items` with the items that have a value of any feature, or a vector."""
  sources = [source for source in vectors.sources_of(data) if source.kind == 'item']
  if not data.item_features and not sources:
    raise UserError(
      'config.data.cold_items=True needs something that is known of an item besides its id; name '
      'config.data.item_features or item_vectors, or set it to False'
    )
  if data.item_features:
    known = ' OR '.join(f'{identifier(name)} IS NOT NULL' for name in data.item_features)
    db.execute(f'INSERT INTO known_items SELECT item FROM items WHERE {known}')
  for source in sources:
    db.register('vector_ids', pa.table({'raw': vectors.ids_of(source)}))
    raw_id = texts.value_sql('raw', data.missing)
    db.execute(f'INSERT INTO known_items SELECT {raw_id} FROM vector_ids')
    db.unregister('vector_ids')


def write(db: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, dict]:
  """Writes the raw ids [C] of the cold items, by index; returns the entry of the file."""
  ids = db.sql('SELECT id FROM cold_item ORDER BY code').to_arrow_table().column('id')
  return {FILE: write_arrow(folder / FILE, {'id': ids.combine_chunks().cast(pa.large_string())})}
