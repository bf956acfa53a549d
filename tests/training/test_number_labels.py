"""A run whose labels are numbers: it predicts them in their unit."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.errors import UserError
from lmn_jax.evaluation import report as reports
from lmn_jax.inference import predict
from lmn_jax.layers.losses import weighted_mean
from lmn_jax.training import config_warnings, loop, trained_run
from lmn_jax.training import setup as setups
from tests.runs import lines, mesh_of

MEAN, STEP = 5000.0, 300.0  # the dwell of item i is MEAN + STEP i, with noise


def write_log(path, rows=1500):
  rng = np.random.default_rng(0)
  with path.open('w') as file:
    file.write('user,item,time,dwell\n')
    for k in range(rows):
      item = int(rng.integers(10))
      file.write(f'u{rng.integers(30)},i{item},{k},{MEAN + STEP * item + 100 * rng.normal():.2f}\n')


def config_of(folder, model='din', **fields):
  path = folder / 'log.csv'
  if not path.exists():
    write_log(path)
  config = configs.base(model)
  config.data = configs.data(
    name='log', source=str(path), label='dwell', label_kind='number', history='all'
  )
  config.model.update(dict(width=4, hidden=(32,), loss='mse') | fields)
  config.update(
    dict(history_length=4, batch_size=32, eval_batch_size=64, steps=200, eval_every=100,
         save_every=100, log_every=20)
  )  # fmt: skip
  config.optimizer.dense.rate = 1e-2
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir, store, report) of a trained run."""
  folder = tmp_path_factory.mktemp('numbers')
  config, workdir = config_of(folder), folder / 'run'
  store = prepare.prepare(config.data, folder / 'stores')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    return config, workdir, store, loop.train(config, workdir, store)


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def test_it_learns_what_the_baselines_know(run):
  _, workdir, _, report = run
  overall, of_baselines = report['test']['overall'], report['baselines']['test']
  errors = {name: values['overall']['rmse'] for name, values in of_baselines.items()}
  assert set(errors) == {'label_mean', 'item_mean', 'user_mean'}
  assert errors['item_mean'] < 120 < 700 < errors['label_mean']
  assert overall['rmse'] < 200 and overall['mae'] < overall['rmse'] and 'auc' not in overall
  assert report['columns'] == ('rmse', 'mae')
  assert report['valid']['overall']['rmse'] == min(
    line['rmse'] for line in lines(workdir) if 'rmse' in line
  )
  assert 'label_mean' in reports.table_of(report)


def test_the_loss_does_not_depend_on_the_unit(run):
  """The first losses are near 1, that of the mean; in the unit of the label it would be 1e6."""
  _, workdir, _, _ = run
  losses = [line['loss'] for line in lines(workdir) if 'loss' in line]
  assert losses[0] < 2 and losses[-1] < 0.2


def test_scored_rows_and_predictions_are_numbers(run, tmp_path, one_device):
  config, workdir, store, report = run
  trained_run.evaluate_best(config, workdir, store, tmp_path / 'rows.csv')
  with (tmp_path / 'rows.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert 'probability' not in rows[0] and float(rows[0]['label']) > 4000
  error = np.array([float(row['score']) - float(row['label']) for row in rows])
  assert report['test']['overall']['rmse'] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
  (tmp_path / 'pairs.csv').write_text('user,item\nu1,i0\nu1,i9\n')
  request = predict.Request(str(tmp_path / 'pairs.csv'), tmp_path / 'scores.csv')
  predict.predict(config, workdir, store, request)
  with (tmp_path / 'scores.csv').open() as file:
    low, high = csv.DictReader(file)
  assert 'probability' not in low
  assert float(low['score']) == pytest.approx(MEAN, abs=500)
  assert float(high['score']) == pytest.approx(MEAN + 9 * STEP, abs=500)


def absolute(value_B, label_B, weight_B):
  return weighted_mean(jnp.abs(value_B - label_B), weight_B)


def test_a_loss_of_the_user_compares_numbers_in_their_unit(run, tmp_path, monkeypatch, one_device):
  config, _, store, _ = run
  monkeypatch.setitem(__import__('sys').modules, 'my_losses', __import__(__name__, fromlist=['x']))
  config = config.copy_and_resolve_references()
  config.model.loss = 'my_losses:absolute'
  setup = setups.set_up(config, store)
  state, batch = setup.trainer.init(0), setups.meshes.place(mesh_of(1), setup.sources['train'][0])
  value = np.asarray(setup.trainer.predict(state, batch))
  expected = np.abs(value - np.asarray(batch['label'])).mean()
  loss = float(setup.trainer.update(state, batch)[1]['loss'])
  assert loss == pytest.approx(expected, rel=1e-5) and loss > 100


@pytest.mark.parametrize(
  'model, fields, message',
  [
    (
      'din',
      dict(loss='bce'),
      "config.model.loss='bce' does not fit .*label_kind='number'; use one",
    ),
    ('din', dict(loss='jrc'), "config.model.loss='jrc' does not fit"),
    ('sim', {}, "an auxiliary loss of SIM learns from clicks; set config.model.search='hard'"),
    ('ubr4ctr', {}, 'an auxiliary loss of UBR4CTR learns from clicks; use another model'),
  ],
)
def test_what_needs_clicks_is_refused(tmp_path, model, fields, message):
  with pytest.raises(UserError, match=message) as error:
    setups.check(config_of(tmp_path, model, **fields))
  assert '\n' not in str(error.value)


def test_next_items_are_no_numbers():
  config = configs.base('sasrec', 'next_item')
  config.data.label_kind = 'number'
  with pytest.raises(UserError, match="label_kind='number' is for config.task='click'; next items"):
    setups.check(config)


def test_equal_numbers_give_a_warning(tmp_path, one_device):
  config = config_of(tmp_path)
  lines = [f'u{k % 5},i{k % 7},{k},3.5\n' for k in range(100)]
  (tmp_path / 'log.csv').write_text('user,item,time,dwell\n' + ''.join(lines))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  setup = setups.set_up(config, store)
  (line,) = config_warnings.TASKS['click'].doubts(config, store)
  assert line == "all labels 'label' of training are 3.5, so there is nothing to learn"
  state, batch = setup.trainer.init(0), setups.meshes.place(mesh_of(1), setup.sources['train'][0])
  assert np.isfinite(setup.trainer.update(state, batch)[1]['loss'])
