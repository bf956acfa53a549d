"""Files with more than plain rows: quotes, late keys, empty parts, lists, side files."""

import bz2
import csv
import gzip
import io
import json
import logging
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmn_jax import config
from lmn_jax.data import prepare
from lmn_jax.data.readers import quotes
from lmn_jax.errors import UserError
from tests.data.test_interactions import rows, staged, table, write
from tests.runs import but_slow

HEAD = 'user,item,time,note\n'


def read(folder, text, columns='"user", item', ending='csv', **fields):
  """Returns rows of a log with this text, and the notes."""
  source = write(folder / f'log.{ending}', text)
  db, notes = staged(folder, config.data(**{'source': source, 'label': ''} | fields))
  return rows(db, columns), notes


# -- quotes -----------------------------------------------------------------------------------


def test_quotes_are_plain_characters_between_tabs(tmp_path):
  text = 'user\titem\ttime\tnote\n' + ''.join(
    f'u{k}\ti{k}\t{k}\t{note}\n' for k, note in enumerate(('"one', 'two', 'three"', '"', 'x"y'))
  )
  expected = [(f'u{k}', f'i{k}', n) for k, n in enumerate(('"one', 'two', 'three"', '"', 'x"y'))]
  read_rows, notes = read(
    tmp_path, text, '"user", item, note', 'tsv', time='', context_features=('note',)
  )
  assert read_rows == expected and notes['rows_read'] == 5
  commas = text.replace('\t', ';')
  assert read(tmp_path, commas, time='', delimiter=';', quote='')[1]['rows_read'] == 5
  with pytest.raises(
    UserError, match='log.csv: row 1: a quoted cell contains whole rows .2 in all'
  ):
    read(tmp_path, '\n'.join(commas.split('\n')[:4]), delimiter=';', time='')


def test_line_breaks_in_quotes_are_counted(tmp_path, caplog):
  text = HEAD + 'u1,i1,1,"two\nlines"\nu2,i2,2,"three\r\nlines, or\n more"\n'
  with caplog.at_level(logging.WARNING):
    read_rows, notes = read(tmp_path, text)
  assert read_rows == [('u1', 'i1'), ('u2', 'i2')]
  assert (notes['rows_read'], notes['line_breaks_in_cells']) == (2, 3)
  assert '3 line breaks are within quoted cells' in caplog.text


def test_a_quote_set_by_the_user_is_trusted(tmp_path, caplog):
  text = HEAD + 'u1,i1,1,"open\nu2,i2,2,x\nu3,i3,3,y"\n'
  with pytest.raises(UserError, match='row 1: a quoted cell contains whole rows .2 in'):
    read(tmp_path, text)
  with caplog.at_level(logging.WARNING):
    assert read(tmp_path, text, quote='"')[1]['line_breaks_in_cells'] == 2
  assert '2 line breaks' in caplog.text
  with pytest.raises(UserError, match="config.data.quote='ab' must be one character"):
    read(tmp_path, text, quote='ab')


notes_of_rows = st.lists(
  st.text(st.sampled_from('a", \n'), max_size=6).map(lambda x: x.strip()), min_size=1, max_size=6
)


@settings(max_examples=25)
@given(notes=notes_of_rows, closed=st.booleans())
def test_no_row_is_lost_silently(tmp_path_factory, notes, closed):
  """Each written row is read, or the log is refused, or line breaks are counted."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n', quotechar='"' if closed else '\x02')
  writer.writerow(('user', 'item', 'time', 'note'))
  writer.writerows((f'u{k}', f'i{k}', k, note) for k, note in enumerate(notes))
  try:
    read_rows, counts = read(tmp_path_factory.mktemp('log'), file.getvalue())
  except UserError:
    return
  breaks = sum(note.count('\n') for note in notes)
  if closed:
    assert len(read_rows) == len(notes) and counts['line_breaks_in_cells'] == breaks
  elif counts['rows_read'] + counts['line_breaks_in_cells'] != len(notes):
    lines = [line for line in file.getvalue().split('\n')[1:] if line]
    assert counts['rows_read'] + counts['line_breaks_in_cells'] >= len(lines)


# -- JSON lines -------------------------------------------------------------------------------


def test_json_keys_and_types_of_all_lines_are_read(tmp_path):
  lines = [{'user': 'a', 'item': 'x', 'time': k, 'tags': ['p', 'q']} for k in range(1500)]
  lines[1200] = {'user': 'b', 'item': 'y', 'time': 1200, 'tags': 'r', 'query': 'late', 'é/~"': 7}
  lines[1300] |= {'user': 12, 'item': 3.0, 'tags': [], 'query': None}
  text = '\n\n'.join(map(json.dumps, lines))
  read_rows, _ = read(
    tmp_path,
    text,
    '"user", item, tags, query, "é/~"""',
    'jsonl',
    context_features=('tags', 'query', 'é/~"'),
    multi={'tags': '|'},
  )
  assert read_rows[0] == ('a', 'x', 'p|q', None, None)
  assert read_rows[1200] == ('b', 'y', 'r', 'late', '7')
  assert read_rows[1300] == ('12', '3', None, None, None)


