"""Times: SQL and Python agree; the unit and form of a log are inferred once, others are refused."""

import datetime
from pathlib import Path

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmn_jax import config
from lmn_jax.data import interactions
from lmn_jax.data.times import FRACTIONS, UNITS, Clock, clock_of
from lmn_jax.errors import UserError

SECONDS = Clock('number', 'second', 1, '', 1_700_000_000, 1_700_086_400)
FRACTIONAL = SECONDS._replace(
  per_unit=FRACTIONS, first=1_700_000_000_500_000, last=1_700_086_400_000_000
)
MILLIS = SECONDS._replace(unit='millisecond', first=1_700_000_000_000, last=1_700_086_400_000)
COUNTER = Clock('number', '', 1, '', 0, 1000)
TEXT = Clock('text', 'microsecond', 1, '', 0, 10**15)
EITHER = Clock('either', 'second', FRACTIONS)
FORMAT = '%d/%m/%Y %H:%M:%S'
CLOCKS = (SECONDS, FRACTIONAL, MILLIS, COUNTER, TEXT, EITHER, Clock('format', '', 1, FORMAT))

numbers = st.one_of(
  st.integers(-(2**64), 2**64),
  st.integers(-2000, 10**6),
  *(st.integers(1_600_000_000 * scale, 1_800_000_000 * scale) for scale in UNITS.values()),
  st.floats(),
  st.floats(0, 1e10),
)
dates = st.datetimes(datetime.datetime(1000, 1, 1), datetime.datetime(9000, 1, 1))
zones = st.sampled_from(('', 'Z', '+02', '+02:00', '-0530', ' UTC', '+1', '+99:00'))
stamps = st.builds(
  lambda date, form, zone: date.strftime(form) + zone,
  dates,
  st.sampled_from(
    ('%Y-%m-%d', '%Y/%m/%d %H:%M', '%Y-%m-%dT%H:%M:%S', '%Y-%m-%d %H:%M:%S.%f', '%Y%m%d', FORMAT)
  ),
  zones,
)
texts = st.one_of(
  numbers.map(str),
  st.from_regex(r'[+-]?[0-9]{0,12}[.]?[0-9]{0,8}(e[+-]?[0-9]{1,2})?', fullmatch=True),
  stamps,
  st.from_regex(r'[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([ T][0-9]{1,2}:[0-9]{1,2}(:[0-9.]{1,9})?)?',
                fullmatch=True),
  st.text('0123456789-/:.+TZ e_x\u0663', max_size=20),
  st.sampled_from(('inf', '-inf', 'infinity', 'nan', 'epoch', '1_000', '0x10', '', '1e400')),
)  # fmt: skip


@pytest.fixture(scope='module')
def db():
  with duckdb.connect() as connection:
    connection.execute("SET TimeZone = 'UTC'")
    yield connection


def sql_time(db, clock, text):
  query = f'SELECT {clock.sql("text")} FROM (SELECT $1::VARCHAR AS text)'
  return db.execute(query, [text]).fetchone()[0]


def python_time(clock, value):
  try:
    return clock.parse(value)
  except ValueError as error:
    assert 'expected' in str(error)
    return None


@settings(max_examples=300)
@given(text=texts, clock=st.sampled_from(CLOCKS))
@example(text='24:00', clock=TEXT)
@example(text='2024-01-01 24:00:00', clock=TEXT)
@example(text='2024-12-31 23:59:60', clock=TEXT)
@example(text='0' * 50 + '5', clock=COUNTER)
@example(text='0.0000005', clock=FRACTIONAL._replace(unit='', first=0, last=0))
def test_sql_and_python_agree(db, text, clock):
  """SQL also reads DuckDB's further forms of dates: zones by name, years of 5 digits."""
  text = text.strip()
  parsed, expected = python_time(clock, text), sql_time(db, clock, text)
  if parsed is None and expected is not None and clock.form in ('text', 'either', 'format'):
    return
  assert parsed == expected


@given(date=dates, zone=zones)
def test_python_reads_texts_of_iso_8601(date, zone):
  text = date.isoformat(sep=' ') + zone
  try:
    expected = datetime.datetime.fromisoformat(text.replace(' UTC', 'Z'))
  except ValueError:
    return
  expected = expected if expected.tzinfo else expected.replace(tzinfo=datetime.UTC)
  since = expected - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  assert python_time(TEXT, text) == since // datetime.timedelta(microseconds=1)


@given(clock=st.sampled_from((SECONDS, FRACTIONAL, MILLIS)), unit=st.sampled_from(list(UNITS)))
def test_a_number_in_another_unit_is_refused(clock, unit):
  value = 1_800_000_000 * UNITS[unit]
  if unit == clock.unit:
    assert python_time(clock, value) == value * clock.per_unit
  else:
    with pytest.raises(ValueError, match=f'{clock.unit}s since 1970.* number of {unit}s'):
      clock.parse(value)


