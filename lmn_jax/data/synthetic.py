"""Generated logs with planted structure, so that a test can show that a memory helps.

The first log is a stand-in for the private Douyin e-commerce search log of the LMN paper. It has
nothing in common with it but the columns: users with profiles, items with categories, search
queries, impressions with clicks, time. What drives a click is planted:

    logit p(click) = bias + quality_i + recent * [category_i in recent_u(t)]
                     + lasting * [category_i in lasting_u] + shared * [i in shared_g(u)]

    recent   a temporary interest of a user. It changes every few dozen impressions, so that the
             window of newest clicks shows it: the interest that Pooling sees and DIN sees better.
    lasting  a user's own interests, searched for only in the first part of the log: later their
             clicks have left the window, and only a memory of the user still has them.
    shared   single items that the user's hidden group likes, whatever their category: the clicks of
             one user of a group are evidence for all, and only a table of (group, item) has it all.

`generate` makes that log. `generate_long` makes one with long histories, so that a test can show
that a longer history helps: the newest events carry no signal, and the events that do are
thousands of events back. `generate_interests` makes one for the next item, whose signal is in no
short window.
"""

import numpy as np
import pyarrow as pa

from lmn_jax.data.synthetic_interests import generate_interests
from lmn_jax.data.synthetic_tables import DAY, HOUR, START, check_size, item_table, texts

AGES = ('18-23', '24-30', '31-40', '41-50', '51+')
CITIES = 30


def generate(
  *,
  seed: int = 0,
  users: int = 1_000,
  items: int = 500,
  categories: int = 40,
  groups: int = 20,
  impressions: int = 800,
  days: int = 90,
  bias: float = -2.2,
  quality: float = 0.4,
  recent: float = 2.0,
  lasting: float = 1.0,
  shared: float = 2.5,
  recent_span: int = 60,
  lasting_until: float = 0.4,
  liked: float = 0.2,
  known: float = 1.0,
) -> dict[str, pa.Table]:
  """Generates the stand-in log.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, items, categories, groups: the number of each.
    impressions: mean number of a user; users differ by a factor of about three.
    days: length of the log.
    bias: log-odds of a click without any interest.
    quality: standard deviation of the items' own log-odds.
    recent, lasting, shared: log-odds that the three kinds of interest add.
    recent_span: impressions after which a temporary interest changes.
    lasting_until: share of a user's impressions after which lasting interests are not searched for.
    liked: share of the items that a group likes.
    known: chance that a field of a profile is the typical one of the user's group, and not any.

  Returns:
    'log': user, item, query (text), time (int64 seconds), label (int8), probability (float32, the
    true one: the ceiling of any model; no config maps it). 'users': user, age, gender, city.
    'items': item, category.

  Raises:
    UserError: a size is too small to plant the structure.
  """
  sizes = dict(groups=groups, impressions=impressions, days=days, recent_span=recent_span)
  _check_clicks(users, items, categories, sizes)
  rng = np.random.default_rng(seed)
  quality_I = rng.normal(0, quality, items)
  group_U, profiles = _profiles(rng, users, groups, known)
  shared_GI = rng.random((groups, items)) < liked
  lasting_UC = rng.random((users, categories)) < 5 / categories  # sets of categories
  user_E, share_E, recent_E2 = _impressions(rng, users, impressions, categories, recent_span)
  searched_E = _searches(rng, user_E, share_E < lasting_until, recent_E2, lasting_UC)
  query_E = searched_E * 3 + rng.integers(0, 3, len(searched_E))
  item_E = _shown_items(rng, searched_E, items, categories)
  category_E = item_E % categories
  logit_E = bias + quality_I[item_E] + recent * (recent_E2 == category_E[:, None]).any(1)
  logit_E = logit_E + lasting * lasting_UC[user_E, category_E]
  logit_E = logit_E + shared * shared_GI[group_U[user_E], item_E]
  log = _click_log(rng, user_E, item_E, query_E, logit_E, share_E * days * DAY)
  return {'log': log, 'users': profiles, 'items': item_table(items, categories)}


def _check_clicks(users: int, items: int, categories: int, sizes: dict[str, int]) -> None:
  check_size('users', users)
  check_size('items', items, categories, 'categories=')
  for name, value in sizes.items():
    check_size(name, value)
  check_size('categories', categories, 20)


