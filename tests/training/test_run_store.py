"""A run keeps its store: changes of the log do not matter, and other data are refused."""

import json
import shutil

import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare, store_folder
from lmn_jax.errors import UserError
from lmn_jax.training import run_store
from tests import runs
from tests.logfiles import append, as_before, data_of, folder_bytes, make_run, write_log


@pytest.fixture
def lines(monkeypatch):
  lines = []
  monkeypatch.setattr(run_store.log, 'warning', lambda text, *values: lines.append(text % values))
  return lines


@pytest.fixture
def trained(tmp_path):
  """(experiment, workdir, folder of the stores, log) of a run."""
  root, log = tmp_path / 'stores', write_log(tmp_path / 'log.csv')
  experiment = configs.base('pooling')
  experiment.data = data_of(log)
  store = prepare.prepare(experiment.data, root)
  return experiment, make_run(tmp_path / 'run', experiment, store.fingerprint), root, log


MODES = (run_store.store_to_read, run_store.store_to_train, run_store.store_to_plan)


def test_a_changed_or_deleted_log_does_not_matter(trained, lines, monkeypatch):
  experiment, workdir, root, log = trained
  before = {find: find(experiment, workdir, root).fingerprint for find in MODES}
  assert len(set(before.values())) == 1 and not lines
  monkeypatch.setattr(prepare.interactions, 'stage', None)  # reading a log fails
  append(log, 'u1,i2,70,1')
  for find in MODES:
    assert find(experiment, workdir, root).fingerprint == before[find]
    assert lines.pop().startswith('the log has changed since ') and not lines
  log.unlink()
  for find in MODES:
    assert find(experiment, workdir, root).fingerprint == before[find] and not lines
  assert len(store_folder.folders(root)) == 1


def test_a_new_run_reads_the_current_log(trained, tmp_path):
  experiment, workdir, root, log = trained
  append(log, 'u1,i2,70,1')
  for find in (run_store.store_to_train, run_store.store_to_plan):
    store = find(experiment, tmp_path / 'another', root)
    assert store.fingerprint != run_store.run_of(workdir).fingerprint
  with pytest.raises(UserError, match='another holds no checkpoint; run --mode=train first'):
    run_store.store_to_read(experiment, tmp_path / 'another', root)


@pytest.mark.parametrize('find', MODES[:2])
def test_other_data_are_refused(trained, find, tmp_path):
  experiment, workdir, root, log = trained
  experiment.data.min_count = 2
  with pytest.raises(UserError, match='config.data.min_count was 1 and is 2; use another'):
    find(experiment, workdir, root)
  experiment.data.min_count = 1
  # Another log of the same name and size.
  other = write_log(tmp_path / 'other' / 'log.csv')
  other.write_text(other.read_text().replace('u1', 'u8'))
  experiment.data.source = str(other)
  with pytest.raises(UserError, match='config.data.source was .*log.csv. and is .*other/log.csv'):
    find(experiment, workdir, root)
  # The same log elsewhere, and fields that do not matter.
  experiment.data.source = str(log.rename(other))
  experiment.data.memory_limit, experiment.data.name = '1GB', 'log'
  assert find(experiment, workdir, root).fingerprint == run_store.run_of(workdir).fingerprint
  assert len(store_folder.folders(root)) == 1


# The section `data` of the first version, with its defaults.
FIRST = """{"behaviour": "", "bins": {}, "context_features": [], "delimiter": "",
 "duplicates": "keep", "encoding": "utf-8", "example_behaviours": [], "fields": [], "format": "",
 "header": true, "history": "positive", "history_behaviours": [], "item": "item",
 "item_features": [], "items_fields": [], "items_separator": ",", "items_source": "",
 "label": "label", "label_threshold": null, "max_history": 0, "memory_limit": "2GB",
 "min_count": 1, "missing": ["", "NA", "NULL", "nan"], "multi": {}, "name": "data",
 "negatives": 0, "positive_behaviours": [], "quote": "\\"", "rows_per_part": 16777216, "seed": 0,
 "side_encoding": "utf-8", "side_format": "", "source": "",
 "split": {"protocol": "global_time", "test": 0.1, "valid": 0.1}, "split_column": "",
 "synthetic": {}, "tfds_data_dir": "", "time": "time", "time_format": "", "times_source": "",
 "user": "user", "user_features": [], "users_fields": [], "users_source": ""}"""


