"""Hostile input: logs, ids and overrides are read exactly, or refused with an error of one line."""

import collections
import csv
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmn_jax import config as configs
from lmn_jax import main
from lmn_jax.data import prepare, texts
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.training import setup as setups
from tests.runs import but_slow, tiny_config
from tests.test_main import CONFIG, call

FORMATS = ('csv', 'tsv', 'jsonl', 'recbole', 'movielens', 'sequences', 'parquet')
MISSING = ('', 'NA', 'NULL', 'nan', 'NaN', 'null', '\\N', '<na>')
# Ids that occur in practice: numbers that are too large or negative, texts that resemble numbers,
# text of any script, and text with a meaning in a shell, SQL or a spreadsheet.
NASTY = (
  '0', '-1', '007', '7', '7.0', '1e3', str(2**31), str(2**63), str(-(2**63) - 1), str(10**40),
  'inf', 'Nan', 'None', 'true', "x'; DROP TABLE interactions; --", '=1+1', '../../etc/passwd',
  '%s', '{0}',
  'é', 'e\u0301', '日本', '😀', '\u202e', '\u00a0', ' a', 'a ', 'A', 'a', 'a,b', 'a"b', 'a\tb', "'",
  '\\', '\\N', 'x' * 3000,
)  # fmt: skip
ids = st.one_of(
  st.sampled_from(NASTY + MISSING),
  st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0\r\n'), max_size=8),
  st.integers(-(2**70), 2**70).map(str),
)
times = st.one_of(
  st.integers(0, 2**33).map(str),
  st.sampled_from(
    ('', '-5', '1e9', '1.5', 'x', '2024-01-01', str(2**63), str(10**30), 'nan', 'inf')
  ),
)


def data_of(kind, **fields):
  config = configs.data(
    name='hostile', label='', split=dict(protocol='leave_one_out'), format=kind, **fields
  )
  config.user, config.item, config.time = 'user', 'item', 'time'
  return config


def prepared(config, text):
  """Returns the histories of a log, or None if it is refused with an error of one line."""
  with tempfile.TemporaryDirectory() as root:
    source, stores = Path(root, f'log.{config.format}'), Path(root, 'stores')
    source.write_bytes(text)
    config.source = str(source)
    try:
      store = prepare.prepare(config, stores)
    except UserError as error:
      message = str(error)
      assert message and len(message.splitlines()) == 1, message
      assert not [x for x in stores.iterdir() if not x.name.endswith('.lock')]
      return None
    check(store)
    return histories(store)


def check(store):
  """Checks a store: ids are in their tables, histories are sorted by time, and hashes agree."""
  V = store.vocabulary['item']
  for part in store.parts:
    assert part.history['item'].min(initial=0) >= 0 and part.history['item'].max(initial=0) < V
    count, offset = part.users['count'], part.users['offset']
    assert count.min(initial=1) >= 1 and count.sum() == len(part.history['item'])
    for first, events in zip(offset, count, strict=True):
      assert (np.diff(part.history['time'][first : first + events]) >= 0).all()
  Store(store.path).check_unchanged()


def histories(store):
  """Returns raw user -> raw items of their history, in order; None is the unknown item."""
  raw = store.raw_ids('item').to_pylist()
  items_by_user = {}
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for name, first, events in zip(names, part.users['offset'], part.users['count'], strict=True):
      items_by_user[name] = [raw[row] for row in part.history['item'][first : first + events]]
  return items_by_user


@pytest.mark.parametrize('kind', FORMATS)
@settings(max_examples=12)
@given(text=st.binary(max_size=200))
@example(text=b'')
@example(text=b'user,item,time\n')
@example(text=b'\xff\xfeuser')
@example(text=b'user\titem\ttime\n\n\n1\t2\n1\t2\t3\t4\n')
@example(text=b'{"user": 1, "item": [1, 2], "time": {"a": 1}}\n{"user": null}\n[]\n3\n')
@example(text=b'user:token\titem:token\ttime:float\n1\t1\tx\n')
@example(text=b'"user,item,time\n1,2,3\n')
def test_bytes_that_are_not_a_log_are_read_or_refused(kind, text):
  prepared(data_of(kind), text)


