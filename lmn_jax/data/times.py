"""The unit and the form of a log's times, and how other times are read in them or refused.

Both are inferred once, when the store is made, and kept in its manifest as `notes['time']`. The
rule is implemented twice: in SQL for columns of files, and in Python for the service and the code
in an export. This file imports nothing of lmn_jax, because every export has a copy of it.

  form      times in the source                         int64 in the store
  number    9, 9.0, 9e3; with fractions 9.5             the number, times `per_unit`
  text      2024-05-31, 2024-05-31T23:59:01.5+02:00     microseconds since 1970, UTC without a zone
  format    texts of config.data.time_format            microseconds since 1970
  either    texts, or numbers of seconds                microseconds since 1970, in earlier stores
  position  none                                        the position of the row, or in the sequence

The unit of numbers is inferred from their size: 1.7e9 are seconds since 1970, 1.7e12 milliseconds.
It is '' where the size does not show it (days, years, positions, seconds since the first event).
"""

import math
import re
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any, NamedTuple

# How many of a unit are a second, the finest last.
UNITS = {'second': 1, 'millisecond': 10**3, 'microsecond': 10**6, 'nanosecond': 10**9}
# The years 1980 and 2100 in seconds since 1970, between which the times of real logs are. Dates
# written as numbers, YYYYMMDD and YYYYMMDDHHMM, are outside of them in every unit.
FIRST, LAST = 315_532_800, 4_102_444_800
FRACTIONS = 10**6  # `per_unit` if the log's numbers have fractions
BELOW = 9e12  # the bound of such numbers, so that they fit into 64 bits
REACH = 1000  # the maximum distance of a time from a log of the unit '', in spans of the log
INT64 = 2**63

WHOLE = r'[+-]?[0-9]{1,40}([.]0*)?'
NUMBER = r'[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?'
STAMP = re.compile(
  r'([0-9]{4})([-/])([0-9]{1,2})\2([0-9]{1,2})'
  r'(?:[ T]([0-9]{1,2}):([0-9]{2})(?::([0-9]{2})(?:[.]([0-9]{1,9}))?)?'
  r'(?:Z| UTC|([+-])([0-9]{2})(?::?([0-9]{2}))?)?)?'
)
# Directives of DuckDB's strptime -> Python's; others are not supported in Python.
DIRECTIVES = {d: f'%{d}' for d in 'abdmyYHIpMSfzjAB%'} | {f'-{d}': f'%{d}' for d in 'dmHIMSyj'}


class Clock(NamedTuple):
  """The form, unit and range of the times of a log.

  form: see above. unit: of its numbers, a key of UNITS or ''. per_unit: int64 in the store of one
  unit. time_format: of the form 'format'. first, last: the least and the greatest time, as in the
  store.
  """

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
    """The least and the greatest int64 in the store that can be a time of this log."""
    if self.form == 'number' and self.unit:
      scale = UNITS[self.unit] * self.per_unit
      low, high = min(self.first, FIRST * scale), max(self.last, LAST * scale)
    elif self.form == 'number':
      reach = REACH * max(self.last - self.first, REACH * self.per_unit)
      low, high = self.first - reach, self.last + reach
    else:
      low, high = -INT64, INT64 - 1
    return max(low, -INT64), min(high, INT64 - 1)

  @property
  def per_second(self) -> int:
    """int64 in the store of one second; of 1 where the log's numbers have no known unit."""
    return self.per_unit * UNITS.get(self.unit, 1)

  def seconds(self, time: Any) -> Any:
    """Returns whole seconds since `first`, rounded down. time: int or int64, as in the store."""
    return (time - self.first) // self.per_second

  def parse(self, value: Any) -> int:
    """Returns a raw time as the store's int64.

    Args:
      value: a text, or a number where the log has numbers.

    Raises:
      ValueError: if it cannot be a time of this log; the message says what is expected and why, but
        not the value.
    """
    text = value.strip() if isinstance(value, str) else _text(value)
    time = None
    if self.form in ('text', 'either'):
      time = _parse_stamp(text)
    elif self.form == 'format':
      time = _parse_format(text, self.time_format)
    if self.form in ('number', 'position', 'either'):
      time = time if time is not None else _parse_number(text, self.per_unit)
    low, high = self.bounds
    if time is None or not low <= time <= high:
      raise ValueError(f'{self.expected()} is expected{self._mismatch(text)}')
    return time

  def reason(self, value: Any) -> str:
    """Returns why a value is refused: the message of `parse`, or what is expected."""
    try:
      self.parse(value)
    except ValueError as error:
      return str(error)
    return f'{self.expected()} is expected'

  def sql(self, text: str) -> str:
    """Returns SQL of `parse` for a stripped text: BIGINT, NULL where `parse` raises."""
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
    """Describes a valid time, as in 'a whole number of seconds since 1970, such as 1700009000'."""
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

  def _mismatch(self, text):
    """Describes how a text differs from what is expected; '' if it cannot be determined."""
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
  """Returns the unit in which a number is a time between 1980 and 2100, '' if there is none."""
  for unit, scale in UNITS.items():
    if FIRST * scale <= number <= LAST * scale:
      return unit
  return ''


