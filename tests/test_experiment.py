"""`Experiment`: tables in memory, the same files as the command line, threads."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

import lmn_jax
from lmn_jax import config as configs
from lmn_jax.data import frames
from lmn_jax.errors import UserError
from lmn_jax.training import setup as setups
from lmn_jax.training import trained_run
from tests.runs import mesh_of
from tests.test_main import call

COLUMNS = dict(user='user_id', item='film', time='timestamp', label='clicked', name='films')
SMALL = dict(
  steps=4, eval_every=2, save_every=2, log_every=2, batch_size=32, eval_batch_size=32,
  history_length=6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def log_of(users=12, films=15, rows=400):
  """Returns a log with text and numeric ids."""
  draw = np.random.default_rng(0)
  return pd.DataFrame(
    dict(
      user_id=[f'u{k}' for k in draw.integers(0, users, rows)],
      film=draw.integers(0, films, rows),
      timestamp=1_600_000_000 + np.arange(rows),
      clicked=draw.integers(0, 2, rows),
    )
  )


def make(log, folder, **fields):
  fields = dict(model=dict(name='pooling', width=4, hidden=(8,)), data=COLUMNS) | SMALL | fields
  return lmn_jax.Experiment(log=log, workdir=folder, **fields)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns (log, experiment, report) of a training on a pandas DataFrame."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    log = log_of()
    experiment = make(log, tmp_path_factory.mktemp('films') / 'run')
    return log, experiment, experiment.train()


def as_csv(log, folder):
  path = folder / 'log.csv'
  log.to_csv(path, index=False)
  return path


def as_parquet(log, folder):
  path = folder / 'log.parquet'
  log.to_parquet(path)
  return str(path)


KINDS = {
  'pandas': lambda log, _: log,
  'pandas with an index': lambda log, _: log.set_axis(range(5, 5 + len(log))),
  'polars': lambda log, _: pl.from_pandas(log),
  'polars with categories': lambda log, _: pl.from_pandas(log).with_columns(
    pl.col('user_id').cast(pl.Categorical)
  ),
  'arrow': lambda log, _: pa.Table.from_pandas(log),
  'arrow with categories': lambda log, _: pa.Table.from_pandas(log.astype({'user_id': 'category'})),
  'a reader of batches': lambda log, _: pa.Table.from_pandas(log).to_reader(max_chunksize=100),
  'parquet': as_parquet,
  'csv': as_csv,
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_log_has_the_same_examples(kind, trained, tmp_path):
  log, experiment, _ = trained
  store = make(KINDS[kind](log, tmp_path), tmp_path / 'run').prepare()
  expected = experiment.prepare()
  assert store.manifest['counts'] == expected.manifest['counts']
  assert store.vocabulary == expected.vocabulary
  for part, other in zip(store.parts, expected.parts, strict=True):
    for name, values in part.history.items():
      np.testing.assert_array_equal(values, other.history[name])
    for name, values in part.examples.items():
      np.testing.assert_array_equal(values, other.examples[name])


@pytest.mark.parametrize('kind', ['pandas', 'polars', 'arrow', 'parquet'])
def test_predictions_have_the_type_of_the_rows(kind, trained, tmp_path):
  log, experiment, _ = trained
  rows = KINDS[kind](log[:7][['user_id', 'film']], tmp_path)
  scores = experiment.predict(rows)
  assert type(scores) is (pa.Table if kind == 'parquet' else type(rows))
  table = frames.to_arrow(scores, 'scores')
  assert table.column('user_id').to_pylist() == log['user_id'][:7].tolist()
  assert np.isfinite(table.column('score').to_numpy()).all()
  users = KINDS[kind](log[:7][['user_id']], tmp_path)
  best = frames.to_arrow(experiment.predict(users, top_k=2), 'best')
  assert best.column('rank').to_pylist() == [1, 2] * 7


def test_scores_equal_those_of_the_evaluation(trained, tmp_path):
  """Rows with times have the scores of the test split that `evaluate` writes."""
  log, experiment, report = trained
  assert experiment.evaluate(tmp_path / 'test.parquet')['test'] == report['test']
  test = pq.read_table(tmp_path / 'test.parquet').to_pandas().sort_values('timestamp')
  rows = log.tail(len(test))
  scores = experiment.predict(rows.drop(columns='clicked'))
  np.testing.assert_allclose(scores['score'], test['score'], rtol=1e-6)


def test_embeddings_are_the_rows_of_the_best_checkpoint(trained):
  log, experiment, _ = trained
  table = experiment.embeddings('item')
  assert set(table.column('id').to_pylist()) == {None, *map(str, log['film'])}
  assert table.schema.field('vector').type == pa.list_(pa.float32(), 4)
  with pytest.raises(UserError, match="table='memory' is unknown"):
    experiment.embeddings('memory')


def test_scores_of_a_next_item_model_are_products_of_its_vectors(trained, tmp_path):
  log, _, _ = trained
  experiment = make(
    log, tmp_path / 'run', task='next_item', model=dict(name='gru4rec', width=4), batch_size=4,
    eval_batch_size=4, data=COLUMNS | dict(split=dict(protocol='leave_one_out')),
  )  # fmt: skip
  experiment.train()
  users, items = (
    dict(zip(*experiment.embeddings(x).to_pydict().values(), strict=True)) for x in ('user', 'item')
  )
  assert set(users) == set(log['user_id'])
  rows = log[:20][['user_id', 'film']]
  scores = experiment.predict(rows)
  products = [np.dot(users[u], items[str(i)]) for u, i in rows.itertuples(index=False)]
  np.testing.assert_allclose(scores['score'], products, rtol=1e-5, atol=1e-6)
  assert experiment.update_states()['users_in_all'] == len(users)
  # Now from the stored states.
  again = experiment.embeddings('user').to_pydict()
  for user, vector in zip(*again.values(), strict=True):
    np.testing.assert_allclose(vector, users[user], rtol=1e-5, atol=1e-6)


def test_export_writes_a_folder_and_a_link(trained, monkeypatch):
  _, experiment, _ = trained
  folder = experiment.export(precision='int8')['folder']
  assert (experiment.workdir / 'export').readlink().name == folder


def test_trainings_in_threads_of_one_process_have_the_same_result(trained, tmp_path):
  log, _, report = trained
  reports = []
  for name in ('first', 'second'):
    thread = threading.Thread(
      target=lambda name=name: reports.append(make(log, tmp_path / name).train())
    )
    thread.start()
    thread.join()
  for other in reports:
    assert other['test'] == report['test'] and other['step'] == report['step']


def test_another_process_continues_the_run(trained, monkeypatch, capsys, tmp_path):
  """The command line continues a run of Python, with the log in the workdir."""
  log, _, report = trained
  experiment = make(log, tmp_path / 'run', steps=2)
  experiment.train()
  config = tmp_path / 'films.py'
  config.write_text(
    'import json\n'
    'from lmn_jax.experiment import Experiment\n'
    'def get_config():\n'
    f'  return Experiment(model=dict(name="pooling", width=4, hidden=(8,)), data={COLUMNS!r},\n'
    f'    log={experiment.config.data.source!r}, **{SMALL!r}).config\n'
  )
  code, out, err = call(
    monkeypatch, capsys, f'--config={config}', f'--workdir={experiment.workdir}'
  )
  assert code == 0, err
  assert 'resumed from step 2' in err
  continued = json.loads((experiment.workdir / 'report.json').read_text())
  assert continued['test'] == json.loads(json.dumps(report['test']))
  vectors = tmp_path / 'items.parquet'
  code, out, err = call(
    monkeypatch, capsys, f'--config={config}', f'--workdir={experiment.workdir}',
    '--mode=embeddings', f'--output={vectors}',
  )  # fmt: skip
  assert code == 0, err
  assert out == f'{vectors}: 16 vectors of 4 of the table item\n'
  assert pq.read_table(vectors).equals(experiment.embeddings())


def test_a_config_by_name_with_fields(tmp_path):
  experiment = lmn_jax.Experiment(
    'douyin:sim', workdir=tmp_path / 'run', optimizer=dict(dense=dict(rate=0.5)), steps=3,
    data=dict(synthetic=dict(users=7), multi=dict(tags='|')),
  )  # fmt: skip
  config = experiment.config
  assert (config.model.name, config.steps, config.optimizer.dense.rate) == ('sim', 3, 0.5)
  assert config.data.synthetic.users == 7 and config.data.multi.tags == '|'
  assert experiment.stores == tmp_path / 'stores'
  assert lmn_jax.Experiment('douyin:sim').workdir.as_posix() == 'runs/douyin-sim'
  assert not list(tmp_path.iterdir())


def test_a_config_that_is_passed_does_not_change(tmp_path):
  config = configs.douyin('pooling')
  before = config.to_dict()
  experiment = lmn_jax.Experiment(config, log=log_of(), workdir=tmp_path, steps=3, data=COLUMNS)
  assert config.to_dict() == before
  assert experiment.config.steps == 3 and experiment.config.data.format == 'parquet'


def test_references_between_fields_are_kept():
  """The columns of lmn_movielens depend on its source."""
  config = lmn_jax.Experiment('lmn_movielens', log='ml.inter').config
  assert (config.data.item, config.data.items_source) == ('item_id', 'ml.item')


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(stepz=3), "config field='stepz' is unknown; did you mean 'steps'"),
    (dict(data=dict(usr='u')), "config.data field='usr' is unknown"),
    (dict(steps='many'), "config.steps='many'"),
    (dict(optimizer=3), 'config.optimizer=3 must be a dict'),
    (dict(model='dinn'), 'dinn'),
    (dict(log=[1, 2]), 'log is a list; give a path, a pandas or polars DataFrame, or an Arrow'),
    (dict(log=pd.DataFrame({'x': [1, 'a', b'b']})), 'log: .*give each column one type'),
    (dict(log=pd.Series([1, 2])), 'log is a Series; give a path'),
    (dict(log=pl.LazyFrame({'x': [1]})), 'log is a LazyFrame; give a path'),
    (dict(log=pd.DataFrame([[1, 2]], columns=['x', 'x'])), 'log has several columns of one name'),
    (dict(config='lmn_douyn'), "did you mean 'lmn_douyin'"),
    (dict(config='/nowhere/x.py'), "'/nowhere/x.py' is not a file"),
  ],
)
def test_wrong_arguments_raise_an_error_of_one_line(fields, message, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    lmn_jax.Experiment(workdir=tmp_path / 'run', **fields)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_methods_before_training_are_refused(tmp_path):
  experiment = make(log_of(), tmp_path / 'run')
  for method in (experiment.evaluate, experiment.embeddings, experiment.export):
    with pytest.raises(UserError, match='holds no checkpoint; run --mode=train first'):
      method()


def test_a_table_with_the_same_content_is_not_written_again(tmp_path):
  make(log_of(), tmp_path / 'run')
  path = tmp_path / 'run/log.parquet'
  before = path.stat()
  make(log_of(), tmp_path / 'run')
  assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
  assert [x.name for x in path.parent.iterdir()] == ['log.parquet']


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(config=ConfigDict()), "no field 'task'; begin with lmn_jax.config.base"),
    (dict(workdir=''), "workdir='' is empty; name a folder, or leave it out for runs/lmn"),
    (dict(log=pd.DataFrame()), 'log has no columns; at least one is expected'),
    (dict(steps=2.5), 'config.steps=2.5 is of the type float; it must be of the type int, such as'),
    (dict(steps=True), 'config.steps=True is of the type bool; it must be of the type int'),
    (dict(criterion=max), 'config.criterion=.* is of the type builtin_function_or_method; it must'),
    (dict(metrics=(max,)), 'config.metrics=.* must be a tuple of texts'),
    (dict(data=dict(item_features=(3,))), r'config.data.item_features=\(3,\) must be a tuple of'),
    (dict(optimizer=dict(dense=dict(arguments=3))), 'arguments=3 must be a dict of fields'),
  ],
)
def test_a_value_of_another_type_is_refused_in_a_line(fields, message, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    lmn_jax.Experiment(**dict(workdir=tmp_path / 'run') | fields)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_frozen_configs_are_taken(tmp_path):
  frozen = FrozenConfigDict(configs.base('din'))
  config = lmn_jax.Experiment(frozen, steps=np.int64(3)).config
  assert config.steps == 3 and type(config.steps) is int


def test_an_experiment_without_a_log(tmp_path):
  with pytest.raises(UserError, match='config.data.source is empty; name the log'):
    lmn_jax.Experiment(workdir=tmp_path / 'run').prepare()


@pytest.mark.parametrize(
  'text, message',
  [
    ('def get_config(:\n', ' line 1: SyntaxError'),
    ('def get_config():\n  return 1 / 0\n', ' line 2: ZeroDivisionError'),
    ('def get_config(model):\n  pass\n', r'get_config\(\) takes an argument'),
    ('', r'defines no function get_config\(\)'),
    ('def get_config():\n  return {}\n', 'must return a ConfigDict and returned {}'),
  ],
)
def test_a_config_file_with_an_error(text, message, tmp_path):
  path = tmp_path / 'my_config.py'
  path.write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    lmn_jax.Experiment(path)
  assert str(caught.value).startswith(str(path)) and '\n' not in str(caught.value)


def test_folders_that_cannot_be_written(tmp_path):
  file = tmp_path / 'file'
  file.write_text('x')
  path = as_csv(log_of(), tmp_path)
  calls = (
    lambda: make(log_of(), file),
    lambda: make(log_of(), file / 'run'),
    lambda: make(path, tmp_path / 'run', stores=file).prepare(),
    lambda: make(path, file).train(),
  )
  for call_ in calls:
    with pytest.raises(UserError, match='(Not a directory|File exists); choose another --workdir'):
      call_()
  assert file.read_text() == 'x' and sorted(x.name for x in tmp_path.iterdir()) == [
    'file',
    'log.csv',
  ]


def test_arguments_of_methods_are_refused_in_a_line(trained, tmp_path, monkeypatch):
  log, experiment, _ = trained
  monkeypatch.chdir(tmp_path)
  rows = log[:3][['user_id', 'film']]
  users = rows[['user_id']]
  before = sorted(x.name for x in experiment.workdir.iterdir())
  calls = {
    '--top_k=-1 must be at least 1': lambda: experiment.predict(users, top_k=-1),
    'rows has no rows; at least one is expected': lambda: experiment.predict(rows[:0]),
    'rows has no columns': lambda: experiment.predict(pd.DataFrame(index=range(3))),
    "rows: column config.data.item='film' is unknown": lambda: experiment.predict(users),
    '--export=x/.. has no name': lambda: experiment.export('x/..'),
  }  # fmt: skip
  (tmp_path / 'x.csv').write_text('user_id,film\nu1,1\n')
  for message, call_ in calls.items():
    with pytest.raises(UserError, match=message) as caught:
      call_()
    assert '\n' not in str(caught.value)
  assert [x.name for x in tmp_path.iterdir()] == ['x.csv']
  assert sorted(x.name for x in experiment.workdir.iterdir()) == before


def test_more_best_items_than_there_are(trained):
  """All items that the user has not clicked."""
  log, experiment, _ = trained
  user = log['user_id'][0]
  assert len(experiment.predict(log[:1][['user_id']], top_k=2)) == 2
  clicked = log[(log['user_id'] == user) & (log['clicked'] == 1)]
  best = experiment.predict(log[:1][['user_id']], top_k=10**6)
  assert set(best['film']) == {*map(str, set(log['film']) - set(clicked['film']))}


def test_a_run_that_keeps_its_store_says_so_when_its_table_is_another(trained, tmp_path, caplog):
  """A program in Python shows warnings, but no information of loggers."""
  log, _, report = trained
  make(log, tmp_path / 'run').train()
  assert not [x for x in caplog.records if x.levelname == 'WARNING']
  other = make(log.assign(clicked=1 - log['clicked']), tmp_path / 'run')
  (line,) = (x.getMessage() for x in caplog.records if x.levelname == 'WARNING')
  assert 'log.parquet is now another table' in line and 'use another workdir' in line
  assert other.train()['test'] == report['test']


def test_a_second_thread_is_refused_the_workdir(trained, tmp_path):
  log, _, report = trained
  (tmp_path / 'run').mkdir()
  ended = []

  def train():
    with pytest.raises(UserError, match='/run is in use by process'):
      make(log, tmp_path / 'run').train()
    ended.append(True)

  with trained_run.only_command(tmp_path / 'run'):
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
  assert ended and make(log, tmp_path / 'run').train()['test'] == report['test']


WRONG = """
import pandas as pd
from lmn_jax import Experiment
from lmn_jax.errors import UserError

