"""A store is built once from a log, reused while the log is the same, and never changed."""

import json
import os
import shutil

import pytest

from lmn_jax.data import prepare as preparing
from lmn_jax.data import store_folder
from lmn_jax.data.prepare import prepare
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from tests.logfiles import append, as_before, data_of, folder_bytes, write_log


@pytest.fixture
def log_lines(monkeypatch):
  """The lines that prepare logs."""
  lines = []
  monkeypatch.setattr(preparing.log, 'info', lambda text, *values: lines.append(text % values))
  return lines


@pytest.fixture
def readings(monkeypatch):
  """A list with an entry for each time that a log was read."""
  readings, stage = [], preparing.interactions.stage

  def counted(*arguments):
    readings.append(arguments)
    return stage(*arguments)

  monkeypatch.setattr(preparing.interactions, 'stage', counted)
  return readings


def names(root):
  """The names in a folder that are not hidden."""
  return sorted(path.name for path in root.iterdir() if not path.name.startswith('.'))


def test_a_changed_log_has_another_store_beside_the_first(tmp_path, log_lines, readings):
  """Also if the changed file has the same name as others."""
  root, log = tmp_path / 'stores', tmp_path / 'log'
  first = write_log(log / 'dt=1' / 'part-0.csv')
  write_log(log / 'dt=2' / 'part-0.csv', first=60)
  data = data_of(log / '*' / 'part-0.csv')
  store = prepare(data, root)
  assert store.path == root / f'log-{store.fingerprint[:16]}'
  assert log_lines[0] == f'the log is read: {root} has no store log'
  assert log_lines[1].startswith(f'store {store.path} is built: 120 rows read, 7 users, ')
  before = folder_bytes(store.path)
  assert prepare(data, root).path == store.path
  assert log_lines[2:] == [f'store {store.path} is reused'] and len(readings) == 1

  append(first, 'late,i1,150,1', 'late,i2,151,1')
  longer = prepare(data, root)
  assert longer.manifest['notes']['rows_read'] == 122 and longer.path != store.path
  assert 'was built from other data (files.source/dt=1/part-0.csv.size ' in log_lines[3]
  (log / 'dt=0').mkdir()
  (log / 'dt=0' / 'part-0.csv').write_text('user,item,time,label\nnew,i1,5,1\n')
  more_files = prepare(data, root)
  assert more_files.manifest['notes']['rows_read'] == 123
  assert names(root) == sorted(x.path.name for x in (store, longer, more_files))
  assert folder_bytes(store.path) == before and len(readings) == 3


def test_the_same_log_in_another_folder_is_not_read_again(tmp_path, log_lines, readings):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'a' / 'log.csv')
  store = prepare(data_of(log), root)
  os.utime(log, (1, 1))
  assert prepare(data_of(log), root).path == store.path
  moved = log.parent.rename(tmp_path / 'b') / 'log.csv'
  assert prepare(data_of(moved, memory_limit='1GB'), root).path == store.path
  assert len(readings) == 1
  # Another name may mean another order of files: the log is read once more, then it is known.
  renamed = moved.rename(moved.with_name('other.csv'))
  for _ in range(2):
    assert prepare(data_of(renamed), root).path == store.path
  assert len(readings) == 2 and log_lines[-2:] == [
    f'store {store.path} has the same content and is reused', f'store {store.path} is reused',
  ]  # fmt: skip
  (root / '.log.index.json').write_text('{')  # a damaged cache is computed again
  assert prepare(data_of(renamed), root).path == store.path and len(readings) == 3


def test_other_fields_of_the_config_have_another_store(tmp_path, log_lines):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store, other = prepare(data_of(log), root), prepare(data_of(log, min_count=9), root)
  assert store.path != other.path and log_lines[2].endswith('(config.data.min_count 1 -> 9)')
  assert prepare(data_of(log), root).path == store.path and 'reused' in log_lines[-1]


def test_logs_with_other_counts_but_equal_files_have_different_stores(tmp_path):
  """A row without a user changes the counts, but no file of the store."""
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store = prepare(data_of(log), root)
  append(log, ',i1,70,1')
  other = prepare(data_of(log), root)
  assert other.manifest['content'] == store.manifest['content']
  assert other.fingerprint != store.fingerprint
  assert other.manifest['notes']['rows_read'] == 61
  assert other.manifest['notes']['rows_without_user'] == 1


