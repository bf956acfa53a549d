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


def generate_interests(
  *,
  seed: int = 0,
  users: int = 1_000,
  categories: int = 100,
  per_category: int = 34,
  favourites: int = 10,
  length: int = 1_000,
  session: int = 3,
  interest_share: float = 0.4,
) -> dict[str, pa.Table]:
  """Makes a log of histories through which an interest runs that no window of them shows.

  An event is an item; items have categories, which the log does not tell. Events come in sessions
  of one category: item '0', the cue, and `session` items. So what goes on in a session the events
  just before tell, and of what category the next one is, behind a cue, the user's interest: of the
  sessions `interest_share` are of the user's favourite categories, all of them alike often, the
  others of any other. In a window a favourite stands out from the rest little or not at all; in the
  whole history it is there `interest_share / favourites * (categories - favourites) /
  (1 - interest_share)` times as often (with the defaults 6). The items to be told are the first of
  the last two sessions, which are of favourites. No item comes twice before all of its category
  have come once, so they ask for the categories. Who knows these has `10 / unseen` of them within
  the first ten, where `unseen` are the favourite items that are left (with the defaults some 43).

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, categories: how many there are. per_category: items of each. favourites: categories that
      each user has. length: events of each user; the last is a session's first item, and the first
      may stand in the middle of one. session: items of each. interest_share: of the sessions.

  Returns:
    'log': user, item, time (int64 seconds), split ('valid' and 'test' the first items of the last
    two sessions, 'train' all others). 'users': user. 'items': item.

  Raises:
    UserError: if a size is too small to plant the structure.
  """
  _check('users', users)
  _check('categories', categories, favourites + 1, 'favourites + 1=')
  _check('session', session)
  _check('length', length, 2 * session + 4, '2 * session + 4=')
  sessions = 1 + -(-(length - 2) // (session + 1))
  ours = round(interest_share * sessions)
  _check('interest_share', interest_share, 3 / sessions, 'three sessions, ')
  most = -(-(ours - 2) // favourites) * session + session + 1
  _check('per_category', per_category, most, 'what a user meets of each, ')
  rng = np.random.default_rng(seed)
  kind_UC = np.argsort(rng.random((users, categories)), axis=1)  # the favourites come first

  # Exactly as many favourite sessions, dealt evenly to the favourites, but for the last two, whose
  # items are to be told: they are of any, so that nothing but the favourites themselves tells them.
  order_US = rng.random((users, sessions))
  order_US[:, -2:] = 1
  rank_US = np.argsort(np.argsort(order_US, axis=1), axis=1)
  favourite_US = rank_US % favourites
  favourite_US[:, -2:], rank_US[:, -2:] = rng.integers(0, favourites, (users, 2)), 0
  other_US = rng.integers(favourites, categories, (users, sessions))
  place_US = np.where(rank_US < ours - 2, favourite_US, other_US)
  category_US = np.take_along_axis(kind_UC, place_US, axis=1)
  # The cue stands as a category of its own, number `categories`; the last session is cut off.
  block_USE = np.repeat(category_US[:, :, None], session + 1, axis=2)
  block_USE[:, :, 0] = categories
  end = sessions * (session + 1) - (session - 1)
  category_UL = block_USE.reshape(users, -1)[:, end - length : end]

  # Each category's items in an order of the user's own.
  order_UCP = np.argsort(rng.random((users, categories, per_category)), axis=2)
  by_category_UL = np.argsort(category_UL, axis=1, kind='stable')
  sorted_UL = np.take_along_axis(category_UL, by_category_UL, axis=1)
  first_UL = np.concatenate(
    [np.ones((users, 1), bool), sorted_UL[:, 1:] != sorted_UL[:, :-1]], axis=1
  )
  at_L = np.broadcast_to(np.arange(length), (users, length))
  nth_UL = np.empty((users, length), np.int64)
  begin_UL = np.maximum.accumulate(np.where(first_UL, at_L, 0), axis=1)
  np.put_along_axis(nth_UL, by_category_UL, at_L - begin_UL, axis=1)
  cue_UL = category_UL == categories
  kind_UL = np.where(cue_UL, 0, category_UL)
  chosen_UL = order_UCP[np.arange(users)[:, None], kind_UL, nth_UL % per_category]
  item_UL = np.where(cue_UL, 0, 1 + per_category * kind_UL + chosen_UL)

  split_L = np.full(length, 'train', object)
  split_L[[-2 - session, -1]] = 'valid', 'test'
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
  'synthetic:interests': generate_interests,
}


def _item_table(category_I: np.ndarray) -> pa.Table:
  return pa.table(
    {
      'item': pa.array(np.arange(len(category_I))).cast(pa.string()),
      'category': pa.array(category_I).cast(pa.string()),
    }
  )


def _check(name: str, value: int | float, bound: int | float = 1, what: str = '') -> None:
  """Refuses a size below its bound, which `what` names if another size sets it."""
  if value < bound:
    raise UserError(f'config.data.synthetic.{name}={value} must be at least {what}{bound}')
