"""Leaks: on logs of pure noise every score has an AUC of .5.

There is a leak if the label of an example can be predicted from the way in which the example was
made. Logs of noise are drawn with all settings of sampling, vocabulary, splits and histories; every
score that a model could learn must have an AUC of .5 within its standard error.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import event, make_store

from lmn_jax import config as configs
from lmn_jax.data.splits import PROTOCOLS, SPLITS
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.training import loop

ERRORS = 4.5  # the bound in standard errors; a run makes a few hundred comparisons


def noise(
  seed: int, rows: int, users: int, items: int, times: int, labelled: bool, copied: float,
  history: str,
) -> list[dict]:  # fmt: skip
  """Returns rows of users, items, times, labels and a context, drawn independently and uniformly.

  copied: the share of the rows that are in the log twice.
  """
  rng = np.random.default_rng(seed)
  user, item = rng.integers(users, size=rows), rng.integers(items, size=rows)
  time, split = rng.integers(times, size=rows), rng.integers(len(SPLITS), size=rows)
  label = rng.random(rows) < 0.3 if labelled else np.ones(rows)
  query = rng.integers(9, size=rows)
  order = np.sort(np.r_[np.arange(rows), np.flatnonzero(rng.random(rows) < copied)])
  return [
    event(
      number, f'u{user[k]}', f'i{item[k]}', int(time[k]), label[k],
      history=bool(label[k]) or history == 'all', split=int(split[k]), query=f'q{query[k]}',
    )
    for number, k in enumerate(order)
  ]  # fmt: skip


def columns(store: Store, split: str) -> dict[str, np.ndarray]:
  """Returns the examples of a split, with the occurrences of their items in their histories."""
  columns = {name: [] for name in ('user', 'item', 'label', 'time', 'end', 'context.query')}
  count, is_newest, position = [], [], []
  for part in store.parts:
    span = slice(*part.bounds[split])
    for name, pieces in columns.items():
      pieces.append(part.examples[name][span] + (part.first if name == 'user' else 0))
    examples = zip(*(part.examples[name][span] for name in ('user', 'item', 'end')), strict=True)
    for user, item, end in examples:
      first = part.users['offset'][user]
      history = part.history['item'][first : first + end]
      places = np.flatnonzero(history == item)
      count.append(len(places))
      is_newest.append(end and history[-1] == item)
      position.append(places[-1] - end if len(places) else -(10**6))
  occurrences = dict(count=count, is_newest=is_newest, position=position)
  return {name: np.concatenate(pieces) for name, pieces in columns.items()} | {
    name: np.array(values) for name, values in occurrences.items()
  }


def means(train: dict, examples: dict, *names: str) -> dict[str, np.ndarray]:
  """Returns counts, clicks and mean label of the training examples with equal columns `names`."""

  def key_of(x):
    return sum(x[name].astype(np.int64) * 10**6**k for k, name in enumerate(names))

  keys, group = np.unique(key_of(train), return_inverse=True)
  count, clicks = np.bincount(group), np.bincount(group, train['label'])
  place = np.minimum(np.searchsorted(keys, key_of(examples)), len(keys) - 1)
  exists = keys[place] == key_of(examples)
  mean = np.where(exists, clicks[place] / count[place], train['label'].mean())
  group_name = ' and '.join(names)
  return {
    f'training examples of the {group_name}': exists * count[place],
    f'clicks of the {group_name}': exists * clicks[place],
    f'mean of the {group_name}': mean,
  }


def scores(store: Store, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the labels of a split, and all scores of its examples that a model could learn."""
  train, examples = columns(store, 'train'), columns(store, split)
  by_name = {
    'item is in the vocabulary': examples['item'] > 0,
    'item is in the history': examples['count'] > 0,
    'occurrences of the item in the history': examples['count'],
    'item is the newest event': examples['is_newest'],
    'position of the item in the history': examples['position'],
    'item is in the vocabulary and the history': (examples['item'] > 0) & (examples['count'] > 0),
    'length of the history': examples['end'],
    'time': examples['time'],
    'order in the split': np.arange(len(examples['item'])),
  }
  for names in (('item',), ('user',), ('context.query',), ('user', 'item')):
    by_name |= means(train, examples, *names)
  # Relative to the user, because an order within users hardly shows between users.
  user = examples['user']
  total, count = (np.bincount(user, x) for x in (examples['time'], None))
  by_name['time, within the user'] = examples['time'] - (total / np.maximum(count, 1))[user]
  return examples['label'], by_name


