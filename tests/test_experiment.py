"""`Experiment`: tables in memory, the same files as the command line, threads."""

import json
import threading

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lmn_jax
from lmn_jax import config as configs
from lmn_jax.data import frames
from lmn_jax.errors import UserError
from lmn_jax.training import setup as setups
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
