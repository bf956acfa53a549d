"""The counts of a store, as a line and as a table, are those of its log."""

from lmn_jax import config
from lmn_jax.data import counts
from lmn_jax.data.prepare import prepare
from tests.logfiles import append, data_of, write_log


def table_of(store):
  """The table as a dict; checks that the protocol is its last line."""
  lines = counts.table_of(store).splitlines()
  assert lines.pop() == store.protocol
  pairs = (line.split('  ', 1) for line in lines)
  return {name.strip(): text.strip() for name, text in pairs}


def test_every_row_is_counted_as_read_dropped_or_kept(tmp_path):
  log = write_log(tmp_path / 'log.csv', 40)
  append(log, ',i1,41,1', 'NA,i1,42,1', 'u1,,43,1', 'u0,i0,0,0', 'new,other,99,1')
  store = prepare(data_of(log, duplicates='drop', max_history=2), tmp_path / 'stores')
  table = table_of(store)
  assert table['rows read'] == '45' and table['times'].startswith('a whole number')
  assert table['dropped, without a user'] == "2, 1 with 'NA'"
  assert table['dropped, without an item'] == '1'
  assert table['dropped, duplicates'] == '1' and table['rows kept'] == '41'
  assert table['users'] == '8, 7 in the vocabulary'
  assert int(table['older events cut off']) > 0
  split = {name: table[f'examples, {name}'].split()[0].rstrip(',') for name in store.examples}
  assert {x: int(y) for x, y in split.items()} == store.examples
  assert sum(store.examples.values()) == 41
  assert table['unknown users, test'].startswith(f'1 of {store.examples["test"]} examples (')
  assert table['unknown users, valid'].startswith('0 of ')
  assert counts.line_of(store).startswith('45 rows read, 4 dropped, 8 users, ')


def test_counts_of_dropped_rows_are_not_shown_when_they_are_zero(tmp_path):
  store = prepare(data_of(write_log(tmp_path / 'log.csv')), tmp_path / 'stores')
  assert not [x for x in table_of(store) if x.startswith(('dropped', 'older', 'duplicate'))]
  assert counts.line_of(store).startswith('60 rows read, 7 users, ')


def test_unknown_values_of_features_are_counted(tmp_path):
  """For validation and test: values that training did not see, and missing values."""
  slots = ['a', 'b', 'a', 'b', 'a', 'b', 'a', 'new', ' ', 'b']
  lines = [f'u{k % 2},i,{k},1,{slot},"a, {slot}"\n' for k, slot in enumerate(slots)]
  (tmp_path / 'log.csv').write_text('user,item,time,label,slot,tags\n' + ''.join(lines))
  data = config.data(
    source=str(tmp_path / 'log.csv'), user_features=('slot',), context_features=('tags',),
    multi={'tags': ','}, split=dict(protocol='global_time', valid=0.2, test=0.2),
  )  # fmt: skip
  table = table_of(prepare(data, tmp_path / 'stores'))
  assert {name: text for name, text in table.items() if 'missing' in name} == {
    'user.slot unknown or missing, valid': '0 of 2 examples (0.0%)',
    'user.slot unknown or missing, test': '0 of 2 examples (0.0%)',
    'context.tags unknown or missing, valid': '1 of 2 examples (50.0%)',
    'context.tags unknown or missing, test': '0 of 2 examples (0.0%)',
  }