def auc_and_error(label: np.ndarray, score: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
  """Returns the AUC, and its standard error if examples are correlated within clusters.

  The examples of a user share a history and the negatives that can be drawn: DeLong's placements,
  summed by cluster (Obuchowski 1997).
  """
  clicks, rest = np.sort(score[label > 0]), np.sort(score[label == 0])

  def share_below(x, values):
    counts = (np.searchsorted(values, x, side) for side in ('left', 'right'))
    return sum(counts) / (2 * len(values))

  auc = share_below(clicks, rest).mean()
  shift = np.where(
    label > 0,
    (share_below(score, rest) - auc) / len(clicks),
    (1 - share_below(score, clicks) - auc) / len(rest),
  )
  return auc, np.sqrt(np.sum(np.bincount(cluster, shift) ** 2))


def check_noise(path: Path, rows: list[dict], fields: dict) -> int:
  """Checks every score of a store's splits; returns the number of splits with enough examples."""
  try:
    store = make_store(path, rows, **fields, context_features=('query',))
  except UserError as error:
    assert 'left for training' in str(error)
    return 0
  compared = 0
  for split in ('valid', 'test'):
    if not store.examples[split]:
      continue
    label, by_name = scores(store, split)
    clicks, rest = int(label.sum()), int((1 - label).sum())
    if min(clicks, rest) < 20:
      continue
    compared += 1
    independent = np.sqrt((clicks + rest + 1) / (12 * clicks * rest))
    user = columns(store, split)['user']
    for name, score in by_name.items():
      auc, error = auc_and_error(label, score.astype(np.float64), user)
      error = max(error, independent)
      assert abs(auc - 0.5) < ERRORS * error, (
        f'{split}: AUC {auc:.4f} by {name!r} in {clicks} clicks of {clicks + rest} examples, '
        f'{abs(auc - 0.5) / error:.1f} standard errors from .5'
      )
  return compared


LOGS = st.fixed_dictionaries(
  dict(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([1500, 4000]),
    users=st.sampled_from([60, 250]),
    items=st.sampled_from([12, 100, 1500]),
    times=st.sampled_from([7, 200, 10**7]),
    labelled=st.booleans(),
    copied=st.sampled_from([0, 0, 0.25]),
    history=st.sampled_from(['positive', 'all']),
  )
)
FIELDS = st.fixed_dictionaries(
  dict(
    negatives=st.sampled_from([0, 1, 1, 3]),
    min_count=st.sampled_from([1, 2, 5, 12]),
    max_history=st.sampled_from([0, 0, 5]),
    rows_per_part=st.sampled_from([700, 2**24]),
    seed=st.integers(0, 99),
  )
)


def any_split(protocol):
  return st.sampled_from([(0.1, 0.1), (0.2, 0.4), (0.0, 0.3)]).map(
    lambda shares: dict(protocol=protocol, valid=shares[0], test=shares[1])
  )


def examine(log: dict, fields: dict, split: dict):
  if log['labelled']:
    log['copied'] = 0  # the label of a copied row is known from the other copy
  else:
    fields['negatives'] = fields['negatives'] or 1
  rows = noise(**log)
  with tempfile.TemporaryDirectory() as folder:
    check_noise(Path(folder) / 'store', rows, dict(fields, split=split))


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_every_score_has_an_auc_of_one_half_on_noise(protocol):
  @settings(max_examples=4)
  @given(LOGS, FIELDS, any_split(protocol))
  def check(log, fields, split):
    examine(log, fields, split)

  check()


@pytest.mark.slow
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_every_score_has_an_auc_of_one_half_on_many_logs_of_noise(protocol):
  @settings(max_examples=40)
  @given(LOGS, FIELDS, any_split(protocol))
  def check(log, fields, split):
    examine(log, fields, split)

  check()


@pytest.mark.slow
@pytest.mark.parametrize('model, min_count, history', [
  ('pooling', 1, 'all'), ('din', 5, 'positive'), ('din', 1, 'positive'), ('din', 5, 'all'),
])  # fmt: skip
def test_models_have_an_auc_of_one_half_on_noise(tmp_path, model, min_count, history):
  """After many epochs, with repeated items in the histories, a model would use every leak."""
  log = dict(users=150, items=300, times=10**7, labelled=False, copied=0, history=history)
  store = make_store(
    tmp_path / 'store', noise(1, 4000, **log), negatives=1, min_count=min_count,
    context_features=('query',), split=dict(protocol='user_ratio', valid=0.2, test=0.3),
  )  # fmt: skip
  config = configs.base(model)
  config.update(dict(steps=300, eval_every=300, save_every=300, history_length=20, batch_size=256))
  config.data.split.update(dict(protocol='user_ratio', valid=0.2, test=0.3))
  report = loop.train(config, tmp_path / 'run', store)
  for split in ('valid', 'test'):
    clicks = store.manifest['counts']['clicks'][split]
    error = np.sqrt((2 * clicks + 1) / (12 * clicks**2))
    for metrics in (report[split], *report['baselines'][split].values()):
      assert abs(metrics['overall']['auc'] - 0.5) < ERRORS * error


def test_max_history_does_not_reveal_the_label(tmp_path):
  """If only positives counted as events, a positive would shorten its own history."""
  log = dict(users=250, items=12, times=10**7, labelled=True, copied=0, history='positive')
  split = dict(protocol='user_ratio', valid=0.0, test=0.3)
  assert check_noise(tmp_path / 'store', noise(0, 4000, **log), dict(max_history=5, split=split))