@pytest.mark.parametrize(
  'late,fields,message',
  [
    ('\n\n[1]', {}, 'line 1503, .* is not a JSON object'),
    ('{"user": ', {}, 'line 1501, .* is not valid JSON'),
    ('{"user": "a", "item": {"id": 1}, "time": 1}', {}, "'item' holds a JSON object"),
    ('{"user": "a", "item": "x", "tags": ["p", "q"], "time": 1}', {}, "'tags' holds lists"),
    ('{"user": "a", "item": "x", "tags": ["p|q"], "time": 1}', {'multi': {'tags': '|'}},
     "'tags': a value of a list contains the separator"),
    ('{"user": "a", "item": "x", "time": 1}', {'context_features': ('query',)},
     "'query' is unknown"),
  ],
)  # fmt: skip
def test_invalid_json_on_a_late_line_is_refused(tmp_path, late, fields, message):
  text = '{"user": "a", "item": "x", "time": 0, "tags": "p"}\n' * 1500 + late
  with pytest.raises(UserError, match=message):
    read(tmp_path, text, ending='jsonl', **{'context_features': ('tags',)} | fields)


# -- files ------------------------------------------------------------------------------------


def test_files_are_sorted_by_numbers_in_their_names(tmp_path, caplog):
  names = ('d2/p10', 'd2/p9', 'd10/p1', 'd1/p2', 'd1/p02', 'x', 'd/p1', 'd/p')
  for name in names:
    write(tmp_path / 'log' / f'{name}.csv', f'user,item\nu,{name}\n')
  write(tmp_path / 'log/_temporary/p1.csv', 'user,item\nu,no\n')
  write(tmp_path / 'log/d1/.p1.csv', 'no')
  write(tmp_path / 'log/d1/_SUCCESS', '')
  data = config.data(source=str(tmp_path / 'log/**/*'), format='csv', time='', label='')
  with caplog.at_level(logging.INFO):
    db, _ = staged(tmp_path, data)
  items = ['d/p', 'd/p1', 'd1/p02', 'd1/p2', 'd2/p9', 'd2/p10', 'd10/p1', 'x']
  assert [x for (x,) in rows(db, 'item')] == items
  assert 'p.csv, p1.csv, p02.csv, p2.csv, p9.csv, p10.csv, p1.csv, x.csv' in caplog.text
  with pytest.raises(UserError, match='p1.csv: column .* available: no'):
    staged(tmp_path, config.data(**dict(data) | {'source': str(tmp_path / 'log/d1/.p*')}))


@pytest.mark.parametrize('ending,line', [('csv', 'user,item,time\nu,i,1\n'), ('jsonl', '')])
def test_files_without_a_row_are_skipped(tmp_path, ending, line):
  full = line or '{"user": "u", "item": "i", "time": 1}\n'
  for k, text in enumerate((full, '', '\n', line.partition('\n')[0], '\ufeff')):
    write(tmp_path / f'{k}.{ending}', text)
  data = config.data(source=str(tmp_path / f'*.{ending}'), label='')
  db, notes = staged(tmp_path, data)
  assert rows(db, 'item') == [('i',)]
  assert (len(notes['files']), notes['empty_files']) == (5, 4)
  write(tmp_path / f'0.{ending}', '')
  with pytest.raises(UserError, match='the log is empty'):
    staged(tmp_path, data)


# -- side files -------------------------------------------------------------------------------


def test_each_side_file_has_its_own_format(tmp_path):
  write(tmp_path / 'users.tsv', 'user\tcity\nu\tKöln\n'.encode('utf-16'))
  write(tmp_path / 'items.dat', 'i|"red"\n')
  sides = dict(
    users_source=str(tmp_path / 'users.tsv'),
    users_format='tsv',
    users_encoding='utf-16',
    user_features=('city',),
    items_source=str(tmp_path / 'items.dat'),
    items_delimiter='|',
    items_fields=('item', 'colour'),
    item_features=('colour',),
  )
  text = 'user;item;time\nu;i;1\n'
  source = write(tmp_path / 'log.csv', text)
  data = config.data(source=source, label='', delimiter=';', **sides)
  db, _ = staged(tmp_path, data)
  assert table(db, 'users') == [('u', 'Köln')] and table(db, 'items') == [('i', 'red')]
  for changed, message in {
    ('users_encoding', ''): 'config.data.users_encoding .config.data.side_encoding',
    ('users_encoding', 'utf-9'): "config.data.users_encoding .*'utf-9' is unknown",
    ('users_format', 'cvs'): "config.data.users_format='cvs' is unknown",
    ('users_source', ''): 'config.data.users_.*needs config.data.users_source',
    ('items_delimiter', ''): 'items.dat: .*check config.data.items_format, '
    'config.data.items_delimiter, config.data.quote, config.data.items_fields',
  }.items():
    name, value = changed
    with pytest.raises(UserError, match=message):
      staged(tmp_path, config.data(source=source, label='', delimiter=';', **sides | {name: value}))
  write(tmp_path / 'items.dat', '')
  with pytest.raises(UserError, match='config.data.items_source=.*no file has a row'):
    staged(tmp_path, data)


