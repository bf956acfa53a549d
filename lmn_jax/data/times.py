"""The unit and the form of a log's times: how another time is read as the log's, or refused.

They are decided once, when the store is made, and kept in its manifest as `notes['time']`. The same
rule stands here twice: in SQL, for columns of files, and in Python, for the service and whoever
loads an export. This file imports nothing of lmn_jax, and a copy of it lies in every exported
folder.

  form      the source has                              an int64 of the store is
  number    9, 9.0, 9e3; with fractions 9.5             the number, times `per_unit`
  text      2024-05-31, 2024-05-31T23:59:01.5+02:00     microseconds since 1970, UTC without a zone
  format    texts of config.data.time_format            microseconds since 1970
  either    texts, or numbers of seconds                microseconds since 1970: of older stores
  position  no times                                    the place of the row, or in the sequence

The unit of numbers is told by their size: 1.7e9 are seconds since 1970, 1.7e12 milliseconds. Where
the size tells nothing (days, years, positions, seconds since the beginning of the log) it is ''.
"""

import math
import re
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any, NamedTuple

# What a unit is of a second, the finest last.
UNITS = {'second': 1, 'millisecond': 10**3, 'microsecond': 10**6, 'nanosecond': 10**9}
# Seconds since 1970 of 1980 and of 2100: the times that logs of this world have. Written as digits,
# YYYYMMDD and YYYYMMDDHHMM are none in any unit.
FIRST, LAST = 315_532_800, 4_102_444_800
FRACTIONS = 10**6  # int64 of the store for a unit, where the log's numbers have fractions
BELOW = 9e12  # of such numbers, so that they fit into 64 bits
REACH = 1000  # how many times its own span another time may lie from a log whose unit is ''
INT64 = 2**63

WHOLE = r'[+-]?[0-9]{1,40}([.]0*)?'
NUMBER = r'[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?'
STAMP = re.compile(
  r'([0-9]{4})([-/])([0-9]{1,2})\2([0-9]{1,2})'
  r'(?:[ T]([0-9]{1,2}):([0-9]{2})(?::([0-9]{2})(?:[.]([0-9]{1,9}))?)?'
  r'(?:Z| UTC|([+-])([0-9]{2})(?::?([0-9]{2}))?)?)?'
)
# Directives of DuckDB's strptime -> Python's; the others are not read in Python.
DIRECTIVES = {d: f'%{d}' for d in 'abdmyYHIpMSfzjAB%'} | {f'-{d}': f'%{d}' for d in 'dmHIMSyj'}


class Clock(NamedTuple):
  """The times of a log. unit: of its numbers. first, last: of the log, as the store has them."""

  form: str
  unit: str = ''
  per_unit: int = 1
  time_format: str = ''
  first: int = 0
  last: int = 0

  @property
  def timed(self) -> bool:
    """Whether the log has times."""
    return self.form != 'position'

  @property
  def bounds(self) -> tuple[int, int]:
    """The least and the greatest int64 of the store that can be a time of this log."""
    if self.form == 'number' and self.unit:
      scale = UNITS[self.unit] * self.per_unit
      low, high = min(self.first, FIRST * scale), max(self.last, LAST * scale)
    elif self.form == 'number':
      reach = REACH * max(self.last - self.first, REACH * self.per_unit)
      low, high = self.first - reach, self.last + reach
    else:
      low, high = -INT64, INT64 - 1
    return max(low, -INT64), min(high, INT64 - 1)

  def parse(self, value: Any) -> int:
    """A raw time as the store's int64.

    Args:
      value: a text, or a number where the log has numbers.

    Raises:
      ValueError: it cannot be a time of this log; the message says why, and what is expected, and
        leaves the value to the caller.
    """
    text = value.strip() if isinstance(value, str) else _text(value)
    found = None
    if self.form in ('text', 'either'):
      found = _stamp(text)
    elif self.form == 'format':
      found = _formatted(text, self.time_format)
    if self.form in ('number', 'position', 'either'):
      found = found if found is not None else _number(text, self.per_unit)
    low, high = self.bounds
    if found is None or not low <= found <= high:
      raise ValueError(f'{self.expected()} is expected{self._seen(text)}')
    return found

  def reason(self, value: Any) -> str:
    """Why a value is refused: the message of `parse`, or what is expected."""
    try:
      self.parse(value)
    except ValueError as error:
      return str(error)
    return f'{self.expected()} is expected'

  def sql(self, text: str) -> str:
    """SQL of `parse` of a text without spaces around it: BIGINT, NULL where that raises."""
    if self.form == 'text':
      return stamp_sql(text)
    if self.form == 'format':
      return format_sql(text, self.time_format)
    number = number_sql(text, self.per_unit)
    if self.form == 'either':
      number = f'coalesce({stamp_sql(text)}, {number})'
    low, high = self.bounds
    return f'CASE WHEN {number} BETWEEN {low} AND {high} THEN {number} END'

  def expected(self) -> str:
    """What a time must be, such as 'a whole number of seconds since 1970, such as 1700009000'."""
    if self.form == 'text':
      return 'a text such as 2024-05-31 23:59:01 (UTC, if it names no zone)'
    if self.form == 'format':
      return f'a text of the form {self.time_format!r}'
    if self.form == 'either':
      return 'a text such as 2024-05-31 23:59:01, or a number of seconds'
    whole = 'a number' if self.per_unit > 1 else 'a whole number'
    if not self.timed:
      return f'{whole} of 64 bits'
    first, last = (f'{x / self.per_unit:.15g}' if self.per_unit > 1 else x for x in self[-2:])
    if self.unit:
      return f'{whole} of {self.unit}s since 1970, such as {last}'
    return f'{whole} near those of the log, {first} to {last},'

  def _seen(self, text):
    """What a text looks like that is not expected, if that can be told."""
    if self.form == 'position' or not re.fullmatch(NUMBER, text):
      return ''
    unit = unit_of(float(text))
    if self.form in ('text', 'format'):
      return ', as in the log; this is a number'
    if unit and unit != self.unit:
      return f'; this is a number of {unit}s by its size'
    if self.per_unit == 1 and not re.fullmatch(WHOLE, text):
      return '; the log has no fractions, so round it'
    return ''