def clock_of(notes: dict[str, Any], time_format: str, first: int, last: int) -> Clock:
  """Returns the clock in the manifest of a store.

  Args:
    notes: of the manifest; those of earlier versions have only 'time_unit' and need the other
      arguments.
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
  """Returns a number as text, '' for any other value."""
  if isinstance(value, bool) or not isinstance(value, Integral | Real):
    return ''
  return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _int64(value):
  return value if -INT64 <= value < INT64 else None


def _parse_number(text, per_unit):
  if not re.fullmatch(NUMBER, text, re.ASCII):
    return None
  number = float(text)
  if per_unit > 1:
    return _rounded(number * per_unit) if abs(number) < BELOW else None
  if re.fullmatch(WHOLE, text):
    return _int64(int(text.partition('.')[0]))
  return int(number) if abs(number) < 2**53 and number.is_integer() else None


def _rounded(x):
  """Rounds halves away from zero, as SQL does."""
  return int(x) if abs(x) >= 2**52 else int(math.copysign(math.floor(abs(x) + 0.5), x))


def _parse_stamp(text):
  match = STAMP.fullmatch(text)
  if not match:
    return None
  year, _, month, day, hour, minute, second, fraction, sign, ahead, minutes = match.groups()
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


def _parse_format(text, time_format):
  try:
    pattern = re.sub('%(-?.)', lambda match: DIRECTIVES[match[1]], time_format)
    date = datetime.strptime(text, pattern)
    return _since_1970(date if date.tzinfo else date.replace(tzinfo=UTC))
  except (KeyError, ValueError, OverflowError):
    return None


def whole_sql(text: str) -> str:
  """Returns SQL of a whole number, BIGINT."""
  number = f'try_cast({text} AS DOUBLE)'
  return f"""CASE WHEN regexp_full_match({text}, '{WHOLE}')
    THEN try_cast(regexp_replace({text}, '[.]0*$', '') AS BIGINT)
    WHEN regexp_full_match({text}, '{NUMBER}') AND abs({number}) < {2**53}
    AND {number} = trunc({number}) THEN try_cast({number} AS BIGINT) END"""


def number_sql(text: str, per_unit: int) -> str:
  """Returns SQL of a number times `per_unit`, BIGINT."""
  if per_unit == 1:
    return whole_sql(text)
  number = f'try_cast({text} AS DOUBLE)'
  return f"""CASE WHEN regexp_full_match({text}, '{NUMBER}') AND abs({number}) < {BELOW!r}
    THEN try_cast(round({number} * {float(per_unit)!r}) AS BIGINT) END"""


def stamp_sql(text: str) -> str:
  """Returns SQL of microseconds since 1970 of a text that begins with a date, BIGINT.

  It is NULL for 'infinity', which DuckDB casts to a time.
  """
  return f"""CASE WHEN regexp_matches({text}, '^[0-9]')
    THEN epoch_us(try_cast({text} AS TIMESTAMPTZ)) END"""


def format_sql(text: str, time_format: str) -> str:
  """Returns SQL of microseconds since 1970 of a text of the form `time_format`, BIGINT."""
  quoted = time_format.replace("'", "''")
  return f"epoch_us(try_strptime({text}, '{quoted}'))"