# -- sequences --------------------------------------------------------------------------------

EVENTS = [('u1', 'd', 100), ('u1', 'c', 200), ('u1', 'b', 300), ('u1', 'a', 400), ('u2', 'e', 7)]


def sequences(folder, text, ending='tsv', **fields):
  fields = dict(format='sequences', user='uid', item='items', time='ts', split_column='') | fields
  source = write(folder / f'log.{ending}', text)
  db, notes = staged(folder, config.data(**{'source': source, 'label': ''} | fields))
  return db.execute('SELECT "user", item, time FROM interactions ORDER BY "user", time, "row"'
                    ).fetchall(), notes  # fmt: skip


@pytest.mark.parametrize(
  'text,fields',
  [
    ('uid\titems\tts\nu1\ta,b,c,d\t400,300,200,100\nu2\te\t7\n', {}),
    ("uid\titems\tts\nu1\t['a', 'b', 'c', 'd']\t[400, 300, 200, 100]\nu2\t['e']\t7\n",
     {'items_separator': ', '}),
    ('uid;items;ts\nu1;"[""a"",""b""]";400,300\nu1;[c  d];"[200 100]"\nu2;[e];[7]\n',
     {'delimiter': ';'}),
    ('u1\td\t100\nu1\tc,b,a\t200,300,400\nu2\te\t7\n',
     {'header': False, 'fields': ('uid', 'items', 'ts')}),
  ],
)  # fmt: skip
def test_times_and_literals_of_sequences_are_read(tmp_path, text, fields):
  events, notes = sequences(tmp_path, text, **fields)
  assert events == EVENTS and notes['rows'] == 5


@pytest.mark.parametrize(
  'text,fields,message',
  [
    ('uid\titems\tts\nu2\te\t1\nu1\ta,b\t1\n', {},
     "log.tsv: row 2: column 'ts' has 1 values, column 'items' 2; give both the same"),
    ('uid\titems\nu1\ta,b\n', {}, "config.data.time .*'ts' is unknown"),
    ('u1,a,b\n', {'header': False, 'times_source': ''}, "config.data.time='ts' names a column"),
    ("uid\titems\tts\nu1\t['a', 'b]\t1,2\n", {}, 'the list .* cannot be read'),
    ('uid\titems\tts\nu1\t[1, ..., 2]\t1,2\n', {}, 'the list .* cannot be read'),
  ],
)  # fmt: skip
def test_invalid_sequences_are_refused(tmp_path, text, fields, message):
  with pytest.raises(UserError, match=message):
    sequences(tmp_path, text, **fields)


def test_the_lines_of_a_user_are_joined(tmp_path):
  for k, text in enumerate(('1\ta,b\n2\tc\n1.0\td\n', '2\te\n 1\tf,g\n')):
    write(tmp_path / f'{k}.tsv', 'uid\titems\n' + text)
  events, notes = sequences(tmp_path, '', source=str(tmp_path / '?.tsv'), time='')
  assert [(user, item) for user, item, _ in events] == [('1', x) for x in 'abdfg'] + [
    ('2', 'c'), ('2', 'e')
  ]  # fmt: skip
  assert [time for *_, time in events] == [0, 1, 2, 3, 4, 0, 1]
  assert notes['users_on_several_lines'] == 2 and notes['time']['form'] == 'position'


