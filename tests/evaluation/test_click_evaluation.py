"""Scores and metrics of a split equal those of a plain loop over its examples."""

import functools

import numpy as np
import pytest

from lmn_jax.data.batches import BatchSource
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import baselines, click_evaluation, click_metrics
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.training import feed, program
from lmn_jax.training import setup as setups
from lmn_jax.training.trainer import compile_program
from tests.runs import but_slow, mesh_of, tiny_config

LENGTH = 8


def source(store, split, size, rows=None):
  return BatchSource(store.path, split, size, LENGTH, rows=rows)


def make(store, batch_size, mesh):
  config = tiny_config('din')
  schema = Schema(tuple(store.vocabulary.items()), **store.features)
  model = registry.build(config.model.to_dict(), schema)
  return compile_program(program.make(config, model, source(store, 'test', batch_size)[0], mesh))


@pytest.fixture(scope='module')
def plain(tiny_store):
  """Logit, label, user, item and history of each test example, scored alone on one device."""
  trainer, single = make(tiny_store, 1, mesh_of(1)), source(tiny_store, 'test', 1)
  state, rows = trainer.init(0), []
  for k in range(len(single)):
    batch = single[k]
    logit = float(trainer.predict(state, meshes.place(mesh_of(1), batch))[0])
    rows.append([logit, *(batch[x][0] for x in ('label', 'user_index', 'item', 'total'))])
  return [np.array(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize('shape, size', but_slow([((1, 1), 64), ((8, 1), 64), ((4, 2), 16)], {2}))
def test_scores_equal_a_plain_loop(tiny_store, plain, shape, size):
  """With filler in the last batch, also on meshes with a model axis."""
  assert tiny_store.examples['test'] % size
  mesh = mesh_of(*shape)
  trainer = make(tiny_store, size, mesh)
  predict = functools.partial(trainer.predict, trainer.init(0))
  test = source(tiny_store, 'test', size)
  scores = click_evaluation.score(predict, feed.held_out(test, None, mesh), test.examples)
  assert scores.shape == plain[0].shape
  np.testing.assert_allclose(scores, plain[0], atol=1e-6)


def test_examples_equal_those_of_the_batches(tiny_store, plain):
  assert len(tiny_store.parts) > 1
  examples = click_evaluation.examples_of(tiny_store, 'test')
  for column, reference in zip(
    (examples.label, examples.user, examples.item, examples.total), plain[1:], strict=True
  ):
    np.testing.assert_array_equal(column, reference)


def test_metrics_are_computed_over_the_whole_split(tiny_store, plain):
  """The AUC equals that of all pairs, and not the average over batches."""
  logit, label = plain[0].astype(np.float32), plain[1]
  examples = click_evaluation.examples_of(tiny_store, 'test')
  overall = click_evaluation.report(examples, logit, (10,))['overall']
  margins = logit[label == 1][:, None] - logit[label == 0][None]
  auc = ((margins > 0) + (margins == 0) / 2).mean()
  assert overall['auc'] == pytest.approx(auc)
  size = len(label) // 4
  batches = [
    click_metrics.auc(label[k : k + size], logit[k : k + size]) for k in range(0, 4 * size, size)
  ]
  assert abs(np.mean(batches) - auc) > 1e-3  # so the test can distinguish the two
  assert overall['rows'] == len(label) and overall['clicks'] == label.sum()


def test_hosts_split_a_batch_in_the_order_of_the_store(tiny_store):
  """`score` relies on it: the logits of all hosts are in the order of the store."""
  parts = [source(tiny_store, 'test', 64, rows) for rows in np.split(np.arange(64), 2)]
  items = [part[k]['item'] for k in range(parts[0].batches) for part in parts]
  expected = click_evaluation.examples_of(tiny_store, 'test').item
  np.testing.assert_array_equal(np.concatenate(items)[: len(expected)], expected)


def test_baselines_use_only_the_training_examples(tiny_store):
  clicks = {}
  single = source(tiny_store, 'train', 1)
  for k in range(len(single)):
    batch = single[k]
    clicks[batch['item'][0]] = clicks.get(batch['item'][0], 0.0) + float(batch['label'][0])
  examples = click_evaluation.examples_of(tiny_store, 'test')
  reports = click_evaluation.report_baselines(
    click_evaluation.count_training(tiny_store), examples, (10,)
  )
  want = click_metrics.auc(examples.label, np.array([clicks.get(x, 0.0) for x in examples.item]))
  assert reports['popularity']['overall']['auc'] == pytest.approx(want)
  assert set(reports) == set(baselines.BASELINES['click'])
  assert reports['item_mean']['overall']['log_loss'] is None


def test_health_reports_usage_and_the_largest_value(tiny_store):
  config = tiny_config('lmn')
  setup = setups.set_up(config, tiny_store)
  state = setup.trainer.init(0)
  start = click_evaluation.health(state.tables, setup.model.tables())
  assert start == {
    'memory/ever': 0.0, 'memory/dead': 1.0, 'memory/kl': 0.0, 'memory/entropy': 1.0,
    'memory/largest': pytest.approx(np.abs(state.tables['memory'].rows_RD).max()),
  }  # fmt: skip
  table = state.tables['memory']
  table = table._replace(rows_RD=table.rows_RD.at[3, 1].set(-7e30))
  reads = np.zeros(table.reads_R.shape, np.int32)
  reads[:4] = 5
  state = state._replace(
    tables=state.tables | {'memory': table._replace(reads_R=reads, ever_R=reads > 0)}
  )
  health = click_evaluation.health(state.tables, setup.model.tables())
  assert health == {
    'memory/ever': 1 / 16, 'memory/dead': 15 / 16, 'memory/kl': pytest.approx(np.log(16)),
    'memory/entropy': pytest.approx(np.log(4) / np.log(64)), 'memory/largest': np.float32(7e30),
  }  # fmt: skip
