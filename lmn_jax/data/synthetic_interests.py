"""A generated log for the next item, with interests that no short window of a history shows."""

import numpy as np
import pyarrow as pa

from lmn_jax.data.synthetic_tables import HOUR, START, check_size, texts


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
  """Generates histories with interests that no short window of them shows.

  Events come in blocks: item '0', the cue; one of the goods, the visit; then chatter, of which each
  event is with chance 1/2 the successor of the one before, the same for all users, otherwise any.
  So the previous event predicts chatter. A visit is with chance `stay` the same as the one before,
  otherwise any of the user's favourites. A window has few visits (with the defaults four in 50
  events), the whole history has all favourites.

  The targets are the last two visits: favourites that are not among the newest `recent` events (if
  a user has met all there, the one not met for the longest time). A model that has the favourites
  ranks a target within the first `favourites`; the newest `recent` events only show what it is
  not; and a model that has only learned that goods follow a cue ranks it within the first K with
  chance K / goods.

  Args:
    seed: of all randomness; equal arguments give equal tables.
    users, goods, chatter: the number of each. favourites: goods of each user.
    length: events of each user; the last one is a visit, and the first may be within a block.
    block: events of each block. stay: chance of the same visit again. recent: events.

  Returns:
    'log': user, item, time (int64 seconds), split ('valid' and 'test' for the last two visits,
    'train' for all other events). 'users': user. 'items': item: '0', the goods, the chatter.

  Raises:
    UserError: a size is too small to plant the structure.
  """
  _check_interests(users, goods, favourites, chatter, block, length)
  rng = np.random.default_rng(seed)
  blocks = 1 + -(-(length - 2) // block)
  item_UNE = np.zeros((users, blocks, block), np.int64)
  item_UNE[:, :, 1] = 1 + _visits(
    rng, (users, goods, favourites), blocks, block, stay, length, recent
  )
  item_UNE[:, :, 2:] = 1 + goods + _chatter(rng, (users, blocks, block - 2), chatter)
  end = (blocks - 1) * block + 2  # the last block ends with its visit
  item_UL = item_UNE.reshape(users, -1)[:, end - length : end]
  return _interest_tables(item_UL, block, 1 + goods + chatter)


def _check_interests(
  users: int, goods: int, favourites: int, chatter: int, block: int, length: int
) -> None:
  check_size('users', users)
  check_size('favourites', favourites, 3)
  check_size('goods', goods, favourites, 'favourites=')
  check_size('chatter', chatter)
  check_size('block', block, 3)
  check_size('length', length, favourites * block, 'favourites * block=')


def _visits(
  rng: np.random.Generator,
  sizes: tuple[int, int, int],
  blocks: int,
  block: int,
  stay: float,
  length: int,
  recent: int,
) -> np.ndarray:
  """The visited good of each block [U, N]. sizes: numbers of users, goods and favourites."""
  users, goods, favourites = sizes
  every = np.arange(users)
  favourite_UF = np.argsort(rng.random((users, goods)), axis=1)[:, :favourites]
  visit_UN = rng.integers(0, favourites, (users, blocks))
  stay_UN = rng.random((users, blocks)) < stay
  newest_UF = np.full((users, favourites), -1)  # the block of the newest visit
  for n in range(blocks):
    if n < blocks - 2:
      visit_UN[:, n] = np.where(stay_UN[:, n] & (n > 0), visit_UN[:, n - 1], visit_UN[:, n])
    else:  # a target: any visited favourite that is far enough back, else the farthest
      gap_UF = (n - newest_UF) * block
      far_UF = length + rng.random((users, favourites))
      key_UF = np.where(gap_UF > recent, far_UF, gap_UF)
      visit_UN[:, n] = np.argmax(np.where(newest_UF < 0, -1, key_UF), axis=1)
    newest_UF[every, visit_UN[:, n]] = n
  return np.take_along_axis(favourite_UF, visit_UN, axis=1)


def _chatter(rng: np.random.Generator, shape: tuple[int, int, int], chatter: int) -> np.ndarray:
  """Chatter [U, N, E]; the first of a block continues the last one of the block before."""
  successor_I = rng.permutation(chatter)
  item_UNE = rng.integers(0, chatter, shape)
  follows_UNE = rng.random(shape) < 0.5
  item_UT, follows_UT = item_UNE.reshape(shape[0], -1), follows_UNE.reshape(shape[0], -1)
  for t in range(1, item_UT.shape[1]):
    item_UT[:, t] = np.where(follows_UT[:, t], successor_I[item_UT[:, t - 1]], item_UT[:, t])
  return item_UT.reshape(shape)


def _interest_tables(item_UL: np.ndarray, block: int, items: int) -> dict[str, pa.Table]:
  users, length = item_UL.shape
  split_L = np.full(length, 'train', object)
  split_L[[-1 - block, -1]] = 'valid', 'test'
  log = {
    'user': texts(np.repeat(np.arange(users), length)),
    'item': texts(item_UL.ravel()),
    'time': pa.array(np.tile(START + HOUR * np.arange(length), users)),
    'split': pa.array(np.tile(split_L, users)),
  }
  return {
    'log': pa.table(log),
    'users': pa.table({'user': texts(np.arange(users))}),
    'items': pa.table({'item': texts(np.arange(items))}),
  }
