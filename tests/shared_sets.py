"""Configs that read public data sets in their original formats.

The data sets are not part of the project; `configs(root)` takes the folder that contains them.
"""

from pathlib import Path

import ml_collections

from lmn_jax import config

# The folder of the data sets, for the tests that read them; these are skipped where it is missing.
ROOT = Path(__file__).resolve().parents[2] / 'shared' / 'data'

ALI_CCP = ('121', '122', '124', '125', '126', '127', '128', '129')
LEAVE_ONE_OUT = {'protocol': 'leave_one_out', 'valid': 0.1, 'test': 0.1}
USER_RATIO = {'protocol': 'user_ratio', 'valid': 0.1, 'test': 0.2}


def configs(root: Path) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of every data set under `root`, by name."""
  samples = root / 'ctr-samples'
  sets = {
    'movielens-100k': dict(
      source=root / 'movielens-100k/ml-100k.inter',
      user='user_id',
      item='item_id',
      time='timestamp',
      label='rating',
      label_threshold=4.0,
      users_source=root / 'movielens-100k/ml-100k.user',
      items_source=root / 'movielens-100k/ml-100k.item',
      user_features=('age', 'gender', 'occupation', 'zip_code'),
      item_features=('release_year', 'class'),
      multi={'class': ' '},
      split=USER_RATIO,
    ),
    'movielens-1m': dict(
      source=root / 'movielens-1m/sequences.tsv',
      format='sequences',
      user='user_id',
      item='movie_ids_in_time_order',
      time='',
      label='',
      side_format='movielens',
      users_source=root / 'movielens-1m/users.dat',
      users_fields=('user_id', 'sex', 'age_group', 'job', 'code'),
      items_source=root / 'movielens-1m/movies.dat',
      items_fields=('movie_ids_in_time_order', 'title', 'genres'),
      user_features=('gender', 'age_group', 'job'),
      item_features=('genres',),
      multi={'genres': '|'},
      split=LEAVE_ONE_OUT,
    ),
    'movielens-1m-ratings': dict(
      source=root / 'movielens-1m/ratings_sample_100k.dat', label='rating', label_threshold=4.0
    ),
    'amazon-beauty': dict(
      source=root / 'amazon-beauty/Beauty_item_org_rank.txt',
      times_source=root / 'amazon-beauty/Beauty_time_org_rank.txt',
      format='sequences',
      header=False,
      items_separator=' ',
      label='',
      split=LEAVE_ONE_OUT,
    ),
    'amazon-musical-instruments': dict(
      source=root / 'amazon-musical-instruments/Musical_Instruments.json',
      user='reviewerID',
      item='asin',
      time='unixReviewTime',
      label='overall',
      label_threshold=4.0,
    ),
    'taobao-userbehavior': dict(
      source=root / 'taobao-userbehavior/UserBehavior.csv',
      header=False,
      fields=('user', 'item', 'category', 'behaviour', 'time'),
      label='',
      behaviour='behaviour',
      positive_behaviours=('buy', 'cart', 'fav'),
      history='all',
      item_features=('category',),
    ),
    'kuairand-pure': dict(
      source=root / 'kuairand-pure-15core/interactions.csv',
      format='tsv',
      user='user_id',
      item='video_id',
      time='time_ms',
      label='is_click',
      context_features=('long_view',),
    ),
    'jdata': dict(
      source=root / 'jdata/JData_Action_2016*.csv',
      user='user_id',
      item='sku_id',
      label='',
      behaviour='type',
      positive_behaviours=('4',),
      history='all',
      duplicates='drop',
      users_source=root / 'jdata/JData_User.csv',
      items_source=root / 'jdata/JData_Product.csv',
      side_encoding='gbk',
      user_features=('age', 'sex', 'user_lv_cd'),
      item_features=('a1', 'a2', 'a3', 'cate', 'brand'),
      missing=('', 'NA', 'NULL', 'nan', '-1'),
    ),
    'jd-sdm': dict(
      source=root / 'jd-sdm/sample_action.csv',
      user='user_id',
      item='item_id',
      time='action_time',
      time_format='%Y/%m/%d %H:%M',
      label='',
      users_source=root / 'jd-sdm/sample_user.csv',
      items_source=root / 'jd-sdm/sample_item.csv',
      user_features=('age', 'sex', 'city'),
      item_features=('brand', 'shop_id', 'cate'),
      context_features=('session_id',),
    ),
    'ml-1m-sample': dict(
      source=samples / 'matching__ml-1m__ml-1m_sample.csv',
      user='user_id',
      item='movie_id',
      time='timestamp',
      label='rating',
      label_threshold=4.0,
      user_features=('gender', 'age', 'occupation'),
      item_features=('genres',),
      multi={'genres': '|'},
    ),
    'diginetica': dict(
      source=samples / 'matching__session_based__diginetica__train-item-views-sample.csv',
      delimiter=';',
      user='sessionId',  # most users are NA
      item='itemId',
      time='timeframe',
      label='',
    ),
    'yoochoose': dict(
      source=samples / 'matching__session_based__yoochoose__yoochoose-clicks-sample.dat',
      format='csv',
      header=False,
      fields=('user', 'time', 'item', 'category'),
      label='',
      item_features=('category',),
    ),
    'yidian': dict(
      source=samples / 'matching__yidian_news__yidian_news_sampled.csv',
      user='userId',
      item='itemId',
      time='showTime',
      label='click',
      user_features=('deviceName', 'OS', 'province', 'city', 'age0'),
      context_features=('network', 'refresh', 'showPos'),
      numeric={'age0': 'bins:4'},
    ),
    'amazon-electronics': dict(
      source=samples / 'ranking__amazon-electronics__amazon_electronics_sample.csv',
      user='user_id',
      item='item_id',
      label='',
      item_features=('cate_id',),
    ),
  }
  for part in ('train', 'val', 'test'):
    sets[f'ali-ccp-{part}'] = dict(
      source=samples / f'ranking__ali-ccp__ali_ccp_{part}_sample.csv',
      user='101',
      item='205',
      time='',
      label='click',
      history='all',
      user_features=ALI_CCP,
      item_features=('206', '207', '210', '216'),
      context_features=('301', 'D109_14'),
      numeric={'D109_14': 'bins:4'},
    )
  for name in ('books', 'beauty'):
    sets[f'amazon-{name}-sample'] = dict(
      source=samples / f'ranking__amazon-{name}__amazon_{name}_sample.csv',
      user='user_id',
      item='item_id',
      label_threshold=2.0,  # labels are 1 and 2
    )
  return {name: _config(name, fields) for name, fields in sets.items()}


def _config(name: str, fields: dict) -> ml_collections.ConfigDict:
  text = {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
  return config.data(name=name, **text)