def _profiles(
  rng: np.random.Generator, users: int, groups: int, known: float
) -> tuple[np.ndarray, pa.Table]:
  """The hidden group of each user, and profiles that reveal a part of it."""
  group_U = rng.integers(0, groups, users)
  known_U = rng.random((users, 3)) < known

  def field(column: int, values: int) -> np.ndarray:
    """The value typical of the group for a share `known` of the users, any value for the others."""
    typical_G = rng.integers(0, values, groups)
    return np.where(known_U[:, column], typical_G[group_U], rng.integers(0, values, users))

  age_U, gender_U, city_U = field(0, len(AGES)), field(1, 2), field(2, CITIES)
  columns = {
    'user': texts(np.arange(users)),
    'age': pa.array([AGES[age] for age in age_U]),
    'gender': pa.array(['f' if gender else 'm' for gender in gender_U]),
    'city': texts(city_U),
  }
  return group_U, pa.table(columns)


def _impressions(
  rng: np.random.Generator, users: int, mean: int, categories: int, span: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Impressions user by user, in order of time.

  Returns:
    For each impression: user [E], share of the user's impressions before it [E], and the two
    categories of the current temporary interest [E, 2].
  """
  count_U = np.maximum(1, rng.gamma(4.0, mean / 4.0, users).astype(np.int64))
  user_E = np.repeat(np.arange(users), count_U)
  place_E = np.arange(len(user_E)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
  spans = int(count_U.max()) // span + 1
  recent_US2 = rng.integers(0, categories, (users, spans, 2))
  return user_E, place_E / count_U[user_E], recent_US2[user_E, place_E // span]


def _searches(
  rng: np.random.Generator,
  user_E: np.ndarray,
  early_E: np.ndarray,
  recent_E2: np.ndarray,
  lasting_UC: np.ndarray,
) -> np.ndarray:
  """Searched categories [E]: lasting interests early, temporary ones always, the rest at random."""
  total, categories = len(user_E), lasting_UC.shape[1]
  kind_E = rng.random(total)
  searched_E = rng.integers(0, categories, total)
  is_recent_E = kind_E < 0.35
  searched_E[is_recent_E] = recent_E2[np.arange(total), rng.integers(0, 2, total)][is_recent_E]
  is_lasting_E = (kind_E > 0.35) & (kind_E < np.where(early_E, 0.75, 0.40))
  # A random category of each user's set; any category where the set is empty.
  order_UC = np.argsort(rng.random(lasting_UC.shape) - lasting_UC, axis=1, kind='stable')
  size_E = lasting_UC.sum(1)[user_E]
  index_E = (rng.random(total) * np.maximum(size_E, 1)).astype(np.int64)
  searched_E[is_lasting_E] = order_UC[user_E, index_E][is_lasting_E]
  return searched_E


def _shown_items(
  rng: np.random.Generator, searched_E: np.ndarray, items: int, categories: int
) -> np.ndarray:
  """Items shown for searches [E]: mostly of the searched category, popular ones more often."""
  total = len(searched_E)
  popular_E = (items // categories * rng.beta(1.0, 2.5, total)).astype(np.int64)
  return np.where(
    rng.random(total) < 0.7, searched_E + categories * popular_E, rng.integers(0, items, total)
  )


def _click_log(
  rng: np.random.Generator,
  user_E: np.ndarray,
  item_E: np.ndarray,
  query_E: np.ndarray,
  logit_E: np.ndarray,
  seconds_E: np.ndarray,
) -> pa.Table:
  """The log in order of time; each user's impressions begin at about the given seconds."""
  total = len(user_E)
  probability_E = 1 / (1 + np.exp(-logit_E))
  label_E = rng.random(total) < probability_E
  # Times are whole minutes, so that some are equal.
  time_E = (seconds_E + rng.integers(0, DAY, total)).astype(np.int64) // 60 * 60
  order_E = np.lexsort((np.arange(total), time_E))
  return pa.table(
    {
      'user': texts(user_E[order_E]),
      'item': texts(item_E[order_E]),
      'query': texts(query_E[order_E]),
      'time': pa.array(time_E[order_E] + START),
      'label': pa.array(label_E[order_E].astype(np.int8)),
      'probability': pa.array(probability_E[order_E].astype(np.float32)),
    }
  )


def generate_long(
  *,
  seed: int = 0,
  users: int = 300,
  items: int = 100,
  categories: int = 20,
  length: int = 10_000,
  recent: int = 1_000,
  offers: int = 20,
  weight: float = 4.0,
) -> dict[str, pa.Table]:
  """Generates a log of long histories, whose newest events carry no signal about clicks.

  A coin decides for each user and category whether the user likes it. The user views the liked
  categories one after the other, in stretches of equal length, of which the last one ends before
  the `recent` newest events; these are of any category. Then the user is offered items:

      logit p(click) = weight * (1 if the user likes category_i else -1)

  The newest N events show a share (N - recent) / (length - recent) of what a user likes. So AUC
  grows with the history that a model reads, from .5 at `recent` events to its ceiling at all.
  Nothing else carries a signal: the coins are independent, a user is offered a category at most
  once, and no item is better than another.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, items, categories: the number of each; every category has as many items.
    length: events of each user's history.
    recent: newest events, which are of any category.
    offers: of each user, after the history; each of another category.
    weight: log-odds of a click for a liked category, and against a click for any other.

  Returns:
    'log': user, item, behaviour ('view' an event of the history, 'offer'), time (int64 seconds),
    label (int8; 1 of every view), probability (float32, the true one). 'users': user. 'items':
    item, category.

  Raises:
    UserError: a size is too small to plant the structure.
  """
  _check_long(users, items, categories, length, recent, offers)
  rng = np.random.default_rng(seed)
  likes_UC = rng.random((users, categories)) < 0.5
  viewed_UL = _viewed_categories(rng, likes_UC, length, recent)
  offered_UO = np.argsort(rng.random((users, categories)), axis=1)[:, :offers]
  sign_UO = np.where(np.take_along_axis(likes_UC, offered_UO, axis=1), 1, -1)
  probability_UO = 1 / (1 + np.exp(-weight * sign_UO))
  label_UO = rng.random((users, offers)) < probability_UO
  items_of = items // categories
  view_UL = viewed_UL + categories * rng.integers(0, items_of, viewed_UL.shape)
  offer_UO = offered_UO + categories * rng.integers(0, items_of, offered_UO.shape)
  ones_UL = np.broadcast_to(1, view_UL.shape)
  log = [
    _behaviour_log('view', 0, view_UL, ones_UL, ones_UL),
    _behaviour_log('offer', length, offer_UO, label_UO, probability_UO),
  ]
  tables = {'log': pa.concat_tables(log), 'users': pa.table({'user': texts(np.arange(users))})}
  return tables | {'items': item_table(items, categories)}


def _check_long(
  users: int, items: int, categories: int, length: int, recent: int, offers: int
) -> None:
  check_size('users', users)
  check_size('items', items, categories, 'categories=')
  check_size('categories', categories, 20)  # with fewer, a user might like none
  check_size('recent', recent, 0)
  check_size('length', length, recent + categories, 'recent + categories=')
  check_size('offers', offers)
  check_size('categories', categories, offers, 'offers=')


def _viewed_categories(
  rng: np.random.Generator, likes_UC: np.ndarray, length: int, recent: int
) -> np.ndarray:
  """The category of each event [U, L]: stretches of the liked ones, then `recent` of any."""
  users, categories = likes_UC.shape
  # The liked categories of each user in the order of their stretches, then the others.
  order_UC = np.argsort(rng.random((users, categories)) - likes_UC, axis=1)
  far = length - recent
  stretch_UF = np.arange(far) * likes_UC.sum(1, keepdims=True) // far
  viewed_UL = rng.integers(0, categories, (users, length))
  viewed_UL[:, :far] = np.take_along_axis(order_UC, stretch_UF, axis=1)
  return viewed_UL


def _behaviour_log(
  behaviour: str,
  first: int,
  item_UN: np.ndarray,
  label_UN: np.ndarray,
  probability_UN: np.ndarray,
) -> pa.Table:
  """Rows of one behaviour for every user, at the hours first, first + 1, ..."""
  users, N = item_UN.shape
  return pa.table(
    {
      'user': texts(np.repeat(np.arange(users), N)),
      'item': texts(item_UN.ravel()),
      'behaviour': pa.repeat(behaviour, users * N),
      'time': pa.array(np.tile(START + HOUR * (first + np.arange(N)), users)),
      'label': pa.array(label_UN.ravel().astype(np.int8)),
      'probability': pa.array(probability_UN.ravel().astype(np.float32)),
    }
  )


# The generated logs, by the `source` of a config.
LOGS = {
  'synthetic': generate,
  'synthetic:long': generate_long,
  'synthetic:interests': generate_interests,
}