TYPED = {
  'uid': ['u1', 'u2', 'u3', 'u4'],
  'items': [['a', 'b', 'c', 'd'], ['e'], [], None],
  'ts': [[400, 300, 200, 100], [7], [], None],
  'click': [[1, 0, 1, 0], [1], [], None],
  'day': ['mo', 'tu', 'we', 'th'],
  'price': [[4, 3, 2, 1], [5], [], None],
  'tags': [['p', 'q'], ['r'], [], None],
}


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
@pytest.mark.parametrize('kind', ['', 'sequences'])
def test_lists_of_events_in_typed_files_are_read(tmp_path, ending, kind):
  path = tmp_path / f'log.{ending}'
  records = [dict(zip(TYPED, row, strict=True)) for row in zip(*TYPED.values(), strict=True)]
  if ending == 'parquet':
    pq.write_table(pa.table(TYPED), path)
  else:
    path.write_text('\n'.join(json.dumps(record) for record in records))
  fields = dict(
    format=kind, source=str(path), user='uid', item='items', time='ts', label='click',
    user_features=('day',), context_features=('price', 'tags'), multi={'tags': ' '},
  )  # fmt: skip
  db, notes = staged(tmp_path, config.data(**fields))
  assert rows(db, '"user", item, time, label, price, tags') == [
    ('u1', 'a', 400, 1.0, '4', 'p q'),
    ('u1', 'b', 300, 0.0, '3', 'p q'),
    ('u1', 'c', 200, 1.0, '2', 'p q'),
    ('u1', 'd', 100, 0.0, '1', 'p q'),
    ('u2', 'e', 7, 1.0, '5', 'r'),
  ]
  assert table(db, 'users') == [('u1', 'mo'), ('u2', 'tu')]
  db, notes = staged(tmp_path, config.data(**fields | {'time': '', 'label': ''}))
  assert rows(db, 'time') == [(0,), (1,), (2,), (3,), (0,)] and notes['time']['form'] == 'position'
  with pytest.raises(UserError, match="row 1: column 'tags' has 2 values, column 'items' 4"):
    staged(tmp_path, config.data(**fields | {'multi': {}}))


tokens = st.text(st.sampled_from('ab1é.-_'), min_size=1, max_size=4).filter(
  lambda x: x.strip('.') and not x.endswith('.0')
)
lines = st.lists(
  st.tuples(st.sampled_from(['u', 'v', 'w']), st.lists(st.tuples(tokens, st.integers(0, 9)))),
  min_size=1, max_size=6,
).filter(lambda x: any(events for _, events in x))  # fmt: skip


@pytest.mark.slow
@settings(max_examples=15)
@given(lines=lines, timed=st.booleans())
def test_all_forms_of_a_sequence_give_the_same_events(tmp_path_factory, lines, timed):
  """Separated texts, literals, JSON lists and Parquet lists; a user may have several lines."""
  folder, expected, positions = tmp_path_factory.mktemp('log'), [], {}
  for user, events in lines:
    for item, time in events:
      positions[user] = positions.get(user, -1) + 1
      expected.append((user, item, time if timed else positions[user]))
  listed = [(user, [x for x, _ in events], [t for _, t in events]) for user, events in lines]
  names = ('uid', 'items', 'ts')
  forms = {
    'separated.tsv': lambda x: '|'.join(map(str, x)),
    'python.tsv': str,
    'json.tsv': lambda x: json.dumps(x, ensure_ascii=False),
  }
  for ending, write_list in forms.items():
    text = ''.join(f'{user}\t{write_list(x)}\t{write_list(t)}\n' for user, x, t in listed)
    write(folder / f'log.{ending}', '\t'.join(names) + '\n' + text)
  records = [dict(zip(names, row, strict=True)) for row in listed]
  write(folder / 'log.jsonl', '\n'.join(map(json.dumps, records)))
  pq.write_table(pa.Table.from_pylist(records, pa.schema(
    [('uid', pa.string()), ('items', pa.list_(pa.string())), ('ts', pa.list_(pa.int64()))]
  )), folder / 'log.parquet')  # fmt: skip
  for ending in (*forms, 'jsonl', 'parquet'):
    events, _ = sequences(
      folder, '', source=str(folder / f'log.{ending}'), items_separator='|', missing=(),
      time='ts' if timed else '',
    )  # fmt: skip
    key = lambda x: (x[0], x[2])  # noqa: E731
    assert events == sorted(expected, key=key), ending


@pytest.mark.parametrize(
  'record,message',
  [
    ({'items': [{'id': 1}], 'ts': [1]}, "'items' holds JSON lists of lists or of objects"),
    ({'items': ['a'], 'ts': [1, 2]}, "column 'ts' has 2 values, column 'items' 1"),
    ({'items': 'a', 'ts': [1]}, "'ts' holds lists; .*config.data.format='sequences'"),
  ],
)
def test_invalid_typed_lists_are_refused(tmp_path, record, message):
  text = json.dumps({'uid': 'u'} | record)
  with pytest.raises(UserError, match=message):
    sequences(tmp_path, text, 'jsonl', format='')
  structs = pa.table({'uid': ['u'], 'items': [record['items']], 'ts': [record['ts']]})
  pq.write_table(structs, tmp_path / 'log.parquet')
  with pytest.raises(UserError, match=message.replace(' JSON lists.*', '').split(' holds JSON')[0]):
    sequences(tmp_path, '', source=str(tmp_path / 'log.parquet'), format='')


