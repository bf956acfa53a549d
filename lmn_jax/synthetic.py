"""Logs with planted structure, so that "memory helps" is something a test can show.

The log is a stand-in for the private Douyin e-commerce search log of the LMN paper and shares
nothing with it but the columns: users with profiles, items with categories, search queries,
impressions with clicks, time. What drives a click is planted:

    logit p(click) = bias + quality_i + recent * [category_i in recent_u(t)]
                     + lasting * [category_i in lasting_u] + shared * [i in shared_g(u)]

    recent   a user's passing interest; it changes every few dozen impressions, so that the window
             of newest clicks shows it: what Pooling sees and DIN sees better.
    lasting  a user's own interests, searched for in the first part of the log only: later their
             clicks have left the window, and only a memory of the user still has them.
    shared   single items that the user's hidden group likes, whatever their category: what one
             user of a group clicks tells of all, and only a table of (group, item) knows it all.

`generate` makes that log. `generate_long` makes one for long histories, so that "longer helps" is
a test as well: its newest events tell nothing, and what tells lies thousands of events back.
"""

import numpy as np
import pyarrow as pa

from lmn_jax.errors import UserError

AGES = ('18-23', '24-30', '31-40', '41-50', '51+')
START, HOUR, DAY = 1_700_000_000, 3_600, 86_400  # seconds


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
  """Makes a log.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, items, categories, groups: how many there are.
    impressions: mean number of impressions of a user; users differ by a factor of about three.
    days: length of the log.
    bias: log-odds of a click without any interest.
    quality: standard deviation of the items' own log-odds.
    recent, lasting, shared: log-odds added by the three kinds of interest.
    recent_span: impressions after which a passing interest changes.
    lasting_until: share of a user's impressions after which lasting interests are no longer
      searched for.
    liked: share of the items that a group likes.
    known: chance that a field of a user's profile is the one typical of the user's group, and not
      any.

  Returns:
    'log': user, item, query (text), time (int64 seconds), label (int8), probability (float32, the
    true one: the ceiling of any model; no config maps it). 'users': user, age, gender, city.
    'items': item, category.

  Raises:
    UserError: if a size is too small to plant the structure.
  """
  _check('users', users)
  _check('items', items, categories, 'categories=')
  _check('groups', groups)
  _check('impressions', impressions)
  _check('days', days)
  _check('categories', categories, 20)
  _check('recent_span', recent_span)
  rng = np.random.default_rng(seed)

  # Items: each category has its own, of which the first ones are shown most.
  category_I = np.arange(items) % categories
  quality_I = rng.normal(0, quality, items)
  per_category = items // categories

  # Users: a hidden group, of which the profile tells a little.
  group_U = rng.integers(0, groups, users)
  known_U = rng.random((users, 3)) < known

  def profile(column, values):
    """A share `known` of the users have the value typical of their group, the others any."""
    typical_G = rng.integers(0, values, groups)
    return np.where(known_U[:, column], typical_G[group_U], rng.integers(0, values, users))

  age_U, gender_U, city_U = profile(0, len(AGES)), profile(1, 2), profile(2, 30)

  # Interests, as sets of categories.
  shared_GI = rng.random((groups, items)) < liked
  lasting_UC = rng.random((users, categories)) < 5 / categories

  # Impressions, user by user and in time order within each.
  count_U = np.maximum(1, rng.gamma(4.0, impressions / 4.0, users).astype(np.int64))
  user_E = np.repeat(np.arange(users), count_U)
  place_E = np.arange(len(user_E)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
  share_E = place_E / count_U[user_E]
  total = len(user_E)

  # A passing interest: two categories for every span of impressions.
  spans = int(count_U.max()) // recent_span + 1
  recent_US2 = rng.integers(0, categories, (users, spans, 2))
  recent_E2 = recent_US2[user_E, place_E // recent_span]

  def pick(member_RC, row_E):
    """A random member category of each row's set; any category where the set is empty."""
    order_RC = np.argsort(rng.random(member_RC.shape) - member_RC, axis=1, kind='stable')
    size_E = member_RC.sum(1)[row_E]
    index_E = (rng.random(total) * np.maximum(size_E, 1)).astype(np.int64)
    return order_RC[row_E, index_E]

  # What is searched for: lasting interests early, passing ones all along, the rest at random.
  kind_E = rng.random(total)
  early_E = share_E < lasting_until
  searched_E = rng.integers(0, categories, total)
  is_recent_E = kind_E < 0.35
  searched_E[is_recent_E] = recent_E2[np.arange(total), rng.integers(0, 2, total)][is_recent_E]
  is_lasting_E = (kind_E > 0.35) & (kind_E < np.where(early_E, 0.75, 0.40))
  searched_E[is_lasting_E] = pick(lasting_UC, user_E)[is_lasting_E]
  query_E = searched_E * 3 + rng.integers(0, 3, total)

  # A query mostly shows items of its category, popular ones more often.
  popular_E = (per_category * rng.beta(1.0, 2.5, total)).astype(np.int64)
  item_E = np.where(
    rng.random(total) < 0.7, searched_E + categories * popular_E, rng.integers(0, items, total)
  )
  shown_E = category_I[item_E]

  logit_E = (
    bias
    + quality_I[item_E]
    + recent * (recent_E2 == shown_E[:, None]).any(1)
    + lasting * lasting_UC[user_E, shown_E]
    + shared * shared_GI[group_U[user_E], item_E]
  )
  probability_E = 1 / (1 + np.exp(-logit_E))
  label_E = rng.random(total) < probability_E

  # Each user's impressions spread over the days; sessions give ties in time.
  time_E = (share_E * days * DAY + rng.integers(0, DAY, total)).astype(np.int64) // 60 * 60
  order_E = np.lexsort((np.arange(total), time_E))
  log = {
    'user': pa.array(user_E[order_E]).cast(pa.string()),
    'item': pa.array(item_E[order_E]).cast(pa.string()),
    'query': pa.array(query_E[order_E]).cast(pa.string()),
    'time': pa.array(time_E[order_E] + START),
    'label': pa.array(label_E[order_E].astype(np.int8)),
    'probability': pa.array(probability_E[order_E].astype(np.float32)),
  }
  return {
    'log': pa.table(log),
    'users': pa.table(
      {
        'user': pa.array(np.arange(users)).cast(pa.string()),
        'age': pa.array([AGES[a] for a in age_U]),
        'gender': pa.array(['f' if g else 'm' for g in gender_U]),
        'city': pa.array(city_U).cast(pa.string()),
      }
    ),
    'items': _item_table(category_I),
  }


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
  """Makes a log of long histories, whose newest events tell nothing of what is clicked.

  A coin says of each user and category whether the user likes it. The liked ones pass through the
  user's history one after the other, in stretches of equal length, the last of which ends before
  the `recent` newest events; these are of any category. Then the user is offered items:

      logit p(click) = weight * (1 if the user likes category_i else -1)

  The newest N events show a share (N - recent) / (length - recent) of what a user likes: AUC grows
  with the history that a model reads, from .5 at `recent` on, and has its ceiling where it reads
  all. Nothing else tells: each coin is tossed for itself, a user is offered a category at most
  once, and no item is better than another.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, categories: how many there are. items: how many there are, alike many of each category.
    length: events of each user's history.
    recent: newest events, which are of any category.
    offers: of each user, after the history; each of another category.
    weight: log-odds of a click for a liked category, and against one for any other.

  Returns:
    'log': user, item, behaviour ('view' an event of the history, 'offer'), time (int64 seconds),
    label (int8; 1 of every view), probability (float32, the true one). 'users': user. 'items':
    item, category.

  Raises:
    UserError: if a size is too small to plant the structure.
  """
  _check('users', users)
  _check('items', items, categories, 'categories=')
  _check('categories', categories, 20)  # with fewer, a user might like none
  _check('recent', recent, 0)
  _check('length', length, recent + categories, 'recent + categories=')
  _check('offers', offers)
  _check('categories', categories, offers, 'offers=')
  rng = np.random.default_rng(seed)
  category_I = np.arange(items) % categories

  def of_category(category):
    """A random item of each category of an array."""
    return category + categories * rng.integers(0, items // categories, category.shape)

  likes_UC = rng.random((users, categories)) < 0.5
  # Of each user the liked categories in the order of their stretches, then the others.
  order_UC = np.argsort(rng.random((users, categories)) - likes_UC, axis=1)

  far = length - recent
  stretch_UF = np.arange(far) * likes_UC.sum(1, keepdims=True) // far
  shown_UL = rng.integers(0, categories, (users, length))
  shown_UL[:, :far] = np.take_along_axis(order_UC, stretch_UF, axis=1)

  offered_UO = np.argsort(rng.random((users, categories)), axis=1)[:, :offers]
  sign_UO = np.where(np.take_along_axis(likes_UC, offered_UO, axis=1), 1, -1)
  probability_UO = 1 / (1 + np.exp(-weight * sign_UO))
  label_UO = rng.random((users, offers)) < probability_UO

  def log(first, item_UN, behaviour, label_UN, probability_UN):
    """Rows of every user at the hours first, first + 1, ..."""
    N = item_UN.shape[1]
    return pa.table(
      {
        'user': pa.array(np.repeat(np.arange(users), N)).cast(pa.string()),
        'item': pa.array(item_UN.ravel()).cast(pa.string()),
        'behaviour': pa.repeat(behaviour, users * N),
        'time': pa.array(np.tile(START + HOUR * (first + np.arange(N)), users)),
        'label': pa.array(label_UN.ravel().astype(np.int8)),
        'probability': pa.array(probability_UN.ravel().astype(np.float32)),
      }
    )

  sure_UL = np.broadcast_to(1, shown_UL.shape)
  views = log(0, of_category(shown_UL), 'view', sure_UL, sure_UL)
  answers = log(length, of_category(offered_UO), 'offer', label_UO, probability_UO)
  return {
    'log': pa.concat_tables([views, answers]),
    'users': pa.table({'user': pa.array(np.arange(users)).cast(pa.string())}),
    'items': _item_table(category_I),
  }


def generate_returns(
  *,
  seed: int = 0,
  users: int = 1_000,
  categories: int = 100,
  per_category: int = 20,
  favourites: int = 4,
  length: int = 600,
  early: int = 100,
  session: int = 5,
  return_share: float = 0.01,
) -> dict[str, pa.Table]:
  """Makes a log of histories whose next item hangs, now and then, on what lies far back.

  An event is an item; items have categories, which the log does not tell. Events come in sessions,
  each of items of one category drawn at random, so that what comes next in a session is told by the
  events before. Each user has favourite categories. Of the first `early` events every third is of
  these; from then on they show only in returns: item '0', the cue, and behind it an item of a
  favourite category. No favourite item comes twice, so a return asks for the categories, not for
  the item. The last four events are two returns, whose items are to be told: who knows all
  favourite categories has `10 / unseen` of them within the first ten, where `unseen` are the
  favourite items that are left.

  The newest N events show N * return_share favourite items: a window tells little.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, categories: how many there are. per_category: items of each. favourites: categories that
      each user has. length: events of each user. early: the first of them, of which every third is
      of a favourite category. session: events of one category in a row. return_share: of the events
      behind, how many are returned items.

  Returns:
    'log': user, item, time (int64 seconds), split ('valid' and 'test' the last two returned items,
    'train' all others). 'users': user. 'items': item.

  Raises:
    UserError: if a size is too small to plant the structure.
  """
  _check('users', users)
  _check('categories', categories, favourites + 1, 'favourites + 1=')
  _check('session', session)
  _check('early', early, 0)
  _check('length', length, early + 4, 'early + 4=')
  rng = np.random.default_rng(seed)
  kind_UC = np.argsort(rng.random((users, categories)), axis=1)  # the favourites come first
  pool_UF = np.argsort(rng.random((users, favourites * per_category)), axis=1)
  # Items of a favourite category, in the order in which the user meets them.
  mine_UF = 1 + per_category * np.take_along_axis(kind_UC, pool_UF // per_category, axis=1)
  mine_UF += pool_UF % per_category

  # Sessions of the other categories.
  sessions = -(-length // session)
  other_US = rng.integers(favourites, categories, (users, sessions))
  shown_US = np.take_along_axis(kind_UC, other_US, axis=1)
  item_UL = 1 + per_category * np.repeat(shown_US, session, axis=1)[:, :length]
  item_UL += rng.integers(0, per_category, (users, length))

  # Cue and returned item in pairs, so that none lies upon another.
  pairs = (length - early) // 2
  pair_UP = rng.random((users, pairs)) < 2 * return_share
  pair_UP[:, -2:] = True
  cue_UL, favourite_UL = np.zeros((2, users, length), bool)
  cue_UL[:, length - 2 * pairs :: 2] = pair_UP
  favourite_UL[:, length - 2 * pairs + 1 :: 2] = pair_UP
  favourite_UL[:, : length - 2 * pairs : 3] = True

  nth_UL = np.cumsum(favourite_UL, axis=1) - 1
  most = -(-int(nth_UL.max() + 1) // favourites)
  _check('per_category', per_category, most, 'what a user meets of each, ')
  favourite_item_UL = np.take_along_axis(mine_UF, np.maximum(nth_UL, 0), axis=1)
  item_UL = np.where(favourite_UL, favourite_item_UL, np.where(cue_UL, 0, item_UL))

  split_L = np.full(length, 'train', object)
  split_L[[-3, -1]] = 'valid', 'test'
  return {
    'log': pa.table(
      {
        'user': pa.array(np.repeat(np.arange(users), length)).cast(pa.string()),
        'item': pa.array(item_UL.ravel()).cast(pa.string()),
        'time': pa.array(np.tile(START + HOUR * np.arange(length), users)),
        'split': pa.array(np.tile(split_L, users)),
      }
    ),
    'users': pa.table({'user': pa.array(np.arange(users)).cast(pa.string())}),
    'items': pa.table(
      {'item': pa.array(np.arange(1 + categories * per_category)).cast(pa.string())}
    ),
  }


# The generated logs, by the `source` that a config gives.
LOGS = {
  'synthetic': generate,
  'synthetic:long': generate_long,
  'synthetic:returns': generate_returns,
}


def _item_table(category_I: np.ndarray) -> pa.Table:
  return pa.table(
    {
      'item': pa.array(np.arange(len(category_I))).cast(pa.string()),
      'category': pa.array(category_I).cast(pa.string()),
    }
  )


def _check(name: str, value: int, bound: int = 1, what: str = '') -> None:
  """Refuses a size below its bound, which `what` names if another size sets it."""
  if value < bound:
    raise UserError(f'config.data.synthetic.{name}={value} must be at least {what}{bound}')
