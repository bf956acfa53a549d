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
  goods: int = 200,
  favourites: int = 10,
  chatter: int = 100,
  length: int = 1_000,
  block: int = 12,
  stay: float = 0.15,
  recent: int = 100,
) -> dict[str, pa.Table]:
  """Makes a log of histories through which interests run that no short window of them shows.

  Events come in blocks: item '0', the cue; one of the goods; and chatter that follows itself, half
  of the time an item's successor, the same for all users, otherwise any. So the event before tells
  the chatter. What comes behind a cue is, with chance `stay`, what came behind the one before;
  otherwise any of the user's favourites. Few of these stand in a window (with the defaults four
  visits in 50 events), all of them in the whole history.

  The items to be told stand behind the last two cues, and are favourites that the newest `recent`
  events do not show (of a user who has met all in these, the one not met for the longest time). Who
  knows the favourites has them within the first `favourites`; the newest `recent` events tell only
  what they are not; and who has learned no more than that goods follow a cue has them within the
  first K with chance K / goods.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, goods, chatter: how many there are. favourites: goods of each user. length: events of
      each user; the last is behind a cue, and the first may stand in the middle of a block. block:
      events of each. stay: chance of the same visit again. recent: events.

  Returns:
    'log': user, item, time (int64 seconds), split ('valid' and 'test' the goods behind the last two
    cues, 'train' all others). 'users': user. 'items': item: '0', the goods, the chatter.

  Raises:
    UserError: if a size is too small to plant the structure.
  """
  _check('users', users)
  _check('favourites', favourites, 3)
  _check('goods', goods, favourites, 'favourites=')
  _check('chatter', chatter)
  _check('block', block, 3)
  _check('length', length, favourites * block, 'favourites * block=')
  rng = np.random.default_rng(seed)
  blocks, every = 1 + -(-(length - 2) // block), np.arange(users)

  favourite_UF = np.argsort(rng.random((users, goods)), axis=1)[:, :favourites]
  visit_UN = rng.integers(0, favourites, (users, blocks))
  stay_UN = rng.random((users, blocks)) < stay
  newest_UF = np.full((users, favourites), -1)  # the block of the newest visit
  for n in range(blocks):
    if n < blocks - 2:
      visit_UN[:, n] = np.where(stay_UN[:, n] & (n > 0), visit_UN[:, n - 1], visit_UN[:, n])
    else:  # to be told: any that lies far enough back, else the farthest; of those visited
      gap_UF = (n - newest_UF) * block
      far_UF = length + rng.random((users, favourites))
      key_UF = np.where(gap_UF > recent, far_UF, gap_UF)
      visit_UN[:, n] = np.argmax(np.where(newest_UF < 0, -1, key_UF), axis=1)
    newest_UF[every, visit_UN[:, n]] = n
  visit_UN = np.take_along_axis(favourite_UF, visit_UN, axis=1)

  # Chatter: the first of a block goes on from the last of the one before.
  successor_I = rng.permutation(chatter)
  said_UNE = rng.integers(0, chatter, (users, blocks, block - 2))
  follows_UNE = rng.random((users, blocks, block - 2)) < 0.5
  said_UT, follows_UT = said_UNE.reshape(users, -1), follows_UNE.reshape(users, -1)
  for t in range(1, said_UT.shape[1]):
    said_UT[:, t] = np.where(follows_UT[:, t], successor_I[said_UT[:, t - 1]], said_UT[:, t])

  item_UNE = np.zeros((users, blocks, block), np.int64)
  item_UNE[:, :, 1] = 1 + visit_UN
  item_UNE[:, :, 2:] = 1 + goods + said_UT.reshape(said_UNE.shape)
  end = (blocks - 1) * block + 2  # the last block is cut off behind the visit
  item_UL = item_UNE.reshape(users, -1)[:, end - length : end]

  split_L = np.full(length, 'train', object)
  split_L[[-1 - block, -1]] = 'valid', 'test'
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
    'items': pa.table({'item': pa.array(np.arange(1 + goods + chatter)).cast(pa.string())}),
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