def test_literals_of_lists_are_read_as_tokens(tmp_path):
  text = 'user\titem\ttime\ttags\nu\ti\t1\t[\'p\', "q"]\nu\tj\t2\tp|q\nu\tk\t3\t[p]|[q]\n'
  tags, _ = read(tmp_path, text, 'tags', 'tsv', context_features=('tags',), multi={'tags': '|'})
  assert tags == [('p|q',), ('p|q',), ('[p]|[q]',)]


# -- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'places',
  [
    ['2', '10', '1', '3'],
    ['2.5', '10', '-1', '3'],
    [str(2**70 + k) for k in (2, 10, 1, 3)],
    ['2024-01-02', '2024-01-10', '2024-01-01 12:00:01', '2024-01-03'],
  ],
)
def test_a_second_column_orders_rows_of_one_time(tmp_path, places):
  lines = [f'u,i{k},5,{place},c{k}\n' for k, place in enumerate(places)]
  text = 'user,item,time,place,city\n' + ''.join(lines) + 'u,i4,4,99,late\n'
  last = '2025-01-01' if '2024' in places[0] else str(2**71)
  text = text.replace(',99,', f',{last},')
  for time in ('time', ''):
    source = write(tmp_path / 'log.csv', text)
    data = config.data(source=source, label='', time=time, order='place', user_features=('city',))
    db, _ = staged(tmp_path, data)
    first = ['i4'] if time else []
    last = [] if time else ['i4']
    items = db.execute('SELECT item FROM interactions ORDER BY time, "row"').fetchall()
    assert [x for (x,) in items] == [*first, 'i2', 'i0', 'i3', 'i1', *last]
    assert table(db, 'users') == [('u', 'late' if time else 'c2')]
  with pytest.raises(UserError, match="row 1: the order column 'city' holds 'c0'; a number or"):
    staged(tmp_path, config.data(source=source, label='', order='city'))
  write(tmp_path / 'log.csv', text.replace(f',{places[1]},', ',x,'))
  with pytest.raises(UserError, match="row 2: the order column 'place' holds 'x'"):
    staged(tmp_path, data)


# -- split by files ---------------------------------------------------------------------------


@pytest.mark.parametrize('ending,fields', [('csv', {}), ('tsv', {'format': 'sequences'})])
def test_splits_may_be_separate_files(tmp_path, ending, fields):
  names = {'train': 'source', 'valid': 'valid_source', 'test': 'test_source'}
  sources = {}
  for k, (part, field) in enumerate(names.items()):
    text = f'user,item,time\nu,i{k},{k + 1}\nv,j{k},{k + 5}\n'
    if fields:
      text = f'user\titem\ttime\nu\ti{k}\t{k + 1}\nv\tj{k}\t{k + 5}\n'
    sources[field] = write(tmp_path / f'{part}.{ending}', text)
  data = dict(label='', split=dict(protocol='column'), **sources, **fields)
  db, notes = staged(tmp_path, config.data(**data))
  assert rows(db, 'item, split') == [
    ('i0', 0), ('j0', 0), ('i1', 1), ('j1', 1), ('i2', 2), ('j2', 2)
  ]  # fmt: skip
  assert len(notes['files']) == 3
  store = prepare.prepare(config.data(**data, name='whole'), tmp_path / 'stores')
  assert store.manifest['counts']['examples'] == {'train': 2, 'valid': 2, 'test': 2}
  db, _ = staged(tmp_path, config.data(**data | {'valid_source': '', 'time': ''}))
  assert rows(db, 'item, split') == [('i0', 0), ('j0', 0), ('i2', 2), ('j2', 2)]
  for wrong, message in {
    ('split', 'global_time'): "valid_source=.*needs config.data.split.protocol='column', not 'glo",
    ('split_column', 'item'): "config.data.split_column='item' and the files of valid_source",
    ('test_source', 'no.csv'): "config.data.test_source='no.csv' does not exist",
  }.items():
    name, value = wrong
    changed = {'split': dict(protocol=value)} if name == 'split' else {name: value}
    with pytest.raises(UserError, match=message):
      staged(tmp_path, config.data(**data | changed))
  none = {'valid_source': '', 'test_source': ''}
  with pytest.raises(UserError, match='needs config.data.split_column'):
    staged(tmp_path, config.data(**data | none))


# -- compressed files -------------------------------------------------------------------------


