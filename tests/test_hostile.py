"""Hostile input: a log, an id or an override is taken for what it says, or refused in one line."""

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
from tests.runs import tiny_config
from tests.test_main import CONFIG, call

FORMATS = ('csv', 'tsv', 'jsonl', 'recbole', 'movielens', 'sequences', 'parquet')
MISSING = ('', 'NA', 'NULL', 'nan', 'NaN', 'null', '\\N', '<na>')
# What people's ids have been found to be: numbers too large, below zero, not quite numbers; text of
# any script; what a shell, SQL or a spreadsheet would take for something else.
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


def log_of(kind, **fields):
  config = configs.data(
    name='hostile', label='', split=dict(protocol='leave_one_out'), format=kind, **fields
  )
  config.user, config.item, config.time = 'user', 'item', 'time'
  return config


def prepared(config, text):
  """Histories in the store of these bytes; None where they are refused, in one clean line."""
  with tempfile.TemporaryDirectory() as root:
    source, stores = Path(root, f'log.{config.format}'), Path(root, 'stores')
    source.write_bytes(text)
    config.source = str(source)
    try:
      store = prepare.prepare(config, stores)
    except UserError as error:
      said = str(error)
      assert said and len(said.splitlines()) == 1, said
      assert not [x for x in stores.iterdir() if not x.name.endswith('.lock')]
      return None
    check(store)
    return histories(store)


def check(store):
  """What every batch rests on: ids in their tables, histories in the order of time, sums."""
  V = store.vocabulary['item']
  for part in store.parts:
    assert part.history['item'].min(initial=0) >= 0 and part.history['item'].max(initial=0) < V
    count, offset = part.users['count'], part.users['offset']
    assert count.min(initial=1) >= 1 and count.sum() == len(part.history['item'])
    for first, events in zip(offset, count, strict=True):
      assert (np.diff(part.history['time'][first : first + events]) >= 0).all()
  Store(store.path).check_unchanged()


def histories(store):
  """Raw user -> raw items of its history, in order; None is the unknown item."""
  raw = store.raw_ids('item').to_pylist()
  found = {}
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for name, first, events in zip(names, part.users['offset'], part.users['count'], strict=True):
      found[name] = [raw[row] for row in part.history['item'][first : first + events]]
  return found


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
def test_bytes_that_are_no_log(kind, text):
  prepared(log_of(kind), text)


def wanted(rows):
  """Histories of (user, item, time) by the rule: no user or no item, no event; by time, row."""
  found = collections.defaultdict(list)
  for number, (user, item, time) in enumerate(rows):
    user, item = (texts.value(x, texts.words(configs.data().missing)) for x in (user, item))
    if user and item:
      found[user].append((int(time), number, item))
  return {user: [item for *_, item in sorted(events)] for user, events in found.items()}


def written(kind, rows):
  """Rows of text as a log of a format."""
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


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'parquet'])
@settings(max_examples=12)
@given(rows=st.lists(st.tuples(ids, ids, st.integers(0, 2**33).map(str)), min_size=1, max_size=20))
@example(rows=[('u', x, '5') for x in NASTY] * 2)
@example(rows=[(x, 'i', '5') for x in NASTY for _ in range(3)])
def test_ids_are_what_was_written(kind, rows):
  """Each id is itself and no other, however alike: 7 and 007, composed and not, of any size."""
  quoted = {'quote': '"'} if kind == 'tsv' else {}
  found, histories = prepared(log_of(kind, **quoted), written(kind, rows)), wanted(rows)
  if found is None:
    # Nothing to learn or to predict from.
    assert not any(len(items) > 2 for items in histories.values()), histories
    return
  assert found.keys() == histories.keys()
  for user, items in histories.items():
    known = [x for x in found[user] if x is not None]
    # An item that only validation or test have is unknown; all others are themselves, in place.
    assert len(found[user]) == len(items)
    assert known == [x for x, y in zip(items, found[user], strict=True) if y is not None]
    assert found[user][:-2] == items[:-2]


@settings(max_examples=20)
@given(rows=st.lists(st.tuples(ids, ids, times), min_size=1, max_size=12))
def test_times_that_are_none(rows):
  prepared(log_of('csv'), written('csv', rows))


def test_one_user_of_very_many_events_and_very_many_of_one():
  events = 200_000
  rows = [f'long,i{k % 1000},{k}' for k in range(events)] + [f'u{k},i1,{k}' for k in range(20_000)]
  text = '\n'.join(['user,item,time', *rows, ''])
  found = prepared(log_of('csv', rows_per_part=1000), text.encode())
  assert len(found) == 20_001 and len(found['long']) == events
  assert found['long'][:3] == ['i0', 'i1', 'i2']


def leaves(config, prefix='config'):
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


# Capturing begins anew with each call.
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), max_size=2))
def test_overrides_are_checked_or_refused(config_file, overrides, capsys):
  """`--config.FIELD=VALUE` is a value that the field may have, or one line and status 2."""
  arguments = [f'--config={config_file}', *(f'--{name}={x}' for name, x in overrides)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(main, 'run', lambda: setups.check(main.FLAGS.config))
    code, out, err = call(patch, capsys, *arguments)
  assert code in (0, 2) and out == ''
  if code:
    assert err.startswith('error: ') and err.count('\n') == 1 and len(err) < 3000, err