def expected_histories(rows):
  """Returns the histories of rows (user, item, time), sorted by time and row.

  Rows without a user or an item are skipped.
  """
  events_by_user = collections.defaultdict(list)
  for number, (user, item, time) in enumerate(rows):
    user, item = (texts.value(x, texts.words(configs.data().missing)) for x in (user, item))
    if user and item:
      events_by_user[user].append((int(time), number, item))
  return {user: [item for *_, item in sorted(events)] for user, events in events_by_user.items()}


def log_bytes(kind, rows):
  """Returns the content of a log of a format with these rows of text."""
  names = ('user', 'item', 'time')
  if kind == 'parquet':
    columns = [pa.array(list(x), pa.string()) for x in zip(*rows, strict=True)]
    columns[2] = pa.array([int(time) for *_, time in rows], pa.int64())
    file = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), file)
    return file.getvalue()
  if kind == 'jsonl':
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return '\n'.join([*lines, '']).encode()
  file = io.StringIO()
  csv.writer(file, delimiter=',' if kind == 'csv' else '\t', quoting=csv.QUOTE_ALL).writerows(
    [names, *rows]
  )
  return file.getvalue().encode()


@pytest.mark.parametrize('kind', but_slow(['csv', 'tsv', 'jsonl', 'parquet'], {0}))
@settings(max_examples=12)
@given(rows=st.lists(st.tuples(ids, ids, st.integers(0, 2**33).map(str)), min_size=1, max_size=20))
@example(rows=[('u', x, '5') for x in NASTY] * 2)
@example(rows=[(x, 'i', '5') for x in NASTY for _ in range(3)])
def test_ids_are_stored_exactly(kind, rows):
  """Similar ids stay different: 7 and 007, composed and decomposed characters, ids of any size."""
  quoted = {'quote': '"'} if kind == 'tsv' else {}
  stored = prepared(data_of(kind, **quoted), log_bytes(kind, rows))
  expected = expected_histories(rows)
  if stored is None:
    # No user has an event for training.
    assert not any(len(items) > 2 for items in expected.values()), expected
    return
  assert stored.keys() == expected.keys()
  for user, items in expected.items():
    known_items = [x for x in stored[user] if x is not None]
    # Items that occur only in validation or test are unknown; all others are at their positions.
    assert len(stored[user]) == len(items)
    assert known_items == [x for x, y in zip(items, stored[user], strict=True) if y is not None]
    assert stored[user][:-2] == items[:-2]


@settings(max_examples=20)
@given(rows=st.lists(st.tuples(ids, ids, times), min_size=1, max_size=12))
def test_invalid_times_are_read_or_refused(rows):
  prepared(data_of('csv'), log_bytes('csv', rows))


def test_a_user_with_very_many_events_and_very_many_users_with_one_event():
  events = 200_000
  rows = [f'long,i{k % 1000},{k}' for k in range(events)] + [f'u{k},i1,{k}' for k in range(20_000)]
  text = '\n'.join(['user,item,time', *rows, ''])
  stored = prepared(data_of('csv', rows_per_part=1000), text.encode())
  assert len(stored) == 20_001 and len(stored['long']) == events
  assert stored['long'][:3] == ['i0', 'i1', 'i2']


def leaves(config, prefix='config'):
  """Yields the paths of all fields of a config."""
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from leaves(value, f'{prefix}.{name}')
    else:
      yield f'{prefix}.{name}'


VALUES = (
  '', '-1', '0', '1', '2.5', 'nan', 'inf', '-inf', '1e400', '1_0', '0x10', '(1,2', '(1,)', '()',
  '[]', '{}', "('a',)", 'None', 'True', 'abc', '"', "'", '../..', '/', '\0', 'é', str(2**31),
  str(2**63), '9' * 40, '--config.steps=1', '__import__("os").abort()', '(' * 2000,
)  # fmt: skip
FIELDS = sorted(leaves(tiny_config('lmn')))


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(CONFIG.format(arguments="'lmn'"))
  return path


# `call` reads the captured output after each example.
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), max_size=2))
def test_overrides_are_accepted_or_refused(config_file, overrides, capsys):
  """`--config.FIELD=VALUE` is valid, or ends with an error of one line and status 2."""
  arguments = [f'--config={config_file}', *(f'--{name}={x}' for name, x in overrides)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(main, 'run', lambda: setups.check(main.FLAGS.config))
    code, out, err = call(patch, capsys, *arguments)
  assert code in (0, 2) and out == ''
  if code:
    assert err.startswith('error: ') and err.count('\n') == 1 and len(err) < 3000, err