@pytest.mark.parametrize('ending', ['gz', 'bz2', 'zst', 'BZ2'])
@pytest.mark.parametrize('kind,encoding', [('csv', 'utf-16'), ('jsonl', 'utf-8')])
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path, ending, kind, encoding):
  text = 'user,item,time\n' + ''.join(f'u,é{k},{k}\n' for k in range(3000))
  if kind == 'jsonl':
    text = ''.join(
      json.dumps({'user': 'u', 'item': f'é{k}', 'time': k}) + '\n' for k in range(3000)
    )
  plain = text.encode(encoding)
  if ending == 'zst':
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, 'zstd') as file:
      file.write(plain)
    compressed = sink.getvalue().to_pybytes()
  else:
    compressed = (gzip.compress if ending == 'gz' else bz2.compress)(plain)
  source = write(tmp_path / f'log.{kind}.{ending}', compressed)
  data = config.data(source=source, label='', encoding=encoding)
  db, notes = staged(tmp_path, data)
  assert notes['rows_read'] == 3000 and rows(db, 'item')[-1] == ('é2999',)
  assert not list((tmp_path / 'scratch').glob('*'))
  for damaged in (compressed[: len(compressed) // 2], b'no' + compressed):
    write(Path(source), damaged)
    with pytest.raises(UserError, match='cannot be read as utf'):
      staged(tmp_path, data)


# -- bad lines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'ending,text,fields,where',
  [
    ('csv', b'user,item,time\nu,i,1\nu,j\nu,\xff,3\nu,k,4,5\n"u"x,l,5\nu,m,6\n', {},
     'line 3: Exp'),
    ('tsv', b'user\titem\ttime\nu\ti\t1\nu\tj\nu\t\xff\t3\n\nu\tk\t4\t5\nx\nu\tm\t6\n',
     {}, 'line 3'),
    ('jsonl', b'{"user": "u", "item": "i", "time": 1}\n[1]\n{"user": \n"\xff"\nx\n'
     b'{"user": "u", "item": "m", "time": 6}\n', {}, "line 2, '[1]', is not a JSON object"),
    ('csv.gz', gzip.compress('user,item,time\nu,i,1\nu,é\n'.encode('gbk')
     + b'u,\xff,3\nu\n,\nu,m,6\n', mtime=0), {'encoding': 'gbk'}, 'line 3'),
  ],
)  # fmt: skip
def test_unreadable_lines_are_skipped_if_configured(tmp_path, caplog, ending, text, fields, where):
  source = write(tmp_path / f'log.{ending}', text)
  data = dict(source=source, label='') | fields
  with pytest.raises(UserError):
    staged(tmp_path, config.data(**data))
  with caplog.at_level(logging.WARNING):
    db, notes = staged(tmp_path, config.data(**data, bad_lines='skip'))
  assert rows(db, 'item') == [('i',), ('m',)]
  assert notes['lines_skipped'] == 4 and notes['rows_read'] == 2
  assert 'skipped 4 unreadable lines' in caplog.text and where in caplog.text
  with pytest.raises(UserError, match="config.data.bad_lines='drop' is unknown"):
    staged(tmp_path, config.data(**data, bad_lines='drop'))


def test_skipped_lines_of_a_side_file_are_counted(tmp_path, caplog):
  data = config.data(
    source=write(tmp_path / 'log.csv', 'user,item,time\nu,i,1\n'), label='', bad_lines='skip',
    users_source=write(tmp_path / 'users.csv', 'user,city\nu,"a\nb"\nv\nw,x\n'),
    user_features=('city',),
  )  # fmt: skip
  with caplog.at_level(logging.WARNING):
    db, notes = staged(tmp_path, data)
  assert table(db, 'users') == [('u', 'a\nb'), ('w', 'x')]
  assert (notes['lines_skipped_of_users'], notes['line_breaks_in_cells_of_users']) == (1, 1)
  assert (notes['lines_skipped'], notes['line_breaks_in_cells']) == (0, 0)
  assert 'users.csv: line' in caplog.text


def test_rows_with_invalid_values_are_skipped_if_configured(tmp_path, caplog):
  text = (
    'user,item,time,label,place,part\na,x,1,1,1,train\na,y,2,yes,2,train\na,z,3,0,x,test\n'
    'a,w,4,1,4,no\na,v,5,0,5,test\n'
  )
  data = config.data(
    source=write(tmp_path / 'log.csv', text), order='place', split_column='part', bad_lines='skip',
    split=dict(protocol='column'),
  )  # fmt: skip
  with caplog.at_level(logging.WARNING):
    db, notes = staged(tmp_path, data)
  assert rows(db, 'item, time, label, split') == [('x', 1, 1.0, 0), ('v', 5, 0.0, 2)]
  assert notes['rows_skipped'] == 3
  assert "log.csv: row 3: the order column 'place' holds 'x'" in caplog.text
  remaining = {name for (name,) in db.execute('SHOW TABLES').fetchall()}
  assert not remaining & {'bad', 'ranks', 'valid_rows', 'unordered_rows'}


# -- candidates and histories of rows ---------------------------------------------------------

MIND = (
  '1\tu1\t11/11/2019 9:05:58 AM\tN1 N2 N3\tN7-1 N8-0 N9-0\n'
  '2\tu2\t11/12/2019 6:11:30 PM\t\tN7-0 N-2-1\n'
  '3\tu1\t11/13/2019 6:11:30 AM\tN1 N2 N3\tN8-1\n'
  '4\tu1\t11/14/2019 6:11:30 AM\tN3\tN9-0\n'
)


def examples_of(store):
  """Returns (user, id of the embedding row, item, label, history) of each example, in raw ids."""
  items, users, examples = store.raw_ids('item').to_pylist(), store.raw_ids('user').to_pylist(), []
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for user, item, label, end in zip(
      *(part.examples[name] for name in ('user', 'item', 'label', 'end')), strict=True
    ):
      begin = part.users['offset'][user]
      events = [items[row] for row in part.history['item'][begin : begin + end]]
      examples.append((names[user], users[part.users['row'][user]], items[item], label, events))
  return sorted(examples, key=lambda x: (x[0], x[2], x[3]))


def mind(folder, text=MIND, **fields):
  defaults = dict(
    source=write(folder / 'behaviors.tsv', text), header=False,
    fields=('imp', 'user', 'time', 'history', 'impressions'), candidates='impressions',
    row_history='history', time_format='%m/%d/%Y %I:%M:%S %p',
    split=dict(protocol='global_time', valid=0.0, test=0.0),
  )  # fmt: skip
  return config.data(**defaults | fields)


def test_candidates_have_the_history_of_their_row(tmp_path):
  items = write(tmp_path / 'news.tsv', 'N1\tsport\nN7\tfood\n')
  data = mind(tmp_path, items_source=items, items_fields=('item', 'kind'), item_features=('kind',))
  store = prepare.prepare(data, tmp_path / 'stores')
  past = ['N1', 'N2', 'N3']
  assert examples_of(store) == [
    ('u1', 'u1', 'N9', 0.0, ['N3']),
    ('u1\0001', 'u1', 'N7', 1.0, past),
    ('u1\0001', 'u1', 'N8', 0.0, past),
    ('u1\0001', 'u1', 'N8', 1.0, past),
    ('u1\0001', 'u1', 'N9', 0.0, past),
    ('u2', 'u2', 'N-2', 1.0, []),
    ('u2', 'u2', 'N7', 0.0, []),
  ]
  notes = store.manifest['notes']
  assert (notes['users_of_row_histories'], notes['row_histories']) == (2, 3)
  # Without row_history, the history is the clicks of earlier impressions.
  store = prepare.prepare(mind(tmp_path, row_history='', name='clicks'), tmp_path / 'stores')
  assert [events for *_, item, _, events in examples_of(store) if item == 'N9'] == [
    [],
    ['N7', 'N8'],
  ]


def test_the_records_of_a_user_are_split_as_one_user(tmp_path):
  split = dict(protocol='user_ratio', valid=0.0, test=0.4)
  store = prepare.prepare(mind(tmp_path, split=split), tmp_path / 'stores')
  splits = {}
  for number, part in enumerate(store.parts):
    names = store.user_ids(number).to_pylist()
    for user, place in zip(part.examples['user'], part.examples['split'], strict=True):
      splits.setdefault(names[user].partition('\0')[0], []).append(int(place))
  # The newest two of five are the test examples, although they are of different records.
  assert {user: sorted(places) for user, places in splits.items()} == {
    'u1': [0, 0, 0, 2, 2], 'u2': [0, 0],
  }  # fmt: skip


def test_rows_may_have_a_label_and_a_history(tmp_path):
  text = 'user,item,label,past\nu,i,1,a^b\nu,j,0,a^b^c\nv,i,0,\n'
  fields = dict(
    source=write(tmp_path / 'log.csv', text), header=True, fields=(), candidates='', time='',
    row_history='past', history_separator='^', time_format='',
  )  # fmt: skip
  store = prepare.prepare(mind(tmp_path, **fields), tmp_path / 'stores')
  expected = [
    ('u', 'u', 'j', 0.0, ['a', 'b', 'c']), ('u\0001', 'u', 'i', 1.0, ['a', 'b']),
    ('v', 'v', 'i', 0.0, []),
  ]  # fmt: skip
  assert examples_of(store) == expected
  lists = {'user': ['u', 'u', 'v'], 'label': [1, 0, 0], 'item': ['i', 'j', 'i'],
           'past': [['a', 'b'], ['a', 'b', 'c'], []]}  # fmt: skip
  pq.write_table(pa.table(lists), tmp_path / 'log.parquet')
  fields['source'] = str(tmp_path / 'log.parquet')
  store = prepare.prepare(mind(tmp_path, **fields, name='lists'), tmp_path / 'stores')
  assert examples_of(store) == expected


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'candidates': 'shown'}, "config.data.candidates='shown' is unknown"),
    ({'row_history': 'past'}, "config.data.row_history='past' is unknown"),
    ({'item': 'imp'}, "'imp' and in that of config.data.candidates='impressions'; remove one"),
    ({'time': '', 'time_format': '', 'row_history': ''}, 'needs config.data.time'),
    ({'candidates_label_separator': ':'}, "N7-1 of 'impressions' has no label after ':'; set conf"),
    ({'format': 'sequences'}, 'is for files of rows, not for sequences'),
    ({'history': 'all'}, "config.data.history='all' has no effect with config.data.row_history"),
    (
      {'candidates': '', 'item': 'impressions', 'label': ''},
      "holds lists of candidates such as 'N7-1 N8-0 N9",
    ),
  ],
)
def test_invalid_candidates_are_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    staged(tmp_path, mind(tmp_path, **fields))


