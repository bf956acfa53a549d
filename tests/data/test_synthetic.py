"""Generated logs of long histories: which events carry a signal, and which do not."""

import numpy as np
import pytest

from lmn_jax import config
from lmn_jax.data import prepare, synthetic
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.splits import SPLITS
from lmn_jax.errors import UserError
from lmn_jax.evaluation import click_metrics

SIZES = dict(users=200, items=60, categories=20, length=1_000, recent=200, offers=15)


@pytest.fixture(scope='module')
def log():
  """Categories of the views [U, L]; categories, probabilities and labels of the offers [U, O]."""
  tables = synthetic.generate_long(**SIZES)
  column = {name: tables['log'][name].to_numpy() for name in tables['log'].column_names}
  category_I = tables['items']['category'].to_numpy().astype(int)
  category = category_I[column['item'].astype(int)]
  order = np.lexsort((column['time'], column['user'].astype(int)))
  views, offers = (order[column['behaviour'][order] == name] for name in ('view', 'offer'))
  offered = category, column['probability'], column['label']
  return category[views].reshape(200, -1), *(x[offers].reshape(200, -1) for x in offered)


def test_only_the_far_past_shows_what_a_user_likes(log):
  views_UL, category_UO, probability_UO, _ = log
  assert views_UL.shape == (200, 1_000) and category_UO.shape == (200, 15)
  liked_UO = probability_UO > 0.5

  def auc_of(newest):
    """AUC of liked categories, scored by how often they occur among the newest events."""
    window_UN = views_UL[:, 1_000 - newest :]
    count_UO = (window_UN[:, None] == category_UO[:, :, None]).sum(-1)
    return click_metrics.auc(liked_UO.ravel(), count_UO.ravel())

  auc = [auc_of(newest) for newest in (50, 200, 400, 600, 1_000)]
  # For 3,000 offers the AUC of chance is .500 +- .011.
  assert abs(auc[0] - 0.5) < 0.03 and abs(auc[1] - 0.5) < 0.03
  assert auc[2] > 0.6 and auc[3] > auc[2] + 0.1 and auc[4] > 0.97, auc


def test_other_offers_and_categories_carry_no_signal(log):
  _, category_UO, probability_UO, label_UO = log
  assert set(probability_UO.ravel()) == {np.float32(1 / (1 + np.exp(x))) for x in (-4, 4)}
  # The ceiling: clicks are as likely as the probabilities.
  assert abs(click_metrics.auc(label_UO.ravel(), probability_UO.ravel()) - 0.982) < 0.01
  # No category is offered twice, so a user's click on one offer does not predict another.
  assert all(len(set(row)) == 15 for row in category_UO)
  others_UO = label_UO.sum(1, keepdims=True) - label_UO
  assert abs(click_metrics.auc(label_UO.ravel(), others_UO.ravel()) - 0.5) < 0.04
  shown_C = np.bincount(category_UO.ravel(), minlength=20)
  clicks_C = np.bincount(category_UO.ravel(), label_UO.ravel(), minlength=20)
  # Each category is clicked half of the time, within four standard deviations.
  assert (abs(clicks_C / shown_C - 0.5) < 2 / np.sqrt(shown_C)).all()


def test_equal_seeds_give_equal_logs():
  first, again, other = (synthetic.generate_long(seed=s, **SIZES)['log'] for s in (3, 3, 4))
  assert first.equals(again) and not first.equals(other)


def test_every_offer_has_the_whole_history(tmp_path):
  store = prepare.prepare(config.long_data(**SIZES), tmp_path)
  assert store.examples == {'train': 2_200, 'valid': 200, 'test': 600}
  assert store.manifest['counts']['events'] == 200_000
  for split, n in store.examples.items():
    assert (BatchSource(store.path, split, n, 1_000)[0]['total'] == 1_000).all()


