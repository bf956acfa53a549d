"""Named histories of stores and batches, against their definition over the rows of the log."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import event, fields_of_histories, make_store, store_of_histories
from test_resident import assert_equal_batches, mesh_of

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.named_histories import behaviours_of, of_history, staged_column
from lmn_jax.data.reads import Reads
from lmn_jax.errors import UserError

HISTORIES = {'all': ('view', 'cart', 'buy'), 'orders': ('cart', 'buy')}
READS = Reads(True, ('event.behaviour', 'event.dwell'), (('all', 9), ('orders', 4)))


@settings(max_examples=12, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 3), st.booleans()), min_size=3
  )
)
def test_a_named_history_has_the_earlier_rows_of_its_behaviours(tmp_path_factory, rows):
  """rows: (user, time, kind, is an example); kinds 0 and 1 are orders, 3 is no event."""
  rows = [(0, 0, 0, True), (1, 0, 2, True), *rows]
  log = [
    event(k, f'u{user}', f'i{k}', time, history=kind < 3, example=example or k < 2)
    | {staged_column('orders'): kind < 2}
    for k, (user, time, kind, example) in enumerate(rows)
  ]
  split = dict(protocol='user_ratio', valid=0.0, test=0.0)
  fields = dict(behaviour='kind', histories={'orders': ('a', 'b')}, split=split, rows_per_part=7)
  store = make_store(tmp_path_factory.mktemp('random') / 'store', log, **fields)
  items = store.raw_ids('item').to_pylist()
  checked = 0
  for number, part in enumerate(store.parts):
    users = store.user_ids(number).to_pylist()
    for k, user in enumerate(part.examples['user']):
      at = int(items[part.examples['item'][k]][1:])
      owner, time = rows[at][:2]
      assert users[user] == f'u{owner}'
      for name, most in (('', 3), ('orders', 2)):
        suffix = name and f'.{name}'
        begin = part.users[f'offset{suffix}'][user]
        span = slice(begin, begin + part.examples[f'end{suffix}'][k])
        columns = part.events(name)
        before = sorted(
          (t, n)
          for n, (u, t, kind, _) in enumerate(rows)
          if u == owner and t < time and kind < most
        )
        assert [items[item] for item in columns['item'][span]] == [f'i{n}' for _, n in before]
        assert columns['time'][span].tolist() == [t for t, _ in before]
      checked += 1
  assert checked == sum(x['example'] for x in log)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return store_of_histories(tmp_path_factory.mktemp('named'))


def source_of(store, split='train', **fields):
  return BatchSource(store.path, split, 16, 9, 3, split == 'train', reads=READS, **fields)


def test_a_history_of_all_behaviours_is_the_main_one(store):
  batch = source_of(store, 'test')[0]
  main, copy = of_history(batch, 'none'), of_history(batch, 'all')
  assert main.keys() == copy.keys() and not any(':' in key for key in main)
  for key, x in main.items():
    np.testing.assert_array_equal(x, copy[key], err_msg=key)
  folder = store.path.parents[1]
  data = configs.data(**fields_of_histories(folder) | dict(rows_per_part=90, histories={}))
  plain = prepare.prepare(data, folder / 'plain')
  assert 'histories' not in plain.manifest and plain.manifest != store.manifest
  for one, other in zip(plain.manifest['parts'], store.manifest['parts'], strict=True):
    assert one['files']['history.arrow'] == other['files']['history.arrow']
    assert one['files'].keys() == {'users.arrow', 'history.arrow', 'examples.arrow'}


@pytest.mark.parametrize('targets', [1, 3])
def test_no_event_of_the_future_or_of_another_behaviour_enters(store, targets):
  """Gaps are above 0, so events are strictly before; their behaviours are those of the history."""
  source = source_of(store, targets=targets, stale_events=2 * (targets > 1))
  names = store.raw_ids('event.behaviour').to_pylist()
  lacks, seen = [], 0
  alone = source_of(store)
  totals = {x: alone._gather(np.arange(alone.rows), 0)[f'{x}:total'] for x in ('all', 'orders')}
  for step in range(6):
    batch = source[step]
    for name, behaviours in HISTORIES.items():
      x = of_history(batch, name)
      real = np.arange(x['history'].shape[1]) < x['length'][:, None]
      assert (x['time_gap'][real] > 0).all() and not x['time_gap'][~real].any()
      assert {names[k] for k in x['event.behaviour'][real]} <= {*behaviours, None}
      assert (x['length'] == np.minimum(x['total'], dict(READS.histories)[name])).all()
      seen += real.sum()
    assert (batch['orders:total'] <= batch['total']).all()
    if targets > 1:
      plan = source.plan(step)
      for b, (index, n) in enumerate(zip(plan['index'], plan['targets'], strict=True)):
        for name, total in totals.items():
          lacks += (total[index : index + n] - batch[f'{name}:total'][b]).tolist()
  assert seen > 100 and (targets == 1 or (min(lacks) >= 0 and 0 < max(lacks) <= 2))


@pytest.mark.parametrize('mesh, targets', [('1', 1), ('8 x 1', 3)])
def test_devices_cut_the_histories_of_the_host(store, mesh, targets):
  lengths = dict(train_length='suffix') if targets > 1 else {}
  source = source_of(store, targets=targets, **lengths)
  steps = {source.lengths.at(step): step for step in range(0, 200, 8)}
  assert_equal_batches(source, mesh_of(mesh), list(steps.values())[:2], min(2, len(steps)))
  if targets == 1:
    test = source_of(store, 'test')
    assert_equal_batches(test, mesh_of(mesh), [test.batches - 1])


def test_a_shorter_step_reads_the_same_share_of_each_history(store):
  source = source_of(store, train_length='suffix')
  lengths = set()
  for step in range(0, 200, 8):
    batch = source[step]
    lengths.add(tuple(batch[key].shape[1] for key in ('history', 'all:history', 'orders:history')))
  assert lengths == {(9, 9, 4), (4, 4, 2), (2, 2, 1), (1, 1, 1)}


WRONG = [
  ({'orders': ('cart', 'bye')}, {}, "histories.orders='bye' is unknown; available: cart, view"),
  ({'orders': ()}, {}, r'config.data.histories.orders=\(\) must be a tuple'),
  ({'orders': 'cart'}, {}, "config.data.histories.orders='cart' must be a tuple"),
  ({'my orders': ('cart',)}, {}, "has the name 'my orders'; it must be letters"),
  ({'update': ('cart',)}, {}, "has the name 'update'; it must be letters"),
  ({'orders': ('cart',)}, {'behaviour': ''}, 'needs config.data.behaviour, the column of types'),
  (
    {'orders': ('cart',)}, {'history_behaviours': ('view',)},
    "orders, of config.data.history_behaviours,='cart' is unknown; available: view",
  ),
  ({'orders': ('cart',)}, {'row_history': 'past'}, "contradicts config.data.row_history='past'"),
  (
    {'orders': ('cart',)}, {'history': 'positive'},
    "histories.orders=\\('cart',\\) has no event: with config.data.history='positive'",
  ),
]  # fmt: skip


@pytest.mark.parametrize('histories, fields, message', WRONG)
def test_wrong_histories_are_refused(tmp_path, histories, fields, message):
  log = tmp_path / 'log.csv'
  log.write_text('user,item,time,label,behaviour,past\n' + ''.join(
    f'u{k % 2},i{k},{k},{k % 2},{("cart", "view")[k % 2]},\n' for k in range(12)
  ))  # fmt: skip
  source = dict(source=str(log), behaviour='behaviour', history='all', histories=histories)
  if 'row_history' in fields:
    fields = fields | {'history': 'positive'}
  data = configs.data(**source | fields)
  with pytest.raises(UserError, match=message) as error:
    behaviours_of(data)  # before any row is read
    prepare.prepare(data, tmp_path / 'stores')
  assert '\n' not in str(error.value)
