"""What is said of a store is what is in it."""

from lmn_jax import config
from lmn_jax.data import counts
from lmn_jax.data.prepare import prepare
from tests.logfiles import append, data_of, write_log


def table(store):
  lines = counts.table_of(store).splitlines()
  assert lines.pop() == store.protocol
  return dict(line.split('  ', 1) for line in lines)


def test_rows_are_accounted_for(tmp_path):
  log = write_log(tmp_path / 'log.csv', 40)
  append(log, ',i1,41,1', 'NA,i1,42,1', 'u1,,43,1', 'u0,i0,0,0', 'new,other,99,1')
  store = prepare(data_of(log, duplicates='drop', max_history=2), tmp_path / 'stores')
  found = {name: said.strip() for name, said in table(store).items()}
  assert found['rows read'] == '45' and found['times'].startswith('a whole number')
  assert found['dropped, without a user'] == "2, 1 with 'NA'"
  assert found['dropped, without an item'] == '1'
  assert found['dropped, duplicates'] == '1' and found['rows kept'] == '41'
  assert found['users'] == '8, 7 in the vocabulary'
  assert int(found['older events cut off']) > 0
  split = {name: found[f'examples, {name}'].split()[0].rstrip(',') for name in store.examples}
  assert {x: int(y) for x, y in split.items()} == store.examples
  assert sum(store.examples.values()) == 41
  assert found['unknown users, test'].startswith(f'1 of {store.examples["test"]} examples (')
  assert found['unknown users, valid'].startswith('0 of ')
  assert counts.line_of(store).startswith('45 rows read, 4 dropped, 8 users, ')


def test_a_count_of_zero_that_nobody_asks_for_is_left_out(tmp_path):
  store = prepare(data_of(write_log(tmp_path / 'log.csv')), tmp_path / 'stores')
  found = table(store)
  assert not [x for x in found if x.startswith(('dropped', 'older', 'duplicate'))]
  assert counts.line_of(store).startswith('60 rows read, 7 users, ')


def test_unknown_values_of_features_are_counted(tmp_path):
  """Of validation and test, whose values training did not see or that have none."""
  slots = ['a', 'b', 'a', 'b', 'a', 'b', 'a', 'new', ' ', 'b']
  lines = [f'u{k % 2},i,{k},1,{slot},"a, {slot}"\n' for k, slot in enumerate(slots)]
  (tmp_path / 'log.csv').write_text('user,item,time,label,slot,tags\n' + ''.join(lines))
  data = config.data(
    source=str(tmp_path / 'log.csv'), user_features=('slot',), context_features=('tags',),
    multi={'tags': ','}, split=dict(protocol='global_time', valid=0.2, test=0.2),
  )  # fmt: skip
  found = table(prepare(data, tmp_path / 'stores'))
  said = {name.strip(): text.strip() for name, text in found.items() if 'missing' in name}
  assert said == {
    'user.slot unknown or missing, valid': '0 of 2 examples (0.0%)',
    'user.slot unknown or missing, test': '0 of 2 examples (0.0%)',
    'context.tags unknown or missing, valid': '1 of 2 examples (50.0%)',
    'context.tags unknown or missing, test': '0 of 2 examples (0.0%)',
  }
