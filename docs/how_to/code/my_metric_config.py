"""DIN on the generated stand-in, or GRU4Rec on generated interests, with a metric."""

from lmn_jax import config as configs


def get_config(task):
  if task == 'click':
    config = configs.base('din')
    config.data = configs.douyin_data()
    config.metrics = ('my_metric:precision_of_the_top_tenth',)
  else:
    config = configs.base('gru4rec', 'next_item')
    config.data = configs.interests_data()
    config.metrics = ('my_metric:median_rank',)
    config.criterion = '-median_rank'  # the lowest is the best
  return config