@pytest.mark.parametrize(
  'clock,value,expected',
  [
    (SECONDS, 1_700_009_000, 1_700_009_000),
    (SECONDS, '1700009000.0', 1_700_009_000),
    (SECONDS, 1.700009e9, 1_700_009_000),
    (SECONDS, 1_700_009_000.5, 'has no fractions, so round it'),
    (SECONDS, '2024-01-01', 'a whole number of seconds since 1970, such as 1700086400 is expected'),
    (SECONDS, True, 'expected'),
    (SECONDS, float('inf'), 'expected'),
    (SECONDS, 10**30, 'expected'),
    (FRACTIONAL, 1_700_009_000, 1_700_009_000_000_000),
    (FRACTIONAL, '1700009000.25', 1_700_009_000_250_000),
    (COUNTER, 1001, 1001),
    (COUNTER, 1_700_009_000, 'a whole number near those of the log, 0 to 1000, is expected; this'),
    (TEXT, '2024-01-01T01:00:00+01:00', 1_704_067_200_000_000),
    (TEXT, 1_704_067_200, 'a text such as .*this is a number'),
    (TEXT, 'infinity', 'a text such as'),
    (Clock('format', '', 1, FORMAT), '01/01/2024 00:00:00', 1_704_067_200_000_000),
    (Clock('position'), 7, 7),
  ],
)
def test_a_time_is_parsed_or_refused(clock, value, expected):
  if isinstance(expected, int):
    assert clock.parse(value) == expected
  else:
    with pytest.raises(ValueError, match=expected):
      clock.parse(value)


def staged(folder, times, clock=None, **fields):
  source = folder / 'log.csv'
  source.write_text('user,item,time\n' + ''.join(f'u,i,{time}\n' for time in times))
  data = config.data(source=str(source), label='', **fields)
  with interactions.connect(Path(':memory:'), '1GB', folder / 'spill') as db:
    notes = interactions.stage(data, db, folder, clock)
    rows = db.execute('SELECT time FROM interactions ORDER BY "row"').fetchall()
  return clock_of(notes, '', 0, 0), [time for (time,) in rows]


T = 1_700_000_000


@pytest.mark.parametrize(
  'times,form,unit,per_unit',
  [
    ([T, T + 5], 'number', 'second', 1),
    ([0, T, T + 5], 'number', 'second', 1),
    ([T * 1000], 'number', 'millisecond', 1),
    ([T * 10**6], 'number', 'microsecond', 1),
    ([T * 10**9], 'number', 'nanosecond', 1),
    ([T + 0.5, T], 'number', 'second', FRACTIONS),
    ([T * 1000 + 0.5], 'number', 'millisecond', FRACTIONS),
    ([0, 5, 1000], 'number', '', 1),
    ([20240101, 20240102], 'number', '', 1),
    ([20240101235901], 'number', '', 1),
    (range(0, 2_600_000_000, 10**8), 'number', '', 1),  # milliseconds from the first event on
    (['2024-01-01', '2024-01-02 10:00'], 'text', 'microsecond', 1),
  ],
)
def test_the_unit_of_a_log_is_inferred(tmp_path, times, form, unit, per_unit):
  clock, staged_times = staged(tmp_path, times)
  assert clock == Clock(form, unit, per_unit, '', min(staged_times), max(staged_times))
  assert staged(tmp_path, times, clock)[1] == staged_times, 'a log fits its own clock'


@pytest.mark.parametrize(
  'times,message',
  [
    ([T, T, T * 1000, T], 'row 3: .*1700000000000.*number of milliseconds.* most rows have second'),
    ([T, T + 0.5, T * 1000, T], 'row 3: .*number of milliseconds'),
    (['2024-01-01', 'infinity', '2024-01-03'], "row 2: .*'infinity'; a time such as"),
    (['2024-01-01', '-infinity', '2024-01-03'], "row 2: .*'-infinity'; a time such as"),
    (['2024-01-01', T, '2024-01-03'], 'row 2: .*a time such as'),
    ([T, 'inf', T], "row 2: .*'inf'; a number is expected"),
    ([T, 'nan', T], "row 2: .*'nan'; a number is expected"),
    ([T, 2**63], 'row 2: .*a number is expected'),
  ],
)
def test_a_time_that_does_not_fit_the_log_is_refused(tmp_path, times, message):
  with pytest.raises(UserError, match=message):
    staged(tmp_path, times)


@pytest.mark.parametrize(
  'log,times,expected',
  [
    ([T + 0.5, T], [T + 9000, T + 9001.5], [(T + 9000) * 10**6, (T + 9001) * 10**6 + 500_000]),
    ([T], [T + 9000.0], [T + 9000]),
    ([T], [T + 9000.5, T], 'row 1: .*1700009000.5.*round it'),
    ([T], [T, (T + 9000) * 1000], 'row 2: .*whole number of seconds.*milliseconds by its size'),
    ([T * 1000], [T + 9000], 'row 1: .*whole number of milliseconds.* seconds by its size'),
    (['2024-01-01'], [T], 'row 1: .*a text such as'),
    (['2024-01-01'], ['2024-01-02T00:00:00Z'], [1_704_153_600_000_000]),
    ([T], ['2024-01-02'], 'row 1: .*whole number of seconds'),
    ([3, 5], [6, 900], [6, 900]),
    ([3, 5], [T], 'row 1: .*near those of the log, 3 to 5.*seconds by its size'),
  ],
)
def test_new_events_are_read_with_the_clock_of_the_log(tmp_path, log, times, expected):
  clock, _ = staged(tmp_path, log)
  if isinstance(expected, list):
    assert staged(tmp_path, times, clock)[1] == expected
  else:
    with pytest.raises(UserError, match=expected):
      staged(tmp_path, times, clock)


def test_stores_of_earlier_versions_have_a_clock():
  assert clock_of({'time_unit': 'source'}, '', T, T + 9) == Clock(
    'number', 'second', 1, '', T, T + 9
  )
  assert clock_of({'time_unit': 'source'}, '', 1, T).unit == ''
  assert not clock_of({'time_unit': 'position'}, '', 0, 0).timed
  assert clock_of({'time_unit': 'microsecond'}, '%Y', 0, 0).parse('1971') == 365 * 86_400 * 10**6
  either = clock_of({'time_unit': 'microsecond'}, '', 0, 0)
  assert either.parse('1970-01-02') == either.parse(86_400) == 86_400 * 10**6
