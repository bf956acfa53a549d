"""A store is made once of a log, found again while the log is the same, and never changed."""

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
def said(monkeypatch):
  """The lines of the log."""
  lines = []
  monkeypatch.setattr(preparing.log, 'info', lambda text, *values: lines.append(text % values))
  return lines


@pytest.fixture
def readings(monkeypatch):
  """How often a log was read."""
  times, stage = [], preparing.interactions.stage

  def counted(*arguments):
    times.append(1)
    return stage(*arguments)

  monkeypatch.setattr(preparing.interactions, 'stage', counted)
  return times


def names(root):
  return sorted(path.name for path in root.iterdir() if not path.name.startswith('.'))


def test_a_log_that_changes_makes_another_store_beside_the_first(tmp_path, said, readings):
  """Also in a file whose name others have."""
  root, log = tmp_path / 'stores', tmp_path / 'log'
  first = write_log(log / 'dt=1' / 'part-0.csv')
  write_log(log / 'dt=2' / 'part-0.csv', first=60)
  data = data_of(log / '*' / 'part-0.csv')
  one = prepare(data, root)
  assert one.path == root / f'log-{one.fingerprint[:16]}'
  assert said[0] == f'the log is read: {root} has no store log'
  assert said[1].startswith(f'store {one.path} is built: 120 rows read, 7 users, ')
  before = folder_bytes(one.path)
  assert prepare(data, root).path == one.path
  assert said[2:] == [f'store {one.path} is reused'] and len(readings) == 1

  append(first, 'late,i1,150,1', 'late,i2,151,1')
  two = prepare(data, root)
  assert two.manifest['notes']['rows_read'] == 122 and two.path != one.path
  assert 'was made of other data (files.source/dt=1/part-0.csv.size ' in said[3]
  (log / 'dt=0').mkdir()
  (log / 'dt=0' / 'part-0.csv').write_text('user,item,time,label\nnew,i1,5,1\n')
  three = prepare(data, root)
  assert three.manifest['notes']['rows_read'] == 123
  assert names(root) == sorted(store.path.name for store in (one, two, three))
  assert folder_bytes(one.path) == before and len(readings) == 3


def test_the_same_log_elsewhere_is_not_read_again(tmp_path, said, readings):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'a' / 'log.csv')
  store = prepare(data_of(log), root)
  os.utime(log, (1, 1))
  assert prepare(data_of(log), root).path == store.path
  moved = log.parent.rename(tmp_path / 'b') / 'log.csv'
  assert prepare(data_of(moved, memory_limit='1GB'), root).path == store.path
  assert len(readings) == 1
  # Another name may be another order: it is read once, and known from then on.
  named = moved.rename(moved.with_name('other.csv'))
  for _ in range(2):
    assert prepare(data_of(named), root).path == store.path
  assert len(readings) == 2 and said[-2:] == [
    f'store {store.path} holds the same, and is reused', f'store {store.path} is reused',
  ]  # fmt: skip
  (root / '.log.index.json').write_text('{')  # a cache: what is damaged is made anew
  assert prepare(data_of(named), root).path == store.path and len(readings) == 3


def test_other_settings_make_another_store(tmp_path, said):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  one, two = prepare(data_of(log), root), prepare(data_of(log, min_count=9), root)
  assert one.path != two.path and said[2].endswith('(config.data.min_count 1 -> 9)')
  assert prepare(data_of(log), root).path == one.path and 'reused' in said[-1]


def test_what_is_said_of_a_store_is_of_its_log(tmp_path):
  """The files of a store may be the same while the counts are not: a row without a user."""
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  one = prepare(data_of(log), root)
  append(log, ',i1,70,1')
  two = prepare(data_of(log), root)
  assert two.manifest['content'] == one.manifest['content']
  assert two.fingerprint != one.fingerprint
  assert two.manifest['notes']['rows_read'] == 61
  assert two.manifest['notes']['rows_without_user'] == 1


def test_a_log_that_is_written_to_while_it_is_read(tmp_path, monkeypatch):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  stage = preparing.interactions.stage

  def disturbed(*arguments):
    notes = stage(*arguments)
    append(log, 'u1,i1,70,1')
    return notes

  monkeypatch.setattr(preparing.interactions, 'stage', disturbed)
  with pytest.raises(UserError, match=rf'{log} was changed while the log was read; run it again'):
    prepare(data_of(log), root)
  assert [path.name for path in root.iterdir()] == ['.log.lock']
  monkeypatch.setattr(preparing.interactions, 'stage', stage)
  assert prepare(data_of(log), root).manifest['notes']['rows_read'] == 61


def test_a_store_of_an_earlier_version_is_left_and_opened(tmp_path, said):
  """What made it may have made it otherwise than now: another training has a store of its own."""
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  folder = as_before(prepare(data_of(log), root))
  before = folder_bytes(folder)
  fingerprint = Store(folder).fingerprint
  new = prepare(data_of(log), root)
  assert new.path != folder and folder_bytes(folder) == before
  assert new.manifest['content'] == fingerprint
  assert f'{folder} was made by another version' in said[-2]
  assert store_folder.find(root, fingerprint).path == folder
  # Without it the run that knows it goes on with what is the same to the byte.
  shutil.rmtree(folder)
  found = store_folder.find(root, fingerprint)
  assert found.path == new.path and found.fingerprint == fingerprint


def test_a_failed_build_leaves_nothing(tmp_path, said):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store = prepare(data_of(log), root)
  append(log, 'u1,i1,70,2')
  with pytest.raises(UserError, match='holds .2'):
    prepare(data_of(log), root)
  assert not any('is built' in line for line in said[2:])
  assert names(root) == [store.path.name] and not list(root.glob('.*.building'))
  assert Store(store.path).fingerprint == store.fingerprint


def test_what_a_killed_build_left_is_no_store(tmp_path):
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  store = prepare(data_of(log), root)
  left = root / '.log.building' / 'store'
  shutil.copytree(store.path, left)
  others = root / '.other.building'
  others.mkdir()
  assert store_folder.folders(root) == [store.path]
  append(log, 'u1,i1,70,1')
  prepare(data_of(log), root)
  assert not left.exists() and others.exists()  # another name's is not ours to clear


def test_damaged_files_are_named_and_made_again_on_demand(tmp_path, said):
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
  assert folder_bytes(store.path) == before and 'bytes expected' in said[-2]

  (store.path / 'manifest.json').write_text('{"schema": ')
  with pytest.raises(UserError, match='damaged'):
    store_folder.find(root, store.fingerprint)
  assert folder_bytes(prepare(data, root).path) == before
  shutil.rmtree(store.path / 'part-00000')
  with pytest.raises(UserError, match='is missing, .* bytes expected'):
    Store(store.path)
  with pytest.raises(UserError, match='is not a store'):
    Store(root / 'other')


def test_names_and_folders_that_are_no_stores(tmp_path):
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
