"""A run with several labels: training, validation, the report, and scores of rows."""

import csv
import json

import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_metrics
from lmn_jax.evaluation import report as reports
from lmn_jax.inference import predict
from lmn_jax.training import loop, tasks, trained_run
from lmn_jax.training import setup as setups
from tests.runs import lines, mesh_of

LABELS = ('click', 'order')


def write_log(path, rows=1500):
  """Clicks depend on the item, and orders on its parity, where they are known."""
  rng = np.random.default_rng(0)
  with path.open('w') as file:
    file.write('user,item,time,click,order,price\n')
    for k in range(rows):
      item = int(rng.integers(20))
      click = int(rng.random() < (0.2 + 0.6 * (item < 10)))
      order = '' if rng.random() < 0.3 else int(rng.random() < (0.1 + 0.8 * (item % 2)))
      file.write(f'u{rng.integers(30)},i{item},{k},{click},{order},{rng.integers(3)}\n')


def config_of(folder, **fields):
  path = folder / 'log.csv'
  if not path.exists():
    write_log(path)
  config = configs.base('din')
  config.data = configs.data(
    name='log', source=str(path), labels=LABELS, weight='price', rows_per_part=300
  )
  config.model.update(dict(width=4, hidden=(32,), tower=(8,), label_head='mmoe', experts=2))
  config.update(
    dict(history_length=4, batch_size=32, eval_batch_size=64, steps=200, eval_every=100,
         save_every=100, log_every=20, criterion='order/auc')
  )  # fmt: skip
  config.update(fields)
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir, store, report) of a trained run."""
  folder = tmp_path_factory.mktemp('labels')
  config, workdir = config_of(folder), folder / 'run'
  store = prepare.prepare(config.data, folder / 'stores')
  assert len(store.parts) > 2
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    return config, workdir, store, loop.train(config, workdir, store)


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def test_every_label_has_its_metrics(run):
  config, workdir, store, report = run
  columns = tasks.columns_of(config)
  assert columns[0] == 'click/auc' and columns[5] == 'order/auc' and len(columns) == 10
  overall = report['test']['overall']
  labelled = store.manifest['counts']['labels']['order']['labelled']['test']
  assert overall['rows'] == overall['click/rows'] == store.examples['test'] > labelled
  assert overall['order/rows'] == labelled and overall['not_finite'] == 0
  for name in LABELS:  # both are learnt
    assert overall[f'{name}/auc'] > 0.65, overall
    assert report['baselines']['test']['item_mean']['overall'][f'{name}/auc'] > 0.65
  assert report['baselines']['test']['popularity']['overall']['order/log_loss'] is None
  printed = reports.table_of(report)
  assert f'click, test, {overall["rows"]} rows ' in printed
  assert f'order, test, {labelled} rows ' in printed


def test_the_loss_is_the_sum_of_those_of_the_labels(run):
  _, workdir, _, _ = run
  steps = [line for line in lines(workdir) if 'loss/click' in line]
  assert len(steps) > 3
  for line in steps:
    assert line['loss/click'] == pytest.approx(line['click/loss'] + line['order/loss'], rel=1e-5)


def test_the_criterion_is_that_of_the_named_label(run):
  _, workdir, _, report = run
  scores = dict(json.loads((workdir / 'checkpoints/validations.json').read_text()))
  validated = [line for line in lines(workdir) if 'valid/order/auc' in line or 'order/auc' in line]
  assert len(scores) == len(validated) == 2
  assert scores[report['step']] == max(scores.values())
  assert report['valid']['overall']['order/auc'] == pytest.approx(scores[report['step']])


def test_scored_rows_give_the_metrics(run, tmp_path, one_device):
  config, workdir, store, _ = run
  report = trained_run.evaluate_best(config, workdir, store, tmp_path / 'rows.csv')
  with (tmp_path / 'rows.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == store.examples['test']
  known = [row for row in rows if row['label.order'] != '']
  assert len(known) == report['test']['overall']['order/rows']
  label, score = (np.array([float(row[f'{x}.order']) for row in known]) for x in ('label', 'score'))
  auc = click_metrics.auc(label, score)
  assert report['test']['overall']['order/auc'] == pytest.approx(auc, abs=1e-6)
  first = rows[0]
  p = 1 / (1 + np.exp(-float(first['score.click'])))
  assert float(first['probability.click']) == pytest.approx(p, rel=1e-5)


def test_predictions_have_a_score_for_each_label(run, tmp_path, one_device):
  config, workdir, store, _ = run
  (tmp_path / 'pairs.csv').write_text('user,item\nu1,i3\nu2,i4\nnew,i5\n')
  request = predict.Request(str(tmp_path / 'pairs.csv'), tmp_path / 'scores.csv')
  predict.predict(config, workdir, store, request)
  with (tmp_path / 'scores.csv').open() as file:
    scores = list(csv.DictReader(file))
  assert [*scores[0]][2:6] == ['score.click', 'probability.click', 'score.order',
                               'probability.order']  # fmt: skip
  assert float(scores[0]['score.order']) > float(scores[1]['score.order'])  # odd before even
  (tmp_path / 'users.csv').write_text('user\nu1\n')
  request = predict.Request(str(tmp_path / 'users.csv'), tmp_path / 'best.csv', top_k=3)
  predict.predict(config, workdir, store, request)
  with (tmp_path / 'best.csv').open() as file:
    assert {'score', 'probability', 'rank'} <= {*next(csv.DictReader(file))}


def test_predictions_refuse_an_input_with_such_columns(run, tmp_path, one_device):
  config, workdir, store, _ = run
  (tmp_path / 'pairs.csv').write_text('user,item,score.order\nu1,i3,1\n')
  request = predict.Request(str(tmp_path / 'pairs.csv'), tmp_path / 'scores.csv')
  with pytest.raises(UserError, match="adds a column of the name 'score.order'"):
    predict.predict(config, workdir, store, request)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(criterion='auc'), "config.criterion='auc' is unknown; .*click/auc"),
    (dict(model=dict(label_head='moe')), "config.model.label_head='moe' is unknown"),
    (dict(model=dict(experts=0)), 'config.model.experts=0 must be at least 1'),
    (dict(model=dict(tower=(0,))), r'config.model.tower=\(0,\) must be whole numbers from 1 on'),
    (dict(model=dict(label_weights=(1.0,))), 'must have a number for each label, 2'),
    (dict(model=dict(label_weights=(1.0, -1.0))), 'must be numbers of at least 0'),
    (dict(model=dict(label_weights=('1', '2'))), 'must be numbers of at least 0'),
    (dict(model=dict(tower=('x',))), 'must be whole numbers from 1 on'),
    (dict(model=dict(tuned=(1,))), 'must be a tuple of texts'),
    (dict(data=dict(labels=('click',))), "label_head='mmoe' is not read: there is one label; name"),
  ],
)
def test_wrong_fields_are_refused(tmp_path, fields, message):
  config = config_of(tmp_path)
  for name, value in fields.items():
    if isinstance(value, dict):
      config[name].update(value)
    else:
      config[name] = value
  with pytest.raises(UserError, match=message) as error:
    setups.check(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('field, value', [('weight', 'price'), ('labels', LABELS)])
def test_next_items_have_neither_weights_nor_labels(field, value):
  config = configs.base('sasrec', 'next_item')
  config.data[field] = value
  with pytest.raises(UserError, match=f"config.data.{field}=.* is for config.task='click'"):
    setups.check(config)


def test_a_label_without_both_classes_in_validation_has_no_criterion(tmp_path, one_device):
  write_log(tmp_path / 'log.csv')
  rows = (tmp_path / 'log.csv').read_text().splitlines()
  cut = [','.join([*row.split(',')[:4], '0', '1']) for row in rows[1100:]]
  (tmp_path / 'log.csv').write_text('\n'.join(rows[:1100] + cut) + '\n')
  config = config_of(tmp_path)
  store = prepare.prepare(config.data, tmp_path / 'stores')
  with pytest.raises(UserError, match="has 0 clicks in 150 examples of the label 'order', so it"):
    setups.set_up(config, store)
  config.criterion = ''
  assert setups.set_up(config, store).sources


@pytest.mark.parametrize('loss', ['pairwise', 'jrc'])
def test_targets_of_a_request_have_labels_and_weights(run, one_device, loss):
  """The loss within groups compares the targets of a request, label by label."""
  config, _, store, _ = run
  config = config.copy_and_resolve_references()
  config.update(dict(targets_per_request=4, stale_events=100))
  config.model.loss = loss
  setup = setups.set_up(config, store)
  batch = setup.sources['train'][0]
  assert batch['label'].shape == (32, 4, 2) and np.isnan(batch['label'][..., 1]).any()
  assert set(np.unique(batch['weight'])) == {0, 1, 2}
  state = setup.trainer.init(0)
  state, metrics = setup.trainer.update(state, meshes.place(setup.mesh, batch))
  assert np.isfinite(metrics['loss'])
  for k, name in enumerate(LABELS):
    label = np.where(batch['weight'] > 0, batch['label'][..., k], np.nan)
    both = (label == 1).any(1) & (label == 0).any(1)
    weight = np.where(np.isnan(label), 0, batch['weight'])
    share = weight[both].sum() / weight.sum()
    assert float(metrics[f'{name}/grouped']) == pytest.approx(share, rel=1e-5) and share > 0.3