def unit_of(number: int | float) -> str:
  """The unit in which a number is a time since 1970 that logs have; '' for none."""
  for unit, scale in UNITS.items():
    if FIRST * scale <= number <= LAST * scale:
      return unit
  return ''


def clock_of(notes: dict[str, Any], time_format: str, first: int, last: int) -> Clock:
  """The clock that a store's manifest has.

  Args:
    notes: of the manifest. Older ones have 'time_unit' alone, and of these:
    time_format: config.data.time_format. first, last: the least and the greatest time.
  """
  if 'time' in notes:
    return Clock(**notes['time'])
  unit = notes.get('time_unit', 'source')
  if unit == 'position':
    return Clock('position', first=first, last=last)
  if unit == 'source':
    unit = unit_of(last)
    return Clock('number', unit if unit == unit_of(first) else '', first=first, last=last)
  if time_format:
    return Clock('format', 'microsecond', time_format=time_format, first=first, last=last)
  return Clock('either', 'second', FRACTIONS, first=first, last=last)


def _text(value):
  """A number as a text; '' for what is none."""
  if isinstance(value, bool) or not isinstance(value, Integral | Real):
    return ''
  return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _int64(value):
  return value if -INT64 <= value < INT64 else None


def _number(text, per_unit):
  if not re.fullmatch(NUMBER, text, re.ASCII):
    return None
  number = float(text)
  if per_unit > 1:
    return _rounded(number * per_unit) if abs(number) < BELOW else None
  if re.fullmatch(WHOLE, text):
    return _int64(int(text.partition('.')[0]))
  return int(number) if abs(number) < 2**53 and number.is_integer() else None


def _rounded(x):
  """Halves away from zero, as in SQL."""
  return int(x) if abs(x) >= 2**52 else int(math.copysign(math.floor(abs(x) + 0.5), x))


def _stamp(text):
  found = STAMP.fullmatch(text)
  if not found:
    return None
  year, _, month, day, hour, minute, second, fraction, sign, ahead, minutes = found.groups()
  try:
    date = datetime(int(year), int(month), int(day), tzinfo=UTC)
  except ValueError:
    return None
  clock = [int(x or 0) for x in (hour, minute, second)]
  if (clock > [24, 0, 0] or max(clock[1:]) > 59) or int(minutes or 0) > 59:
    return None
  micros = int((fraction or '').ljust(6, '0')[:6])
  if clock[0] == 24 and micros:
    return None
  zone = int(f'{sign or "+"}1') * (int(ahead or 0) * 60 + int(minutes or 0))
  seconds = (clock[0] * 60 + clock[1] - zone) * 60 + clock[2]
  return _since_1970(date) + seconds * 10**6 + micros


def _since_1970(date):
  since = date - datetime(1970, 1, 1, tzinfo=UTC)
  return (since.days * 86_400 + since.seconds) * 10**6 + since.microseconds


def _formatted(text, time_format):
  try:
    pattern = re.sub('%(-?.)', lambda found: DIRECTIVES[found[1]], time_format)
    date = datetime.strptime(text, pattern)
    return _since_1970(date if date.tzinfo else date.replace(tzinfo=UTC))
  except (KeyError, ValueError, OverflowError):
    return None


def whole_sql(text: str) -> str:
  """SQL of a whole number, BIGINT."""
  number = f'try_cast({text} AS DOUBLE)'
  return f"""CASE WHEN regexp_full_match({text}, '{WHOLE}')
    THEN try_cast(regexp_replace({text}, '[.]0*$', '') AS BIGINT)
    WHEN regexp_full_match({text}, '{NUMBER}') AND abs({number}) < {2**53}
    AND {number} = trunc({number}) THEN try_cast({number} AS BIGINT) END"""


def number_sql(text: str, per_unit: int) -> str:
  """SQL of a number, as the BIGINT of a store that has `per_unit` for one."""
  if per_unit == 1:
    return whole_sql(text)
  number = f'try_cast({text} AS DOUBLE)'
  return f"""CASE WHEN regexp_full_match({text}, '{NUMBER}') AND abs({number}) < {BELOW!r}
    THEN try_cast(round({number} * {float(per_unit)!r}) AS BIGINT) END"""


def stamp_sql(text: str) -> str:
  """SQL of microseconds since 1970 of a text that begins with a date; `infinity` is none."""
  return f"""CASE WHEN regexp_matches({text}, '^[0-9]')
    THEN epoch_us(try_cast({text} AS TIMESTAMPTZ)) END"""


def format_sql(text: str, time_format: str) -> str:
  """SQL of microseconds since 1970 of a text of a pattern."""
  quoted = time_format.replace("'", "''")
  return f"epoch_us(try_strptime({text}, '{quoted}'))"
