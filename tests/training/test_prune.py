"""Stores are removed only on request, and never if a run needs them or they are in use."""

import gc
import multiprocessing
import shutil

import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare, store_folder
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.training import run_store
from lmn_jax.training.prune import prune
from tests.logfiles import append, as_before, data_of, make_run, write_log


@pytest.fixture
def three(tmp_path):
  """Returns (folder of the stores, three stores of a growing log, oldest first, an experiment)."""
  root, log = tmp_path / 'runs' / 'stores', write_log(tmp_path / 'log.csv')
  experiment = configs.base('pooling')
  experiment.data = data_of(log)
  folders = []
  for k in range(3):
    folders.append(prepare.prepare(experiment.data, root).path)
    append(log, f'u1,i2,{70 + k},1')
  gc.collect()  # an open store is in use
  return root, folders, experiment


def notes_of(text):
  """Returns folder -> note."""
  lines = [line.split(maxsplit=3) for line in text.splitlines()[1:]]
  return {line[0]: line[3] for line in lines if line[2:3] == ['MB']}


def test_stores_that_no_run_needs_are_removed_on_request(three, tmp_path):
  root, (old, middle, new), experiment = three
  remains, other, compiled = root / '.log.building', root / 'thesis', root / '.compiled'
  for folder in (remains, other, compiled):
    folder.mkdir()
  fingerprint = Store(old).fingerprint
  run = make_run(tmp_path / 'runs' / 'deep' / 'down' / 'run', experiment, fingerprint)
  gc.collect()
  table = prune(root, [tmp_path / 'runs'])
  assert notes_of(table) == {
    old.name: f'kept: {run}', middle.name: 'not needed', new.name: 'kept: the newest of log',
    remains.name: 'not needed', '.compiled': 'kept: compiled programs',
  }  # fmt: skip
  assert f'runs that need a store: 1; only {tmp_path}/runs was searched for runs' in table
  assert table.splitlines()[-1].startswith('--yes removes 2 folders, ')
  assert all(x.exists() for x in (old, middle, new, remains, other))
  assert 'nothing to remove' in prune(root, [tmp_path / 'runs'], name='else')
  assert 'removed: 2 folders' in prune(root, [tmp_path / 'runs'], name='log', remove=True)
  assert sorted(store_folder.folders(root)) == sorted([old, new])
  assert other.exists() and compiled.exists() and not remains.exists()
  assert not list(root.glob('.*.removed'))
  assert run_store.store_to_read(experiment, run, root).path == old
  # Runs in other folders are found through a symlink only.
  gc.collect()
  place = tmp_path / 'place'
  place.mkdir()
  assert notes_of(prune(root, [place]))[old.name] == 'not needed'
  (place / 'link').symlink_to(run)
  assert notes_of(prune(root, [place]))[old.name] == f'kept: {place / "link"}'


def test_a_store_of_an_earlier_version_is_listed(three, tmp_path):
  root, (old, *_), experiment = three
  earlier = as_before(Store(old))
  shutil.move(earlier, root / 'before')
  mark = Store(root / 'before').fingerprint
  gc.collect()
  assert notes_of(prune(root, [tmp_path]))['before'] == 'kept: the newest of before'
  make_run(tmp_path / 'run', experiment, mark)
  assert notes_of(prune(root, [tmp_path]))['before'] == f'kept: {tmp_path / "run"}'
  shutil.rmtree(root / 'before')  # now the run reads the store with the same content
  prepare.prepare(data_of(write_log(tmp_path / 'log.csv')), root)
  gc.collect()
  names = [x for x, note in notes_of(prune(root, [tmp_path])).items() if note.endswith('/run')]
  assert names == [store_folder.locate(root, mark).name]


def _hold(folder, ready, end):
  """Keeps a store open until `end` is set."""
  store = Store(folder)
  ready.set()
  end.wait(60)
  del store


def test_a_store_that_another_process_reads_is_kept(three, tmp_path):
  root, (old, middle, _), _ = three
  context = multiprocessing.get_context('spawn')
  ready, end = context.Event(), context.Event()
  process = context.Process(target=_hold, args=(middle, ready, end))
  process.start()
  try:
    assert ready.wait(60)
    notes = notes_of(prune(root, [tmp_path], remove=True))
    assert notes[middle.name] == 'kept: in use' and notes[old.name] == 'not needed'
  finally:
    end.set()
    process.join()
  assert middle.exists() and not old.exists()
  prune(root, [tmp_path], remove=True)
  assert not middle.exists()


def test_nothing_is_removed_if_a_run_does_not_name_its_store(three, tmp_path):
  root, folders, experiment = three
  run = make_run(tmp_path / 'run', experiment, 'x')
  next(run.rglob('metadata')).write_text('')
  with pytest.raises(UserError, match=f'{run}/checkpoints: all checkpoints are damaged'):
    prune(root, [tmp_path], remove=True)
  assert all(folder.exists() for folder in folders)
  with pytest.raises(UserError, match='is not a folder'):
    prune(tmp_path / 'none', [tmp_path])
