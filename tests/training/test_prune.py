"""Stores are removed on demand only, and none that a run needs or that is in use."""

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
  """(the stores' root, folders of three stores of a growing log, oldest first, an experiment)."""
  root, log = tmp_path / 'runs' / 'stores', write_log(tmp_path / 'log.csv')
  experiment = configs.base('pooling')
  experiment.data = data_of(log)
  made = []
  for k in range(3):
    made.append(prepare.prepare(experiment.data, root).path)
    append(log, f'u1,i2,{70 + k},1')
  gc.collect()  # an open store is in use
  return root, made, experiment


def told(text):
  """Folder -> what is said of it."""
  lines = [line.split(maxsplit=3) for line in text.splitlines()[1:]]
  return {line[0]: line[3] for line in lines if line[2:3] == ['MB']}


def test_nothing_is_removed_that_is_needed_and_nothing_unasked(three, tmp_path):
  root, (one, two, new), experiment = three
  left, other = root / '.log.building', root / 'thesis'
  for folder in (left, other):
    folder.mkdir()
  fingerprint = Store(one).fingerprint
  run = make_run(tmp_path / 'runs' / 'deep' / 'down' / 'run', experiment, fingerprint)
  gc.collect()
  said = prune(root, [tmp_path / 'runs'])
  assert told(said) == {
    one.name: f'kept: {run}', two.name: 'to go', new.name: 'kept: the newest of log',
    left.name: 'to go',
  }  # fmt: skip
  assert f'runs that need a store: 1; others may lie elsewhere than in {tmp_path}/runs' in said
  assert said.splitlines()[-1].startswith('--yes removes 2 folders, ')
  assert all(x.exists() for x in (one, two, new, left, other))
  assert 'nothing to remove' in prune(root, [tmp_path / 'runs'], name='else')
  assert 'removed: 2 folders' in prune(root, [tmp_path / 'runs'], name='log', remove=True)
  assert sorted(store_folder.folders(root)) == sorted([one, new])
  assert other.exists() and not left.exists() and not list(root.glob('.*.removed'))
  assert run_store.store_to_read(experiment, run, root).path == one
  # Runs elsewhere are not found, unless a link leads to them.
  gc.collect()
  place = tmp_path / 'place'
  place.mkdir()
  assert told(prune(root, [place]))[one.name] == 'to go'
  (place / 'link').symlink_to(run)
  assert told(prune(root, [place]))[one.name] == f'kept: {place / "link"}'


def test_a_store_of_an_earlier_version_is_one(three, tmp_path):
  root, (one, *_), experiment = three
  old = as_before(Store(one))
  shutil.move(old, root / 'before')
  mark = Store(root / 'before').fingerprint
  gc.collect()
  assert told(prune(root, [tmp_path]))['before'] == 'kept: the newest of before'
  make_run(tmp_path / 'run', experiment, mark)
  assert told(prune(root, [tmp_path]))['before'] == f'kept: {tmp_path / "run"}'
  shutil.rmtree(root / 'before')  # from here on the run reads the one whose files are the same
  prepare.prepare(data_of(write_log(tmp_path / 'log.csv')), root)
  gc.collect()
  kept = [x for x, said in told(prune(root, [tmp_path])).items() if said.endswith('/run')]
  assert kept == [store_folder.locate(root, mark).name]


def _hold(folder, said, end):
  store = Store(folder)
  said.set()
  end.wait(60)
  del store


def test_a_store_that_another_process_reads(three, tmp_path):
  root, (one, two, _), _ = three
  context = multiprocessing.get_context('spawn')
  said, end = context.Event(), context.Event()
  process = context.Process(target=_hold, args=(two, said, end))
  process.start()
  try:
    assert said.wait(60)
    found = told(prune(root, [tmp_path], remove=True))
    assert found[two.name] == 'kept: in use' and found[one.name] == 'to go'
  finally:
    end.set()
    process.join()
  assert two.exists() and not one.exists()
  prune(root, [tmp_path], remove=True)
  assert not two.exists()


def test_a_run_that_does_not_say_its_store(three, tmp_path):
  root, made, experiment = three
  run = make_run(tmp_path / 'run', experiment, 'x')
  next(run.rglob('metadata')).write_text('')
  with pytest.raises(UserError, match=f'{run}/checkpoints: no checkpoint says which store'):
    prune(root, [tmp_path], remove=True)
  assert all(folder.exists() for folder in made)
  with pytest.raises(UserError, match='is not a folder'):
    prune(tmp_path / 'none', [tmp_path])
