"""What files may hold besides plain rows: quotes, late keys, empty parts, lists, side files."""

import csv
import io
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmn_jax import config
from lmn_jax.errors import UserError
from tests.test_logs import rows, staged, table, write

HEAD = 'user,item,time,note\n'


def read(folder, text, what='"user", item', ending='csv', **fields):
  """Rows of a log of this text, and the notes."""
  source = write(folder / f'log.{ending}', text)
  db, notes = staged(folder, config.data(**{'source': source, 'label': ''} | fields))
  return rows(db, what), notes


# -- quotes -----------------------------------------------------------------------------------


def test_a_tab_parts_columns_without_quotes(tmp_path):
  text = 'user\titem\ttime\tnote\n' + ''.join(
    f'u{k}\ti{k}\t{k}\t{note}\n' for k, note in enumerate(('"one', 'two', 'three"', '"', 'x"y'))
  )
  expected = [(f'u{k}', f'i{k}', n) for k, n in enumerate(('"one', 'two', 'three"', '"', 'x"y'))]
  found, notes = read(
    tmp_path, text, '"user", item, note', 'tsv', time='', context_features=('note',)
  )
  assert found == expected and notes['rows_read'] == 5
  commas = text.replace('\t', ';')
  assert read(tmp_path, commas, time='', delimiter=';', quote='')[1]['rows_read'] == 5
  with pytest.raises(UserError, match='log.csv: row 1: a quoted cell holds whole rows .2 in all'):
    read(tmp_path, '\n'.join(commas.split('\n')[:4]), delimiter=';', time='')


def test_lines_in_quotes_are_counted(tmp_path, caplog):
  text = HEAD + 'u1,i1,1,"two\nlines"\nu2,i2,2,"three\r\nlines, or\n more"\n'
  with caplog.at_level(logging.WARNING):
    found, notes = read(tmp_path, text)
  assert found == [('u1', 'i1'), ('u2', 'i2')]
  assert (notes['rows_read'], notes['line_breaks_in_cells']) == (2, 3)
  assert '3 line breaks lie within quoted cells' in caplog.text


def test_a_quote_that_is_set_is_trusted(tmp_path, caplog):
  text = HEAD + 'u1,i1,1,"open\nu2,i2,2,x\nu3,i3,3,y"\n'
  with pytest.raises(UserError, match='row 1: a quoted cell holds whole rows .2 in'):
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
def test_no_row_is_lost_in_silence(tmp_path_factory, notes, closed):
  """Every row that was written is read, or the log is refused, or line breaks are counted."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n', quotechar='"' if closed else '\x02')
  writer.writerow(('user', 'item', 'time', 'note'))
  writer.writerows((f'u{k}', f'i{k}', k, note) for k, note in enumerate(notes))
  try:
    found, said = read(tmp_path_factory.mktemp('log'), file.getvalue())
  except UserError:
    return
  breaks = sum(note.count('\n') for note in notes)
  if closed:
    assert len(found) == len(notes) and said['line_breaks_in_cells'] == breaks
  elif said['rows_read'] + said['line_breaks_in_cells'] != len(notes):
    lines = [line for line in file.getvalue().split('\n')[1:] if line]
    assert said['rows_read'] + said['line_breaks_in_cells'] >= len(lines)


# -- JSON lines -------------------------------------------------------------------------------


def test_json_keys_and_types_of_all_lines(tmp_path):
  lines = [{'user': 'a', 'item': 'x', 'time': k, 'tags': ['p', 'q']} for k in range(1500)]
  lines[1200] = {'user': 'b', 'item': 'y', 'time': 1200, 'tags': 'r', 'query': 'late', 'é/~"': 7}
  lines[1300] |= {'user': 12, 'item': 3.0, 'tags': [], 'query': None}
  text = '\n\n'.join(map(json.dumps, lines))
  found, _ = read(
    tmp_path,
    text,
    '"user", item, tags, query, "é/~"""',
    'jsonl',
    context_features=('tags', 'query', 'é/~"'),
    multi={'tags': '|'},
  )
  assert found[0] == ('a', 'x', 'p|q', None, None)
  assert found[1200] == ('b', 'y', 'r', 'late', '7')
  assert found[1300] == ('12', '3', None, None, None)


@pytest.mark.parametrize(
  'late,fields,message',
  [
    ('[1]', {}, 'line 1501, .* is no JSON object'),
    ('{"user": ', {}, 'line 1501, .* is no JSON'),
    ('{"user": "a", "item": {"id": 1}, "time": 1}', {}, "'item' holds a JSON object"),
    ('{"user": "a", "item": "x", "tags": ["p", "q"], "time": 1}', {}, "'tags' holds lists"),
    ('{"user": "a", "item": "x", "tags": ["p|q"], "time": 1}', {'multi': {'tags': '|'}},
     "'tags': a value of a list holds the separator"),
    ('{"user": "a", "item": "x", "time": 1}', {'context_features': ('query',)},
     "'query' is unknown"),
  ],
)  # fmt: skip
def test_json_that_is_refused_late(tmp_path, late, fields, message):
  text = '{"user": "a", "item": "x", "time": 0, "tags": "p"}\n' * 1500 + late
  with pytest.raises(UserError, match=message):
    read(tmp_path, text, ending='jsonl', **{'context_features': ('tags',)} | fields)


# -- files ------------------------------------------------------------------------------------


def test_numbers_in_names_are_numbers(tmp_path, caplog):
  names = ('d2/p10', 'd2/p9', 'd10/p1', 'd1/p2', 'd1/p02', 'x')
  for name in names:
    write(tmp_path / 'log' / f'{name}.csv', f'user,item\nu,{name}\n')
  write(tmp_path / 'log/_temporary/p1.csv', 'user,item\nu,no\n')
  write(tmp_path / 'log/d1/.p1.csv', 'no')
  write(tmp_path / 'log/d1/_SUCCESS', '')
  data = config.data(source=str(tmp_path / 'log/**/*'), format='csv', time='', label='')
  with caplog.at_level(logging.INFO):
    db, _ = staged(tmp_path, data)
  assert [x for (x,) in rows(db, 'item')] == ['d1/p02', 'd1/p2', 'd2/p9', 'd2/p10', 'd10/p1', 'x']
  assert 'p02.csv, p2.csv, p9.csv, p10.csv, p1.csv, x.csv' in caplog.text
  with pytest.raises(UserError, match='p1.csv: column .* available: no'):
    staged(tmp_path, config.data(**dict(data) | {'source': str(tmp_path / 'log/d1/.p*')}))


@pytest.mark.parametrize('ending,line', [('csv', 'user,item,time\nu,i,1\n'), ('jsonl', '')])
def test_parts_without_a_row_are_left_out(tmp_path, ending, line):
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


def test_each_side_file_has_its_own_form(tmp_path):
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
