"""The next-item model of my_next_item_model.py on generated interests."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('my_next_item_model:MovingAverage', 'next_item')
  config.data = configs.interests_data()
  return config
