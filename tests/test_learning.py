"""The effects that the synthetic logs contain, with two seeds of small logs.

Short histories: popularity < Pooling < DIN < LMN, and LMN beats its control. experiments/compare.py
makes the comparison of the README, with all seeds and controls; .ci/run fails below its AUC. Long
histories: SAM needs the whole history.
"""

import jax
import pytest

from lmn_jax import config as configs
from lmn_jax.distributed import mesh as meshes
from tests.runs import load_experiment, mesh_of

compare = load_experiment('compare')

# ml_collections loads config files with a deprecated function of Python.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture
def optimised():
  """Compiles long-running programs with optimizations, unlike the other tests."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


def small(model, **fields):
  """Returns a config of 100 k impressions that a model learns in 700 steps."""
  config = configs.base(model)
  config.data = configs.douyin_data(users=200, items=100, categories=20, groups=10, impressions=500)
  config.model.update(dict(scale=0.2) | fields)
  if model != 'pooling':
    config.model.softmax = True
  if model == 'lmn':
    config.model.update(dict(slots_per_axis=64, top_k=8, positions=1, query='axes'))
  config.update(dict(history_length=20, batch_size=256, steps=700, eval_every=700, save_every=700))
  config.optimizer.dense.rate = 4e-3
  config.optimizer.embedding.rate = config.optimizer.memory.rate = 0.15
  return config


@pytest.mark.slow
def test_each_model_learns_more_than_the_one_before(tmp_path, monkeypatch, optimised):
  # Eight devices on two cores are four times slower and give the same tables (test_update.py).
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))
  entries = [
    compare.Entry('pooling', small('pooling')),
    compare.Entry('din', small('din')),
    compare.Entry('lmn', small('lmn')),
    compare.Entry('shuffled', small('lmn', shuffle_user=True)),
  ]
  lines = compare.summarise(compare.run(entries, [0, 1], tmp_path))
  auc = {name: line['auc'][0] for name, line in lines.items()}
  # Runs that differ in rounding alone differ by .005 in AUC, because the best K slots change.
  # Frozen values lose no more on a log this small, so only the full comparison has them.
  for better, worse, margin in (
    ('pooling', 'popularity', 0.05), ('pooling', 'item_user_mean', 0.05), ('din', 'pooling', 0.003),
    ('lmn', 'din', 0), ('lmn', 'shuffled', 0.003),
  ):  # fmt: skip
    assert auc[better] > auc[worse] + margin, auc


def aucs_of_long_log(entries, workdir, tolerance):
  """Returns the AUC of each entry; asserts that baselines and the first entry are at chance."""
  lines = compare.summarise(compare.run(entries, [0], workdir))
  auc = {name: line['auc'][0] for name, line in lines.items()}
  for name in ('popularity', 'item_mean', 'item_user_mean', entries[0].label):
    assert abs(auc[name] - 0.5) < tolerance, auc
  return auc


@pytest.mark.slow
def test_sam_needs_the_whole_of_a_long_history(tmp_path, monkeypatch, optimised):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))

  def entry(length):
    config = configs.base('sam')
    config.data = configs.long_data(users=1500, items=20, length=300, recent=60)
    config.model.update(dict(width=8, scale=0.2))
    config.update(dict(history_length=length, batch_size=128, eval_batch_size=512, steps=300))
    config.update(dict(eval_every=300, save_every=300))
    config.optimizer.dense.rate = 4e-3
    config.optimizer.embedding.rate = 0.15
    return compare.Entry(f'reads {length}', config)

  # The AUC of chance over 6,000 examples is .500 +- .0075.
  auc = aucs_of_long_log([entry(50), entry(300)], tmp_path, 0.03)
  assert auc['reads 300'] > auc['reads 50'] + 0.1, auc
