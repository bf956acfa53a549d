"""SQL that reads the cells of a file as text: plain values, JSON values and lists.

A list becomes the text of its values joined by the separator that `config.data.multi` has for its
column; splitting this text gives the list again. A value that the text cannot represent is refused.
"""

from collections.abc import Mapping


def literal(text: object) -> str:
  """Returns an SQL string literal."""
  return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
  """Returns a quoted SQL identifier."""
  return '"' + name.replace('"', '""') + '"'


def is_nested(kind: str) -> bool:
  """Whether a type is nested: a structure, or a list of anything but plain values."""
  return kind.count('[') > 1 or kind.startswith(('STRUCT', 'MAP', 'UNION'))


def typed_text(column: str, expression: str, kind: str, multi: Mapping[str, str]) -> str:
  """Returns SQL of a typed column as text; lists are joined by their separator."""
  if is_nested(kind):
    return _error(
      f'column {column!r} has the type {kind}; choose a column of plain values or lists of them'
    )
  if kind.endswith(']'):
    return _joined(column, text_list(expression, kind), multi)
  # Many Parquet writers do not mark a column of text as such, so bytes are read as UTF-8.
  return f'decode({expression})' if kind == 'BLOB' else f'CAST({expression} AS VARCHAR)'


def text_list(expression: str, kind: str) -> str:
  """Returns SQL of a typed list as VARCHAR[]."""
  if kind == 'BLOB[]':
    return f'list_transform({expression}, lambda x: decode(x))'
  return f'CAST({expression} AS VARCHAR[])'


def json_text(key: str, value: str, multi: Mapping[str, str]) -> str:
  """Returns SQL of a JSON value as text; an object is refused."""
  nested = _error(f'column {key!r} holds a JSON object; choose a column of plain values')
  joined = _joined(key, json_list(key, value), multi)
  return f"""CASE json_type({value}) WHEN 'ARRAY' THEN {joined}
    WHEN 'OBJECT' THEN {nested} ELSE json_extract_string({value}, '$') END"""


def json_list(key: str, value: str) -> str:
  """Returns SQL of a JSON list as VARCHAR[], NULL for any other value."""
  nested = _error(
    f'column {key!r} holds JSON lists of lists or of objects; choose a column of lists of plain '
    'values'
  )
  return f"""CASE WHEN json_type({value}) <> 'ARRAY' THEN NULL
    WHEN list_has_any(json_type({value}, '$[*]'), ['ARRAY', 'OBJECT']) THEN [{nested}]
    ELSE json_extract_string({value}, '$[*]') END"""


def _error(message: str) -> str:
  """Returns SQL that raises an error where it is evaluated, and so only if the column is read."""
  return f'error({literal(message)})::VARCHAR'


def cell_text(column: str, text: str, multi: Mapping[str, str]) -> str:
  """Returns SQL of a text cell; a list literal in a column of `multi` is joined like a list."""
  if column not in multi:
    return text
  values = literal_list(text)
  return f'CASE WHEN {values} IS NULL THEN {text} ELSE {_joined(column, values, multi)} END'


def _joined(column: str, values: str, multi: Mapping[str, str]) -> str:
  """Returns SQL that joins a list of texts; a value that contains the separator is refused."""
  if column not in multi:
    return _error(
      f'column {column!r} holds lists; for a feature set a separator that joins them, '
      f"config.data.multi={{{column!r}: '|'}}; for a list of events set "
      "config.data.format='sequences'"
    )
  separator = literal(multi[column])
  contains_separator = _error(
    f'column {column!r}: a value of a list contains the separator {multi[column]!r}; choose '
    'another separator in config.data.multi'
  )
  return f"""CASE WHEN list_bool_or(list_transform({values}, lambda x: contains(x, {separator})))
    THEN {contains_separator} ELSE array_to_string({values}, {separator}) END"""


def literal_list(expression: str) -> str:
  """Returns SQL of the values of a list literal in a cell, NULL for other text.

  Literals of Python and JSON, [11, 12] or ['a', 'b'], and of NumPy, [11 12], are read. A literal
  that is truncated, nested or malformed is refused.
  """
  text = f'trim({expression})'
  values = f'TRY_CAST({text} AS VARCHAR[])'
  numpy = f'regexp_full_match({text}, \'\\[[^,\\[\\]\\x27"]*\\s[^,\\[\\]\\x27"]*\\]\')'
  words = f"regexp_extract_all({text}, '[^\\s\\[\\]]+')"
  malformed = f"""error('the list ' || left({text}, 80) || ' cannot be read; write a complete list '
    || 'of plain values separated by commas')"""
  return f"""CASE WHEN NOT (starts_with({text}, '[') AND ends_with({text}, ']')) THEN NULL
    WHEN {numpy} THEN CASE WHEN contains({text}, '...') THEN {malformed} ELSE {words} END
    WHEN {values} IS NULL AND contains({text}[2:], '[') THEN NULL
    WHEN {values} IS NULL OR list_contains({values}, '...')
      OR list_bool_or(list_transform({values}, lambda x: starts_with(x, '['))) THEN {malformed}
    ELSE {values} END"""