def test_a_list_is_refused_as_an_item(tmp_path):
  with pytest.raises(UserError, match="holds lists such as '.1, 2.'; config.data.format='seq"):
    read(tmp_path, 'user\titem\ttime\nu\t[1, 2]\t1\n', ending='tsv')


# -- every field is read or refused -----------------------------------------------------------

FIELDS = dict(
  delimiter=';', quote="'", header=False, fields=('item', 'user', 'time'), encoding='utf-16',
  user='item', item='user', time='', time_format='%Y', order='day', label='day',
  label_threshold=2.0, behaviour='day', positive_behaviours=('1',), history_behaviours=('1',),
  example_behaviours=('1',), split_column='day', items_separator='|', times_source='nowhere',
  valid_source='nowhere', test_source='nowhere', candidates='item', candidates_separator='|',
  candidates_label_separator=':', row_history='item', history_separator='|', users_source='nowhere',
  users_format='tsv', users_delimiter=';', users_encoding='gbk', users_fields=('user',),
  items_source='nowhere', items_format='tsv', items_delimiter=';', items_encoding='gbk',
  items_fields=('item',), side_format='csv', side_encoding='gbk', user_features=('day',),
  item_features=('day',), context_features=('day',),
)  # fmt: skip


def small_log(folder, kind):
  """Returns config fields of a log of a format: three rows, not in the order of their times."""
  columns = {'user': ['u', 'u', 'v'], 'item': ['i', 'j', 'i'], 'time': [5, 4, 4], 'day': [1, 0, 1]}
  if kind == 'sequences':
    text = 'user\titem\ttime\tday\nu\ti,j\t5,4\t1,0\nv\ti\t4\t1\n'
    return dict(source=write(folder / 'log.tsv', text), format=kind)
  rows_of = list(zip(*columns.values(), strict=True))
  if kind == 'parquet':
    pq.write_table(pa.table(columns), folder / 'log.parquet')
    return dict(source=str(folder / 'log.parquet'))
  if kind == 'jsonl':
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows_of]
    return dict(source=write(folder / 'log.jsonl', '\n'.join(lines)))
  if kind == 'movielens':
    lines = ['::'.join(map(str, row)) for row in rows_of]
    source = write(folder / 'log.dat', '\n'.join(lines))
    return dict(source=source, fields=tuple(columns))
  mark = ',' if kind == 'csv' else '\t'
  names = {'recbole': 'user:token\titem:token\ttime:float\tday:float'}
  lines = [names.get(kind, mark.join(columns)), *(mark.join(map(str, row)) for row in rows_of)]
  endings = {'recbole': 'inter'}
  return dict(source=write(folder / f'log.{endings.get(kind, kind)}', '\n'.join(lines)))


