"""The file of users' states: all of a log or nothing, once, and of one model only."""

import shutil
import sqlite3

import jax
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.data import new_events, prepare
from lmn_jax.errors import UserError
from lmn_jax.inference import state_table
from lmn_jax.inference.state_table import FILE, StateTable, fingerprint, update_states
from lmn_jax.inference.user_states import make_server
from lmn_jax.training import loop, trained_run

T = 4


def write(path, rows):
  """A log of (user, item, time)."""
  path.write_text('user,item,time\n' + ''.join(f'{u},{i},{t}\n' for u, i, t in rows))
  return str(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(config, workdir, store, rows): a run of two steps on a log of twelve users."""
  folder = tmp_path_factory.mktemp('states')
  rng = np.random.default_rng(0)
  rows = [
    (f'u{user:02}', f'i{rng.integers(20):02}', 10 * k + user % 3)
    for user in range(12)
    for k in range(3 + user)
  ]
  config = configs.base('dman', 'next_item', steps=2, history_length=T, batch_size=8)
  config.eval_batch_size = 8
  config.data.update(source=write(folder / 'log.csv', rows), label='', name='log')
  config.data.split.protocol = 'leave_one_out'
  config.model.update(dict(width=6, slots=3))
  store = prepare.prepare(config.data, folder / 'stores')
  loop.train(config, folder / 'run', store)
  return config, folder / 'run', store, rows


@pytest.fixture
def run(trained, tmp_path):
  """The run in a folder of its own, without states."""
  config, workdir, store, rows = trained
  shutil.copytree(workdir, tmp_path / 'run')
  return config, tmp_path / 'run', store, rows


def opened(config, workdir, store):
  """(table, server, state) of a run."""
  setup, best = trained_run.best_of(config, workdir, store)
  server = make_server(setup.model, setup.trainer, setup.mesh, T, config.eval_batch_size)
  origin = {'weights': fingerprint(best.state), 'vocabulary': store.fingerprint}
  table = StateTable(workdir / FILE, server.empty(np.zeros(0)), origin)
  return table, server, best.state


def assert_kept(config, workdir, store, rows):
  """The table holds what the whole log of `rows` makes of each user."""
  table, server, state = opened(config, workdir, store)
  code = {item: k for k, item in enumerate(store.raw_ids('item').to_pylist())}
  row = {user: k for k, user in enumerate(store.raw_ids('user').to_pylist())}
  users = sorted({user for user, _, _ in rows})
  events = [
    np.array([code.get(i, 0) for u, i, t in sorted(rows, key=lambda r: r[2]) if u == user])
    for user in users
  ]
  known = np.array([row.get(user, 0) for user in users])
  wanted = server.update(state, server.empty(known), events)
  found, times = table.get(users, server.empty(np.zeros(len(users))))
  table.close()
  assert [one.time for one in times] == [max(t for u, _, t in rows if u == user) for user in users]
  assert found.held.sum() and found.segments.max() > 2
  for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


def test_states_of_the_store_and_then_of_new_events(run, tmp_path):
  config, workdir, store, rows = run
  found = update_states(config, workdir, store, '')
  assert found['users'] == found['new_users'] == found['users_in_all'] == 12
  assert found['events'] == len(rows) and found['old_events'] == 0
  assert_kept(config, workdir, store, rows)
  # Nothing is read twice.
  again = update_states(config, workdir, store, '')
  assert again['events'] is None and again['users_in_all'] == 12
  assert state_table.line_of(again).endswith('12 users; up to date, no new events were given')

  new = [('u00', 'i03', 900), ('u00', 'i04', 901), ('u05', 'unheard of', 902)]
  new += [('stranger', f'i{k:02}', 900 + k) for k in range(6)]
  log = write(tmp_path / 'new.csv', new)
  found = update_states(config, workdir, store, log)
  counts = {name: found[name] for name in (*state_table.COUNTS, 'users_in_all')}
  assert counts == dict(users=3, events=9, new_users=1, old_events=0, users_in_all=13)
  assert_kept(config, workdir, store, rows + new)
  copy = shutil.copy(log, tmp_path / 'copy.csv')
  for same in (log, copy):
    with pytest.raises(UserError, match='taken in before; nothing was changed'):
      update_states(config, workdir, store, str(same))
  # A log that begins earlier: what the states have is left out.
  more = [('u00', 'i07', 950)]
  found = update_states(config, workdir, store, write(tmp_path / 'more.csv', new + more))
  assert found['events'] == 1 and found['old_events'] == 9
  assert '9 left out as older' in state_table.line_of(found)
  assert_kept(config, workdir, store, rows + new + more)
  # Others of the newest second are not older, and a log that has it again takes nothing twice.
  tied = [*more, ('u00', 'i08', 950), ('u00', 'i07', 950)]
  for log, taken, old in ((tied, 2, 1), ([*tied, ('u00', 'i09', 950)], 1, 3)):
    found = update_states(config, workdir, store, write(tmp_path / f'{taken}.csv', log))
    assert (found['events'], found['old_events']) == (taken, old)
  assert_kept(config, workdir, store, [*rows, *new, *tied, ('u00', 'i09', 950)])


def test_a_table_of_an_earlier_version_goes_on(run, tmp_path):
  """What it does not know of its newest second counts as taken in."""
  config, workdir, store, rows = run
  update_states(config, workdir, store, '')
  with sqlite3.connect(workdir / FILE) as db:
    db.execute('ALTER TABLE states DROP COLUMN newest')
  db.close()
  last = max(rows, key=lambda row: row[2])
  log = [last, (last[0], 'i01', last[2] + 1), (last[0], 'i02', last[2] + 1)]
  found = update_states(config, workdir, store, write(tmp_path / 'new.csv', log))
  assert (found['events'], found['old_events']) == (2, 1)
  assert_kept(config, workdir, store, rows + log[1:])


def test_all_of_a_log_or_nothing(run, tmp_path, monkeypatch):
  config, workdir, store, rows = run
  update_states(config, workdir, store, '')
  new = [(user, 'i01', 900) for user, _, _ in rows]
  log = write(tmp_path / 'new.csv', new)
  put, calls = StateTable.put, []

  def cut(self, *arguments):
    put(self, *arguments)
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(state_table, 'CHUNK', 1)
  with monkeypatch.context() as patch:
    patch.setattr(StateTable, 'put', cut)
    with pytest.raises(KeyboardInterrupt):
      update_states(config, workdir, store, log)
  assert_kept(config, workdir, store, rows)
  assert not (workdir / '.states').exists()
  assert update_states(config, workdir, store, log)['events'] == len(new)
  assert_kept(config, workdir, store, rows + new)


def test_states_of_other_weights_are_refused(run):
  config, workdir, store, _ = run
  update_states(config, workdir, store, '')
  shutil.rmtree(workdir / 'checkpoints')
  config = config.copy_and_resolve_references()
  config.seed = 1
  loop.train(config, workdir, store)
  with pytest.raises(UserError, match='the states are of other weights .* delete the file'):
    update_states(config, workdir, store, '')


def test_a_file_that_is_no_table_is_refused(run):
  config, workdir, store, _ = run
  (workdir / FILE).write_bytes(b'x' * 5000)
  with pytest.raises(UserError, match='no table of user states .* delete it'):
    update_states(config, workdir, store, '')


def test_clicks_have_no_states(run):
  _, workdir, store, _ = run
  with pytest.raises(UserError, match='is for config.task=next_item, and this is click'):
    update_states(configs.base('pooling'), workdir, store, '')


def test_times_of_another_kind_are_refused(run, tmp_path):
  config, workdir, store, _ = run
  log = write(tmp_path / 'new.csv', [('u00', 'i01', '2020-01-01T00:00:00')])
  with pytest.raises(UserError, match='row 1: .*a whole number .* is expected'):
    update_states(config, workdir, store, log)
  assert not (workdir / '.states').exists()


def test_new_events_have_neither_split_nor_features(tmp_path):
  data = configs.interests_data()
  data.item_features, data.items_source = ('genre',), 'items.csv'
  path = tmp_path / 'new.csv'
  write(path, [('u', 'i', 1)])
  found, content = new_events.log_of(data, str(path))
  assert (found.source, found.split_column, found.item_features) == (str(path), '', ())
  assert found.items_source == '' and data.split_column == 'split' and len(content) == 64


@pytest.mark.parametrize(
  'events, said',
  [
    ('none.csv', "--events='none.csv' does not exist"),
    ('tfds:movielens/1m-ratings', 'is of the form tfds; give files of rows'),
  ],
)
def test_what_is_no_log_of_events_is_refused(run, events, said):
  config, workdir, store, _ = run
  with pytest.raises(UserError, match=said):
    update_states(config, workdir, store, events)


def test_a_log_in_two_files_is_refused(tmp_path):
  data = configs.data(times_source='times.txt')
  with pytest.raises(UserError, match="'times.txt' comes in two files, and new events in one"):
    new_events.log_of(data, 'items.txt')