def test_a_run_of_the_first_version_fits_a_config_of_defaults(trained):
  """A changed default must be added to FORMER, otherwise runs with the old one are refused."""
  experiment, workdir, root, log = trained
  (file,) = workdir.rglob('metadata')
  identity = json.loads(file.read_text())
  identity['data'] = json.loads(FIRST) | {'source': str(log)}
  file.write_text(json.dumps(identity))
  log.unlink()
  assert run_store.store_to_read(experiment, workdir, root).fingerprint == identity['store']


def test_missing_fields_of_a_run_have_their_defaults(trained):
  experiment, workdir, root, _ = trained
  (file,) = workdir.rglob('metadata')
  identity = json.loads(file.read_text())
  del identity['data']['negatives']
  identity['data']['quote'] = '"'  # the former default
  file.write_text(json.dumps(identity))
  run_store.store_to_read(experiment, workdir, root)
  experiment.data.negatives = 3
  with pytest.raises(UserError, match='config.data.negatives was 0 and is 3'):
    run_store.store_to_read(experiment, workdir, root)


def test_bins_of_earlier_versions_are_a_way_of_numbers(trained):
  experiment, workdir, root, _ = trained
  (file,) = workdir.rglob('metadata')
  identity = json.loads(file.read_text())
  del identity['data']['numeric']
  identity['data']['bins'] = {'price': 4}
  file.write_text(json.dumps(identity))
  experiment.data.context_features = identity['data']['context_features'] = ()
  with experiment.data.unlocked():
    experiment.data.numeric = {'price': 'bins:4'}
  for find in MODES:
    find(experiment, workdir, root)
  experiment.data.numeric.price = 'bins:5'
  with pytest.raises(UserError, match="numeric.price was 'bins:4' and is 'bins:5'"):
    run_store.store_to_read(experiment, workdir, root)


def test_a_missing_store(trained):
  experiment, workdir, root, log = trained
  (folder,) = store_folder.folders(root)
  fingerprint = run_store.run_of(workdir).fingerprint
  shutil.rmtree(folder)
  with pytest.raises(UserError) as error:
    run_store.store_to_read(experiment, workdir, root)
  for words in (fingerprint[:16], str(root), '--stores', '--mode=prepare'):
    assert words in str(error.value)
  assert not store_folder.folders(root)  # reading builds nothing
  assert run_store.store_to_train(experiment, workdir, root).fingerprint == fingerprint
  shutil.rmtree(folder)
  append(log, 'u1,i2,70,1')
  with pytest.raises(UserError, match='on a store that is missing, and the current log gives'):
    run_store.store_to_train(experiment, workdir, root)


def test_runs_and_stores_of_earlier_versions_open(trained, lines):
  experiment, workdir, root, log = trained
  (folder,) = store_folder.folders(root)
  old = as_before(store_folder.find(root, run_store.run_of(workdir).fingerprint))
  del folder
  shutil.rmtree(workdir)
  fingerprint = json.loads((old / 'manifest.json').read_text())['fingerprint']
  make_run(workdir, experiment, fingerprint)
  before = folder_bytes(old)
  for change in (lambda: None, lambda: append(log, 'u1,i2,70,1'), log.unlink):
    change()
    for find in MODES:
      store = find(experiment, workdir, root)
      assert store.path == old and store.fingerprint == fingerprint
  assert len(lines) == len(MODES)  # for the log that grew
  assert folder_bytes(old) == before


def test_the_newest_readable_checkpoint_names_the_store(trained):
  experiment, workdir, root, _ = trained
  run = run_store.run_of(workdir)
  make_run(workdir, experiment, run.fingerprint, step=12)
  (newest,) = workdir.glob('checkpoints/step_12/config/metadata')
  newest.write_text('{"store"')
  assert run_store.run_of(workdir) == run
  (workdir / 'checkpoints/step_3/config/metadata').unlink()
  with pytest.raises(UserError, match='all checkpoints are damaged, none names its store'):
    run_store.store_to_train(experiment, workdir, root)


def test_the_file_that_orbax_writes_is_read(tmp_path):
  config, workdir, store = runs.untrained(runs.tiny_config(), tmp_path)
  run = run_store.run_of(workdir)
  assert run.fingerprint == store.fingerprint
  lists = {k: list(x) for k, x in config.model.items() if isinstance(x, tuple)}
  assert lists['hidden'] == [8] and run.config['model'] == config.model.to_dict() | lists
  assert run_store.store_to_read(config, workdir, tmp_path / 'stores').path == store.path
