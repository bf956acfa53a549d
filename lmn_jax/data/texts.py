"""Raw texts of ids, tokens and values of features: which texts are one value, in Python and in SQL.

One rule for the columns of a log, its side files, the rows of predictions, events, requests and
whoever loads an export:

  spaces at both ends go, all that Unicode has, tabs and line ends too   ' 8\\t' is '8'
  a whole number with zeros after the point is the whole number          '8.0', '8.00' are '8'
  a word of config.data.missing is nothing, in capitals or not           'None', 'NULL', '\\N'

Nothing else is changed: '007', '+8', '8e0', '8.5' and 'a b' stay as they are. A list is cut at its
separator first, and each token is read so. Of Python, 8, 8.0 and numpy's numbers are '8', True is
'true'. This file imports nothing of lmn_jax, and a copy of it lies in every exported folder.
"""

import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

# What str.strip() takes away; SQL is told the characters one by one.
SPACES = ''.join(chr(code) for code in range(0x3001) if chr(code).isspace())
WHOLE = re.compile(r'(-?[0-9]+)[.]0+', re.ASCII)
UPPER, LOWER = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz'
_LOWERED = str.maketrans(UPPER, LOWER)


def words(missing: Sequence[str]) -> frozenset[str]:
  """The words that are nothing, as `value` compares them. missing: config.data.missing."""
  return frozenset(_lowered(_whole(str(word).strip())) for word in ('', *missing))


def _lowered(text):
  """The letters of ASCII in small; those of other scripts differ between Python and SQL."""
  return text.lower() if text.isascii() else text.translate(_LOWERED)


def _whole(text):
  found = WHOLE.fullmatch(text)
  return found[1] if found else text


def text_of(raw: Any) -> str:
  """A raw value as a text: None is '', and a whole number has no point.

  Raises:
    ValueError: it is neither a text nor a number.
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
  raise ValueError(f'a text or a number is expected; this is of the type {type(raw).__name__}')


def value(raw: Any, missing: frozenset[str]) -> str:
  """An id, or the value of a feature of one token; '' is nothing.

  Args:
    raw: as given. missing: of `words`.

  Raises:
    ValueError: of `text_of`.
  """
  text = text_of(raw).strip()
  if text.endswith('0'):
    text = _whole(text)
  return '' if _lowered(text) in missing else text


def tokens(raw: Any, separator: str, missing: frozenset[str]) -> list[str]:
  """The tokens of the value of a feature that may have several.

  Args:
    raw: as given; also a sequence of tokens. separator: between them. missing: of `words`.

  Raises:
    ValueError: of `text_of`.
  """
  pieces = raw
  if isinstance(raw, str) or not isinstance(raw, Sequence):
    text = text_of(raw).strip()
    pieces = [] if _lowered(text) in missing else text.split(separator)
  return [token for piece in pieces if (token := value(piece, missing))]


def strip_sql(text: str) -> str:
  """SQL of a text without spaces around it."""
  return _stripped(text, lambda stripped: stripped)


def given_sql(text: str, missing: Sequence[str]) -> str:
  """SQL of a text without spaces around it, NULL if it is nothing: a list, before it is cut."""
  return _stripped(
    text,
    lambda stripped: f'CASE WHEN {_nothing(stripped, missing)} THEN NULL ELSE {stripped} END',
  )


def value_sql(text: str, missing: Sequence[str]) -> str:
  """SQL of `value`, NULL if it is nothing."""

  def value_of(stripped):
    whole = f"regexp_replace({stripped}, '^(-?[0-9]+)[.]0+$', '\\1')"
    return f"""CASE WHEN ends_with({stripped}, '0')
      AND regexp_full_match({stripped}, '-?[0-9]+[.]0+')
      THEN CASE WHEN {_nothing(whole, missing)} THEN NULL ELSE {whole} END
      WHEN {_nothing(stripped, missing)} THEN NULL ELSE {stripped} END"""

  return _stripped(text, value_of)


def tokens_sql(text: str, separator: str, missing: Sequence[str]) -> str:
  """SQL of `tokens` of a text of `given_sql`: a list of texts."""
  cut = f'string_split({text}, {_literal(separator)})'
  return f"""list_filter(list_transform({cut}, lambda piece: {value_sql('piece', missing)}),
    lambda token: token IS NOT NULL)"""


def _stripped(text, then):
  """SQL of something of a stripped text. Stripping takes long, and few texts need it."""
  spaces = _literal(SPACES)
  return f"""CASE WHEN regexp_matches({text}, {_literal(f'^[{SPACES}]|[{SPACES}]$')})
    THEN {then(f'trim({text}, {spaces})')} ELSE {then(text)} END"""


def _nothing(text, missing):
  """SQL of whether a text is a word that is nothing; as a condition of CASE it is quick."""
  known = sorted(words(missing))
  # `lower` is quick, and lowers more than ASCII.
  quick = ', '.join(f'lower({_literal(word)})' for word in known)
  exact = ', '.join(map(_literal, known))
  return f"""(lower({text}) IN ({quick})
    AND translate({text}, '{UPPER}', '{LOWER}') IN ({exact}))"""


def _literal(text):
  return "'" + text.replace("'", "''") + "'"