@pytest.mark.parametrize(
  'sizes, message',
  [
    (dict(users=0), 'users=0 must be at least 1'),
    (dict(items=19), 'items=19 must be at least categories=20'),
    (dict(categories=19), 'categories=19 must be at least 20'),
    (dict(categories=20, offers=21), 'categories=20 must be at least offers=21'),
    (dict(recent=-1), 'recent=-1 must be at least 0'),
    (dict(length=219), r'length=219 must be at least recent \+ categories=220'),
  ],
)
def test_sizes_that_are_too_small_are_errors(sizes, message):
  with pytest.raises(UserError, match=f'config.data.synthetic.{message}'):
    synthetic.generate_long(**SIZES | sizes)


def test_an_unknown_generated_log_is_an_error(tmp_path):
  data = config.long_data(**SIZES)
  data.source = 'synthetic:lnog'
  with pytest.raises(UserError, match="config.data.source='synthetic:lnog' is unknown; did you"):
    prepare.prepare(data, tmp_path)


INTERESTS = dict(users=60, goods=50, favourites=5, chatter=30, length=301, block=6, recent=30)


def test_interests_recur_in_the_whole_history_and_targets_are_far_back():
  log = synthetic.generate_interests(**INTERESTS, stay=0.0)['log'].to_pydict()
  item = np.array(log['item'], int).reshape(60, 301)
  split = np.array(log['split']).reshape(60, 301)
  assert {x: (split == x).sum(axis=1).tolist() for x in SPLITS[1:]} == {
    'valid': 60 * [1], 'test': 60 * [1]
  }  # fmt: skip
  assert (split[:, -7] == 'valid').all() and (split[:, -1] == 'test').all()
  # A cue, one of the goods, four of the chatter; the last block has the first two events, and the
  # first block the last five.
  blocks = np.concatenate([np.zeros((60, 1), int), item, np.full((60, 4), 51)], axis=1)
  blocks = blocks.reshape(60, 51, 6)
  assert (blocks[:, :, 0] == 0).all() and (blocks[:, :, 2:] > 50).all() and blocks.max() == 80
  visits = blocks[:, :, 1]
  assert visits.min() == 1 and visits.max() == 50
  gaps = []
  for visit in visits:
    favourites, count = np.unique(visit, return_counts=True)
    assert len(favourites) == 5 and count.min() > 1
    for n in (49, 50):
      earlier = np.flatnonzero(visit[:n] == visit[n])
      gaps.append((n - earlier[-1]) * 6)
      others = [(n - np.flatnonzero(visit[:n] == x)[-1]) * 6 for x in favourites]
      assert gaps[-1] > 30 or gaps[-1] == max(others)
  assert np.mean(np.array(gaps) > 30) > 0.8
  followed = blocks[:, :, 3:-1], blocks[:, :, 4:]
  pairs = np.stack(followed, axis=-1)[:, :-1].reshape(-1, 2)
  most = [np.bincount(pairs[pairs[:, 0] == x, 1]).max() for x in range(51, 81)]
  assert sum(most) / len(pairs) == pytest.approx(0.5 + 0.5 / 30, abs=0.03)


def test_visits_repeat_with_the_chance_of_stay():
  log = synthetic.generate_interests(**INTERESTS, stay=0.6)['log'].to_pydict()
  visits = np.array(log['item'], int).reshape(60, 301)[:, 6::6]
  same = (visits[:, 1:-2] == visits[:, :-3]).mean()
  assert same == pytest.approx(0.6 + 0.4 / 5, abs=0.03)


@pytest.mark.parametrize(
  'sizes, message',
  [
    (dict(favourites=2), 'favourites=2 must be at least 3'),
    (dict(goods=4), 'goods=4 must be at least favourites=5'),
    (dict(block=2), 'block=2 must be at least 3'),
    (dict(length=29), r'length=29 must be at least favourites \* block=30'),
  ],
)
def test_sizes_of_interests_that_are_too_small_are_errors(sizes, message):
  with pytest.raises(UserError, match=f'config.data.synthetic.{message}'):
    synthetic.generate_interests(**INTERESTS | sizes)
