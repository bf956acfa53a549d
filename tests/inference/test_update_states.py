"""The file of users' states: a log is added as a whole, once; all states are of one model."""

import shutil
import sqlite3

import jax
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.data import new_events, prepare
from lmn_jax.errors import UserError
from lmn_jax.inference import update_states as command
from lmn_jax.inference.state_table import FILE, StateTable, fingerprint
from lmn_jax.inference.update_states import update_states
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.training import loop, trained_run

T = 4


def write(path, rows):
  """Writes a log of (user, item, time)."""
  path.write_text('user,item,time\n' + ''.join(f'{u},{i},{t}\n' for u, i, t in rows))
  return str(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns (config, workdir, store, rows): a run of two steps on a log of twelve users."""
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
  """Returns a copy of the run, without states."""
  config, workdir, store, rows = trained
  shutil.copytree(workdir, tmp_path / 'run')
  return config, tmp_path / 'run', store, rows


def opened(config, workdir, store):
  """Returns (table, model, state) of a run."""
  setup, best = trained_run.best_of(config, workdir, store)
  model = StatefulModel(setup.model, setup.trainer, setup.mesh, T, config.eval_batch_size)
  origin = {'weights': fingerprint(best.state), 'vocabulary': store.fingerprint}
  table = StateTable(workdir / FILE, model.empty(np.zeros(0)), origin)
  return table, model, best.state


def assert_kept(config, workdir, store, rows):
  """Asserts that the table has the states that result from reading all of `rows`."""
  table, model, state = opened(config, workdir, store)
  code = {item: k for k, item in enumerate(store.raw_ids('item').to_pylist())}
  row = {user: k for k, user in enumerate(store.raw_ids('user').to_pylist())}
  users = sorted({user for user, _, _ in rows})
  events = [
    np.array([code.get(i, 0) for u, i, t in sorted(rows, key=lambda r: r[2]) if u == user])
    for user in users
  ]
  known = np.array([row.get(user, 0) for user in users])
  expected = model.update(state, model.empty(known), [{'item': x} for x in events])
  states, times = table.get(users, model.empty(np.zeros(len(users))))
  table.close()
  assert [newest.time for newest in times] == [
    max(t for u, _, t in rows if u == user) for user in users
  ]
  assert states.held.sum() and states.segments.max() > 2
  for new, old in zip(jax.tree.leaves(states), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


def test_states_are_computed_from_the_store_and_updated_with_new_events(run, tmp_path):
  config, workdir, store, rows = run
  report = update_states(config, workdir, store, '')
  assert report['users'] == report['new_users'] == report['users_in_all'] == 12
  assert report['events'] == len(rows) and report['old_events'] == 0
  assert_kept(config, workdir, store, rows)
  # Nothing is read twice.
  again = update_states(config, workdir, store, '')
  assert again['events'] is None and again['users_in_all'] == 12
  assert command.line_of(again).endswith('12 users; up to date, no new events were given')

  new = [('u00', 'i03', 900), ('u00', 'i04', 901), ('u05', 'unheard of', 902)]
  new += [('stranger', f'i{k:02}', 900 + k) for k in range(6)]
  log = write(tmp_path / 'new.csv', new)
  report = update_states(config, workdir, store, log)
  counts = {name: report[name] for name in (*command.COUNTS, 'users_in_all')}
  assert counts == dict(users=3, events=9, new_users=1, old_events=0, users_in_all=13)
  assert_kept(config, workdir, store, rows + new)
  copy = shutil.copy(log, tmp_path / 'copy.csv')
  for same in (log, copy):
    with pytest.raises(UserError, match='added before; nothing was changed'):
      update_states(config, workdir, store, str(same))
  # Of a log that begins earlier, the events that the states have are skipped.
  more = [('u00', 'i07', 950)]
  report = update_states(config, workdir, store, write(tmp_path / 'more.csv', new + more))
  assert report['events'] == 1 and report['old_events'] == 9
  assert '9 skipped as older' in command.line_of(report)
  assert_kept(config, workdir, store, rows + new + more)
  # Further events of the newest second are new; those that a state has are not added twice.
  tied = [*more, ('u00', 'i08', 950), ('u00', 'i07', 950)]
  for log, taken, old in ((tied, 2, 1), ([*tied, ('u00', 'i09', 950)], 1, 3)):
    report = update_states(config, workdir, store, write(tmp_path / f'{taken}.csv', log))
    assert (report['events'], report['old_events']) == (taken, old)
  assert_kept(config, workdir, store, [*rows, *new, *tied, ('u00', 'i09', 950)])


def test_a_table_of_an_earlier_version_is_updated(run, tmp_path):
  """It does not hold the items of its newest second: all of them count as added."""
  config, workdir, store, rows = run
  update_states(config, workdir, store, '')
  with sqlite3.connect(workdir / FILE) as db:
    db.execute('ALTER TABLE states DROP COLUMN newest')
  db.close()
  last = max(rows, key=lambda row: row[2])
  log = [last, (last[0], 'i01', last[2] + 1), (last[0], 'i02', last[2] + 1)]
  report = update_states(config, workdir, store, write(tmp_path / 'new.csv', log))
  assert (report['events'], report['old_events']) == (2, 1)
  assert_kept(config, workdir, store, rows + log[1:])


def test_an_interrupted_command_adds_nothing(run, tmp_path, monkeypatch):
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

  monkeypatch.setattr(command, 'CHUNK', 1)
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
  with pytest.raises(UserError, match='the weights of its states is .* delete the file'):
    update_states(config, workdir, store, '')


def test_a_file_that_is_not_a_table_is_refused(run):
  config, workdir, store, _ = run
  (workdir / FILE).write_bytes(b'x' * 5000)
  with pytest.raises(UserError, match='is not a table of user states .* delete it'):
    update_states(config, workdir, store, '')


def test_click_models_have_no_states(run):
  _, workdir, store, _ = run
  with pytest.raises(
    UserError, match="needs config.task='next_item'; models of this run's task, 'click'"
  ):
    update_states(configs.base('pooling'), workdir, store, '')


def test_times_of_another_form_are_refused(run, tmp_path):
  config, workdir, store, _ = run
  log = write(tmp_path / 'new.csv', [('u00', 'i01', '2020-01-01T00:00:00')])
  with pytest.raises(UserError, match='row 1: .*a whole number .* is expected'):
    update_states(config, workdir, store, log)
  assert not (workdir / '.states').exists()


def test_a_log_of_new_events_has_no_split_and_no_features(tmp_path):
  data = configs.interests_data()
  data.item_features, data.items_source = ('genre',), 'items.csv'
  path = tmp_path / 'new.csv'
  write(path, [('u', 'i', 1)])
  log, content = new_events.log_of(data, str(path))
  assert (log.source, log.split_column, log.item_features) == (str(path), '', ())
  assert log.items_source == '' and data.split_column == 'split' and len(content) == 64


@pytest.mark.parametrize(
  'events, message',
  [
    ('none.csv', "--events='none.csv' does not exist"),
    ('tfds:movielens/1m-ratings', 'has the format tfds; give files of rows'),
  ],
)
def test_sources_that_are_not_logs_are_refused(run, events, message):
  config, workdir, store, _ = run
  with pytest.raises(UserError, match=message):
    update_states(config, workdir, store, events)


def test_a_log_in_two_files_is_refused(tmp_path):
  data = configs.data(times_source='times.txt')
  with pytest.raises(UserError, match="'times.txt', a second file, but new events are read"):
    new_events.log_of(data, 'items.txt')