def test_a_log_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  stage = preparing.interactions.stage

  def disturbed(*arguments):
    notes = stage(*arguments)
    append(log, 'u1,i1,70,1')
    return notes

  monkeypatch.setattr(preparing.interactions, 'stage', disturbed)
  with pytest.raises(UserError, match=rf'{log} was changed .* read; run the command again'):
    prepare(data_of(log), root)
  assert [path.name for path in root.iterdir()] == ['.log.lock']
  monkeypatch.setattr(preparing.interactions, 'stage', stage)
  assert prepare(data_of(log), root).manifest['notes']['rows_read'] == 61


def test_a_store_of_an_earlier_version_is_opened_but_not_reused(tmp_path, log_lines):
  """Its version may have read the log differently, so a new training gets a new store."""
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  folder = as_before(prepare(data_of(log), root))
  before = folder_bytes(folder)
  fingerprint = Store(folder).fingerprint
  new = prepare(data_of(log), root)
  assert new.path != folder and folder_bytes(folder) == before
  assert new.manifest['content'] == fingerprint
  assert f'{folder} was built by another version' in log_lines[-2]
  assert store_folder.find(root, fingerprint).path == folder
  # Without it, a run that used it continues with the store that has the same bytes.
  shutil.rmtree(folder)
  reopened = store_folder.find(root, fingerprint)
  assert reopened.path == new.path and reopened.fingerprint == fingerprint


def test_a_failed_build_leaves_no_files(tmp_path, log_lines):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store = prepare(data_of(log), root)
  append(log, 'u1,i1,70,2')
  with pytest.raises(UserError, match='holds .2'):
    prepare(data_of(log), root)
  assert not any('is built' in line for line in log_lines[2:])
  assert names(root) == [store.path.name] and not list(root.glob('.*.building'))
  assert Store(store.path).fingerprint == store.fingerprint


def test_a_half_built_store_of_a_killed_process_is_not_used(tmp_path):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store = prepare(data_of(log), root)
  half_built = root / '.log.building' / 'store'
  shutil.copytree(store.path, half_built)
  others = root / '.other.building'
  others.mkdir()
  assert store_folder.folders(root) == [store.path]
  append(log, 'u1,i1,70,1')
  prepare(data_of(log), root)
  assert not half_built.exists() and others.exists()  # builds of other names are not removed


def test_damaged_files_are_named_and_repaired_on_demand(tmp_path, log_lines):
  root, data = tmp_path / 'stores', data_of(write_log(tmp_path / 'log.csv'))
  store = prepare(data, root)
  before = folder_bytes(store.path)
  path = store.path / 'part-00000' / 'history.arrow'
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  with pytest.raises(UserError) as error:
    prepare(data, root)
  for words in (str(path), f'{len(whole) - 100} bytes', f'{len(whole)} bytes', '--mode=prepare'):
    assert words in str(error.value)
  assert '\n' not in str(error.value)
  assert prepare(data, root, repair=True).path == store.path
  assert folder_bytes(store.path) == before and 'bytes expected' in log_lines[-2]

  (store.path / 'manifest.json').write_text('{"schema": ')
  with pytest.raises(UserError, match='damaged'):
    store_folder.find(root, store.fingerprint)
  assert folder_bytes(prepare(data, root).path) == before
  shutil.rmtree(store.path / 'part-00000')
  with pytest.raises(UserError, match='is missing, .* bytes expected'):
    Store(store.path)
  with pytest.raises(UserError, match='is not a store'):
    Store(root / 'other')


def test_names_that_are_no_folders_and_folders_that_are_no_stores(tmp_path):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  (root / 'log').mkdir(parents=True)
  (root / 'log' / 'thesis.txt').write_text('mine')
  assert prepare(data_of(log), root).path != root / 'log'
  assert (root / 'log' / 'thesis.txt').read_text() == 'mine'
  for name in ('../x', 'a/b', '..', '.', ''):
    with pytest.raises(UserError, match='data.name'):
      prepare(data_of(log, name=name), root)
  manifest = {'schema': 0, 'signature': {}}
  (root / 'log' / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='schema 0'):
    Store(root / 'log')
  prepare(data_of(log), root)
