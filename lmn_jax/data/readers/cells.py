"""The cells of a file as SQL of text: plain values, values of JSON, lists and literals of lists.

A list becomes the text of its values joined by the separator that `config.data.multi` has for its
column, and splitting that text gives the list again. What would become another text is refused.
"""

from collections.abc import Mapping


def literal(text: object) -> str:
  """Returns an SQL string literal."""
  return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
  """Returns a quoted SQL identifier."""
  return '"' + name.replace('"', '""') + '"'


def is_nested(kind: str) -> bool:
  """Whether a type has parts of its own, beyond the values of one list."""
  return kind.count('[') > 1 or kind.startswith(('STRUCT', 'MAP', 'UNION'))


def as_text(column: str, expression: str, kind: str, multi: Mapping[str, str]) -> str:
  """Returns SQL that gives a typed column as text; lists are joined by their separator."""
  if is_nested(kind):
    return _refused(f'column {column!r} is of type {kind}; name a column of plain values or lists')
  if kind.endswith(']'):
    return _joined(column, texts(expression, kind), multi)
  # Bytes are read as UTF-8: many writers of Parquet leave out that a column is of texts.
  return f'decode({expression})' if kind == 'BLOB' else f'CAST({expression} AS VARCHAR)'


def texts(expression: str, kind: str) -> str:
  """SQL that gives a typed list as texts."""
  if kind == 'BLOB[]':
    return f'list_transform({expression}, lambda x: decode(x))'
  return f'CAST({expression} AS VARCHAR[])'


def json_text(key: str, value: str, multi: Mapping[str, str]) -> str:
  """SQL that gives a JSON value as text; an object is refused."""
  nested = _refused(f'column {key!r} holds a JSON object; name a column of plain values')
  joined = _joined(key, json_list(key, value), multi)
  return f"""CASE json_type({value}) WHEN 'ARRAY' THEN {joined}
    WHEN 'OBJECT' THEN {nested} ELSE json_extract_string({value}, '$') END"""


def json_list(key: str, value: str) -> str:
  """SQL that gives a JSON list as texts, and NULL for any other value."""
  nested = _refused(
    f'column {key!r} holds JSON lists of lists or of objects; plain values are read'
  )
  return f"""CASE WHEN json_type({value}) <> 'ARRAY' THEN NULL
    WHEN list_has_any(json_type({value}, '$[*]'), ['ARRAY', 'OBJECT']) THEN [{nested}]
    ELSE json_extract_string({value}, '$[*]') END"""


def _refused(message: str) -> str:
  """SQL that is an error only where it is evaluated: not if a column is not asked for."""
  return f'error({literal(message)})::VARCHAR'


def text_of(column: str, text: str, multi: Mapping[str, str]) -> str:
  """SQL of a text cell; where it holds several tokens, a literal of a list is joined like lists."""
  if column not in multi:
    return text
  values = literal_list(text)
  return f'CASE WHEN {values} IS NULL THEN {text} ELSE {_joined(column, values, multi)} END'


def _joined(column: str, values: str, multi: Mapping[str, str]) -> str:
  """SQL that joins a list of texts, so that splitting it gives the list again; or refuses it."""
  if column not in multi:
    return _refused(
      f'column {column!r} holds lists; those of a feature are joined by a separator, '
      f"config.data.multi={{{column!r}: '|'}}; those of events are read with "
      "config.data.format='sequences'"
    )
  separator = literal(multi[column])
  message = _refused(
    f'column {column!r}: a value of a list holds the separator {multi[column]!r} itself; '
    'choose another one in config.data.multi'
  )
  return f"""CASE WHEN list_bool_or(list_transform({values}, lambda x: contains(x, {separator})))
    THEN {message} ELSE array_to_string({values}, {separator}) END"""


def literal_list(expression: str) -> str:
  """SQL of the values of a literal such as [11, 12] or ['a', 'b'] in a cell; NULL for other text.

  NumPy's [11 12] is one too. What is cut short, nested, or a list in no other way is refused.
  """
  text = f'trim({expression})'
  values = f'TRY_CAST({text} AS VARCHAR[])'
  plain = f'regexp_full_match({text}, \'\\[[^,\\[\\]\\x27"]*\\s[^,\\[\\]\\x27"]*\\]\')'
  words = f"regexp_extract_all({text}, '[^\\s\\[\\]]+')"
  wrong = f"""error('the list ' || left({text}, 80) || ' cannot be read; values parted by commas, '
    || 'whole and not nested, are expected')"""
  return f"""CASE WHEN NOT (starts_with({text}, '[') AND ends_with({text}, ']')) THEN NULL
    WHEN {plain} THEN CASE WHEN contains({text}, '...') THEN {wrong} ELSE {words} END
    WHEN {values} IS NULL AND contains({text}[2:], '[') THEN NULL
    WHEN {values} IS NULL OR list_contains({values}, '...')
      OR list_bool_or(list_transform({values}, lambda x: starts_with(x, '['))) THEN {wrong}
    ELSE {values} END"""
