"""JSON lines: an object a line."""

from pathlib import Path

import duckdb

from lmn_jax.data.readers import cells, text_files
from lmn_jax.data.readers.cells import literal
from lmn_jax.data.readers.reader import LONGEST_HISTORY, Reader, Source
from lmn_jax.data.readers.table import Skipped, Table, nothing, reading
from lmn_jax.data.readers.text import left_out, skipping
from lmn_jax.errors import UserError

JSON_KIND = "CASE WHEN json_valid(line) THEN json_type(line) ELSE 'none' END"


class JsonLines(Reader):
  name, endings, encoded = 'jsonl', ('.json', '.jsonl', '.ndjson'), True

  def table(self, source, path, db, scratch):
    return json_lines(source, path, db, scratch)


def json_lines(source: Source, path: Path, db: duckdb.DuckDBPyConnection, scratch: Path) -> Table:
  """JSON lines. A key may come late and its values may be of several types; each is read as it is.

  Lists are joined by their separator, other values give their text. A nested object is refused if
  it is asked for.
  """
  local = text_files.plain(
    path, source.encoding, source.settings.encoding, scratch, skip=source.skip
  )
  # A delimiter that no JSON holds, so that a line is one column.
  file = (
    f"read_csv({literal(local)}, auto_detect=false, header=false, delim='\x01', quote='', "
    f"escape='', max_line_size={LONGEST_HISTORY}, buffer_size={4 * LONGEST_HISTORY}, "
    f"columns={{'line': 'VARCHAR'}}{skipping(source, path)})"
  )
  with reading(str(path), source.settings):
    names, no_object = _json_shape(path, file, db)
  if no_object.count and not source.skip:
    raise UserError(no_object.first)
  keys = {key: k for k, key in enumerate(names)}
  lines = f"(SELECT line FROM {file} WHERE trim(line) <> '')"
  if no_object.count:
    lines = f"(SELECT line FROM {file} WHERE trim(line) <> '' AND {JSON_KIND} = 'OBJECT')"

  def skipped(db: duckdb.DuckDBPyConnection) -> Skipped:
    unread = left_out(source, path, db)
    return Skipped(unread.count + no_object.count, no_object.first or unread.first)

  if not keys:
    return nothing(path, local)._replace(skipped=skipped)
  columns = {key: cells.json_text(key, f'j{k}', source.multi) for key, k in keys.items()}
  values = {key: f"json_extract_string(j{k}, '$')" for key, k in keys.items()}
  lists = {key: cells.json_list(key, f'j{k}') for key, k in keys.items()}

  def relation(names: list[str]) -> str:
    wanted = list(dict.fromkeys(names))
    paths = ', '.join(literal('/' + n.replace('~', '~0').replace('/', '~1')) for n in wanted)
    values = ', '.join(f'v[{k}] AS j{keys[n]}' for k, n in enumerate(wanted, 1))
    return f'(SELECT {values} FROM (SELECT json_extract(line, [{paths}]) AS v FROM {lines}))'

  copy = None if local == path else local
  return Table(
    str(path), columns, relation, values, copy, lists=lists, settings=source.settings,
    skipped=skipped,
  )  # fmt: skip


def _json_shape(path: Path, file: str, db: duckdb.DuckDBPyConnection) -> tuple[list[str], Skipped]:
  """The keys of all lines, in the order in which they come, and the lines that are no objects."""
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
  what = 'no JSON' if kind == 'none' else 'no JSON object; one object a line is read'
  said = f'{path}: line {number}, {line!r}, is {what}' if count else ''
  return [key for (key,) in keys], Skipped(count, said)