made = Experiment(model='din')
frame = pd.DataFrame({'x': range(30)})
calls = [
  (lambda: Experiment(3), 'config is of the type int; give a ConfigDict'),
  (lambda: Experiment({'steps': 3}), 'config is of the type dict; give a ConfigDict'),
  (lambda: Experiment(frame), 'config is of the type DataFrame; give a ConfigDict'),
  (lambda: Experiment(model=3), 'config.model.name=3 must be a text'),
  (lambda: Experiment(model=dict(name=None)), 'config.model.name=None must be a text'),
  (lambda: Experiment(workdir=3), 'workdir=3 of the type int must be a path'),
  (lambda: Experiment(stores=[]), 'stores=[] of the type list must be a path'),
  (lambda: made.predict_file('log.csv', 'x.csv', '3'), "--top_k='3' must be a whole number"),
  (lambda: made.predict_file('log.csv', 'x.csv', 2.5), '--top_k=2.5 must be a whole number'),
  (lambda: made.predict_file('log.csv', 'x.csv', True), '--top_k=True must be a whole number'),
  (lambda: made.predict_file(frame, 'x.csv'), 'of the type DataFrame must be a path'),
  (lambda: made.predict_file(None, 'x.csv'), '--input is missing'),
  (lambda: made.predict_file('log.csv', None), '--output is missing'),
  (lambda: made.evaluate(3), 'output=3 of the type int must be a path'),
  (lambda: made.export(3), 'to=3 of the type int must be a path'),
  (lambda: made.update_states(frame), 'of the type DataFrame must be a path'),
]
for call, expected in calls:
  try:
    call()
  except UserError as error:
    assert expected in str(error) and len(str(error).splitlines()) == 1, error
  else:
    raise AssertionError(expected)
"""


@pytest.mark.slow
def test_values_of_types_that_no_annotation_allows(tmp_path):
  """In a process of its own: the annotations are checked in this one, and not for a user."""
  (tmp_path / 'log.csv').write_text('user,item\nu1,i1\n')
  done = subprocess.run(
    [sys.executable, '-c', WRONG], cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | {'PYTHONPATH': str(Path(lmn_jax.__file__).parents[1])},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert [x.name for x in tmp_path.iterdir()] == ['log.csv']