@pytest.mark.parametrize('kind', but_slow(
  ['csv', 'jsonl', 'recbole', 'sequences', 'tsv', 'parquet', 'movielens'], range(4)
))  # fmt: skip
def test_each_field_has_an_effect_or_is_refused(tmp_path, kind):
  base = dict(label='') | small_log(tmp_path, kind)

  def contents(**changes):
    db, notes = staged(tmp_path, config.data(**base | changes))
    return notes['behaviours'], [table(db, name) for name in ('interactions', 'users', 'items')]

  plain, without_effect = contents(), []
  for field, value in FIELDS.items():
    try:
      if contents(**{field: value}) == plain:
        without_effect.append(field)
    except UserError:
      pass
  # No file has quotes, and MovieLens files never have a header.
  assert without_effect == {'jsonl': [], 'parquet': [], 'movielens': ['quote', 'header']}.get(
    kind, ['quote']
  )


def test_counting_line_breaks_leaves_the_connection_free(tmp_path):
  """DuckDB runs no other query while a result has not been read to its end."""
  (tmp_path / 'log.csv').write_bytes(b'user,item,note\nu1,i1,"x\r\ny"\n')
  with duckdb.connect() as db:
    db.execute('CREATE TABLE others AS SELECT 1 AS a')
    relation = f"read_csv('{tmp_path / 'log.csv'}', all_varchar=true, header=true)"
    assert quotes.line_breaks(db, 'log.csv', relation, ['item', 'note'], ',', False) == 1
    assert db.sql('SELECT * FROM others').to_arrow_table().num_rows == 1
