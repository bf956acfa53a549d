"""JSON lines: one object per line."""

from pathlib import Path

import duckdb

from lmn_jax.data.readers import cells, text_files
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import LONGEST_HISTORY, Reader, Source
from lmn_jax.data.readers.table import Skipped, Table, empty_table, reading
from lmn_jax.data.readers.text import reject_options, rejected_lines
from lmn_jax.errors import UserError

JSON_KIND = "CASE WHEN json_valid(line) THEN json_type(line) ELSE 'none' END"


class JsonLines(Reader):
  """JSON lines: one object per line."""

  name, endings, encoded = 'jsonl', ('.json', '.jsonl', '.ndjson'), True

  def table(self, source, path, db, scratch):
    return json_table(source, path, db, scratch)


def json_table(source: Source, path: Path, db: duckdb.DuckDBPyConnection, scratch: Path) -> Table:
  """Returns the Table of a file of JSON lines; its columns are the keys of all lines.

  A key may occur first on a late line, and its values may differ in type. Lists are joined by their
  separator, other values become their text. A nested object is refused if its column is read.
  """
  local = text_files.as_utf8(
    path, source.encoding, source.settings.encoding, scratch, skip=source.skip
  )
  # DuckDB's JSON readers number lines wrongly in their errors and do not count the lines that they
  # skip. Its CSV reader does both. No JSON contains the delimiter \x01, so a line is one column.
  file = (
    f"read_csv({literal(local)}, auto_detect=false, header=false, delim='\x01', quote='', "
    f"escape='', max_line_size={LONGEST_HISTORY}, buffer_size={4 * LONGEST_HISTORY}, "
    f"columns={{'line': 'VARCHAR'}}{reject_options(source, path)})"
  )
  with reading(str(path), source.settings):
    names, not_objects = _scan(path, file, db)
  if not_objects.count and not source.skip:
    raise UserError(not_objects.first)
  keys = {key: k for k, key in enumerate(names)}
  lines = f"(SELECT line FROM {file} WHERE trim(line) <> '')"
  if not_objects.count:
    lines = f"(SELECT line FROM {file} WHERE trim(line) <> '' AND {JSON_KIND} = 'OBJECT')"

  def skipped(db: duckdb.DuckDBPyConnection) -> Skipped:
    rejected = rejected_lines(source, path, db)
    return Skipped(rejected.count + not_objects.count, not_objects.first or rejected.first)

  if not keys:
    return empty_table(path, local)._replace(skipped=skipped)
  columns = {key: cells.json_text(key, f'j{k}', source.multi) for key, k in keys.items()}
  values = {key: f"json_extract_string(j{k}, '$')" for key, k in keys.items()}
  lists = {key: cells.json_list(key, f'j{k}') for key, k in keys.items()}

  def relation(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    pointers = ', '.join(literal('/' + n.replace('~', '~0').replace('/', '~1')) for n in names)
    values = ', '.join(f'v[{k}] AS j{keys[n]}' for k, n in enumerate(names, 1))
    return f'(SELECT {values} FROM (SELECT json_extract(line, [{pointers}]) AS v FROM {lines}))'

  copy = None if local == path else local
  return Table(
    str(path), columns, relation, values, copy, lists=lists, settings=source.settings,
    skipped=skipped,
  )  # fmt: skip


def _scan(path: Path, file: str, db: duckdb.DuckDBPyConnection) -> tuple[list[str], Skipped]:
  """Returns the keys of all lines, in order of first occurrence, and counts lines of other JSON."""
  db.execute(
    f"""CREATE OR REPLACE TEMP TABLE json_shape AS
    SELECT kind, keys, count(*) AS n, min(number) AS first, arg_min(line, number) AS line FROM (
      SELECT number, left(line, 80) AS line, {JSON_KIND} AS kind,
        CASE WHEN {JSON_KIND} = 'OBJECT' THEN json_keys(line) END AS keys
      FROM (SELECT line, row_number() OVER () AS number FROM {file}) WHERE trim(line) <> ''
    ) GROUP BY kind, keys"""
  )
  count, number, line, kind = db.execute(
    """SELECT coalesce(sum(n), 0)::BIGINT, min(first), arg_min(line, first), arg_min(kind, first)
    FROM json_shape WHERE kind <> 'OBJECT'"""
  ).fetchone()
  keys = db.execute(
    """SELECT key FROM (SELECT unnest(keys) AS key, unnest(range(len(keys))) AS place, first
    FROM json_shape) GROUP BY key ORDER BY min((first, place))"""
  ).fetchall()
  db.execute('DROP TABLE json_shape')
  problem = 'not valid JSON' if kind == 'none' else 'not a JSON object; write one object per line'
  message = f'{path}: line {number}, {line!r}, is {problem}' if count else ''
  return [key for (key,) in keys], Skipped(count, message)
