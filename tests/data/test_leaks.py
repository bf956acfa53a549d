"""Noise stays noise: on a log of which nothing can be learnt no score is worth anything.

An example whose label can be told from how it was made is a leak. Logs of pure noise are drawn over
all settings of sampling, vocabulary, splits and histories; every score that a model could learn has
an AUC of .5 within its error.
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

ERRORS = 4.5  # standard errors; a run compares a few hundred


def noise(
  seed: int, rows: int, users: int, items: int, times: int, labelled: bool, copied: float,
  history: str,
) -> list[dict]:  # fmt: skip
  """Users, items, times, labels and a context, each drawn alone and uniformly.

  copied: share of the rows that are in the log twice.
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
  """The examples of a split, with what their histories show of their items."""
  found = {name: [] for name in ('user', 'item', 'label', 'time', 'end', 'context.query')}
  met, newest, again = [], [], []
  for part in store.parts:
    own = slice(*part.bounds[split])
    for name, pieces in found.items():
      pieces.append(part.examples[name][own] + (part.first if name == 'user' else 0))
    asked = zip(*(part.examples[name][own] for name in ('user', 'item', 'end')), strict=True)
    for user, item, end in asked:
      first = part.users['offset'][user]
      before = part.history['item'][first : first + end]
      at = np.flatnonzero(before == item)
      met.append(len(at))
      newest.append(end and before[-1] == item)
      again.append(at[-1] - end if len(at) else -(10**6))
  joined = {name: np.concatenate(pieces) for name, pieces in found.items()}
  return joined | dict(met=np.array(met), newest=np.array(newest), again=np.array(again))


def means(train: dict, wanted: dict, *names: str) -> dict[str, np.ndarray]:
  """Of the training examples alike in some columns: how many, their clicks, their mean label."""

  def key_of(x):
    return sum(x[name].astype(np.int64) * 10**6**k for k, name in enumerate(names))

  keys, which = np.unique(key_of(train), return_inverse=True)
  shown, clicks = np.bincount(which), np.bincount(which, train['label'])
  at = np.minimum(np.searchsorted(keys, key_of(wanted)), len(keys) - 1)
  there = keys[at] == key_of(wanted)
  mean = np.where(there, clicks[at] / shown[at], train['label'].mean())
  what = ' and '.join(names)
  return {
    f'training examples of the {what}': there * shown[at],
    f'clicks of the {what}': there * clicks[at],
    f'mean of the {what}': mean,
  }


def scores(store: Store, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Labels of a split, and what a model could learn to tell of its examples."""
  train, own = columns(store, 'train'), columns(store, split)
  made = {
    'item is known': own['item'] > 0,
    'item was met': own['met'] > 0,
    'times the item was met': own['met'],
    'item was the newest event': own['newest'],
    'how long ago the item was met': own['again'],
    'known, of those met': (own['item'] > 0) & (own['met'] > 0),
    'length of the history': own['end'],
    'time': own['time'],
    'order in the split': np.arange(len(own['item'])),
  }
  for names in (('item',), ('user',), ('context.query',), ('user', 'item')):
    made |= means(train, own, *names)
  # Within a user, for what is told by a user's own order is small between users.
  total, count = (np.bincount(own['user'], x) for x in (own['time'], None))
  made['time, within the user'] = own['time'] - (total / np.maximum(count, 1))[own['user']]
  return own['label'], made


def auc_and_error(label: np.ndarray, score: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
  """The AUC, and its standard error where examples hang together in clusters.

  The examples of one user share a history, and what can be drawn for them: DeLong's placements,
  summed by cluster (Obuchowski 1997).
  """
  clicks, rest = np.sort(score[label > 0]), np.sort(score[label == 0])

  def below(x, among):
    both = (np.searchsorted(among, x, side) for side in ('left', 'right'))
    return sum(both) / (2 * len(among))

  found = below(clicks, rest).mean()
  shift = np.where(
    label > 0,
    (below(score, rest) - found) / len(clicks),
    (1 - below(score, clicks) - found) / len(rest),
  )
  return found, np.sqrt(np.sum(np.bincount(cluster, shift) ** 2))


def check_noise(path: Path, rows: list[dict], fields: dict) -> int:
  """Compares every score of a store's splits; returns how many splits had both classes."""
  try:
    store = make_store(path, rows, **fields, context_features=('query',))
  except UserError as error:
    assert 'left for training' in str(error)
    return 0
  compared = 0
  for split in ('valid', 'test'):
    if not store.examples[split]:
      continue
    label, made = scores(store, split)
    clicks, rest = int(label.sum()), int((1 - label).sum())
    if min(clicks, rest) < 20:
      continue
    compared += 1
    independent = np.sqrt((clicks + rest + 1) / (12 * clicks * rest))
    user = columns(store, split)['user']
    for name, score in made.items():
      found, error = auc_and_error(label, score.astype(np.float64), user)
      error = max(error, independent)
      assert abs(found - 0.5) < ERRORS * error, (
        f'{split}: AUC {found:.4f} by {name!r} in {clicks} clicks of {clicks + rest} examples, '
        f'{abs(found - 0.5) / error:.1f} standard errors from .5'
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
    log['copied'] = 0  # a copy's label is known from its twin, which is no noise
  else:
    fields['negatives'] = fields['negatives'] or 1
  rows = noise(**log)
  with tempfile.TemporaryDirectory() as folder:
    check_noise(Path(folder) / 'store', rows, dict(fields, split=split))


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_no_score_is_worth_anything_on_noise(protocol):
  @settings(max_examples=4)
  @given(LOGS, FIELDS, any_split(protocol))
  def some(log, fields, split):
    examine(log, fields, split)

  some()


@pytest.mark.slow
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_no_score_is_worth_anything_on_more_noise(protocol):
  @settings(max_examples=100)
  @given(LOGS, FIELDS, any_split(protocol))
  def many(log, fields, split):
    examine(log, fields, split)

  many()


@pytest.mark.slow
@pytest.mark.parametrize('model', ['pooling', 'din'])
@pytest.mark.parametrize('min_count', [1, 5])
@pytest.mark.parametrize('history', ['positive', 'all'])
def test_no_model_learns_anything_of_noise(tmp_path, model, min_count, history):
  """Trained over many epochs, with repeats in the histories: what can be learnt is."""
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
    for found in (report[split], *report['baselines'][split].values()):
      assert abs(found['overall']['auc'] - 0.5) < ERRORS * error


def test_a_cut_history_does_not_tell_the_label(tmp_path):
  """Counted over the positives alone, a positive takes a place from its own history."""
  log = dict(users=250, items=12, times=10**7, labelled=True, copied=0, history='positive')
  split = dict(protocol='user_ratio', valid=0.0, test=0.3)
  assert check_noise(tmp_path / 'store', noise(0, 4000, **log), dict(max_history=5, split=split))
