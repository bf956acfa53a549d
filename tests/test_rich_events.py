"""Whole runs on logs whose events have features, numbers and times: what they say is learnt."""

import csv

import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.errors import UserError
from lmn_jax.training import loop
from lmn_jax.training import setup as setups
from tests.runs import mesh_of

HOUR = 3600
SPLIT = dict(protocol='user_ratio', valid=0.2, test=0.2)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))


def written(path, columns, rows):
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([columns, *rows])
  return str(path)


def click_log(path, users=60, rows=50):
  """A click follows the click before within an hour, or an event with a long dwell time.

  Neither the user nor an item says anything.
  """
  rng, lines = np.random.default_rng(0), []
  for user in range(users):
    time, dwell = 1_600_000_000 + int(rng.integers(10**6)), 0.0
    for _ in range(rows):
      soon = bool(rng.random() < 0.5)
      time += int(rng.integers(1, HOUR) if soon else rng.integers(10 * HOUR, 90 * HOUR))
      label = int(soon == (dwell > 30))
      dwell = float(rng.exponential(5) if rng.random() < 0.5 else 60 + rng.exponential(60))
      price = '' if rng.random() < 0.1 else f'{rng.gamma(2, 10):.2f}'
      lines.append((f'u{user}', f'i{rng.integers(30)}', time, label, f'{dwell:.1f}', price))
  return written(path, ('user', 'item', 'time', 'label', 'dwell', 'price'), lines)


def click_config(folder, model, **fields):
  config = configs.base(model)
  config.data = configs.data(
    source=click_log(folder / 'log.csv'), name='rich', history='all', split=SPLIT,
    event_features=('dwell',), context_features=('price',),
    numeric={'dwell': 'log', 'price': 'autodis:4'},
  )  # fmt: skip
  config.model.update(dict(width=8, scale=0.3, hidden=(32,)) | fields)
  config.update(
    dict(history_length=1, batch_size=128, eval_batch_size=256, steps=400, eval_every=200,
         save_every=400, log_every=100)
  )  # fmt: skip
  config.optimizer.dense.rate = 1e-2
  return config


def auc_of(config, folder):
  store = prepare.prepare(config.data, folder / 'stores')
  report = loop.train(config, folder / 'run', store)
  return report['test']['overall']['auc']


@pytest.mark.parametrize('time, low, high', [('buckets', 0.9, 1), ('none', 0.4, 0.65)])
def test_clicks_are_learnt_from_dwell_and_time(tmp_path, time, low, high):
  """The label is an exclusive or of both, so without times there is nothing to learn."""
  config = click_config(tmp_path, 'pooling', time=time)
  assert low < auc_of(config, tmp_path) < high


def next_log(path, users=60, rows=40):
  """The kind of an event and whether a day passes determine the next item; items are uniform."""
  rng, lines = np.random.default_rng(0), []
  for user in range(users):
    time, item = 1_600_000_000 + int(rng.integers(10**6)), 0
    for _ in range(rows):
      kind, soon = int(rng.integers(4)), bool(rng.random() < 0.5)
      lines.append((f'u{user}', f'i{item}', time, 'abcd'[kind]))
      time += int(rng.integers(1, HOUR) if soon else rng.integers(24 * HOUR, 90 * HOUR))
      item = 2 * kind + soon
  return written(path, ('user', 'item', 'time', 'kind'), lines)


@pytest.mark.slow
@pytest.mark.parametrize(
  'model, time, low, high',
  [
    ('gru4rec', 'buckets', 0.9, 1.01), ('gru4rec', 'none', 0.3, 0.65),
    ('sasrec', 'buckets', 0.9, 1.01), ('dman', 'buckets', 0.9, 1.01),
    ('sasrec', 'bias', 0.75, 1.01), ('hstu', 'bias', 0.9, 1.01),
  ],
)  # fmt: skip
def test_next_items_are_learnt_from_kind_and_time(tmp_path, model, time, low, high):
  """Without times, one of two items remains: HR@1 is about a half."""
  config = configs.base(model, 'next_item')
  config.data = configs.data(
    source=next_log(tmp_path / 'log.csv'), name='rich', label='', split=SPLIT,
    event_features=('kind',),
  )  # fmt: skip
  config.model.update(width=16, scale=0.3, time=time)
  config.update(
    dict(history_length=8, batch_size=32, eval_batch_size=32, steps=300, eval_every=150,
         save_every=300, log_every=100, ranks=(1,), exclude_seen=False)
  )  # fmt: skip
  config.optimizer.dense.rate = 1e-2
  store = prepare.prepare(config.data, tmp_path / 'stores')
  report = loop.train(config, tmp_path / 'run', store)
  assert low < report['test']['overall']['hr@1'] < high, report['test']['overall']


def test_a_number_is_no_category_of_the_hard_search(tmp_path):
  """Before the log is read."""
  config = configs.base('sim')
  features, numeric = ('price', 'shop', 'age'), {'price': 'log', 'age': 'bins:4'}
  config.data = configs.data(source='log.csv', item_features=features, numeric=numeric)
  config.model.update(search='hard', category='price')
  message = "category='price' is not one of the item features with codes, shop, age; use one of"
  with pytest.raises(UserError, match=message):
    setups.check(config)
