"""Raw texts of ids, tokens and feature values: which texts are the same value, in Python and SQL.

One rule applies to columns of a log, side files, input rows, events, requests and the code in an
export:

  white space at both ends is removed, of any kind in Unicode           ' 8\\t' is '8'
  a whole number with zeros after the point is the whole number         '8.0', '8.00' are '8'
  a word of config.data.missing is a missing value, in any ASCII case   'None', 'NULL', '\\N'

Nothing else is changed: '007', '+8', '8e0', '8.5' and 'a b' stay as they are. A list is first split
at its separator, and then the rule applies to each token. In Python, 8, 8.0 and numpy's numbers are
'8', and True is 'true'.

This file imports nothing of lmn_jax, because every export has a copy of it.
"""

import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

# The characters that str.strip() removes; SQL needs them one by one.
SPACES = ''.join(chr(code) for code in range(0x3001) if chr(code).isspace())
WHOLE = re.compile(r'(-?[0-9]+)[.]0+', re.ASCII)
UPPER, LOWER = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz'
_LOWERED = str.maketrans(UPPER, LOWER)


def words(missing: Sequence[str]) -> frozenset[str]:
  """Returns the words of config.data.missing in the form in which `value` compares them."""
  return frozenset(_lowered(_whole(str(word).strip())) for word in ('', *missing))


def _lowered(text):
  """Lowers the ASCII letters only, because Python and SQL lower others differently."""
  return text.lower() if text.isascii() else text.translate(_LOWERED)


def _whole(text):
  match = WHOLE.fullmatch(text)
  return match[1] if match else text


def text_of(raw: Any) -> str:
  """Returns a raw value as text: None is '', and a whole number has no point.

  Raises:
    ValueError: if it is neither a text nor a number.
  """
  if isinstance(raw, str):
    return raw
  if raw is None:
    return ''
  if isinstance(raw, bool):
    return 'true' if raw else 'false'
  if isinstance(raw, Integral):
    return str(int(raw))
  if isinstance(raw, Real):
    return str(int(raw)) if abs(raw) < 2**53 and raw == int(raw) else str(raw)
  raise ValueError(f'a text or a number is expected; this has the type {type(raw).__name__}')


def value(raw: Any, missing: frozenset[str]) -> str:
  """Returns an id, or the value of a feature with one token; '' if it is missing.

  Args:
    raw: the raw value. missing: of `words`.

  Raises:
    ValueError: of `text_of`.
  """
  text = text_of(raw).strip()
  if text.endswith('0'):
    text = _whole(text)
  return '' if _lowered(text) in missing else text


def tokens(raw: Any, separator: str, missing: frozenset[str]) -> list[str]:
  """Returns the tokens of the value of a multi-valued feature.

  Args:
    raw: the raw value, or a sequence of tokens. separator: between them. missing: of `words`.

  Raises:
    ValueError: of `text_of`.
  """
  pieces = raw
  if isinstance(raw, str) or not isinstance(raw, Sequence):
    text = text_of(raw).strip()
    pieces = [] if _lowered(text) in missing else text.split(separator)
  return [token for piece in pieces if (token := value(piece, missing))]


def strip_sql(text: str) -> str:
  """Returns SQL of a text without white space around it."""
  return _stripped(text, lambda stripped: stripped)


def list_sql(text: str, missing: Sequence[str]) -> str:
  """Returns SQL of a list as one stripped text, not yet split; NULL if it is missing."""
  return _stripped(
    text,
    lambda stripped: f'CASE WHEN {_is_missing(stripped, missing)} THEN NULL ELSE {stripped} END',
  )


def value_sql(text: str, missing: Sequence[str]) -> str:
  """Returns SQL of `value`, NULL if it is missing."""

  def value_of(stripped):
    whole = f"regexp_replace({stripped}, '^(-?[0-9]+)[.]0+$', '\\1')"
    return f"""CASE WHEN ends_with({stripped}, '0')
      AND regexp_full_match({stripped}, '-?[0-9]+[.]0+')
      THEN CASE WHEN {_is_missing(whole, missing)} THEN NULL ELSE {whole} END
      WHEN {_is_missing(stripped, missing)} THEN NULL ELSE {stripped} END"""

  return _stripped(text, value_of)


def tokens_sql(text: str, separator: str, missing: Sequence[str]) -> str:
  """Returns SQL of the list of `tokens` of a text of `list_sql`."""
  pieces = f'string_split({text}, {_literal(separator)})'
  return f"""list_filter(list_transform({pieces}, lambda piece: {value_sql('piece', missing)}),
    lambda token: token IS NOT NULL)"""


def _stripped(text, sql_of):
  """Returns the SQL that `sql_of` makes of a stripped text.

  Stripping is slow and few texts need it, so a condition selects these.
  """
  spaces = _literal(SPACES)
  return f"""CASE WHEN regexp_matches({text}, {_literal(f'^[{SPACES}]|[{SPACES}]$')})
    THEN {sql_of(f'trim({text}, {spaces})')} ELSE {sql_of(text)} END"""


def _is_missing(text, missing):
  """Returns SQL of whether a text is a word of `missing`; it is fast as a condition of CASE."""
  lowered = sorted(words(missing))
  # `lower` is fast, but lowers more than ASCII; `translate` then decides.
  fast = ', '.join(f'lower({_literal(word)})' for word in lowered)
  exact = ', '.join(map(_literal, lowered))
  return f"""(lower({text}) IN ({fast})
    AND translate({text}, '{UPPER}', '{LOWER}') IN ({exact}))"""


def _literal(text):
  return "'" + text.replace("'", "''") + "'"
